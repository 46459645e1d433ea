"""A word put into answers, or kept out of them, by its own logit: after the last block, where activations become words.

    include:  h[p] <- h[p] + s(p) d_k        until the word is there;  s(p) grows, from `first` to `last` nats
    exclude:  h[p] <- h[p] - relu(r_k . h[p]) d_k         at every token that is made

with `r_k` what reads token k's logit, less the mean of all, and `d_k` what moves it by one nat and all others as little
as may be (`learn.unembedding`). It is our own: the direction is the logit lens's (nostalgebraist, 2020), made selective
by the covariance of all tokens' directions. An excluded token gets no likelier than the average one of the vocabulary.

A push that grows lets the word come where it fits best, and sooner or later it comes. A word of several tokens is begun
by the push, and each further token is pushed where the ones before it stand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trimtab.data import queries
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.contrast import versions
from trimtab.learn.inputs import check_lm
from trimtab.learn.unembedding import Unembedding, unembedding
from trimtab.steering import Add, Card, Edit, Positions, ReadWrite, Steering
from trimtab.steering.positions import END, Bound

if TYPE_CHECKING:
    from trimtab.lm import LM

READ = 8
"""So many prompts tell what the model's last norm does."""
STEP = 8
"""The push grows every so many tokens."""
ON = 20.0
"""Nats by which a further token of a word is pushed where the ones before it stand."""
PIECES = 4
"""The most tokens of a word."""
MOST = 6
"""So many texts can be followed in one answer."""
MADE = Positions.from_last_prompt_token()


@keywords
def learn_word_logit(
    lm: LM,
    word: str,
    *,
    exclude: bool = False,
    first: float = 10.0,
    last: float = 22.0,
    tokens: int = 48,
    base: Sequence[str] | None = None,
    head: Unembedding | None = None,
) -> Steering:
    """A steering that puts a word into answers, or with `exclude` keeps it out, by its logit after the last block.

    It is one word's, and works without a word of it in the prompt. It knows spellings, not meanings: an included word
    comes where the model finds it least odd, which may still be odd.

    Args:
        lm: The model.
        word: One word, of at most four tokens.
        exclude: Keep it out: as it is given, in lower case, capitalized and in capitals, as far as these are few enough
            tokens to be followed. The card's `spellings` are those that are kept out.
        first: By how many nats the word's first token is pushed as the answer begins.
        last: And from its token number `tokens` on; between the two the push grows evenly.
        tokens: See `last`.
        base: Prompts that tell what the model's last norm does (default: eight that come with the package).
        head: What `learn.unembedding` read of this model, to learn many words from one reading.

    Returns:
        Edits of the residual stream after the last block, of strength 1; the push stops once the word is there.

    Raises:
        TrimtabError: An empty word, one of more tokens, or with spaces in it, pushes that aren't numbers of 0 or more,
            or that fall.
        UnsupportedError: The engine doesn't give gradients or logits, or the model's logits aren't told by its output
            embeddings and a norm.
    """
    check_lm(lm, "training")
    word = _checked(word, first, last, tokens)
    spellings = _followed(_spellings(lm, word, exclude))
    head = unembedding(lm, queries("learn")[:READ] if base is None else base) if head is None else head
    if exclude:
        edits = _kept_out(head, spellings)
        options: dict[str, object] = {"word": word, "exclude": True}
    else:
        edits = _put_in(head, word, spellings[0], _steps(first, last, tokens))
        options = {"word": word, "exclude": False, "first": first, "last": last, "tokens": tokens}
    options["spellings"] = [spelling.text for spelling in spellings]
    length = head.typical * head.rows.shape[1] ** 0.5
    measured = {"explained": round(head.explained, 6), "activation_norm": {str(head.site.layer): round(length, 6)}}
    return Steering(tuple(edits), Card("word-logit", lm.identity, word, options, measured, versions()))


@dataclass(frozen=True)
class Spelling:
    """A word as it stands in a text, its tokens, and the text of all but the last of them, one more at a time."""

    text: str
    ids: tuple[int, ...]
    begun: tuple[str, ...]


def _checked(word: str, first: float, last: float, tokens: int) -> str:
    word = word.strip()
    if not word:
        raise TrimtabError("a word to include or exclude can't be empty")
    if len(word.split()) > 1:
        raise TrimtabError(f"{word!r} is more than one word; learn each, and add the steerings up")
    if not (0 <= first <= last < math.inf):
        raise TrimtabError(f"a push is 0 or more nats and doesn't fall, got first {first} and last {last}")
    if tokens < 1:
        raise TrimtabError(f"a push grows over one token or more, got {tokens}")
    return word


def _spellings(lm: LM, word: str, exclude: bool) -> list[Spelling]:
    """To include, how the word stands in the fewest tokens; to exclude, all ways that it may stand in a text."""
    forms = dict.fromkeys([word, _capitalized(word)])
    if exclude:
        forms |= dict.fromkeys([word.lower(), word.upper()])
    by_ids: dict[tuple[int, ...], Spelling] = {}
    refused: list[TrimtabError] = []
    for text in [f" {form}" for form in forms] + (list(forms) if exclude else []):
        try:
            spelling = _spelled(lm, text)
            by_ids.setdefault(spelling.ids, spelling)
        except TrimtabError as error:  # capitals may be many tokens, and are seldom written
            refused.append(error)
    if refused and (not by_ids or (exclude and word not in {spelling.text.strip() for spelling in by_ids.values()})):
        raise refused[0]
    return list(by_ids.values()) if exclude else [min(by_ids.values(), key=lambda spelling: len(spelling.ids))]


def _followed(spellings: Sequence[Spelling]) -> list[Spelling]:
    """Those that can be followed in one answer, in their order; the word as it is given is the first."""
    texts = list(dict.fromkeys(spelling.begun[-1].strip() for spelling in spellings if spelling.begun))[:MOST]
    return [spelling for spelling in spellings if not spelling.begun or spelling.begun[-1].strip() in texts]


def _capitalized(word: str) -> str:
    return word[:1].upper() + word[1:]


def _spelled(lm: LM, text: str) -> Spelling:
    ids = tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not 1 <= len(ids) <= PIECES:
        raise TrimtabError(
            f"{text.strip()!r} is {len(ids)} tokens of this model; its logit can be moved for words of at most {PIECES}"
        )
    if lm.tokenizer.unk_token_id in ids:
        raise TrimtabError(f"{text.strip()!r} has letters that this model's tokenizer doesn't know")
    begun = tuple(lm.tokenizer.decode(ids[:n]) for n in range(1, len(ids)))
    if not all(text.strip().startswith(part.strip()) and part.strip() for part in begun):
        raise TrimtabError(
            f"{text.strip()!r} is made of tokens that are no whole letters ({', '.join(map(repr, begun))}), so it can't"
            " be followed as it is written; use learn_word or learn_distill"
        )
    return Spelling(text, ids, begun)


# ---- put in --------------------------------------------------------------------------------------------------


def _steps(first: float, last: float, tokens: int) -> list[tuple[Positions, float]]:
    """Stretches of an answer, and by how many nats the word is pushed there."""
    count = max(1, math.ceil(tokens / STEP)) + (first != last)
    steps = []
    for i in range(count):
        end = None if i == count - 1 else Bound(END, (i + 1) * STEP - 1)
        nats = first + (last - first) * i / max(1, count - 1)
        steps.append((Positions(((Bound(END, i * STEP - 1), end),)), nats))
    return steps


def _put_in(head: Unembedding, word: str, spelling: Spelling, steps: Sequence[tuple[Positions, float]]) -> list[Edit]:
    """The growing push of the first token, and that of each further one, until the word is there."""
    # what is near the word is raised a little, too, such as the word with a capital letter, and that will do
    forms = list(dict.fromkeys([spelling.text.strip(), word, _capitalized(word)]))
    forms = forms[: (MOST - len(spelling.begun)) // 2]
    lacking = ~_any([find(text) for text in forms for find in (Positions.after, Positions.at)])
    begins = lacking & ~_any([Positions.at(text) for text in spelling.begun]) if spelling.begun else lacking
    push = Add(head.write(spelling.ids[0]).float())
    edits = [Edit(head.site, push, where & begins, nats) for where, nats in steps if nats]
    for token, text in zip(spelling.ids[1:], spelling.begun, strict=True):
        edits.append(Edit(head.site, Add(head.write(token).float()), Positions.at(text) & lacking, ON))
    return edits


def _any(some: Sequence[Positions]) -> Positions:
    union = some[0]
    for positions in some[1:]:
        union = union | positions
    return union


# ---- kept out ------------------------------------------------------------------------------------------------


def _kept_out(head: Unembedding, spellings: Sequence[Spelling]) -> list[Edit]:
    """One cap for all that are one token, and for each longer one a cap of its last, where the others stand."""
    edits = []
    if single := list(dict.fromkeys(spelling.ids[0] for spelling in spellings if len(spelling.ids) == 1)):
        edits.append(Edit(head.site, _cap(head, single), MADE))
    longer: dict[str, list[int]] = {}
    for spelling in spellings:
        if len(spelling.ids) > 1:
            longer.setdefault(spelling.begun[-1].strip(), []).append(spelling.ids[-1])
    for text, last in longer.items():
        edits.append(Edit(head.site, _cap(head, list(dict.fromkeys(last))), Positions.at(text)))
    return edits


def _cap(head: Unembedding, tokens: Sequence[int]) -> ReadWrite:
    """No token of these gets likelier than the average one of the vocabulary.

    What is written for one moves the others a little, too; so all are solved for at once, as if each was capped.
    """
    read = torch.stack([head.read(token) for token in tokens])
    write = torch.stack([head.write(token) for token in tokens])
    together = torch.linalg.solve(write @ read.T, write)  # row i moves token i by one nat, and the others by none
    return ReadWrite(read.float(), -together.float(), low=0.0)
