"""Instruction vectors: Stolfo et al., "Improving Instruction-Following in Language Models through Activation
Steering", ICLR 2025, arXiv 2410.12877, section 3.

    m_l = mean over queries of (h_l[query + instruction] - h_l[query])        at the last prompt token
    u_l = m_l / |m_l|,    t_l = mean over queries of h_l[query + instruction] . u_l
    h_l[p] <- h_l[p] + (t_l - h_l[p] . u_l) u_l        "project": formats, at every position p but the first
    h_l[p] <- h_l[p] + c u_l                           "unit": lengths and words, with a weight c
    h_l[p] <- h_l[p] + c m_l                           "add": the same with the mean difference itself at c = 1
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trimtab.engines.contract import check_length
from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import error_prefix
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
"""The default positions of each operation. The paper steers at every position. Here the first is left out, since in
many models it is an attention sink whose norm is a hundred times that of other tokens."""


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

    Each side is rendered with the chat template, if there is one, and with its system prompt, up to the start of the
    answer. So the instruction may also be in the system prompt of the positive sides.

    The operations at strength 1:

    - `"project"` (section 3.2, for formats) moves each activation's projection on the unit mean difference to its mean
      with the instruction, by default at all tokens but the first;
    - `"add"` adds the mean difference, by default from the last prompt token on;
    - `"unit"` (section 3.3, for lengths and words) adds the unit direction, by default at all tokens but the first. The
      strength is then the weight, in units of the residual stream.

    Args:
        lm: The model.
        pairs: Prompts with and without the instruction.
        layers: Blocks to read and to steer after (default: one, at 0.6 of the depth).
        operation: `"project"`, `"add"` or `"unit"`.
        positions: The tokens at which to act (default: see above).
        one_sided: Only raise projections, never lower them; for `"project"`.
        options: Further entries for the card.
        progress: `progress(done, total)` counts pairs.

    Returns:
        The steering, with one edit per layer.

    Raises:
        TrimtabError: There are no pairs, an unknown layer or operation, or pairs of answers (use `learn_caa` for
            these).
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
    """Compute the moments of many instructions at many layers in one pass: `{name: {layer: moments}}`.

    Queries that several instructions share are read once. `steering_from` and `steerings_from` turn the moments into
    steerings, at any of the layers and with any operation, without the model.

    Args:
        lm: The model.
        sets: Each instruction's pairs, by a name.
        layers: The layers to read (default: the one at 0.6 of the depth).
        progress: `progress(done, total)` counts pairs.

    Returns:
        The moments by name and layer.

    Raises:
        TrimtabError: As in `learn_instruct`.
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
    """Make a steering from one instruction's moments.

    Args:
        moments: The moments by layer, from `learn_many`.
        layers: The layers to steer after (default: all that have moments).
        operation: As in `learn_instruct`.
        positions: As in `learn_instruct`.
        one_sided: As in `learn_instruct`.
        card: A card of `instruct_card`, to which the layers, the operation and their measurements are added.

    Returns:
        The steering.

    Raises:
        TrimtabError: A layer has no moments, the operation is unknown, or the sides don't differ.
    """
    _check_operation(operation, one_sided)
    chosen = sorted(moments if layers is None else {layers} if isinstance(layers, int) else set(layers))
    if missing := [layer for layer in chosen if layer not in moments]:
        raise TrimtabError(
            f"no activations were read at layer {missing[0]}; the layers that were read are"
            f" {', '.join(map(str, sorted(moments)))}"
        )
    edit_positions = POSITIONS[operation] if positions is None else positions
    edits = tuple(
        Edit(Site(layer), OPERATIONS[operation](moments[layer], one_sided), edit_positions) for layer in chosen
    )
    card = Card("instruct") if card is None else card
    measured = {
        name: {layer: value for layer, value in figures.items() if int(layer) in chosen}
        if isinstance(figures, Mapping)
        else figures
        for name, figures in {**card.measured, **_measured(moments, operation)}.items()
    }
    edit_options = {"layers": chosen, "operation": operation, **({"one_sided": True} if one_sided else {})}
    return Steering(edits, replace(card, options={**card.options, **edit_options}, measured=measured))


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
    """Make a steering from each instruction's moments, as `steering_from` does from one's.

    Args:
        moments: The moments by name and layer, from `learn_many`.
        layers: The layers to steer after (default: all that have moments).
        operation: As in `learn_instruct`.
        positions: As in `learn_instruct`.
        one_sided: As in `learn_instruct`.
        cards: Cards of `instruct_card` by name. An instruction without one gets a card without data and model.

    Returns:
        The steerings by name.

    Raises:
        TrimtabError: As in `steering_from`.
    """
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
    """The card of a steering learned from these pairs: the model, the digest of the data, and the measurements."""
    return learned_card(lm, "instruct", pairs, moments, {"read_at": "last prompt token", **(options or {})})


def _measured(moments: Moments, operation: str) -> dict[str, dict[str, float]]:
    """By layer: the norm of the mean difference, and for projections the target."""
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
    """The token ids of both prompts of each pair, read at their last tokens. Raises `TrimtabError` for other shapes."""
    prompts = [_prompts(pair) for pair in pairs]
    encoded: dict[Side, list[int]] = {}
    for number, both in enumerate(prompts, 1):
        for side in both:
            if side not in encoded:  # many instructions share a query
                with error_prefix(f"pair {number}"):
                    encoded[side] = encode_prompt(lm.tokenizer, side)
                    check_length(lm.layout, len(encoded[side]), "the prompt")
    texts = {side: Text(ids, [len(ids) - 1]) for side, ids in encoded.items()}
    return [(texts[positive], texts[negative]) for positive, negative in prompts]


def _prompts(pair: Pair) -> tuple[Side, Side]:
    """Both sides as prompts; bare texts become prompts themselves."""
    if pair.shape not in ("prompts", "texts"):
        raise TrimtabError(
            "instruction vectors are learned from pairs of prompts; pairs of answers are for the method caa"
        )
    positive, negative = sides(pair)
    if pair.shape == "texts":
        return Side(positive.answer, ""), Side(negative.answer, "")
    return positive, negative
