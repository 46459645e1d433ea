"""Gradient-based learning from pairs of answers: encoding, held-out pairs and measurements, for any loss.

A method supplies its parameters and its loss for some pairs. `fit` runs gradient descent, and held-out pairs decide
when it stops.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from trimtab.engines.contract import check_length
from trimtab.engines.transformers.forced import Change, PromptAnswer, TeacherForcing, group_by_pass, teacher_forcing
from trimtab.errors import TrimtabError
from trimtab.keywords import caller_stacklevel
from trimtab.learn.activations import error_prefix
from trimtab.learn.contrast import Progress
from trimtab.learn.descent import Descent, DescentHistory, Trainable, descend, mean_loss
from trimtab.learn.parameters import Initializer, initial_parameters
from trimtab.steering import Site
from trimtab.text.answers import EncodedSide, encode_sides
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.lm import LM

HELD_OUT = 8
"""One in this many prompts is held out, with all of its pairs."""


class NoGainWarning(UserWarning):
    """The learned parameters are no better than the initial ones on held-out pairs."""


@dataclass(frozen=True)
class Preference:
    """A pair as token ids, and each answer's log-probability without steering, summed over its tokens."""

    positive: PromptAnswer
    negative: PromptAnswer
    reference: tuple[float, float] = (0.0, 0.0)


class TrainableChanges(Trainable, Protocol):
    """Trainable parameters that change activations."""

    def changes(self, factor: float = 1.0) -> dict[Site, Change]:
        """The change at each site, times `factor`."""


P = TypeVar("P", bound=TrainableChanges)
Objective = Callable[[TeacherForcing, P, Sequence[Preference], Sequence[float]], Tensor]
"""The loss, summed over some pairs, each with its own factor."""


@dataclass(frozen=True)
class Plan:
    """A method's settings for `fit`.

    Args:
        factors: The factors, one of which is drawn for a pair each time it is used for training.
        evaluation_factors: The factors with each of which held-out pairs are evaluated.
        texts_in_memory: The texts of a pair whose autograd graphs are in memory at the same time.
    """

    factors: tuple[float, ...]
    evaluation_factors: tuple[float, ...]
    texts_in_memory: Callable[[Preference], Sequence[PromptAnswer]]


@dataclass(frozen=True)
class _Example:
    pair: Preference
    factor: float | None  # `None`: to be drawn


def preferences(lm: LM, pairs: Sequence[Pair], name: str = "pair") -> list[Preference]:
    """Pairs of answers as token ids, each side under its own system prompt and messages.

    Args:
        lm: The model whose tokenizer and chat template are used.
        pairs: Pairs of the shape "answers".
        name: The name for a pair in error messages.

    Returns:
        The pairs, without reference log-probabilities.

    Raises:
        TrimtabError: There are no pairs, pairs of another shape, or a side that can't be encoded; the message names the
            pair.
    """
    if not pairs:
        raise TrimtabError(f"there is no {name} to learn from; give pairs of answers to a prompt")
    results = []
    for number, pair in enumerate(pairs, 1):
        with error_prefix(f"{name} {number}"):
            if pair.shape != "answers":
                raise TrimtabError(
                    f"this method learns from answers to a prompt, not from pairs of {pair.shape}; give prompt,"
                    " positive and negative"
                )
            positive, negative = encode_sides(lm.tokenizer, pair)
            results.append(Preference(_prompt_answer(lm, positive), _prompt_answer(lm, negative)))
    return results


def _prompt_answer(lm: LM, side: EncodedSide) -> PromptAnswer:
    if not side.start:
        raise TrimtabError(
            "the prompt has no tokens, so there is no token at which the steering can begin; give a prompt"
        )
    check_length(lm.layout, len(side.ids), "a prompt with its answer")
    return PromptAnswer(tuple(side.ids[: side.start]), tuple(side.ids[side.start :]))


def hold_out(pairs: Sequence[Preference]) -> tuple[list[Preference], list[Preference]]:
    """The training pairs and the held-out pairs: one in `HELD_OUT` prompts, or none if there are too few prompts."""
    prompts = list(dict.fromkeys(pair.positive.prompt for pair in pairs))
    aside = set(prompts[HELD_OUT // 2 :: HELD_OUT])
    learned = [pair for pair in pairs if pair.positive.prompt not in aside]
    return learned, [pair for pair in pairs if pair.positive.prompt in aside]


def answers_logprobs(
    run: TeacherForcing,
    texts: Sequence[PromptAnswer],
    changes: Mapping[Site, Change],
    factors: Sequence[float] | None = None,
) -> Tensor:
    """The log-probability of each answer, summed over its tokens, `[texts]`; differentiable."""
    totals = []
    for text, logits in zip(texts, run.logits(texts, changes, factors), strict=True):
        ids = torch.tensor(text.answer, device=logits.device)[:, None]
        totals.append(logits.log_softmax(-1).gather(-1, ids).sum())
    return torch.stack(totals)


def both_logprobs(
    run: TeacherForcing,
    pairs: Sequence[Preference],
    changes: Mapping[Site, Change],
    factors: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the positive and of the negative answers, `[pairs]` each, computed in one pass."""
    texts = [*(pair.positive for pair in pairs), *(pair.negative for pair in pairs)]
    totals = answers_logprobs(run, texts, changes, None if factors is None else [*factors, *factors])
    return totals[: len(pairs)], totals[len(pairs) :]


def fit(
    lm: LM,
    pairs: Sequence[Pair],
    layers: Sequence[int],
    *,
    initialize: Initializer[P],
    objective: Objective[P],
    plan: Plan,
    descent: Descent,
    held_out: Sequence[Pair] | None = None,
    progress: Progress | None = None,
) -> tuple[P, dict[str, Any]]:
    """Train on pairs of answers by gradient descent, and return the best parameters on held-out pairs.

    Args:
        lm: The model; its weights don't change.
        pairs: The pairs to learn from.
        layers: Blocks to steer after.
        initialize: Creates the initial parameters.
        objective: The method's loss.
        plan: The method's factors and memory needs.
        descent: The hyperparameters of the descent.
        held_out: Held-out pairs, which decide when to stop; default: one prompt in `HELD_OUT` of `pairs`.
        progress: `progress(done, total)`: pairs read, then steps.

    Returns:
        The trained parameters, and measurements for the card: the loss before and after, and both sides'
        log-probabilities per token before and after at strength 1, on the held-out pairs, or on all pairs if none are
        held out.

    Warns:
        NoGainWarning: Nothing was better on the held-out pairs than the initial parameters.

    Raises:
        TrimtabError: The pairs can't be learned from, or the loss isn't finite.
    """
    training, validation = _split_pairs(lm, pairs, held_out)
    sites = [Site(layer) for layer in layers]
    count = len(training) + len(validation)
    with teacher_forcing(lm.model, lm.layout, sites) as run:
        with_references = _with_references(
            run, [*training, *validation], None if progress is None else _with_total(progress, count + descent.steps)
        )
        training, validation = with_references[: len(training)], with_references[len(training) :]
        parameters = initial_parameters(lm.layout, run, sites, [pair.positive for pair in training], initialize)
        evaluation_examples = [
            _Example(pair, factor) for pair in validation or training for factor in plan.evaluation_factors
        ]
        examples = [_Example(pair, None) for pair in training]
        generator = torch.Generator().manual_seed(descent.seed)

        def loss(run: TeacherForcing, trained: P, some: Sequence[_Example]) -> Tensor:
            return objective(run, trained, [example.pair for example in some], _factors(some, plan.factors, generator))

        def group_examples(some: Sequence[_Example]) -> list[list[int]]:
            return group_by_pass(run.model, [_combined_text(plan.texts_in_memory(example.pair)) for example in some])

        def report(done: int, _total: int, _words: str) -> None:
            if progress is not None:
                progress(count + done, count + descent.steps)

        before = mean_loss(run, parameters, evaluation_examples, loss, group_examples)
        parameters, history = descend(
            run,
            parameters,
            examples,
            evaluation_examples if validation else [],
            loss,
            descent,
            group_examples=group_examples,
            report=report,
        )
        after = mean_loss(run, parameters, evaluation_examples, loss, group_examples)
        per_token = _per_token(run, parameters, validation or training)
    if progress is not None:
        progress(count + descent.steps, count + descent.steps)
    _warn(history, validation)
    return parameters, {
        "pairs": len(training),
        "held_out": len(validation),
        "loss_before": round(before, 6),
        "loss_after": round(after, 6),
        **per_token,
        "steps": history.steps,
        "best_step": history.best_step if validation else history.steps,
        **({"interrupted": True} if history.interrupted else {}),
    }


def _split_pairs(
    lm: LM, pairs: Sequence[Pair], held_out: Sequence[Pair] | None
) -> tuple[list[Preference], list[Preference]]:
    encoded = preferences(lm, pairs)
    if held_out is None:
        return hold_out(encoded)
    return encoded, preferences(lm, held_out, "held-out pair")


def _with_total(progress: Progress, total: int) -> Progress:
    return lambda done, _: progress(done, total)


@torch.no_grad()
def _with_references(run: TeacherForcing, pairs: Sequence[Preference], progress: Progress | None) -> list[Preference]:
    """The pairs with their reference log-probabilities, without steering."""
    referred: list[Preference] = []
    for numbers in group_by_pass(run.model, [_combined_text([pair.positive, pair.negative]) for pair in pairs]):
        some = [pairs[i] for i in numbers]
        both = torch.stack(both_logprobs(run, some, {}), 1).tolist()
        referred += [replace(pair, reference=(a, b)) for pair, (a, b) in zip(some, both, strict=True)]
        if progress is not None:
            progress(len(referred), len(pairs))
    return referred


def _factors(some: Sequence[_Example], drawn: Sequence[float], generator: torch.Generator) -> list[float]:
    """The factor of each example, fixed or drawn; the generator's state carries over from step to step."""
    return [
        drawn[int(torch.randint(len(drawn), (1,), generator=generator))] if example.factor is None else example.factor
        for example in some
    ]


def _combined_text(texts: Sequence[PromptAnswer]) -> PromptAnswer:
    """One text with as many answer tokens as these texts in total, for `group_by_pass`."""
    return PromptAnswer(texts[0].prompt, tuple(i for text in texts for i in text.answer))


@torch.no_grad()
def _per_token(run: TeacherForcing, parameters: P, pairs: Sequence[Preference]) -> dict[str, dict[str, float]]:
    """Both sides' log-probabilities per token, as means over pairs, before and after."""
    before, after = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for numbers in group_by_pass(run.model, [_combined_text([pair.positive, pair.negative]) for pair in pairs]):
        batch = [pairs[i] for i in numbers]
        lengths = torch.tensor([[len(pair.positive.answer), len(pair.negative.answer)] for pair in batch])
        before += (torch.tensor([pair.reference for pair in batch], dtype=torch.float64) / lengths).sum(0)
        both = torch.stack(both_logprobs(run, batch, parameters.changes()), 1)
        after += (both.cpu().double() / lengths).sum(0)
    measured = {"logprob_before": before / len(pairs), "logprob_after": after / len(pairs)}
    return {
        name: {"positive": round(float(value[0]), 6), "negative": round(float(value[1]), 6)}
        for name, value in measured.items()
    }


def _warn(course: DescentHistory, aside: Sequence[Preference]) -> None:
    if aside and not course.best_step and not course.interrupted:
        warnings.warn(
            f"in {course.steps} steps the loss on the {len(aside)} held-out pairs didn't improve, so the initial"
            " steering is returned; give more pairs or more similar ones, or change the rate",
            NoGainWarning,
            stacklevel=caller_stacklevel(),
        )
