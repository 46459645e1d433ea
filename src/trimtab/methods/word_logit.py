"""Words included in answers, or excluded from them, by their logits: an edit after the last block.

    include:  h[p] <- h[p] + s(p) d_k        until the word has occurred;  s(p) grows from `first` to `last` nats
    exclude:  h[p] <- h[p] - relu(r_k . h[p]) d_k         at every token that produces a generated one

with `r_k` the direction that reads token k's logit, minus the mean logit, and `d_k` the direction that raises it by one
nat and changes all others as little as possible (`learn.unembedding`). This is trimtab's own method: the direction is
that of the logit lens (nostalgebraist, 2020), made selective by the covariance of all tokens' directions. An excluded
token becomes at most as likely as the average token of the vocabulary.

A growing push lets the word occur where it fits best, and makes it occur eventually. If a word has several tokens, the
growing push is for the first one; each further token is pushed right after the ones before it.
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

PROMPT_COUNT = 8
"""The number of prompts from which the effect of the model's last norm is estimated."""
STEP = 8
"""The push grows once per this many tokens."""
CONTINUATION_NATS = 20.0
"""The push in nats for the further tokens of a word, right after the ones before them."""
MAX_WORD_TOKENS = 4
"""The maximum number of tokens of a word."""
MAX_TRACKED = 6
"""The maximum number of texts that can be tracked in one answer."""
ANSWER_POSITIONS = Positions.from_last_prompt_token()


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
    """Learn to include a word in answers, or with `exclude` to avoid it, by its logit after the last block.

    The steering is for one word, and doesn't need the word in the prompt. It acts on the spelling, not on the meaning:
    an included word occurs where the model finds it least unlikely, which may still read oddly.

    Args:
        lm: The model.
        word: One word, of at most four tokens.
        exclude: Avoid the word: as given, in lower case, capitalized and in upper case, as far as these have few enough
            tokens to be tracked. The card's `spellings` lists the excluded ones.
        first: The push of the word's first token at the start of the answer, in nats.
        last: The push from token number `tokens` of the answer on. In between, it grows linearly.
        tokens: See `last`.
        base: Prompts from which the effect of the model's last norm is estimated (default: eight included ones).
        head: The model's unembedding (`learn.unembedding`), to read it only once for many words.

    Returns:
        A steering of the residual stream after the last block. The push stops once the word has occurred.

    Raises:
        TrimtabError: The word is empty, contains spaces or has too many tokens, or the pushes are negative or decrease.
        UnsupportedError: The engine doesn't provide gradients or logits, or the model's logits can't be computed from
            its output embeddings and a norm.
    """
    check_lm(lm, "training")
    word = _check_word(word, first, last, tokens)
    spellings = _trackable(_spellings(lm, word, exclude))
    head = unembedding(lm, queries("learn")[:PROMPT_COUNT] if base is None else base) if head is None else head
    if exclude:
        edits = _exclude_edits(head, spellings)
        options: dict[str, object] = {"word": word, "exclude": True}
    else:
        edits = _include_edits(head, word, spellings[0], _steps(first, last, tokens))
        options = {"word": word, "exclude": False, "first": first, "last": last, "tokens": tokens}
    options["spellings"] = [spelling.text for spelling in spellings]
    activation_norm = head.typical_scale * head.rows.shape[1] ** 0.5
    measured = {
        "explained": round(head.explained, 6),
        "activation_norm": {str(head.site.layer): round(activation_norm, 6)},
    }
    return Steering(tuple(edits), Card("word-logit", lm.identity, word, options, measured, versions()))


@dataclass(frozen=True)
class Spelling:
    """A spelling of a word in a text, its tokens, and the decoded text of each of its proper prefixes."""

    text: str
    ids: tuple[int, ...]
    prefixes: tuple[str, ...]


def _check_word(word: str, first: float, last: float, tokens: int) -> str:
    word = word.strip()
    if not word:
        raise TrimtabError("a word to include or exclude can't be empty")
    if len(word.split()) > 1:
        raise TrimtabError(f"{word!r} is more than one word; learn each one, and add the steerings")
    if not (0 <= first <= last < math.inf):
        raise TrimtabError(f"a push is 0 or more nats and doesn't decrease, got first {first} and last {last}")
    if tokens < 1:
        raise TrimtabError(f"a push grows over one token or more, got {tokens}")
    return word


def _spellings(lm: LM, word: str, exclude: bool) -> list[Spelling]:
    """To include, the spelling with the fewest tokens; to exclude, all spellings in which the word may occur."""
    forms = dict.fromkeys([word, _capitalized(word)])
    if exclude:
        forms |= dict.fromkeys([word.lower(), word.upper()])
    by_ids: dict[tuple[int, ...], Spelling] = {}
    errors: list[TrimtabError] = []
    for text in [f" {form}" for form in forms] + (list(forms) if exclude else []):
        try:
            spelling = _encode_spelling(lm, text)
            by_ids.setdefault(spelling.ids, spelling)
        except TrimtabError as error:  # upper case may need many tokens, and is rare in texts
            errors.append(error)
    if errors and (not by_ids or (exclude and word not in {spelling.text.strip() for spelling in by_ids.values()})):
        raise errors[0]
    return list(by_ids.values()) if exclude else [min(by_ids.values(), key=lambda spelling: len(spelling.ids))]


def _trackable(spellings: Sequence[Spelling]) -> list[Spelling]:
    """The spellings that can be tracked in one answer, in order; the word as given comes first."""
    texts = list(dict.fromkeys(spelling.prefixes[-1].strip() for spelling in spellings if spelling.prefixes))[
        :MAX_TRACKED
    ]
    return [spelling for spelling in spellings if not spelling.prefixes or spelling.prefixes[-1].strip() in texts]


def _capitalized(word: str) -> str:
    return word[:1].upper() + word[1:]


def _encode_spelling(lm: LM, text: str) -> Spelling:
    ids = tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not 1 <= len(ids) <= MAX_WORD_TOKENS:
        raise TrimtabError(
            f"{text.strip()!r} has {len(ids)} tokens in this model; a logit can only be moved for words of at most"
            f" {MAX_WORD_TOKENS}"
        )
    if lm.tokenizer.unk_token_id in ids:
        raise TrimtabError(f"{text.strip()!r} has letters that this model's tokenizer doesn't know")
    prefixes = tuple(lm.tokenizer.decode(ids[:n]) for n in range(1, len(ids)))
    if not all(text.strip().startswith(part.strip()) and part.strip() for part in prefixes):
        raise TrimtabError(
            f"{text.strip()!r} contains tokens that aren't whole letters ({', '.join(map(repr, prefixes))}), so it"
            " can't be followed as it is written; use learn_word or learn_distill"
        )
    return Spelling(text, ids, prefixes)


# ---- include -------------------------------------------------------------------------------------------------


def _steps(first: float, last: float, tokens: int) -> list[tuple[Positions, float]]:
    """Ranges of positions in an answer, and the push there in nats."""
    count = max(1, math.ceil(tokens / STEP)) + (first != last)
    steps = []
    for i in range(count):
        end = None if i == count - 1 else Bound(END, (i + 1) * STEP - 1)
        nats = first + (last - first) * i / max(1, count - 1)
        steps.append((Positions(((Bound(END, i * STEP - 1), end),)), nats))
    return steps


def _include_edits(
    head: Unembedding, word: str, spelling: Spelling, steps: Sequence[tuple[Positions, float]]
) -> list[Edit]:
    """The growing push of the first token, and the push of each further one, until the word has occurred."""
    # similar tokens are raised a little too, such as the capitalized word, which counts as an occurrence
    forms = list(dict.fromkeys([spelling.text.strip(), word, _capitalized(word)]))
    forms = forms[: (MAX_TRACKED - len(spelling.prefixes)) // 2]
    lacking = ~_union([find(text) for text in forms for find in (Positions.after, Positions.at)])
    begins = lacking & ~_union([Positions.at(text) for text in spelling.prefixes]) if spelling.prefixes else lacking
    push = Add(head.write(spelling.ids[0]).float())
    edits = [Edit(head.site, push, where & begins, nats) for where, nats in steps if nats]
    for token, text in zip(spelling.ids[1:], spelling.prefixes, strict=True):
        edits.append(Edit(head.site, Add(head.write(token).float()), Positions.at(text) & lacking, CONTINUATION_NATS))
    return edits


def _union(some: Sequence[Positions]) -> Positions:
    union = some[0]
    for positions in some[1:]:
        union = union | positions
    return union


# ---- exclude -------------------------------------------------------------------------------------------------


def _exclude_edits(head: Unembedding, spellings: Sequence[Spelling]) -> list[Edit]:
    """One cap for all single-token spellings; for longer ones a cap of the last token, right after the others."""
    edits = []
    if single := list(dict.fromkeys(spelling.ids[0] for spelling in spellings if len(spelling.ids) == 1)):
        edits.append(Edit(head.site, _cap(head, single), ANSWER_POSITIONS))
    longer: dict[str, list[int]] = {}
    for spelling in spellings:
        if len(spelling.ids) > 1:
            longer.setdefault(spelling.prefixes[-1].strip(), []).append(spelling.ids[-1])
    for text, last in longer.items():
        edits.append(Edit(head.site, _cap(head, list(dict.fromkeys(last))), Positions.at(text)))
    return edits


def _cap(head: Unembedding, tokens: Sequence[int]) -> ReadWrite:
    """A cap that makes these tokens at most as likely as the average token of the vocabulary.

    The direction that lowers one token also changes the others a little, so all directions are solved for jointly.
    """
    read = torch.stack([head.read(token) for token in tokens])
    write = torch.stack([head.write(token) for token in tokens])
    together = torch.linalg.solve(write @ read.T, write)  # row i raises only token i, by one nat
    return ReadWrite(read.float(), -together.float(), low=0.0)
