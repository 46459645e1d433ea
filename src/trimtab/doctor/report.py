"""The results of checking a model: for each feature, whether it works, and why not."""

from __future__ import annotations

from dataclasses import dataclass

WORKS, PARTLY, REFUSED, WRONG, WRONG_IN_TRANSFORMERS = "works", "partly", "refused", "wrong", "transformers"
"""`PARTLY`: at some layers. `WRONG_IN_TRANSFORMERS`: wrong in transformers itself, unsteered."""


class WrongResult(Exception):
    """The output is wrong."""


class WrongInTransformers(Exception):
    """The output is wrong in transformers itself, without any steering."""


class Remark(str):
    """The remark of a check that passed."""


@dataclass(frozen=True)
class Finding:
    """One feature: its name, its description, whether it works (see `WORKS` …), and the reason if not."""

    name: str
    what: str
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The findings for one model.

    `family` is its `model_type`, `blocks` the path of its blocks, and `weights` describes the weights that were run.
    """

    name: str
    family: str
    blocks: str
    weights: str
    findings: tuple[Finding, ...]

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings of features that give a wrong result or crash."""
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
