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
        return tuple(finding for finding in self.findings if finding.state == WRONG)

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "family": self.family,
            "blocks": self.blocks,
            "weights": self.weights,
            "findings": [
                {"name": finding.name, "what": finding.what, "state": finding.state, "reason": finding.reason}
                for finding in self.findings
            ],
        }
