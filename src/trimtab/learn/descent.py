"""Gradient descent on edits: batches, a schedule, early stopping by held-out texts, and interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from trimtab.engines.transformers.forced import TeacherForcing
from trimtab.errors import TrimtabError

T = TypeVar("T")
P = TypeVar("P", bound="Trainable")


class Trainable(Protocol):
    """Trainable parameters, such as `Trained`."""

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the optimizer updates."""

    def cap(self, dose: float) -> None:
        """Project the parameters back into their bounds after each step, in place."""

    def frozen(self: P) -> P:
        """A copy that the optimizer doesn't update."""


Loss = Callable[[TeacherForcing, P, Sequence[T]], Tensor]
"""The loss, summed over these examples."""
Report = Callable[[int, int, str], None]
"""Called after each step with the number of steps done, the number planned, and a message."""

WARM_UP_STEPS = 5
MIN_RATE_SHARE = 0.1  # the share of the learning rate at the end of the schedule
PATIENCE = 3
"""The number of consecutive evaluations on held-out examples without an improvement after which descent stops."""


@dataclass(frozen=True)
class Descent:
    """The hyperparameters of gradient descent.

    Args:
        steps: The maximum number of steps.
        rate: Adam's learning rate, in units of the activations' root mean square.
        batch: The number of examples per step.
        every: The number of steps between evaluations on held-out examples.
        max_dose: The maximum norm of a vector, relative to the typical activation.
        seed: The seed of the order of the examples.
        slack: The result is the last state whose loss on held-out examples is at most this share above the lowest (and
            below the initial one). With few examples small differences are noise, and later steps are smaller and less
            noisy.
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
class DescentHistory:
    """The course of a descent: the losses by step, and whether it was interrupted."""

    first_loss: float = math.nan
    best_loss: float = math.inf
    best_step: int = 0
    steps: int = 0
    interrupted: bool = False
    losses: list[float] = field(default_factory=list)


def descend(
    run: TeacherForcing,
    parameters: P,
    examples: Sequence[T],
    held_out: Sequence[T],
    loss: Loss[P, T],
    descent: Descent,
    *,
    group_examples: Callable[[Sequence[T]], list[list[int]]],
    report: Report | None = None,
) -> tuple[P, DescentHistory]:
    """Minimize the mean loss of `examples` and return the best state on held-out ones (up to `how.slack`).

    Without held-out examples, the last state is returned. A `KeyboardInterrupt` ends the descent, which the course
    records: the best state so far is returned, or the current one if there was no evaluation yet.

    Args:
        run: Open forward passes of the model, with hooks at the sites of `parameters`.
        parameters: The initial state; it is updated in place.
        examples: The examples to learn from, at least one.
        held_out: The held-out examples, which decide when to stop.
        loss: The loss, summed over some examples.
        descent: The hyperparameters.
        group_examples: Splits examples, by their indices, into groups that fit into one pass.
        report: Called after each step.

    Returns:
        The best state, and the course.

    Raises:
        TrimtabError: There are no examples, or the loss isn't finite.
    """
    if not examples:
        raise TrimtabError("there are no texts to learn from")
    optimizer = torch.optim.Adam(parameters.tensors, lr=descent.rate, betas=(0.9, 0.98))
    order = _order(len(examples), descent)
    history, best, stale, lowest = DescentHistory(), parameters.frozen(), 0, math.inf
    try:
        if held_out:
            history.first_loss = history.best_loss = lowest = mean_loss(run, parameters, held_out, loss, group_examples)
            if not math.isfinite(history.first_loss):
                raise TrimtabError(f"the loss is {history.first_loss} on the held-out texts before the first step")
        for step in range(descent.steps):
            for group in optimizer.param_groups:
                group["lr"] = descent.rate * _schedule(step, descent.steps)
            batch = [examples[i] for i in order[step]]
            optimizer.zero_grad(set_to_none=True)
            total = 0.0
            for numbers in group_examples(batch):
                part = loss(run, parameters, [batch[i] for i in numbers]) / len(batch)
                part.backward()
                total += float(part.detach())
            if not math.isfinite(total):
                raise TrimtabError(
                    f"the loss is {total} at step {step + 1}; a lower rate may help (it is {descent.rate})"
                )
            optimizer.step()
            parameters.cap(descent.max_dose)
            history.losses.append(total)
            history.steps = step + 1
            if held_out and (history.steps % descent.every == 0 or history.steps == descent.steps):
                held_out_loss = mean_loss(run, parameters, held_out, loss, group_examples)
                stale += 1
                lowest = min(lowest, held_out_loss)
                if held_out_loss < history.first_loss and held_out_loss <= (1 + descent.slack) * lowest:
                    history.best_loss, history.best_step, best, stale = (
                        held_out_loss,
                        history.steps,
                        parameters.frozen(),
                        0,
                    )
            if report is not None:
                held_out_note = f", held out {history.best_loss:.3f}" if held_out else ""
                report(history.steps, descent.steps, f"loss {total:.3f}{held_out_note}")
            if stale >= PATIENCE:
                break
    except KeyboardInterrupt:
        history.interrupted = True
    finally:
        for tensor in parameters.tensors:
            tensor.grad = None
    was_evaluated = bool(held_out) and (history.best_step or history.steps >= descent.every or not history.interrupted)
    return (best if was_evaluated else parameters.frozen()), history


def _order(count: int, how: Descent) -> list[list[int]]:
    """The indices of the examples of each step. Every example is used once before any is used again."""
    generator = torch.Generator().manual_seed(how.seed)
    size = min(how.batch, count)
    drawn: list[int] = []
    while len(drawn) < how.steps * size:
        drawn += torch.randperm(count, generator=generator).tolist()
    return [drawn[step * size : (step + 1) * size] for step in range(how.steps)]


def _schedule(step: int, steps: int) -> float:
    """A linear warm-up, then cosine decay."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return min(1.0, (step + 1) / WARM_UP_STEPS) * (MIN_RATE_SHARE + (1 - MIN_RATE_SHARE) * cosine)


@torch.no_grad()
def mean_loss(
    run: TeacherForcing,
    trained: P,
    examples: Sequence[T],
    loss: Loss[P, T],
    groups: Callable[[Sequence[T]], list[list[int]]],
) -> float:
    """The mean loss per example."""
    total = sum(float(loss(run, trained, [examples[i] for i in numbers])) for numbers in groups(examples))
    return total / len(examples)
