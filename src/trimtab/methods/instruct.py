"""Instruction vectors: Stolfo et al., "Improving Instruction-Following in Language Models through Activation
Steering", ICLR 2025, arXiv 2410.12877, section 3.

    m_l = mean over queries of (h_l[query + instruction] - h_l[query])        at the last prompt token
    u_l = m_l / |m_l|,    t_l = mean over queries of h_l[query + instruction] . u_l
    h_l[p] <- h_l[p] + (t_l - h_l[p] . u_l) u_l        "project": formats, at every position p but the first
    h_l[p] <- h_l[p] + c u_l                           "unit": lengths and words, a weight c
    h_l[p] <- h_l[p] + c m_l                           "add": the same in units of the difference, c = 1 for all of it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trimtab.engines.contract import check_length
from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import naming
from trimtab.learn.contrast import Progress, TextPair, check_layers, contrast, contrast_many, learned_card
from trimtab.learn.inputs import pairs_for
from trimtab.learn.moments import PairMoments
from trimtab.steering import Add, Card, Edit, Operation, Positions, SetProjection, Site, Steering
from trimtab.text.answers import encode_prompt
from trimtab.text.pairs import Pair, Pairs, Side, sides

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM


DEPTH = 0.6
Moments = Mapping[int, PairMoments]

OPERATIONS: dict[str, Callable[[PairMoments, bool], Operation]] = {
    "project": lambda m, one_sided: SetProjection(m.direction.float(), m.target(), one_sided=one_sided),
    "add": lambda m, _: Add(m.difference.float()),
    "unit": lambda m, _: Add(m.direction.float()),
}
POSITIONS = {
    "project": Positions.all_but_first(),
    "add": Positions.from_last_prompt_token(),
    "unit": Positions.all_but_first(),
}
"""Where each acts unless something else is requested. The paper steers at every position; the first is left out, since
in many models it is an attention sink whose norm is a hundred times the others'."""


@keywords
def learn_instruct(
    lm: LM,
    pairs: Pairs,
    layers: int | Sequence[int] | None = None,
    *,
    operation: str = "project",
    positions: Positions | None = None,
    one_sided: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn from prompts with and without an instruction, read at the last prompt token (section 3.1).

    Each side is rendered by the chat template, if there is one, under its system prompt, up to where the answer
    begins: an instruction may as well be in the system prompt of the positive sides. Default layer: the one at
    0.6 of the depth. What strength 1 does is the operation's:

    - `"project"` (section 3.2, for formats) moves each activation's projection on the unit mean difference to the
      mean that it has with the instruction, by default everywhere but at the first token; with `one_sided` it is
      only ever raised;
    - `"add"` adds the raw mean difference, by default from the last prompt token on;
    - `"unit"` (section 3.3, for lengths and words) adds the unit direction: the strength is the weight, in units of
      the residual stream; by default everywhere but at the first token.

    `options` are further entries for the card. Raises `TrimtabError` for no pairs, an unknown layer or operation, or
    pairs of answers (they are for `learn_caa`).
    """
    pairs = pairs_for(lm, pairs)
    _check_operation(operation, one_sided)
    chosen = check_layers(lm, layers, DEPTH)
    moments = contrast(lm, prompt_texts(lm, pairs), chosen, progress=progress)
    card = instruct_card(lm, pairs, moments, options)
    return steering_from(moments, operation=operation, positions=positions, one_sided=one_sided, card=card)


@keywords
def learn_many(
    lm: LM,
    sets: Mapping[str, Pairs],
    layers: int | Sequence[int] | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, dict[int, PairMoments]]:
    """The moments of many instructions at many layers, in one pass over the model: `{name: {layer: moments}}`.

    Queries that several instructions share are read once. `steering_from` and `steerings_from` make steerings of the
    moments, at any of the layers and with any operation, without the model. `progress(done, total)` counts pairs.
    Raises `TrimtabError` as `learn_instruct` does.
    """
    chosen = check_layers(lm, layers, DEPTH)
    return contrast_many(
        lm, {name: prompt_texts(lm, pairs_for(lm, pairs)) for name, pairs in sets.items()}, chosen, progress=progress
    )


@keywords
def steering_from(
    moments: Moments,
    layers: int | Sequence[int] | None = None,
    *,
    operation: str = "project",
    positions: Positions | None = None,
    one_sided: bool = False,
    card: Card | None = None,
) -> Steering:
    """The steering from one instruction's moments at these layers (default: all of theirs).

    The other arguments are those of `learn_instruct`; the card, `instruct_card`'s, is completed with what the steering
    does. Raises `TrimtabError` for a layer without moments, an unknown operation, and sides that don't differ.
    """
    _check_operation(operation, one_sided)
    chosen = sorted(moments if layers is None else {layers} if isinstance(layers, int) else set(layers))
    if missing := [layer for layer in chosen if layer not in moments]:
        raise TrimtabError(f"nothing was read at layer {missing[0]}; there are {', '.join(map(str, sorted(moments)))}")
    where = POSITIONS[operation] if positions is None else positions
    edits = tuple(Edit(Site(layer), OPERATIONS[operation](moments[layer], one_sided), where) for layer in chosen)
    card = Card("instruct") if card is None else card
    measured = {
        name: {layer: value for layer, value in figures.items() if int(layer) in chosen}
        if isinstance(figures, Mapping)
        else figures
        for name, figures in {**card.measured, **_measured(moments, operation)}.items()
    }
    does = {"layers": chosen, "operation": operation, **({"one_sided": True} if one_sided else {})}
    return Steering(edits, replace(card, options={**card.options, **does}, measured=measured))


@keywords
def steerings_from(
    moments: Mapping[str, Moments],
    layers: int | Sequence[int] | None = None,
    *,
    operation: str = "project",
    positions: Positions | None = None,
    one_sided: bool = False,
    cards: Mapping[str, Card] | None = None,
) -> dict[str, Steering]:
    """`steering_from` for each instruction of `learn_many`'s."""
    return {
        name: steering_from(
            by_layer,
            layers,
            operation=operation,
            positions=positions,
            one_sided=one_sided,
            card=(cards or {}).get(name),
        )
        for name, by_layer in moments.items()
    }


def instruct_card(lm: LM, pairs: Sequence[Pair], moments: Moments, options: Mapping[str, Any] | None = None) -> Card:
    """The card of what was learned from these pairs: the model, the data's digest, and what was measured."""
    return learned_card(lm, "instruct", pairs, moments, {"read_at": "last prompt token", **(options or {})})


def _measured(moments: Moments, operation: str) -> dict[str, dict[str, float]]:
    """By layer: the length of the mean difference, and for projections where on it they go."""
    measured = {"shift": {str(layer): round(float(m.difference.norm()), 6) for layer, m in moments.items()}}
    if operation == "project":
        measured["target"] = {str(layer): round(m.target(), 6) for layer, m in moments.items()}
    return measured


def _check_operation(operation: str, one_sided: bool) -> None:
    if operation not in OPERATIONS:
        raise TrimtabError(f"there is no operation {operation!r}; operations: {', '.join(OPERATIONS)}")
    if one_sided and operation != "project":
        raise TrimtabError(f"one_sided is for projections, and {operation!r} adds; use operation='project'")


def prompt_texts(lm: LM, pairs: Sequence[Pair]) -> list[TextPair]:
    """The ids of both prompts of each pair, to be read at their last tokens. Raises `TrimtabError` for other shapes."""
    prompts = [_prompts(pair) for pair in pairs]
    encoded: dict[Side, list[int]] = {}
    for number, both in enumerate(prompts, 1):
        for side in both:
            if side not in encoded:  # a query is shared by many instructions
                with naming(f"pair {number}"):
                    encoded[side] = encode_prompt(lm.tokenizer, side)
                    check_length(lm.layout, len(encoded[side]), "the prompt")
    texts = {side: Text(ids, [len(ids) - 1]) for side, ids in encoded.items()}
    return [(texts[positive], texts[negative]) for positive, negative in prompts]


def _prompts(pair: Pair) -> tuple[Side, Side]:
    """Both sides as prompts; those of bare texts are the texts."""
    if pair.shape not in ("prompts", "texts"):
        raise TrimtabError(
            "instruction vectors are learned from pairs of prompts; pairs of answers are for the method caa"
        )
    positive, negative = sides(pair)
    if pair.shape == "texts":
        return Side(positive.answer, ""), Side(negative.answer, "")
    return positive, negative
