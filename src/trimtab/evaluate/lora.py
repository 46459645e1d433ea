"""A baseline to compare steering with: a LoRA finetuned on the same contrastive pairs.

In their comparison with finetuning, Rimsky et al. (2312.06681) train on the matching answers, or on the others:
cross-entropy on the answer's letter only, one epoch. They train all weights with SGD; this is a small LoRA on all
linear layers (Hu et al., 2106.09685) with AdamW, which fits on a laptop. Steering on top of it works as on any model.
Needs `trimtab[finetune]`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trimtab.engines.contract import check_length
from trimtab.engines.language_model import LanguageModel
from trimtab.engines.transformers.read import padded
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.lm import LM
from trimtab.text.answers import encode_sides, side_question
from trimtab.text.letters import letter_of
from trimtab.text.pairs import Pair, digest, sides

Progress = Callable[[int, int], None]
Side = Literal["positive", "negative"]
SIDES: tuple[Side, ...] = get_args(Side)

DESCRIPTION_FILE = "trimtab.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """Training options: the LoRA's rank and scale, AdamW's learning rate, the epochs, the number of pairs per step, and
    the seed of the initial weights and the order.
    """

    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 2e-4
    epochs: int = 1
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "learning_rate", "epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise TrimtabError(f"a LoRA's {name} is above 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Target:
    """A text as token ids, of which the last `count` are trained on."""

    ids: tuple[int, ...]
    count: int


def description(lm: LM, pairs: Sequence[Pair], side: Side, lora: Lora = Lora()) -> dict[str, Any]:
    """Everything that the result of `finetuned` depends on, as plain values."""
    here = lm.identity
    model = {"width": here.width, "layers": here.layers, "fingerprint": here.fingerprint}
    lm.require("training")
    dtype = lm.runs_in["dtype"]
    return {"pairs": digest(pairs), "count": len(pairs), "side": side, **asdict(lora), "model": model, "dtype": dtype}


class FinetunedLM(LM):
    """A model with an adapter that was inserted here."""


def original_weights(lm: LanguageModel) -> AbstractContextManager[None]:
    """A context manager in which a model that was finetuned here computes as before; nothing changes for others."""
    if not isinstance(lm, FinetunedLM):
        return nullcontext()
    context: AbstractContextManager[None] = lm.model.disable_adapter()
    return context


@contextmanager
def finetuned(
    lm: LM,
    pairs: Sequence[Pair],
    side: Side = "positive",
    lora: Lora = Lora(),
    *,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Iterator[FinetunedLM]:
    """A context manager that yields the model finetuned towards one side of the pairs. On exit, `lm` is restored.

    Don't use `lm` in the meantime: both share their weights, and the adapter's layers are inserted into them. With
    `folder`, the adapter is stored there, and loaded from there if it was trained on the same pairs with the same
    options. `progress(done, total)` counts pairs. The same seed gives the same weights on the same machine.

    Raises `TrimtabError` for pairs of prompts or no pairs, a text that is too long, a folder that holds another
    adapter, or if `peft` isn't installed.
    """
    peft = _peft()
    if side not in SIDES:
        raise TrimtabError(f"a side of the pairs is {' or '.join(SIDES)}, got {side!r}")
    about, name = description(lm, pairs, side, lora), f"{lm.name}, finetuned {side}"
    if folder is not None and (Path(folder) / DESCRIPTION_FILE).exists():
        if (stored := read_description(folder)) != about:
            differ = ", ".join(key for key in {**stored, **about} if stored.get(key) != about.get(key))
            raise TrimtabError(
                f"{folder} has a LoRA from another training run ({differ} differ); delete it or name another folder"
            )
        with load_adapter(lm, folder, name) as tuned:
            yield tuned
        return
    targets = [target(lm, pair, side) for pair in pairs]
    if not targets:
        raise TrimtabError("there are no pairs to finetune on")
    for i, each_target in enumerate(targets):
        check_length(lm.layout, len(each_target.ids), f"pair {i + 1}")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear"
    )

    def attach_adapter() -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(lora.seed)
            return peft.get_peft_model(lm.model, config)

    with _adapted(lm, attach_adapter, name) as tuned:
        _train(tuned, targets, lora, progress)
        if folder is not None:
            save_adapter(tuned, folder, about)
        yield tuned


@contextmanager
def load_adapter(lm: LM, folder: str | Path, name: str | None = None) -> Iterator[FinetunedLM]:
    """A context manager that yields the model with the LoRA of a folder. On exit, `lm` is restored; don't use it
    meanwhile.

    `name` is what the model is then called in records.

    Raises `TrimtabError` if there is none, it isn't a safetensors file, or it doesn't fit the model.
    """
    peft = _peft()
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        raise TrimtabError(f"{folder} has no {WEIGHTS}, so it isn't a LoRA that can be loaded")
    if not (folder / "adapter_config.json").is_file():
        raise TrimtabError(f"{folder} has no adapter_config.json, so it isn't a LoRA that can be loaded")

    def attach_adapter() -> Any:
        try:
            return peft.PeftModel.from_pretrained(lm.model, str(folder))
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise TrimtabError(f"the LoRA in {folder} doesn't fit {lm.name}: {str(error).splitlines()[0]}") from None

    with _adapted(lm, attach_adapter, name or f"{lm.name} + {folder.name}") as tuned:
        yield tuned


def save_adapter(lm: LM, folder: str | Path, about: Mapping[str, Any]) -> None:
    """Write the adapter of a finetuned model and its description. Raises `TrimtabError` if it can't be written."""
    folder = Path(folder)
    try:
        lm.model.save_pretrained(str(folder), safe_serialization=True)
    except OSError as error:
        raise TrimtabError(f"can't write the LoRA to {folder}: {error.strerror}") from None
    # last, since a folder without it is incomplete
    write_atomically(folder / DESCRIPTION_FILE, json.dumps(about, indent=2).encode())


def read_description(folder: str | Path) -> dict[str, Any]:
    """The description of the adapter in a folder. Raises `TrimtabError` if it can't be read."""
    path = Path(folder) / DESCRIPTION_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrimtabError(f"can't read {path}: {error}") from None
    if not isinstance(stored, dict):
        raise TrimtabError(f"{path} isn't the description of a LoRA")
    return stored


def target(lm: LM, pair: Pair, side: Side) -> Target:
    """The trained part of a pair: the letter of a multiple-choice answer, a whole answer, or a whole text."""
    chosen = SIDES.index(side)
    if pair.shape == "letters":
        asking = sides(pair)[chosen]
        letter = letter_of(asking.answer)
        question = side_question(lm.tokenizer, asking, (letter,))
        return Target((*question.ids, question.letters[letter]), 1)
    if pair.shape in ("answers", "texts"):
        text = encode_sides(lm.tokenizer, pair)[chosen]
        if len(text.ids) < 2:
            raise TrimtabError(f"the text {text.answer!r} is a single token, with no context to learn it from")
        return Target(text.ids, len(text.ids) - (text.start or 1))
    raise TrimtabError("a LoRA is finetuned on answers or texts; pairs of prompts have no answer to learn")


@contextmanager
def _adapted(lm: LM, attach_adapter: Callable[[], Any], name: str) -> Iterator[FinetunedLM]:
    """The model that `attach_adapter` returns; on exit, peft's layers are removed from `lm`, and `requires_grad` is
    restored.
    """
    required_grad = {parameter: parameter.requires_grad for parameter in lm.model.parameters()}
    adapted = attach_adapter()
    try:
        yield FinetunedLM(adapted.eval(), lm.tokenizer, layers=f"base_model.model.{lm.layout.path}", name=name)
    finally:
        adapted.unload()
        for parameter, before in required_grad.items():
            parameter.requires_grad_(before)


def _train(lm: LM, targets: Sequence[Target], lora: Lora, progress: Progress | None) -> None:
    """Train in evaluation mode: without dropout, so that the result depends only on the seed."""
    weights = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lora.learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(lora.seed)
    total, done = lora.epochs * len(targets), 0
    with lm._exclusive(), torch.enable_grad():  # without other callers' hooks
        for _ in range(lora.epochs):
            order = torch.randperm(len(targets), generator=generator).tolist()
            for start in range(0, len(order), lora.batch_size):
                batch = [targets[i] for i in order[start : start + lora.batch_size]]
                optimizer.zero_grad(set_to_none=True)
                loss(lm, batch).backward()
                optimizer.step()
                done += len(batch)
                if progress is not None:
                    progress(done, total)
    for parameter in weights:
        parameter.grad = None
        parameter.requires_grad_(False)


def loss(lm: LM, batch: Sequence[Target]) -> Tensor:
    """The cross-entropy of a batch's targets, in nats: the mean over texts of each text's mean over its tokens."""
    device = input_device(lm.model)
    ids, mask = padded([each_target.ids[:-1] for each_target in batch], left=True, device=device)
    tail = max(each_target.count for each_target in batch)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    takes = inspect.signature(type(lm.model.get_base_model()).forward).parameters
    if "position_ids" in takes:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = tail
    logits = lm.model(**inputs).logits[:, -tail:].float()
    losses = [
        cross_entropy(row[-each_target.count :], torch.tensor(each_target.ids[-each_target.count :], device=device))
        for row, each_target in zip(logits, batch, strict=True)
    ]
    return torch.stack(losses).mean()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise TrimtabError("finetuning a LoRA needs peft: pip install 'trimtab[finetune]'") from None
    return peft
