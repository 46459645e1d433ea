"""Tuning on multiple-choice questions: scored by the probability of the matching letter, in one pass a question.

Rimsky et al. (2312.06681, section 4.1) read p(matching) / (p(matching) + p(other)) at the token after "(".
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

from trimtab.engines.transformers.read import check_length
from trimtab.errors import TrimtabError
from trimtab.methods.caa import BASE_FORMAT
from trimtab.steering import Steering
from trimtab.text.chat import has_template
from trimtab.text.letters import answer_ids, letter_of
from trimtab.text.pairs import Pair
from trimtab.tune.candidates import Candidate
from trimtab.tune.halving import Rung
from trimtab.tune.tune import BATCH_SIZE, HELD_OUT, MARGIN, Outcome, Progress, Tuned, search

if TYPE_CHECKING:
    from trimtab.lm import LM


def tune_letters(
    lm: LM,
    candidates: Sequence[Candidate],
    pairs: Sequence[Pair],
    *,
    batch_size: int = BATCH_SIZE,
    rungs: Sequence[Rung] | None = None,
    held_out: float = HELD_OUT,
    margin: float = MARGIN,
    seed: int = 0,
    budget_seconds: float | None = None,
    progress: Progress | None = None,
    transfer: bool = False,
) -> Tuned:
    """`tune` for pairs of letters: a question's score is the matching letter's share of both letters' probability.

    There is no text, so there is no quality guard: a strength found here may still break longer answers.

    Raises `TrimtabError` for pairs of another shape, letters that are no single token, and as `tune` does.
    """
    asked = [_question(lm, pair) for pair in pairs]

    def trial(steerings: Sequence[Steering | None], items: Sequence[int], progress: Progress) -> list[Outcome]:
        found = []
        for start in range(0, len(items), batch_size):
            chosen = items[start : start + batch_size]
            found += _shares(lm, steerings[start : start + batch_size], [asked[i] for i in chosen], transfer)
            progress(len(found), len(items))
        return found

    return search(
        candidates,
        [pair.prompt for pair in pairs],
        trial,
        guard=None,
        rows=batch_size,
        rungs=rungs,
        held_out=held_out,
        margin=margin,
        seed=seed,
        budget_seconds=budget_seconds,
        progress=progress,
    )


Question = tuple[list[int], list[int], int, int]


def _question(lm: LM, pair: Pair) -> Question:
    """The prompt's ids, those of the opening bracket, and the ids of the matching and of the other letter."""
    if pair.shape != "letters":
        raise TrimtabError(f"letters are scored on multiple-choice pairs, these are pairs of {pair.shape}")
    chat = has_template(lm.tokenizer)
    prompt = lm.encode(pair.prompt) if chat else lm.encode(BASE_FORMAT.format(question=pair.prompt), chat=False)
    opening, matching, _ = answer_ids(lm.tokenizer, letter_of(pair.positive), after_space=not chat)
    _, other, _ = answer_ids(lm.tokenizer, letter_of(pair.negative), after_space=not chat)
    check_length(lm.layout, len(prompt) + len(opening), "a question")
    return list(prompt), opening, matching, other


@torch.no_grad()
def _shares(
    lm: LM, steerings: Sequence[Steering | None], questions: Sequence[Question], transfer: bool
) -> list[Outcome]:
    device = lm.model.get_input_embeddings().weight.device
    texts = [[*prompt, *opening] for prompt, opening, _, _ in questions]
    width = max(map(len, texts))
    ids, mask = torch.zeros(2, len(texts), width, dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :] = torch.tensor(text)
        mask[row, width - len(text) :] = 1
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    takes = signature(type(lm.model).forward).parameters
    if "position_ids" in takes:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0).to(device)
    if "logits_to_keep" in takes:
        inputs["logits_to_keep"] = 1
    with lm.steered(list(steerings), prompt_lengths=[len(q[0]) for q in questions], transfer=transfer) as session:
        logits = lm.model(**inputs).logits[:, -1].double()
    found = []
    for row, (_, _, matching, other) in enumerate(questions):
        share = torch.sigmoid(logits[row, matching] - logits[row, other])
        doses = [dose.ratio for dose in session.doses(row)]
        found.append(Outcome(score=float(share), dose=max(doses, default=0.0), tokens=1))
    return found
