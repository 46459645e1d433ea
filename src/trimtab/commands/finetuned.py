"""The arms of `trimtab eval ab --finetune`: a LoRA trained on the pairs, towards each side, alone and steered.

An adapter changes the model for every row of a batch, so each side is run separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.commands.arms import PANEL, Arm
from trimtab.commands.pair_files import load_pairs
from trimtab.commands.terminal import progress_bar
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.evaluate.records import Record
    from trimtab.lm import LM
    from trimtab.text.columns import Columns
    from trimtab.text.pairs import Pair

Score = Callable[["LM", dict[str, Arm], Path | None, Mapping[str, Any]], "list[Record]"]

FinetuneOption = Annotated[
    Path | None,
    typer.Option(
        help="Pairs to finetune a LoRA on, one for each side: adds arms with the LoRA alone and with each steering.",
        metavar="PAIRS",
        rich_help_panel=PANEL,
    ),
]


def load_finetune_pairs(path: Path | None, columns: Columns) -> list[Pair]:
    """The pairs. Raises `TrimtabError` if they can't be trained on or `peft` is missing, before a model is loaded."""
    if path is None:
        return []
    from importlib.util import find_spec

    if find_spec("peft") is None:
        raise TrimtabError("--finetune needs peft: pip install 'trimtab[finetune]'")
    pairs = load_pairs(path, columns)
    if pairs[0].shape == "prompts":
        raise TrimtabError(f"--finetune {path}: pairs of prompts have no answer to learn; give pairs of answers")
    return pairs


def score_finetuned_sides(
    lm: LM,
    pairs: Sequence[Pair],
    arms: Mapping[str, Arm],
    out: Path | None,
    score: Score,
    *,
    quiet: bool,
) -> Iterator[tuple[dict[str, Arm], list[Record]]]:
    """For each side of the pairs, the arms and the results of `score` on the finetuned model.

    With `out`, `r.jsonl`, a side's records are in `r-finetuned-positive.jsonl` and its adapter in the folder
    `r-finetuned-positive`; an existing adapter is loaded instead of trained again.
    """
    from trimtab.evaluate.lora import SIDES, description, finetuned

    for side in SIDES:
        target = None if out is None else out.with_stem(f"{out.stem}-finetuned-{side}")
        folder = None if target is None else target.with_suffix("")
        about = {"finetuned": description(lm, pairs, side)}
        with ExitStack() as stack:
            with progress_bar(f"finetuning, {side}", quiet=quiet) as progress:
                tuned = stack.enter_context(finetuned(lm, pairs, side, folder=folder, progress=progress))
            chosen = _arms(arms, side)
            yield chosen, score(tuned, chosen, target, about)


def _arms(arms: Mapping[str, Arm], side: str) -> dict[str, Arm]:
    label = f"finetuned {side}"
    tuned = {label: Arm(about={"kind": "finetuned", "side": side})}
    for name, arm in arms.items():
        if arm.about["kind"] == "steered":
            where = {key: arm.about[key] for key in ("layers", "strength")}
            about = {"kind": "finetuned and steered", "side": side, "like": name, **where}
            tuned[f"{label}, {name}"] = replace(arm, about=about)
    return tuned
