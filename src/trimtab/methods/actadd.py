"""Activation addition (ActAdd): Turner et al., "Steering Language Models With Activation Engineering", arXiv
2308.10248, section 3.

    A[j] = h_l[j](prompt+) - h_l[j](prompt-)        one pair, padded to k tokens; h_l is the input of block l
    h_l[j] <- h_l[j] + c * A[j]        for the first k tokens of the user's prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from trimtab.engines.request import Text
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import digest_of, read_activations
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.inputs import check_lm
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering
from trimtab.steering.positions import END, Bound

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


DEPTH = 0.125
"""Layer 6 of the 48 of GPT-2 XL, the one that the paper uses most."""

Align = Literal["front", "back"]


@keywords
def learn_actadd(
    lm: LM,
    layers: int | Sequence[int] | None = None,
    *,
    positive: str | None = None,
    negative: str | None = None,
    coefficient: float = 5.0,
    align: Align = "front",
    progress: Progress | None = None,
) -> Steering:
    """Learn the difference of two texts, token by token, to add to the first (or last) tokens of a prompt.

    The shorter text is padded with spaces (with the pad token if the tokenizer has no token for a space). The texts are
    read without a chat template. Tokens of a common beginning, such as a BOS token, add nothing. A prompt needs at
    least as many tokens as the longer text.

    Args:
        lm: The model.
        layers: The blocks at whose input to read and add (default: one, at 0.125 of the depth).
        positive: The text to steer towards.
        negative: The text to steer away from.
        coefficient: The strength of the edits, the paper's c.
        align: Whether to add at the `"front"` or at the `"back"` of the prompt.
        progress: `progress(done, total)`.

    Returns:
        The steering, with one `Add` per layer and token.

    Raises:
        TrimtabError: A text is missing, both texts have the same tokens, or a layer is unknown.
    """
    check_lm(lm)
    if not positive or not negative:
        raise TrimtabError("ActAdd needs two texts, a positive one and a negative one")
    if align not in ("front", "back"):
        raise TrimtabError(f"unknown alignment {align!r}; known: front, back")
    chosen = check_layers(lm, layers, DEPTH)
    ids = [lm.encode(text, chat=False) for text in (positive, negative)]
    length = max(map(len, ids))
    filler = _filler(lm)
    texts = [Text([*token_ids, *[filler] * (length - len(token_ids))], range(length)) for token_ids in ids]
    if list(texts[0].ids) == list(texts[1].ids):
        raise TrimtabError(f"{positive!r} and {negative!r} are the same tokens; nothing would be added")
    sites = [Site(layer, "block_input") for layer in chosen]
    activations = read_activations(lm, [texts], sites, progress=progress)
    edits = []
    for site in sites:
        plus, minus = activations[site][0]
        for j, row in enumerate(plus - minus):
            if bool(row.any()):
                edits.append(Edit(site, Add(row.float()), _positions_at(j, length, align), coefficient))
    options = {"layers": chosen, "positive": positive, "negative": negative, "align": align, "tokens": length}
    card = Card("actadd", lm.identity, digest_of(texts=[positive, negative]), options, versions=versions())
    return Steering(tuple(edits), card)


def _positions_at(j: int, length: int, align: Align) -> Positions:
    if align == "front":
        return Positions.span(j, j + 1)
    return Positions(((Bound(END, j - length), Bound(END, j - length + 1)),))


def _filler(lm: LM) -> int:
    """The token for a space, as in the paper, if there is one; else the pad token or the EOS token."""
    space = lm.tokenizer(" ", add_special_tokens=False)["input_ids"]
    if len(space) == 1:
        return int(space[0])
    for token in (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise TrimtabError("the tokenizer has neither a token for a space nor one for padding; give texts of equal length")
