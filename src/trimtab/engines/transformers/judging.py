"""What a step with rejection decides: by the unsteered model's scores, and whether rungs' tokens are plausible.

It is computed where the scores are. The host waits once for all that it has to know of the unsteered model, and once
for each lot of rungs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.decoding.rejection import gate_open, plausible, threshold


@dataclass(frozen=True)
class Asked:
    """What is known of a batch before its first token."""

    betas: Tensor  # [rows], on the device
    steered: Tensor  # [rows], on the device: whether there are rungs
    rungs: tuple[int, ...]  # how many

    @classmethod
    def of(cls, betas: Sequence[float], rungs: Sequence[int], device: torch.device) -> Asked:
        """For rows with these betas and so many rungs."""
        steered = [count > 0 for count in rungs]
        return cls(torch.tensor(betas, device=device), torch.tensor(steered, device=device), tuple(rungs))


@dataclass(frozen=True)
class Raw:
    """What the unsteered model says at a step: on the device, and what of it the host was told."""

    logits: Tensor  # [rows, vocabulary]
    scores: Tensor  # the same after processors
    tau: Tensor  # [rows]
    best: Tensor  # [rows]
    tokens: tuple[int, ...]  # `best`
    opened: tuple[bool, ...]
    ranked: tuple[tuple[int, ...], ...]  # each row's best tokens


@dataclass
class Chosen:
    """A step's tokens: on the device and here, the scores and logits that they came from, and the accepted rungs."""

    choice: Tensor  # [rows]
    tokens: list[int]
    final: Tensor  # [rows, vocabulary]
    used: Tensor  # [rows, vocabulary]
    rungs: list[int | None]

    @classmethod
    def best_of(cls, raw: Raw) -> Chosen:
        """The unsteered model's best tokens."""
        return cls(raw.best, list(raw.tokens), raw.scores, raw.logits, [None] * len(raw.tokens))

    def copy(self) -> Chosen:
        """One that can be changed, row by row."""
        return Chosen(self.choice.clone(), list(self.tokens), self.final.clone(), self.used.clone(), list(self.rungs))


@dataclass(frozen=True)
class Judged:
    """A rung's best token, the scores `[vocabulary]` that it is the best of, and whether it is plausible."""

    candidate: Tensor
    scores: Tensor
    token: int
    accepted: bool


def read_raw(logits: Tensor, scores: Tensor, asked: Asked, going: Sequence[bool], ranked: int) -> Raw:
    """What the unsteered model says, with so many of its best tokens. Gates of rows that have ended are shut."""
    best = scores.argmax(-1)
    tau = threshold(scores, asked.betas)
    parts = [gate_open(scores, tau)[:, None].long(), best[:, None]]
    if ranked:
        parts.append(scores.topk(min(ranked, scores.shape[-1]), dim=-1).indices)
    facts = torch.cat(parts, 1).tolist()
    opened = (bool(one[0]) and alive and rungs > 0 for one, alive, rungs in zip(facts, going, asked.rungs, strict=True))
    tokens, told = tuple(one[1] for one in facts), tuple(tuple(one[2:]) for one in facts)
    return Raw(logits, scores, tau, best, tokens, tuple(opened), told)


def judge(input_ids: Tensor, raw: Raw, rows: Tensor, logits: Tensor, processor: Any) -> list[Judged]:
    """Whether the best tokens of rungs are plausible, from their logits `[rungs, vocabulary]`; `rows` are the batch's.

    With processors, which may go by a row's place, no two rungs are of one row.
    """
    scores = logits
    if len(processor):
        whole = raw.logits.clone()
        whole[rows] = logits
        scores = processor(input_ids, whole)[rows]
    candidates = scores.argmax(-1)
    accepted = plausible(raw.scores[rows], raw.tau[rows], candidates)
    facts = torch.stack([candidates, accepted.long()], 1).tolist()
    return [Judged(candidates[i], scores[i], token, bool(is_accepted)) for i, (token, is_accepted) in enumerate(facts)]
