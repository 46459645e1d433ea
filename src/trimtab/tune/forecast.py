"""Will a direction steer? Estimated from its pairs and from what a push along it does to the next token, before any
answer.

Two numbers of the pairs foretell whether a mean difference steers: how far the pairs' differences agree, and how well
it separates the sides (Braun et al., arXiv 2505.22637 and 2602.17881). Both are taken on pairs that the direction
wasn't learned from. Two more come of the divergence's curve: how much more a push along the direction changes than a
random one as long, and how the change grows with the strength.

What they come to is a small logistic fit to the results of `trimtab bench`, which stands in `data/forecast.json` with
how it was made. It knows the models and tasks of that run, and no others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.data.read import read_json
from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.evaluate.controls import means_for, random_like
from trimtab.evaluate.divergence import Reference, divergence, reference
from trimtab.learn.activations import read_each
from trimtab.methods.caa import answer_texts
from trimtab.methods.instruct import prompt_texts
from trimtab.steering import Site, Steering
from trimtab.text.pairs import Pair, Pairs, as_pairs
from trimtab.tune.nats import factor_at

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

READ_BY = ("caa", "instruct")
"""Methods whose direction is the mean difference that is looked at here."""
LAYERS = 3
"""At so many of a steering's layers the pairs are read, at most, evenly from all."""
LEAST = 8
"""Of fewer pairs nothing is foretold."""
TOKENS = 16
NATS = 1.0
LIKELY, UNLIKELY = 0.7, 0.3
"""Above the one chance it is said to work, below the other not to; between them nothing is said."""
TRUSTED_AUC, TRUSTED_EACH = 0.7, 5
"""A fit is believed where it does so well on tasks that it hasn't seen, and has seen so many results of either outcome;
otherwise nothing is said, whatever the chance."""
FILE = "forecast.json"


@dataclass(frozen=True)
class Predictors:
    """What a forecast is made from.

    Args:
        agree: The share of held-out pairs whose difference points along the direction.
        separation: By how many standard deviations held-out positives and negatives lie apart along it (d').
        auc: The chance that a held-out positive lies above a held-out negative.
        reach: The natural logarithm of the divergence of a push along the direction over that of a random push as long,
            at the strength where the former is 1 nat.
        bend: How the divergence grows there: 2 where doubling the strength makes it fourfold.
    """

    agree: float
    separation: float
    auc: float
    reach: float
    bend: float

    @property
    def features(self) -> tuple[float, ...]:
        """The numbers that the fit takes, in the order of `NAMES`."""
        return self.agree, math.log1p(max(0.0, self.separation)), self.reach, self.bend


NAMES = ("agree", "log(1 + separation)", "reach", "bend")


@dataclass(frozen=True)
class Forecast:
    """What is foretold.

    Args:
        chance: That the steering works, by the fit.
        predictors: What it was made from.
        results: How many bench results the fit was made from; `worked` of them were better than unsteered and random.
        worked: See there.
        auc: How well the fit does on tasks that it hasn't seen.
    """

    chance: float
    predictors: Predictors
    results: int
    worked: int
    auc: float

    @property
    def trusted(self) -> bool:
        """Whether the fit has shown on tasks that it hadn't seen that it is worth something."""
        return self.auc >= TRUSTED_AUC and min(self.worked, self.results - self.worked) >= TRUSTED_EACH

    @property
    def verdict(self) -> str:
        """`"works"`, `"unlikely"` or `"can't say"`; always the last where the fit isn't to be trusted."""
        if self.trusted and self.chance >= LIKELY:
            return "works"
        return "unlikely" if self.trusted and self.chance <= UNLIKELY else "can't say"

    def __str__(self) -> str:
        p = self.predictors
        made = (
            f"{self.results} bench results, of which {self.worked} worked; AUC {self.auc:.2f} on tasks it hadn't seen"
        )
        sure = (
            f"chance {self.chance:.0%}, by a fit to {made}"
            if self.trusted
            else f"the fit that comes along is too small to be trusted: {made}; `trimtab forecast` fits your own"
        )
        return (
            f"forecast: {self.verdict}. {p.agree:.0%} of held-out pairs point along the direction, their sides are"
            f" {p.separation:.1f} deviations apart, and a push changes {math.exp(p.reach):.1f} times what a random one"
            f" does ({sure})"
        )


def forecast(measured: Predictors, fit: Mapping[str, Any] | None = None) -> Forecast:
    """What a fit says of these numbers.

    Args:
        measured: The predictors.
        fit: What `fit` gave; default: the one that comes along, which `data/forecast.json` tells the origin of.
    """
    known = read_json(FILE) if fit is None else fit
    chance = chance_of(measured.features, known)
    return Forecast(chance, measured, int(known["results"]), int(known["worked"]), float(known["auc"]))


def chance_of(features: Sequence[float], fit: Mapping[str, Any]) -> float:
    """The logistic of the weighted features, each less its mean and over its deviation."""
    scaled = [(x - m) / d for x, m, d in zip(features, fit["means"], fit["deviations"], strict=True)]
    score = fit["intercept"] + sum(w * x for w, x in zip(fit["weights"], scaled, strict=True))
    return 1 / (1 + math.exp(-max(-50.0, min(50.0, score))))


def predictors(
    lm: LM,
    pairs: Pairs,
    steering: Steering,
    prompts: Sequence[Prompt],
    *,
    base: Reference | None = None,
    seed: int = 0,
) -> Predictors:
    """What is known of a steering before anything is generated with it.

    Args:
        lm: The model, on the transformers engine.
        pairs: What it was learned from; answers, letters, texts or prompts.
        steering: What was learned.
        prompts: What the divergence is measured on.
        base: The reference that was made of these prompts, if there is one.
        seed: Of the random direction.

    Raises:
        TrimtabError: Fewer than `LEAST` pairs, sides that don't differ, or a steering without a random like.
    """
    pair_list = as_pairs(pairs)
    if len(pair_list) < LEAST:
        raise TrimtabError(f"of {len(pair_list)} pairs nothing can be foretold; {LEAST} are needed")
    agree, separation, auc = separated(lm, pair_list, steering.layers)
    measured = reference(lm, list(prompts), tokens=TOKENS) if base is None else base
    seen: dict[float, float] = {}

    def far(factor: float) -> float:
        if factor not in seen:
            seen[factor] = divergence(lm, factor * steering, measured).p95
        return seen[factor]

    factor = factor_at(far, NATS, 0.1)
    other = factor * random_like(steering, seed, means_for(lm, [steering], prompts))
    random = divergence(lm, other, measured).p95
    tiny = 1e-9
    return Predictors(
        agree,
        separation,
        auc,
        math.log(max(far(factor), tiny) / max(random, tiny)),
        math.log2(max(far(factor), tiny) / max(far(factor / 2), tiny)),
    )


def separated(lm: LM, pairs: Sequence[Pair], layers: Sequence[int]) -> tuple[float, float, float]:
    """Agreement, d' and AUC of held-out pairs along the mean difference of the others, as means over layers.

    Pairs are held out by halves, two that stand next to each other together, since they may be one question in two
    orders. What is read is the residual stream, at the letter, the answer's last token, or the prompt's.
    """
    read = prompt_texts(lm, pairs) if pairs[0].shape == "prompts" else answer_texts(lm, pairs)
    chosen = [layers[i * len(layers) // LAYERS] for i in range(LAYERS)] if len(layers) > LAYERS else list(layers)
    values = _read(lm, read, chosen)
    figures = [held_out(values[layer]) for layer in chosen]
    agree, separation, auc = (sum(column) / len(figures) for column in zip(*figures, strict=True))
    return agree, separation, auc


def held_out(values: Tensor) -> tuple[float, float, float]:
    """Agreement, d' and AUC of pairs `[pairs, 2, width]`, positive first, each half along the other's direction."""
    half = torch.tensor([i // 2 % 2 == 1 for i in range(len(values))])
    results = []
    for mine in (half, ~half):
        other = values[~mine]
        direction = (other[:, 0] - other[:, 1]).mean(0)
        if not float(direction.norm()) > 0:
            raise TrimtabError("the two sides of the pairs don't differ, so nothing can be foretold")
        projected = values[mine] @ (direction / direction.norm())
        positive, negative = projected[:, 0], projected[:, 1]
        spread = math.sqrt(float((positive.var() + negative.var()) / 2))
        gap = float(positive.mean() - negative.mean())
        above = (positive[:, None] > negative[None]).double() + (positive[:, None] == negative[None]).double() / 2
        results.append(
            (float((positive > negative).double().mean()), gap / spread if spread else 0.0, float(above.mean()))
        )
    agree, separation, auc = (sum(column) / len(results) for column in zip(*results, strict=True))
    return agree, separation, auc


def _read(lm: LM, groups: Sequence[tuple[Text, Text]], layers: Sequence[int]) -> dict[int, Tensor]:
    """`[pairs, 2, width]` at each layer, float64: of each text the mean over where it is read."""
    activations = read_each(lm, groups, [Site(layer) for layer in layers], pooled=True)
    return {site.layer: torch.stack([torch.cat(both) for both in pairs]) for site, pairs in activations.items()}


# ---- fitting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A bench result: the task, the features, and whether the steering worked there."""

    task: str
    features: tuple[float, ...]
    worked: bool


def fit(cases: Sequence[Case], penalty: float = 1.0) -> dict[str, Any]:
    """A logistic fit with a quadratic penalty on the weights, and its AUC on tasks left out one at a time.

    Raises:
        TrimtabError: No cases, or all with the same outcome: nothing can be told apart.
    """
    if len({case.worked for case in cases}) < 2:
        raise TrimtabError(
            f"of {len(cases)} bench results {sum(case.worked for case in cases)} worked; a fit needs both outcomes"
        )
    fitted = _fit(cases, penalty)
    chances, worked = left_out(cases, penalty)
    auc = round(auc_of(chances, worked), 6)
    return {**fitted, "names": list(NAMES), "results": len(cases), "worked": sum(worked), "auc": auc}


def left_out(cases: Sequence[Case], penalty: float = 1.0) -> tuple[list[float], list[bool]]:
    """Each case's chance by the fit to all other tasks, and whether it worked."""
    chances, worked = [], []
    for task in dict.fromkeys(case.task for case in cases):
        others = [case for case in cases if case.task != task]
        mine = [case for case in cases if case.task == task]
        if len({case.worked for case in others}) < 2:
            share = sum(case.worked for case in others) / max(1, len(others))
            chances += [share] * len(mine)
        else:
            model = _fit(others, penalty)
            chances += [chance_of(case.features, model) for case in mine]
        worked += [case.worked for case in mine]
    return chances, worked


def auc_of(chances: Sequence[float], worked: Sequence[bool]) -> float:
    """The chance that what worked was given a higher chance than what didn't; ties count half."""
    yes = [c for c, w in zip(chances, worked, strict=True) if w]
    no = [c for c, w in zip(chances, worked, strict=True) if not w]
    if not yes or not no:
        return math.nan
    return sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no))


def _fit(cases: Sequence[Case], penalty: float) -> dict[str, Any]:
    """By Newton's method, in float64."""
    x = torch.tensor([case.features for case in cases], dtype=torch.float64)
    y = torch.tensor([float(case.worked) for case in cases], dtype=torch.float64)
    means, deviations = x.mean(0), x.std(0).clamp_min(1e-6)
    design = torch.cat([(x - means) / deviations, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    ridge = penalty * torch.eye(design.shape[1], dtype=torch.float64)
    ridge[-1, -1] = 1e-6  # the intercept is free
    weights = torch.zeros(design.shape[1], dtype=torch.float64)
    for _ in range(50):
        p = torch.sigmoid(design @ weights)
        gradient = design.T @ (p - y) + ridge @ weights
        curvature = design.T @ (design * (p * (1 - p))[:, None]) + ridge
        step = torch.linalg.solve(curvature, gradient)
        weights = weights - step
        if float(step.norm()) < 1e-10:
            break
    return {
        "means": [round(float(value), 6) for value in means],
        "deviations": [round(float(value), 6) for value in deviations],
        "weights": [round(float(value), 6) for value in weights[:-1]],
        "intercept": round(float(weights[-1]), 6),
    }
