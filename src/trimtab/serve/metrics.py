"""The metrics that Prometheus reads at `/metrics`."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimtab.serve.scheduler import Scheduler
from trimtab.serve.tasks import Done, Event, Failed, Task

SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
LENGTHS = (-100, -50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20, 50, 100)


class Metrics:
    """The counters of one server, in their own registry."""

    def __init__(self) -> None:
        self.registry: CollectorRegistry = CollectorRegistry()
        mine: dict[str, Any] = {"registry": self.registry}
        self.requests: Counter = Counter(
            "trimtab_requests", "Requests by route and status.", ["route", "status"], **mine
        )
        self.seconds: Histogram = Histogram(
            "trimtab_request_seconds",
            "Seconds from a request to the end of its response.",
            ["route"],
            buckets=SECONDS,
            **mine,
        )
        self.first: Histogram = Histogram(
            "trimtab_first_token_seconds", "Seconds from a request to its first token.", buckets=SECONDS, **mine
        )
        self.prompt: Counter = Counter("trimtab_prompt_tokens", "Tokens of prompts.", **mine)
        self.cached: Counter = Counter(
            "trimtab_cached_prompt_tokens", "Tokens of prompts that were taken from the prefix cache.", **mine
        )
        self.generated: Counter = Counter("trimtab_generated_tokens", "Tokens generated.", **mine)
        self.answers: Counter = Counter("trimtab_answers", "Answers by how they ended.", ["end"], **mine)
        self.steered: Counter = Counter("trimtab_steered_answers", "Answers that were steered.", **mine)
        self.judged: Counter = Counter(
            "trimtab_rejection_tokens", "Tokens decoded with rejection, by result.", ["result"], **mine
        )
        self.probability: Histogram = Histogram(
            "trimtab_monitor_probability", "Probabilities read by probe monitors.", ["monitor"], buckets=SHARES, **mine
        )
        self.projection: Histogram = Histogram(
            "trimtab_monitor_projection",
            "Projections read by the other monitors.",
            ["monitor"],
            buckets=LENGTHS,
            **mine,
        )
        self.fired: Counter = Counter(
            "trimtab_monitor_fired", "Answers in which a monitor fired.", ["monitor", "action"], **mine
        )
        self.queued: Gauge = Gauge("trimtab_queued", "Answers that are waiting.", **mine)
        self.running: Gauge = Gauge("trimtab_running", "Answers being decoded.", **mine)
        self.audited: Gauge = Gauge("trimtab_audit_writable", "1 if the audit log can be written, else 0.", **mine)
        self.steps: Gauge = Gauge("trimtab_steps", "Batch steps so far.", **mine)

    def count_answer(self, event: Event, task: Task) -> None:
        """Count an answer that has ended."""
        for monitor in task.monitors:
            read = (event.monitors or {}).get(monitor.name) if isinstance(event, (Done, Failed)) else None
            for value in read.values if read is not None else ():
                (self.probability if monitor.is_probability else self.projection).labels(monitor.name).observe(value)
            if read is not None and read.fired is not None:
                self.fired.labels(monitor.name, monitor.action).inc()
        if isinstance(event, Failed):
            self.answers.labels(event.kind).inc()
        if not isinstance(event, Done):
            return
        self.answers.labels(event.finish).inc()
        self.prompt.inc(len(task.ids))
        self.generated.inc(event.tokens)
        self.cached.inc(event.cached)
        if event.applied.edits:
            self.steered.inc()
        for step in event.trace.steps if event.trace else ():
            result = (
                "shut"
                if not step.open
                else "rejected"
                if step.candidate is None
                else "weakened"
                if step.candidate
                else "steered"
            )
            self.judged.labels(result).inc()

    def text(self, scheduler: Scheduler, *, audited: bool = True) -> bytes:
        """All metrics, in Prometheus's text format."""
        self.audited.set(audited)
        self.queued.set(scheduler.queued)
        self.running.set(scheduler.running)
        self.steps.set(scheduler.steps)
        return generate_latest(self.registry)
