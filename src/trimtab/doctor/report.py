"""What a check of a model found: for each thing that trimtab does, whether it works there, and why not."""

from __future__ import annotations

from dataclasses import dataclass

WORKS, PARTLY, REFUSED, WRONG, THEIRS = "works", "partly", "refused", "wrong", "transformers"
"""`PARTLY`: at some layers. `THEIRS`: wrong in transformers itself, unsteered."""


class Wrong(Exception):
    """What came out isn't what it says."""


class Theirs(Exception):
    """It is wrong in transformers itself, without any steering."""


class Said(str):
    """Of a check that found all well: what there is to say of it."""


@dataclass(frozen=True)
class Finding:
    """One thing that trimtab does: its name, what it is, whether it works (see `WORKS` …), and the reason if not."""

    name: str
    what: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What was found of one model.

    `family` is its `model_type`, `blocks` where its blocks are, and `weights` says whose weights were run.
    """

    name: str
    family: str
    blocks: str
    weights: str
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """What gives something else than it says, or crashes."""
        return tuple(one for one in self.findings if one.state == WRONG)

    def __getitem__(self, name: str) -> Finding:
        return next(one for one in self.findings if one.name == name)

    def as_json(self) -> dict[str, object]:
        """The report as plain data."""
        return {
            "name": self.name,
            "family": self.family,
            "blocks": self.blocks,
            "weights": self.weights,
            "findings": [
                {"name": one.name, "what": one.what, "state": one.state, "reason": one.reason} for one in self.findings
            ],
        }
