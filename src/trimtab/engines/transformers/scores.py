"""Edits of attention scores, compiled into tensors over rows for each layer.

A row is a request or one of its candidate steerings, with its prompt left-padded to the same width. A layer has its
rows' factors, biases and target masses by prompt column. Scores are `[rows, heads, queries, columns]`; with a sliding
window they have only the last columns, so each call gets the number of columns missing on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import BiasScores, Edit, Positions, ScaleScores, ScoreOperation, Site, TargetMass
from trimtab.steering.positions import END

SMALLEST_MASS = 1e-10


@dataclass(frozen=True)
class ScoredRow:
    """The edits of one row's attention scores, its prompt's length, and its left padding."""

    edits: tuple[Edit, ...]
    prompt_length: int
    pads: int


@dataclass(frozen=True)
class _Bias:
    values: Tensor  # [rows, heads or 1, columns]

    def select(self, rows: Tensor) -> _Bias:
        return _Bias(self.values[rows])

    def to(self, device: torch.device) -> _Bias:
        return _Bias(self.values.to(_parameter_dtype(device)).to(device))

    def without_rows(self, rows: Tensor) -> _Bias:
        return _Bias(self.values.masked_fill(rows[:, None, None], 0))

    @property
    def edited_rows(self) -> Tensor:
        return self.values.flatten(1).ne(0).any(-1)

    def apply(self, scores: Tensor, missing: int, own: int) -> None:
        part = _part(scores, self.values.shape[-1], missing, own)
        part += self.values[:, :, None, missing : missing + part.shape[-1]].to(part.dtype)


@dataclass(frozen=True)
class _Mass:
    columns: Tensor  # [rows, columns], whether in the span
    target: Tensor  # [rows]; 0 for rows that aren't edited
    pool: str
    exact: bool

    def select(self, rows: Tensor) -> _Mass:
        return _Mass(self.columns[rows], self.target[rows], self.pool, self.exact)

    def to(self, device: torch.device) -> _Mass:
        return _Mass(
            self.columns.to(device), self.target.to(_parameter_dtype(device)).to(device), self.pool, self.exact
        )

    def without_rows(self, rows: Tensor) -> _Mass:
        return _Mass(self.columns, self.target.masked_fill(rows, 0), self.pool, self.exact)

    @property
    def edited_rows(self) -> Tensor:
        return self.target > 0

    def apply(self, scores: Tensor, missing: int, own: int) -> None:
        part = _part(scores, self.columns.shape[-1], missing, own)
        columns = self.columns[:, None, None, missing : missing + part.shape[-1]]
        weights = scores.softmax(-1)[..., : part.shape[-1]]
        mass = torch.where(columns, weights, 0).sum(-1, keepdim=True)
        if self.pool == "layer":
            mass = mass.mean(1, keepdim=True)
        target = self.target.to(mass.dtype)[:, None, None, None]
        low = mass.clamp(min=SMALLEST_MASS)
        bias = (target / low).log()
        if self.exact:
            bias = bias + (1 - low).log() - (1 - target).log()
        part += torch.where(columns & (mass < target), bias, 0)


@dataclass(frozen=True)
class LayerScores:
    """The edits of one layer's scores: `factor` `[rows, columns]` first, then the stages in order."""

    factor: Tensor | None
    stages: tuple[_Bias | _Mass, ...]
    _moved: dict[torch.device, LayerScores] = field(default_factory=dict, init=False, repr=False, compare=False)
    _chosen: dict[Any, tuple[Tensor, LayerScores]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def select(self, rows: Tensor) -> LayerScores:
        """The edits of these rows, in this order."""
        factor = None if self.factor is None else self.factor[rows]
        return LayerScores(factor, tuple(stage.select(rows) for stage in self.stages))

    def to(self, device: torch.device) -> LayerScores:
        """The edits on this device, cached."""
        if device not in self._moved:
            factor = None if self.factor is None else self.factor.to(device)
            self._moved[device] = LayerScores(factor, tuple(stage.to(device) for stage in self.stages))
        return self._moved[device]

    def steered_rows(self, count: int, device: torch.device) -> tuple[Tensor, LayerScores]:
        """The indices of the steered rows in a batch of `count` rows, and their edits; on this device, cached.

        A request may have several adjacent rows. If the scores were compiled on the CPU, this needs no device
        synchronization.
        """
        if (count, device) not in self._chosen:
            touched = self.edited_rows
            repeat = count // len(touched)
            rows = touched.repeat_interleave(repeat).nonzero().flatten()
            self._chosen[count, device] = rows.to(device), self.select(rows // repeat).to(device)
        return self._chosen[count, device]

    def without_rows(self, rows: Tensor) -> LayerScores:
        """The edits without those of rows where `rows` (`[rows]`) is true."""
        factor = None if self.factor is None else self.factor.masked_fill(rows[:, None], 1)
        return LayerScores(factor, tuple(stage.without_rows(rows) for stage in self.stages))

    @property
    def edited_rows(self) -> Tensor:
        """`[rows]`: whether a row is edited."""
        parts = [stage.edited_rows for stage in self.stages]
        return torch.stack(parts if self.factor is None else [*parts, self.factor.ne(1).any(-1)]).any(0)

    def scale(self, scores: Tensor, missing: int, own: int = 0) -> None:
        """Multiply scores by `factor` in place, before soft caps and the mask: equivalent to scaling the keys.

        The last `own` columns are left unchanged: in a pass of rows, a row's own column, which isn't in the cache.
        """
        if self.factor is not None:
            part = _part(scores, self.factor.shape[-1], missing, own)
            part *= self.factor[:, None, None, missing : missing + part.shape[-1]].to(part.dtype)

    def shift(self, scores: Tensor, missing: int, own: int = 0) -> None:
        """Apply the stages in place, after soft caps and the mask. The last `own` columns are left unchanged."""
        for stage in self.stages:
            stage.apply(scores, missing, own)


def _part(scores: Tensor, width: int, missing: int, own: int) -> Tensor:
    """The prompt's columns of the scores: `width` columns, of which the first `missing` are absent."""
    return scores[..., : max(0, min(width - missing, scores.shape[-1] - own))]


def check_score_edits(edits: Sequence[Edit], layers: int, heads: int) -> None:
    """Raise `TrimtabError` unless all score edits fit a model with this number of layers and heads."""
    for edit in edits:
        if edit.site.layer >= layers:
            raise TrimtabError(f"the steering acts at layer {edit.site.layer}; this model has layers 0 to {layers - 1}")
        bounds = [stop for _, stop in edit.positions.intervals]
        if edit.positions.rule is not None or any(b is None or (b.anchor == END and b.offset > 0) for b in bounds):
            raise UnsupportedError(
                f"attention is steered towards tokens of the prompt, not {edit.positions}; use Positions.span(…)"
            )
        chosen = edit.operation.heads if isinstance(edit.operation, BiasScores) else None
        if chosen and chosen[-1] >= heads:
            raise TrimtabError(f"the steering names head {chosen[-1]}; this model has heads 0 to {heads - 1}")


def compile_scores(rows: Sequence[ScoredRow], width: int, heads: int, device: torch.device) -> dict[int, LayerScores]:
    """Compile the score edits of each steered layer for these rows, whose prompts are padded to `width` columns.

    Layers with the same edits share one `LayerScores`.
    """
    layers = sorted({edit.site.layer for row in rows for edit in row.edits})
    made: dict[tuple, LayerScores] = {}
    by_layer = {}
    for layer in layers:
        here = [tuple(edit for edit in row.edits if edit.site.layer == layer) for row in rows]
        key = tuple(tuple((edit.operation, edit.positions, edit.strength) for edit in edits) for edits in here)
        if key not in made:
            made[key] = _compile(rows, here, width, heads, device)
        by_layer[layer] = made[key]
    return by_layer


def _compile(
    rows: Sequence[ScoredRow], here: list[tuple[Edit, ...]], width: int, heads: int, device: torch.device
) -> LayerScores:
    factor: Tensor | None = None
    slots: list[dict[int, Edit]] = []
    for r, (row, edits) in enumerate(zip(rows, here, strict=True)):
        later = 0
        for edit in edits:
            if isinstance(edit.operation, ScaleScores):
                if factor is None:
                    factor = torch.ones(len(rows), width)
                factor[r, _columns(edit.positions, row, width)] *= edit.operation.factor(edit.strength)
                continue
            if later == len(slots):
                slots.append({})
            slots[later][r] = edit
            later += 1
    stages: list[_Bias | _Mass] = []
    for slot in slots:
        kinds = dict.fromkeys(_kind(edit.operation) for edit in slot.values())
        for kind in kinds:
            chosen = {r: edit for r, edit in slot.items() if _kind(edit.operation) == kind}
            stages.append(_stage(kind, chosen, rows, width, heads, device))
    return LayerScores(None if factor is None else factor.to(device), tuple(stages))


def _kind(operation: object) -> tuple:
    """The kind of an operation. Operations of the same kind run together."""
    if isinstance(operation, TargetMass):
        return ("mass", operation.pool, operation.exact)
    if isinstance(operation, BiasScores):
        return ("bias",)
    raise UnsupportedError(f"the transformers engine can't run {type(operation).__name__}")


def _stage(
    kind: tuple, chosen: dict[int, Edit], rows: Sequence[ScoredRow], width: int, heads: int, device: torch.device
) -> _Bias | _Mass:
    if kind[0] == "bias":
        operations: dict[int, BiasScores] = {r: e.operation for r, e in chosen.items()}
        some = any(operation.heads is not None for operation in operations.values())
        values = torch.zeros(len(rows), heads if some else 1, width, dtype=torch.float64)
        for r, operation in operations.items():
            columns = _columns(chosen[r].positions, rows[r], width)
            if operation.outside:
                columns = ~columns
                columns[: rows[r].pads] = False
            which = list(operation.heads) if operation.heads is not None else list(range(values.shape[1]))
            for head in which:
                values[r, head, columns] += operation.bias * chosen[r].strength
        return _Bias(values).to(device)
    inside = torch.zeros(len(rows), width, dtype=torch.bool)
    target = torch.zeros(len(rows), dtype=torch.float64)
    for r, edit in chosen.items():
        assert isinstance(edit.operation, TargetMass)
        inside[r] = _columns(edit.positions, rows[r], width)
        target[r] = edit.operation.mass(edit.strength)
    return _Mass(inside, target, *kind[1:]).to(device)


def _parameter_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the parameters of score edits."""
    return torch.float64 if device.type == "cpu" else torch.float32


def _columns(positions: Positions, row: ScoredRow, width: int) -> Tensor:
    """`[width]`: whether a column of the row is at one of these positions."""
    columns = torch.zeros(width, dtype=torch.bool)
    for start, stop in positions.resolve(row.prompt_length):
        assert stop is not None
        columns[row.pads + start : row.pads + stop] = True
    return columns


def is_score_edit(edit: Edit) -> bool:
    """Whether the edit acts on attention scores."""
    return isinstance(edit.operation, ScoreOperation)


def score_edits(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits of attention scores."""
    return tuple(edit for edit in edits if is_score_edit(edit))


def activation_edits(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The edits of activations."""
    return tuple(edit for edit in edits if not is_score_edit(edit))


def edited_sites(edits: Sequence[Edit]) -> list[Site]:
    """The sites at which activations are edited."""
    return sorted({edit.site for edit in activation_edits(edits)})
