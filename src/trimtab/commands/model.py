"""The options that select a model, and loading it without the output of other packages."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass
from logging import ERROR, getLogger
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.commands.terminal import note
from trimtab.errors import TrimtabError
from trimtab.text.templates import parse_keywords

if TYPE_CHECKING:
    from trimtab.lm import LM

PANEL = "Model"
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A Hub id, a folder, or a .gguf file. Default: SmolLM2-135M-Instruct.",
        rich_help_panel=PANEL,
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps … Default: CUDA, then MPS, then the CPU.", rich_help_panel=PANEL),
]
DtypeOption = Annotated[
    str,
    typer.Option(help="float32, bfloat16, float16, float64; auto: as the weights are stored.", rich_help_panel=PANEL),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="A branch, tag or commit of a Hub model.", rich_help_panel=PANEL)
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        help="A LoRA (or another peft adapter) to load: a folder or a Hub id. Steerings learned with it belong "
        "to the model with that adapter.",
        rich_help_panel=PANEL,
    ),
]
LayersPathOption = Annotated[
    str | None,
    typer.Option(
        "--layers-path",
        help="Where the model keeps its list of blocks (model.layers), if trimtab can't find it.",
        rich_help_panel=PANEL,
    ),
]
EngineOption = Annotated[
    str,
    typer.Option(
        help="transformers; vllm, which must be installed; llamacpp, for a .gguf file in its stored form "
        "(needs trimtab\\[llamacpp]; steerings that add directions only); or another installed package's.",
        rich_help_panel=PANEL,
    ),
]
ReplicasOption = Annotated[
    int | None,
    typer.Option(
        "--replicas",
        min=1,
        help="With vLLM: spread the work over this many engines, on a Ray cluster or on this machine. "
        "A lost engine is replaced, and its part is done again.",
        metavar="N",
        rich_help_panel=PANEL,
    ),
]
TemplateOption = Annotated[
    list[str] | None,
    typer.Option(
        "--template",
        help="A keyword of the model's chat template, such as enable_thinking=false; repeatable.",
        metavar="KEYWORD=VALUE",
        rich_help_panel=PANEL,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else.")]


@dataclass(frozen=True)
class BareModelOptions:
    """The model, and where it runs: options of commands that load a model."""

    model: ModelOption = None
    device: DeviceOption = None
    dtype: DtypeOption = "auto"
    revision: RevisionOption = None
    layers_path: LayersPathOption = None
    adapter: AdapterOption = None

    def load(self, *, quiet: bool, engine: str = "transformers", replicas: int | None = None) -> LM:
        """Load the model. Raises `TrimtabError` if it isn't available on that device."""
        options = {"engine": engine, "replicas": replicas, **asdict(self)}
        return load_model(options.pop("model"), quiet=quiet, **options)

    @property
    def model_argument(self) -> str:
        """The option that selects this model again, to put in front of others in a command."""
        return f"--model {quote(self.model)} " if self.model else ""


@dataclass(frozen=True)
class ModelOptions(BareModelOptions):
    """The same options, and keywords for the chat template: options of commands that render prompts."""

    template: TemplateOption = None

    @property
    def model_argument(self) -> str:
        """The options that load this model with these keywords again, to put in front of others in a command."""
        keywords = "".join(f"--template {quote(keyword)} " for keyword in self.template or [])
        return f"{super().model_argument}{keywords}"


@dataclass(frozen=True)
class EngineModelOptions(ModelOptions):
    """The same options, and the engine, for commands that work with any engine."""

    engine: EngineOption = "transformers"
    replicas: ReplicasOption = None


def load_model(
    name: str | None,
    *,
    device: str | None,
    dtype: str,
    revision: str | None,
    layers_path: str | None,
    adapter: str | None = None,
    quiet: bool,
    engine: str = "transformers",
    template: list[str] | None = None,
    replicas: int | None = None,
) -> LM:
    """Load the model that the options select. Raises `TrimtabError` if it isn't available on that device.

    All its prompts are rendered with the keywords of `template`, each `KEYWORD=VALUE`.
    """
    keywords = parse_keywords(template)
    check_replicas(replicas, engine)
    quiet = suppress_progress_bars(quiet)
    note(f"loading {name or 'the default model'} …", quiet=quiet)
    from trimtab.lm import LM

    if engine == "vllm":
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    else:
        check_device(device)
    silence(quiet)
    load_options: dict[str, Any] = {"device": device, "dtype": dtype, "revision": revision, "layers": layers_path}
    load_options |= {} if adapter is None else {"adapter": adapter}
    load_options |= {} if replicas is None else {"replicas": replicas}
    lm: Any = LM.load(name, engine=engine, template=keywords or None, **load_options)
    return lm  # another engine's, too: commands require the features that not every engine has


def check_replicas(replicas: int | None, engine: str) -> None:
    """Raise `TrimtabError` for replicas of an engine that has none."""
    if replicas is not None and engine != "vllm":
        raise TrimtabError(f"--replicas spreads work over engines of vLLM, not of {engine}; add --engine vllm")


def suppress_progress_bars(quiet: bool) -> bool:
    """Whether to draw no progress bars; if so, other packages draw none either. Call it before they are imported."""
    quiet = quiet or not sys.stderr.isatty()
    if quiet:
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads this when it is imported
    return quiet


def check_device(device: str | None) -> None:
    """Check that the device exists, before spending minutes on loading a model."""
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrimtabError(f"--device {device} can't be used here: {reason}; cpu always can") from None


def silence(quiet: bool) -> None:
    """Turn off the logs and bars of transformers; download bars stay if someone sees them."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    getLogger("huggingface_hub").setLevel(ERROR)
    logging.disable_progress_bar()
    if not quiet:
        enable_progress_bars()
