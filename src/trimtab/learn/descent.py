"""Gradient descent on edits: batches, a schedule, an early stop by texts that aren't learned from, an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from trimtab.engines.transformers.forced import Forcing
from trimtab.errors import TrimtabError

T = TypeVar("T")
P = TypeVar("P", bound="Trainable")


class Trainable(Protocol):
    """What a descent moves, such as `Trained`."""

    @property
    def tensors(self) -> list[Tensor]:
        """What the optimizer moves."""

    def cap(self, dose: float) -> None:
        """After each step: bring back what the step has taken too far, in place."""

    def frozen(self: P) -> P:
        """A copy that the optimizer doesn't move."""


Loss = Callable[[Forcing, P, Sequence[T]], Tensor]
"""The sum, over these examples, of the loss of each."""
Report = Callable[[int, int, str], None]
"""Called after each step: the steps done, those planned, and what there is to say."""

WARM_UP = 5
LEAST_RATE = 0.1  # of the learning rate, at the end
PATIENCE = 3
"""Looks at the held-out examples, one after another, that may be no better than the best before the descent stops."""


@dataclass(frozen=True)
class Descent:
    """How it is done.

    Args:
        steps: At most so many.
        rate: Adam's learning rate, in units of the activations' root mean square.
        batch: Examples a step.
        every: Steps between looks at the held-out examples.
        max_dose: No vector gets longer than so many times the typical activation.
        seed: Of the order of the examples.
        slack: The last state is kept whose loss on held-out examples is at most this share above the lowest (and below
            the first). Few examples tell little of small differences, and later steps are smaller and surer ones.
    """

    steps: int = 30
    rate: float = 0.005
    batch: int = 8
    every: int = 10
    max_dose: float = 1.0
    seed: int = 0
    slack: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "rate", "batch", "every", "max_dose"):
            if not getattr(self, name) > 0:
                raise TrimtabError(f"{name} of a descent is above 0, got {getattr(self, name)}")
        if not self.slack >= 0:
            raise TrimtabError(f"slack of a descent is 0 or more, got {self.slack}")


@dataclass
class Course:
    """What happened: the losses by step, and whether it was interrupted."""

    first: float = math.nan
    best: float = math.inf
    best_step: int = 0
    steps: int = 0
    interrupted: bool = False
    losses: list[float] = field(default_factory=list)


def descend(
    run: Forcing,
    trained: P,
    examples: Sequence[T],
    held_out: Sequence[T],
    loss: Loss[P, T],
    how: Descent,
    *,
    groups: Callable[[Sequence[T]], list[list[int]]],
    report: Report | None = None,
) -> tuple[P, Course]:
    """Move `trained` down the mean loss of `examples`; what comes back is the best on those held out, or nearly.

    Without held-out examples it is what the last step made. A `KeyboardInterrupt` ends it like a last step, and the
    course says so: what was best until then comes back, or what was reached if nothing has been looked at yet.

    Args:
        run: Open passes of the model, with hooks at the sites of `trained`.
        trained: Where to begin; it is moved.
        examples: What to learn from, at least one.
        held_out: What decides when to stop.
        loss: The sum of the losses of some examples.
        how: Steps, rate and the rest.
        groups: Parts examples, by their numbers, into groups that fit a pass.
        report: Called after each step.

    Raises:
        TrimtabError: No examples, or a loss that isn't finite.
    """
    if not examples:
        raise TrimtabError("there is nothing to learn from")
    optimizer = torch.optim.Adam(trained.tensors, lr=how.rate, betas=(0.9, 0.98))
    order = _order(len(examples), how)
    course, best, stale, lowest = Course(), trained.frozen(), 0, math.inf
    try:
        if held_out:
            course.first = course.best = lowest = mean_loss(run, trained, held_out, loss, groups)
            if not math.isfinite(course.first):
                raise TrimtabError(f"the loss is {course.first} before the first step, on what is held out")
        for step in range(how.steps):
            for group in optimizer.param_groups:
                group["lr"] = how.rate * _schedule(step, how.steps)
            batch = [examples[i] for i in order[step]]
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for numbers in groups(batch):
                part = loss(run, trained, [batch[i] for i in numbers]) / len(batch)
                part.backward()
                total += float(part.detach())
            if not math.isfinite(total):
                raise TrimtabError(f"the loss is {total} at step {step + 1}; a lower rate may help (it is {how.rate})")
            optimizer.step()
            trained.cap(how.max_dose)
            course.losses.append(total)
            course.steps = step + 1
            if held_out and (course.steps % how.every == 0 or course.steps == how.steps):
                held_out_loss = mean_loss(run, trained, held_out, loss, groups)
                stale += 1
                lowest = min(lowest, held_out_loss)
                if held_out_loss < course.first and held_out_loss <= (1 + how.slack) * lowest:
                    course.best, course.best_step, best, stale = held_out_loss, course.steps, trained.frozen(), 0
            if report is not None:
                held = f", held out {course.best:.3f}" if held_out else ""
                report(course.steps, how.steps, f"loss {total:.3f}{held}")
            if stale >= PATIENCE:
                break
    except KeyboardInterrupt:
        course.interrupted = True
    finally:
        for tensor in trained.tensors:
            tensor.grad = None
    looked = bool(held_out) and (course.best_step or course.steps >= how.every or not course.interrupted)
    return (best if looked else trained.frozen()), course


def _order(count: int, how: Descent) -> list[list[int]]:
    """The numbers of the examples of each step: every example once before any comes again."""
    generator = torch.Generator().manual_seed(how.seed)
    size = min(how.batch, count)
    drawn: list[int] = []
    while len(drawn) < how.steps * size:
        drawn += torch.randperm(count, generator=generator).tolist()
    return [drawn[step * size : (step + 1) * size] for step in range(how.steps)]


def _schedule(step: int, steps: int) -> float:
    """A linear warm-up, then half a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARM_UP) * (LEAST_RATE + (1 - LEAST_RATE) * cosine)


@torch.no_grad()
def mean_loss(
    run: Forcing,
    trained: P,
    examples: Sequence[T],
    loss: Loss[P, T],
    groups: Callable[[Sequence[T]], list[list[int]]],
) -> float:
    """The loss of an example, on average."""
    total = sum(float(loss(run, trained, [examples[i] for i in numbers])) for numbers in groups(examples))
    return total / len(examples)
