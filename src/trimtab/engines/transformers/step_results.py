"""The results of a step, computed on the device and copied to the host as one line of numbers per row.

A line has the next token and the greatest logit; then, if any row of the batch wants log-probabilities, that of its
token, the likeliest tokens and their log-probabilities; and last the readings of monitors.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trimtab.decoding.trace import Step
from trimtab.engines.transformers.batch_row import BatchRow, GenerationResponse
from trimtab.engines.transformers.monitoring import MonitorReader, monitor_edits
from trimtab.errors import TrimtabError
from trimtab.steering.monitors import FILTERED, Monitor

Line = Sequence[float]


@dataclass(frozen=True)
class LineLayout:
    """The layout of a line: whether it has log-probabilities, of how many likeliest tokens, and the monitors' readings.

    `readings` is `[rows, monitors]`, or `None` without monitors.
    """

    logprobs: bool
    likeliest: int
    readings: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[BatchRow], vocabulary: int, readings: Tensor | None) -> LineLayout:
        """The layout that covers what these rows request."""
        alternatives = [row.request.alternatives for row in rows if row.request.alternatives is not None]
        return cls(bool(alternatives), min(max(alternatives, default=0), vocabulary), readings)

    def lines(self, tokens: Tensor, logits: Tensor) -> Tensor:
        """The lines `[rows, numbers]` of tokens `[rows]` that were chosen from logits `[rows, vocabulary]`."""
        # amax propagates a NaN
        columns = [tokens[:, None].float(), logits.amax(-1, keepdim=True)]
        if self.logprobs:
            logprobs = logits.log_softmax(-1)
            columns.append(logprobs.gather(-1, tokens[:, None]))
            if self.likeliest:
                values, ids = logprobs.topk(self.likeliest)
                columns += [ids.float(), values]
        if (read := self.readings) is not None:  # candidates have none: rows with rejection aren't monitored
            read = read if len(read) == len(logits) else read.new_zeros(len(logits), read.shape[-1])
            columns.append(read.to(device=logits.device, dtype=torch.float32))
        # token ids are below 2 ** 24, so they are exact in float32
        return torch.cat(columns, -1)

    def likeliest_of(self, line: Line) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens of a line with their log-probabilities, best first."""
        middle = 3 + self.likeliest
        return tuple(zip(map(int, line[3:middle]), line[middle : middle + self.likeliest], strict=True))

    def readings_of(self, line: Line) -> Line:
        """The monitors' readings in a line."""
        return line[2 + self.logprobs * (1 + 2 * self.likeliest) :]


@dataclass(frozen=True)
class ResponseBuilder:
    """Turns lines into responses, and updates the rows.

    Args:
        facts: The layout of the lines.
        watch: The monitors of the batch.
        ends: The tokens that end an answer.
        strict: Whether non-finite logits are an error for greedy rows, too, not only for sampled ones.
    """

    facts: LineLayout
    watch: MonitorReader
    ends: Collection[int]
    strict: bool

    def build(self, row: BatchRow, line: Line, step: Step | None) -> GenerationResponse:
        """The response for a row, which is updated; `step` says how its token was verified."""
        assert row.sampler is not None
        if not abs(line[1]) < float("inf") and (self.strict or row.sampler.settings.sampled):
            error = TrimtabError(
                "the model's logits are no longer finite: the steering is too strong; lower the strength"
            )
            return GenerationResponse(row.key, error=error)
        token = int(line[0])
        monitored, fired = self._record_readings(row, line)
        names = tuple(monitor.name for monitor in fired)
        if any(monitor.action == "stop" for monitor in fired):
            return GenerationResponse(row.key, finish=FILTERED, cached=row.cached, monitored=monitored, fired=names)
        shared_fields: dict[str, Any] = {"cached": row.cached, "monitored": monitored, "fired": names}
        row.first = row.first or time.perf_counter() - row.began
        row.append_token(token)
        if row.ladder is not None:
            row.steps.append(step or Step(open=False, candidate=None, replaced=None))
        finish = "stop" if token in self.ends else "length" if len(row.tokens) >= row.request.max_new_tokens else None
        if (matcher := row.sampler.matcher) is not None:
            try:
                matcher.consume(token)
            except TrimtabError as error:
                return GenerationResponse(row.key, error=error)
            finish = "stop" if matcher.done else finish
        if row.request.alternatives is None:
            return GenerationResponse(row.key, token, finish=finish, **shared_fields)
        likeliest = self.facts.likeliest_of(line)[: row.request.alternatives]
        return GenerationResponse(row.key, token, line[2], likeliest, finish, **shared_fields)

    def _record_readings(self, row: BatchRow, line: Line) -> tuple[tuple[float, ...], tuple[Monitor, ...]]:
        """The readings of a row's monitors and the monitors that fire; the edits that these switch on are recorded."""
        monitors = row.request.monitors
        if not monitors:
            return (), ()
        readings = self.facts.readings_of(line)
        values = tuple(readings[i] for i in self.watch.columns(monitors))
        fired = row.log.add(monitors, values)
        for monitor in fired:
            if monitor.steering is not None:
                edits, names = monitor_edits(monitor, len(row.request.ids))
                row.edits, row.names, row.edits_changed = (*row.edits, *edits), (*row.names, *names), True
        return values, fired
