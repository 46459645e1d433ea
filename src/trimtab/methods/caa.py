"""Contrastive activation addition (CAA): Rimsky et al., "Steering Llama 2 via Contrastive Activation Addition",
ACL 2024, arXiv 2312.06681, section 3.

    v[l] = mean over pairs of (h_l[positive] - h_l[negative])        read at the answer's letter
    h_l[t] <- h_l[t] + m * v[l]        for t from the last prompt token on, at one layer l

If whole answers are read, each side under its own system prompt, this gives the vectors of "Persona Vectors" (Chen et
al., arXiv 2507.21509, section 2): h_l is then the mean over the answer's tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from trimtab.engines.contract import check_length
from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.keywords import caller_stacklevel, keywords
from trimtab.learn.activations import error_prefix, texts_of
from trimtab.learn.contrast import (
    Progress,
    TextPair,
    check_layers,
    contrast_many,
    learned_card,
    mean_over_positions,
    read_batches,
)
from trimtab.learn.estimators import Estimator, as_estimator, estimator_name, mean_difference, unit
from trimtab.learn.inputs import pairs_for
from trimtab.learn.moments import PairMembers, PairMoments
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering
from trimtab.text.answers import LAST, ReadAt, as_read_at, check_read_at, side_question
from trimtab.text.letters import BASE_FORMAT, letter_balance, letter_of
from trimtab.text.pairs import Pair, Pairs, sides

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM

__all__ = [
    "BASE_FORMAT",
    "Norm",
    "PairsWarning",
    "activations",
    "beyond_chance",
    "equalised",
    "learn_behaviours",
    "learn_caa",
    "moved",
]


DEPTH = 0.4
"""The depth at which CAA works best in the paper: layer 13 of 32 (7B) and 14 of 40 (13B)."""

Norm = Literal["raw", "unit", "relative"]
"""The scale of strength 1: the mean difference itself (`raw`, as in the paper), a vector of norm 1 (`unit`), or one
with the mean norm of the activations at that layer (`relative`)."""

BALANCE_LIMIT = 0.1
"""The limit for how much more often a letter is positive than negative. Above it, the letter's own direction is part of
the steering. The paper's data sets are below 0.06, except survival instinct (0.24 for A, -0.33 for B)."""

AGREEMENT_FLOOR = 0.1
"""Pairs whose agreement beyond chance is below this hardly have a direction in common. The same holds for n pairs below
`1 / sqrt(n)`: there, noise contributes more to the mean than the common direction does."""


class PairsWarning(UserWarning):
    """The pairs may not give the intended steering: the letters are unbalanced, or the pairs don't agree."""


@keywords
def learn_caa(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    estimator: str | Estimator = "mean-difference",
    norm: Norm = "raw",
    read_at: str | ReadAt | None = None,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn the mean difference of the pairs' activations, to add from the last prompt token on.

    All layers are read in one pass.

    Args:
        lm: The model.
        pairs: Multiple-choice questions, answers or texts.
        layers: Blocks to read and to steer after (default: one, at 0.4 of the depth).
        estimator: How the direction is computed: `"mean-difference"`, `"median"`, `"pca"`, `"probe"`, or a function of
            the positives' and the negatives' activations, each `[pairs, width]`, that returns a direction `[width]`
            (`trimtab.learn.estimators`). The mean difference keeps only sums in memory, the others all activations.
        norm: The scale of strength 1: `"raw"` (the mean difference, as the paper's multiplier 1), `"unit"` (norm 1) or
            `"relative"` (the mean norm of the activations).
        read_at: Where answers and texts are read: `"last"` (default), or the mean over all tokens of the answer
            (`"answer"`), over the first ones (`"first:8"`), or over those after a text (`"after:</think>"`).
            Multiple-choice pairs are read at the answer's letter. The card records it.
        positions: The tokens at which to add (default: from the last prompt token on).
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering, with one `Add` per layer.

    Raises:
        TrimtabError: There are no pairs, an unknown layer or norm, an answer that isn't a bracketed letter, an answer
            without the `after:` text or with nothing after it, or pairs of prompts (use `learn_instruct` for these).

    Warns:
        PairsWarning: The letters are unbalanced, or the pairs don't agree on a direction.
    """
    options: dict[str, Any] = {"norm": norm, "read_at": read_at, "positions": positions, "progress": progress}
    return learn_behaviours(lm, {"caa": pairs}, layers, estimator=estimator, **options)["caa"]


def learn_behaviours(
    lm: LM,
    behaviours: Mapping[str, Pairs],
    layers: int | Sequence[int] | None = None,
    *,
    estimator: str | Estimator = "mean-difference",
    norm: Norm = "raw",
    read_at: str | ReadAt | None = None,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> dict[str, Steering]:
    """Run `learn_caa` for several behaviours, each with its own pairs, in one pass. Shared texts are read once.

    For vectors of equal norm at each layer, as in the paper, apply `equalised` to the result.
    """
    if norm not in get_args(Norm):
        raise TrimtabError(f"there is no norm {norm!r}; norms: {', '.join(get_args(Norm))}")
    sets = {name: pairs_for(lm, pairs) for name, pairs in behaviours.items()}
    chosen = check_layers(lm, layers, DEPTH)
    estimator_function = as_estimator(estimator)
    if not sets:
        raise TrimtabError("there are no behaviours to learn")
    texts = {
        name: answer_texts(lm, pairs, read_at, f" of {name!r}" if len(sets) > 1 else "") for name, pairs in sets.items()
    }
    moments_type = PairMoments if estimator_function is mean_difference else PairMembers
    by_behaviour = contrast_many(lm, texts, chosen, moments_type=moments_type, progress=progress)
    edit_positions = Positions.from_last_prompt_token() if positions is None else positions
    learned = {}
    for name, moments in by_behaviour.items():
        pairs = sets[name]
        set_label = f" of {name!r}" if len(sets) > 1 else ""
        letters = pairs[0].shape == "letters"
        options = {"layers": chosen, "read_at": _card_read_at(letters, read_at), "norm": norm}
        options |= {} if estimator_function is mean_difference else {"estimator": estimator_name(estimator_function)}
        options |= {} if positions is None else {"positions": str(positions)}
        card = learned_card(lm, "caa", pairs, moments, options)
        if letters:
            balance = {letter: round(net, 6) for letter, net in letter_balance(pairs).items()}
            card = replace(card, measured={**card.measured, "letter_balance": balance})
            _warn_of_balance(balance, set_label)
        _warn_of_agreement(moments, set_label)
        edits = tuple(
            Edit(Site(layer), Add(_direction(moments[layer], estimator_function, norm, layer).float()), edit_positions)
            for layer in chosen
        )
        learned[name] = Steering(edits, card)
    return learned


def equalised(steerings: Mapping[str, Steering]) -> dict[str, Steering]:
    """Scale the vectors of several behaviours to their average norm at each layer (the paper's normalization).

    Directions don't change. Afterwards strength 1 is a shift of the same norm for every behaviour; the norm depends on
    the set of behaviours.

    Raises `TrimtabError` unless all have one `Add` of strength 1 at each of the same layers, or if a vector is zero.
    """
    norms: dict[str, dict[int, float]] = {}
    for name, steering in steerings.items():
        norms[name] = {edit.site.layer: _vector_norm(edit, name) for edit in steering.edits}
        if len(norms[name]) != len(steering.edits) or set(norms[name]) != set(next(iter(norms.values()))):
            raise TrimtabError(
                f"behaviours are equalised layer by layer; {name!r} doesn't have exactly one edit at each of the same"
                " layers"
            )
    together = sorted(steerings)
    result = {}
    for name, steering in steerings.items():
        edits = []
        for edit in steering.edits:
            layer = edit.site.layer
            mean = sum(by_layer[layer] for by_layer in norms.values()) / len(norms)
            direction = edit.operation.direction.double() * (mean / norms[name][layer])
            edits.append(replace(edit, operation=Add(direction.float())))
        card = replace(steering.card, options={**steering.card.options, "norm": "equalised", "with": together})
        result[name] = Steering(tuple(edits), card)
    return result


def moved(steering: Steering, layer: int) -> Steering:
    """Move a vector that was learned at one layer to another layer (the paper's transfer between layers, section 3).

    Raises `TrimtabError` if the steering acts at several layers: choose one with `steering.only([…])`.
    """
    if len(steering.layers) != 1:
        raise TrimtabError(
            f"only a vector of one layer can be moved, but this steering acts at {len(steering.layers)} layers; choose"
            " one with only([…])"
        )
    edits = tuple(replace(edit, site=Site(layer, edit.site.kind)) for edit in steering.edits)
    moved_from = {"moved_from": steering.layers[0]} if steering.layers != (layer,) else {}
    return Steering(edits, replace(steering.card, options={**steering.card.options, **moved_from}))


def _vector_norm(edit: Edit, name: str) -> float:
    if not isinstance(edit.operation, Add) or edit.operation.keep_norm or edit.strength != 1:
        raise TrimtabError(f"only additions of strength 1 are equalised; {name!r} has {edit}")
    length = float(edit.operation.direction.double().norm())
    if not length > 0:
        raise TrimtabError(f"the vector of {name!r} at layer {edit.site.layer} is zero, so it has no direction")
    return length


def _direction(moments: PairMoments, estimator: Estimator, norm: Norm, layer: int) -> Tensor:
    with error_prefix(f"layer {layer}"):
        direction = moments.estimate_direction(estimator) if isinstance(moments, PairMembers) else moments.difference
        if norm == "raw":
            return direction
        return unit(direction) * (moments.norm if norm == "relative" else 1.0)


def beyond_chance(agreement: float, pairs: int) -> float:
    """An estimate of the agreement in the limit of infinitely many such pairs.

    Even random differences agree with their own mean by about `1 / sqrt(pairs)`. This bias is removed:
    `sqrt((n a² - 1) / (n - 1))`, the root of the mean cosine between two different pairs, or 0 if that is negative.
    """
    return math.sqrt(max(0.0, (pairs * agreement**2 - 1) / (pairs - 1))) if pairs > 1 else 1.0


def _warn_of_agreement(moments: Mapping[int, PairMoments], of: str) -> None:
    count = next(iter(moments.values())).count
    limit = max(AGREEMENT_FLOOR, 1 / math.sqrt(count))
    low = [layer for layer, m in moments.items() if beyond_chance(m.agreement, count) < limit]
    if low:
        at = ", ".join(map(str, low))
        warnings.warn(
            f"the {count} pairs{of} barely agree on a direction at layer {at} (less than {limit:.2g} beyond chance);"
            " such a steering tends to have little effect. Use more pairs, more similar ones, or another layer",
            PairsWarning,
            stacklevel=caller_stacklevel(),
        )


def _warn_of_balance(balance: Mapping[str, float], of: str) -> None:
    worst = max(balance, key=lambda letter: abs(balance[letter]))
    if abs(balance[worst]) > BALANCE_LIMIT:
        listed = ", ".join(f"{letter} {net:+.2f}" for letter, net in balance.items())
        warnings.warn(
            f"the letters of the pairs{of} are unbalanced ({listed} per pair): the steering pushes towards a letter"
            " too. Swap the options of some questions",
            PairsWarning,
            stacklevel=caller_stacklevel(),
        )


def answer_texts(
    lm: LM, pairs: Sequence[Pair], read_at: str | ReadAt | None = None, set_label: str = ""
) -> list[TextPair]:
    """The token ids of both sides of each pair, and the positions at which they are read (section 3.1).

    `set_label` names the pairs in error messages. Raises `TrimtabError` as `learn_caa` does.
    """
    if any(pair.shape == "prompts" for pair in pairs):
        raise TrimtabError("CAA learns from answers or texts; pairs of prompts are for the method instruct")
    texts: list[TextPair] = []
    for number, pair in enumerate(pairs, 1):
        checked_read_at = check_read_at(read_at, pair.shape)
        if pair.shape == "letters":
            with error_prefix(f"pair {number}{set_label}"):
                texts.append(_at_letters(lm, pair))
        else:
            texts.append(texts_of(lm, pair, read_at=checked_read_at or LAST, name=f"pair {number}{set_label}"))
    return texts


def _at_letters(lm: LM, pair: Pair) -> TextPair:
    both = sides(pair)
    letters = [letter_of(side.answer) for side in both]
    questions = [side_question(lm.tokenizer, side, (letter,)) for side, letter in zip(both, letters, strict=True)]
    positive, negative = (
        Text(question.ids_with_answer(letter), [len(question.ids)])
        for question, letter in zip(questions, letters, strict=True)
    )
    check_length(lm.layout, max(len(text.ids) for text in (positive, negative)), "the question")
    return positive, negative


def _card_read_at(letters: bool, read_at: str | ReadAt | None) -> str:
    """The value of `read_at` for the card. The defaults keep their original names, so that files don't change."""
    at = LAST if read_at is None else as_read_at(read_at)
    return "letter" if letters else "last token" if at == LAST else str(at)


def read_at_of(card: Card) -> ReadAt | None:
    """The `read_at` that a steering was learned with, according to its card; `None` if it is the method's default."""
    try:
        return ReadAt.parse(str(card.options.get("read_at")))
    except TrimtabError:
        return None  # "letter", "last token", or missing


def activations(
    lm: LM,
    pairs: Pairs,
    layers: Sequence[int],
    *,
    read_at: str | ReadAt | None = None,
    progress: Progress | None = None,
) -> dict[int, Tensor]:
    """The activations that `learn_caa` reads: by layer `[pairs, 2, width]`, positive and negative, float32, on the CPU.

    Useful for plots and probes; `learn_caa` itself keeps only sums. `read_at` is as in `learn_caa`.
    Raises `TrimtabError` as `learn_caa` does.
    """
    pairs = pairs_for(lm, pairs)
    chosen = check_layers(lm, layers, DEPTH)
    if not pairs:
        raise TrimtabError("there are no pairs to read")
    groups = answer_texts(lm, pairs, read_at)
    by_layer = {layer: torch.zeros(len(pairs), 2, lm.layout.width) for layer in chosen}
    for batch in read_batches(lm, groups, [Site(layer) for layer in chosen], progress):
        for site, members in batch.values.items():
            for g, member in zip(batch.groups, members, strict=True):
                by_layer[site.layer][g] = torch.cat([mean_over_positions(text).float() for text in member]).cpu()
    return by_layer
