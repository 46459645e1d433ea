"""Will a direction steer? Estimated before generating, from its pairs and from how a push along it changes the next
token.

Two statistics of the pairs predict whether a mean difference steers: how consistent the pairs' differences are, and how
well it separates the sides (Braun et al., arXiv 2505.22637 and 2602.17881). Both are computed on pairs that the
direction wasn't learned from. Two more come from the divergence as a function of strength: how much more a push along
the direction changes than a random one of the same norm, and how fast the change grows with the strength.

A small logistic regression on the results of `trimtab bench` combines them. It is stored in `data/forecast.json`, with
how it was made. It is based on the models and tasks of that run only.
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
from trimtab.learn.activations import read_activations
from trimtab.methods.caa import answer_texts
from trimtab.methods.instruct import prompt_texts
from trimtab.steering import Site, Steering
from trimtab.text.pairs import Pair, Pairs, as_pairs
from trimtab.tune.nats import find_factor

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

SUPPORTED_METHODS = ("caa", "instruct")
"""Methods that learn the mean difference that is examined here."""
LAYERS = 3
"""The pairs are read at this many of a steering's layers at most, evenly spaced."""
LEAST = 8
"""The smallest number of pairs for a forecast."""
TOKENS = 16
NATS = 1.0
LIKELY, UNLIKELY = 0.7, 0.3
"""At or above the first chance the verdict is "works", at or below the second "unlikely"; between them, "can't say"."""
TRUSTED_AUC, TRUSTED_EACH = 0.7, 5
"""A fit is trusted only if it has at least this AUC on held-out tasks, and at least this many results of either
outcome. Otherwise the verdict is "can't say", whatever the chance.
"""
FILE = "forecast.json"


@dataclass(frozen=True)
class Predictors:
    """The inputs of a forecast.

    Args:
        agree: The share of held-out pairs whose difference points along the direction.
        separation: The distance between held-out positives and negatives along it, in standard deviations (d').
        auc: The probability that a held-out positive has a larger projection than a held-out negative.
        reach: The natural logarithm of the ratio of two divergences, of a push along the direction and of a random push
            of the same norm, at the strength where the former is 1 nat.
        bend: How the divergence grows there: 2 if doubling the strength quadruples it.
    """

    agree: float
    separation: float
    auc: float
    reach: float
    bend: float

    @property
    def features(self) -> tuple[float, ...]:
        """The features of the fit, in the order of `NAMES`."""
        return self.agree, math.log1p(max(0.0, self.separation)), self.reach, self.bend


NAMES = ("agree", "log(1 + separation)", "reach", "bend")


@dataclass(frozen=True)
class Forecast:
    """A forecast and the fit it comes from.

    Args:
        chance: The probability that the steering works, by the fit.
        predictors: The inputs of the forecast.
        results: The number of bench results in the fit; `worked` of them were better than unsteered and random.
        worked: See `results`.
        auc: The AUC of the fit on held-out tasks.
    """

    chance: float
    predictors: Predictors
    results: int
    worked: int
    auc: float

    @property
    def trusted(self) -> bool:
        """Whether the fit predicts held-out tasks well enough."""
        return self.auc >= TRUSTED_AUC and min(self.worked, self.results - self.worked) >= TRUSTED_EACH

    @property
    def verdict(self) -> str:
        """`"works"`, `"unlikely"` or `"can't say"`; always the last if the fit isn't trusted."""
        if self.trusted and self.chance >= LIKELY:
            return "works"
        return "unlikely" if self.trusted and self.chance <= UNLIKELY else "can't say"

    def __str__(self) -> str:
        p = self.predictors
        measured = (
            f"{p.agree:.0%} of held-out pairs point along the direction, their sides are {p.separation:.1f} standard"
            f" deviations apart, and the steering changes the model {math.exp(p.reach):.1f} times as much as a random"
            " direction does"
        )
        made = f"{self.results} bench results, of which {self.worked} worked; AUC {self.auc:.2f} on held-out tasks"
        if self.trusted:
            return f"forecast: {self.verdict}. {measured} (chance {self.chance:.0%}, by a fit to {made})"
        return f"{measured} (no forecast, since the fit can't be trusted: {made}; `trimtab forecast` fits your own)"


def forecast(measured: Predictors, fit: Mapping[str, Any] | None = None) -> Forecast:
    """The forecast of a fit for these predictors.

    Args:
        measured: The predictors.
        fit: The result of `fit`; default: the packaged one, whose origin is in `data/forecast.json`.
    """
    known = read_json(FILE) if fit is None else fit
    chance = chance_of(measured.features, known)
    return Forecast(chance, measured, int(known["results"]), int(known["worked"]), float(known["auc"]))


def chance_of(features: Sequence[float], fit: Mapping[str, Any]) -> float:
    """The logistic function of the weighted, standardized features."""
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
    """Measure the predictors of a steering, before anything is generated with it.

    Args:
        lm: The model, on the transformers engine.
        pairs: The pairs it was learned from: answers, letters, texts or prompts.
        steering: The learned steering.
        prompts: The prompts that the divergence is measured on.
        base: A reference made from these prompts, if there is one.
        seed: The seed of the random direction.

    Raises:
        TrimtabError: Fewer than `LEAST` pairs, sides that don't differ, or a steering that has no random control.
    """
    pair_list = as_pairs(pairs)
    if len(pair_list) < LEAST:
        raise TrimtabError(f"{len(pair_list)} pairs are too few for a forecast; {LEAST} are needed")
    agree, separation, auc = separation_statistics(lm, pair_list, steering.layers)
    measured = reference(lm, list(prompts), tokens=TOKENS) if base is None else base
    divergence_by_factor: dict[float, float] = {}

    def divergence_at(factor: float) -> float:
        if factor not in divergence_by_factor:
            divergence_by_factor[factor] = divergence(lm, factor * steering, measured).p95
        return divergence_by_factor[factor]

    factor = find_factor(divergence_at, NATS, 0.1)
    other = factor * random_like(steering, seed, means_for(lm, [steering], prompts))
    random = divergence(lm, other, measured).p95
    tiny = 1e-9
    return Predictors(
        agree,
        separation,
        auc,
        math.log(max(divergence_at(factor), tiny) / max(random, tiny)),
        math.log2(max(divergence_at(factor), tiny) / max(divergence_at(factor / 2), tiny)),
    )


def separation_statistics(lm: LM, pairs: Sequence[Pair], layers: Sequence[int]) -> tuple[float, float, float]:
    """Agreement, d' and AUC of held-out pairs along the mean difference of the others, as means over layers.

    The pairs are split into halves. Neighboring pairs stay together, since they may be one question in two orders. The
    activations are those of the residual stream, at the letter, the answer's last token, or the prompt's.
    """
    texts = prompt_texts(lm, pairs) if pairs[0].shape == "prompts" else answer_texts(lm, pairs)
    chosen = [layers[i * len(layers) // LAYERS] for i in range(LAYERS)] if len(layers) > LAYERS else list(layers)
    values = _read(lm, texts, chosen)
    figures = [held_out_statistics(values[layer]) for layer in chosen]
    agree, separation, auc = (sum(column) / len(figures) for column in zip(*figures, strict=True))
    return agree, separation, auc


def held_out_statistics(values: Tensor) -> tuple[float, float, float]:
    """Agreement, d' and AUC of pairs `[pairs, 2, width]`, positive first, along the other half's direction."""
    half = torch.tensor([i // 2 % 2 == 1 for i in range(len(values))])
    results = []
    for mine in (half, ~half):
        other = values[~mine]
        direction = (other[:, 0] - other[:, 1]).mean(0)
        if not float(direction.norm()) > 0:
            raise TrimtabError("the two sides of the pairs don't differ, so there is nothing to forecast from")
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
    """`[pairs, 2, width]` at each layer, float64: for each text, the mean over the tokens that are read."""
    activations = read_activations(lm, groups, [Site(layer) for layer in layers], pooled=True)
    return {site.layer: torch.stack([torch.cat(both) for both in pairs]) for site, pairs in activations.items()}


# ---- fitting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A bench result: the task, the features, and whether the steering worked there."""

    task: str
    features: tuple[float, ...]
    worked: bool


def fit(cases: Sequence[Case], penalty: float = 1.0) -> dict[str, Any]:
    """A logistic regression with an L2 penalty on the weights, and its AUC with leave-one-task-out cross-validation.

    Raises:
        TrimtabError: There are no cases, or all have the same outcome.
    """
    if len({case.worked for case in cases}) < 2:
        raise TrimtabError(
            f"of {len(cases)} bench results {sum(case.worked for case in cases)} worked; a fit needs both outcomes"
        )
    fitted = _fit(cases, penalty)
    chances, worked = cross_validated_chances(cases, penalty)
    auc = round(auc_of(chances, worked), 6)
    return {**fitted, "names": list(NAMES), "results": len(cases), "worked": sum(worked), "auc": auc}


def cross_validated_chances(cases: Sequence[Case], penalty: float = 1.0) -> tuple[list[float], list[bool]]:
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
    """The AUC: how often a case that worked has a higher chance than one that didn't; ties count half."""
    yes = [c for c, w in zip(chances, worked, strict=True) if w]
    no = [c for c, w in zip(chances, worked, strict=True) if not w]
    if not yes or not no:
        return math.nan
    return sum((a > b) + (a == b) / 2 for a in yes for b in no) / (len(yes) * len(no))


def _fit(cases: Sequence[Case], penalty: float) -> dict[str, Any]:
    """Fit with Newton's method, in float64."""
    x = torch.tensor([case.features for case in cases], dtype=torch.float64)
    y = torch.tensor([float(case.worked) for case in cases], dtype=torch.float64)
    means, deviations = x.mean(0), x.std(0).clamp_min(1e-6)
    design = torch.cat([(x - means) / deviations, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    ridge = penalty * torch.eye(design.shape[1], dtype=torch.float64)
    ridge[-1, -1] = 1e-6  # the intercept isn't penalized
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
