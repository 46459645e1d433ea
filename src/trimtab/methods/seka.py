"""SEKA: Li et al., "Spectral Attention Steering for Prompt Highlighting", arXiv 2603.01281, section 3.

    h, h+, h-     keys of a phrase in a context: alone, after a question that it answers, after one that it doesn't
    U+ S+ V+ = svd(h' h+ / n)                    P+ = the first k+ columns of U+, times their transpose
    U- S- V- = svd(h' h- / n)                    P- = all but the first k- columns of U-, times their transpose
    k <- k + (g+ P+ k + g- P- k) / 2             for the keys of a highlighted phrase, in heads where |h+ - h-| is large

with k+ and k- the smallest numbers of directions that contain a given share of the singular values. The map is
symmetric for each head, and a layer is one `ReadWrite` with its heads' maps as diagonal blocks.

Here the edited keys are those in the KV cache, after the rotary embedding; the released code edits them before it. To
make them comparable, the three texts are padded with line breaks at the front, so that the phrase is at the same
positions in all of them. The paper keeps heads above a threshold of |h+ - h-| that it tunes to the model; here it is a
share of all heads, those with the largest |h+ - h-| relative to the norm of their keys.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trimtab.engines.request import Text
from trimtab.engines.transformers.attention import score_layers
from trimtab.engines.transformers.keys import keys_of
from trimtab.errors import TrimtabError
from trimtab.keywords import class_keywords, keywords
from trimtab.learn.contrast import Progress, check_layers, read_batches, versions
from trimtab.learn.inputs import check_lm
from trimtab.steering import Card, Edit, Positions, ReadWrite, Site, Steering
from trimtab.text.spans import Emphasis

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.text.chat import Prompt

POSITIVE, NEGATIVE, SHARE, HEADS = 0.8, 0.0, 0.9, 0.5
"""g+, g-, and the shares of singular values and of heads. The paper tunes all of them to the model and the task."""


@class_keywords
@dataclass(frozen=True)
class Highlight:
    """A context, a phrase that occurs in it once, a question that the phrase answers, and one that it doesn't."""

    context: str
    phrase: str
    relevant: str
    irrelevant: str

    def __post_init__(self) -> None:
        if not self.phrase or self.context.count(self.phrase) != 1:
            raise TrimtabError(f"the phrase {self.phrase!r} must occur exactly once in the context {self.context!r}")


def highlights(count: int = 64, seed: int = 0) -> list[Highlight]:
    """Synthetic examples about people (where they live, what they eat …), each with a relevant and another question."""
    generator = random.Random(seed)
    examples = []
    for _ in range(count):
        name = generator.choice(NAMES)
        facts = generator.sample([(q, s, generator.choice(values)) for q, s, values in FACTS], 3)
        context = " ".join(sentence.format(name, value) for _, sentence, value in facts)
        (question, _, phrase), (other, _, _) = generator.sample(facts, 2)
        examples.append(Highlight(context, phrase, question.format(name), other.format(name)))
    return examples


@keywords
def learn_seka(
    lm: LM,
    examples: Sequence[Highlight] | None = None,
    layers: int | Sequence[int] | None = None,
    *,
    positive: float = POSITIVE,
    negative: float = NEGATIVE,
    share: float = SHARE,
    heads: float = HEADS,
    progress: Progress | None = None,
) -> Steering:
    """Learn the directions of keys that encode a phrase's relevance; `seka` then amplifies them in a prompt's phrase.

    Args:
        lm: The model.
        examples: The examples to learn from (default: 64 synthetic `highlights()`).
        layers: The layers at which to edit keys (default: all that have attention).
        positive: g+, the amplification of relevant directions.
        negative: g-, the amplification of the directions outside the leading irrelevant ones. With 0 the maps have a
            low rank, otherwise full rank.
        share: The share of the singular values, from 0 to 1. The larger it is, the more directions count as relevant.
        heads: The share of all heads at these layers to edit: those whose keys differ most between the two questions.
        progress: `progress(done, total)` counts examples.

    Returns:
        A steering of the whole prompt (`Positions.prompt()`). Its strength multiplies g+ and g-.

    Raises:
        TrimtabError: There are fewer than two examples, or a share is out of range.
        UnsupportedError: The model's keys can't be steered, or the engine doesn't show which keys each head stores.
    """
    check_lm(lm, "modules")
    example_list = highlights() if examples is None else list(examples)
    if len(example_list) < 2:
        raise TrimtabError(f"SEKA learns from two examples or more, got {len(example_list)}")
    for name, value in (("share", share), ("heads", heads)):
        if not 0 < value <= 1:
            raise TrimtabError(f"{name} is a share above 0, of 1 at most, got {value!r}")
    chosen = check_layers(lm, score_layers(lm.layout) if layers is None else layers, 0)
    head_counts = {layer: keys_of(lm.layout, Site(layer, "keys")).heads for layer in chosen}
    keys_by_site = _keys(lm, example_list, [Site(layer, "keys") for layer in chosen], progress)
    keys_by_head = {site: _by_head(keys, head_counts[site.layer]) for site, keys in keys_by_site.items()}
    key_shifts = {
        (site, head): _key_shift(*head_keys)
        for site, site_keys in keys_by_head.items()
        for head, head_keys in enumerate(site_keys)
    }
    edited_heads = set(
        sorted(key_shifts, key=lambda place: (-key_shifts[place], place))[: math.ceil(heads * len(key_shifts))]
    )
    edits = []
    for site, each in keys_by_head.items():
        maps = []
        for head, (plain, with_relevant, with_irrelevant) in enumerate(each):
            projection = positive * _leading_projection(plain, with_relevant, share) + negative * _remaining_projection(
                plain, with_irrelevant, share
            )
            maps.append(projection / 2 if (site, head) in edited_heads else torch.zeros_like(projection))
        operation = as_read_write(maps)
        if operation.rank:
            edits.append(Edit(site, operation, Positions.prompt()))
    options = {"positive": positive, "negative": negative, "share": share, "heads": heads}
    measured = {
        "examples": len(example_list),
        "moved": {f"{s.layer}.{head}": round(x, 4) for (s, head), x in key_shifts.items()},
    }
    digest = hashlib.sha256(repr(example_list).encode()).hexdigest()
    return Steering(tuple(edits), Card("seka", lm.identity, digest, options, measured, versions()))


@keywords
def seka(
    lm: LM,
    prompt: Prompt,
    emphasize: Emphasis | Sequence[Emphasis],
    learned: Steering,
    *,
    system: str | None = None,
    chat: bool | None = None,
) -> Steering:
    """Apply the result of `learn_seka` to phrases of this prompt.

    Args:
        lm: The model.
        prompt: The prompt.
        emphasize: The phrases: a phrase, a `Pattern`, a `Part`, or several of these.
        learned: The steering of `learn_seka`.
        system: A system message.
        chat: Whether to apply the chat template.

    Returns:
        A steering for this prompt only.

    Raises:
        TrimtabError: A phrase isn't in the prompt.
    """
    spans = lm.spans(prompt, emphasize, system=system, chat=chat)
    return learned.at(reduce(or_, (Positions.span(*span) for span in spans)))


def as_read_write(maps: Sequence[Tensor]) -> ReadWrite:
    """Symmetric maps `[size, size]`, one per head, as one operation on the heads' concatenated activations.

    Its rows are the maps' eigenvectors with nonzero eigenvalues.
    """
    size, total = len(maps[0]), sum(map(len, maps))
    read, write = [], []
    for head, head_map in enumerate(maps):
        values, vectors = torch.linalg.eigh(head_map)
        for value, vector in zip(values, vectors.T, strict=True):
            if abs(float(value)) > 1e-9:
                row = torch.zeros(total, dtype=torch.float64)
                row[head * size : (head + 1) * size] = vector
                read.append(row)
                write.append(value * row)
    if not read:
        return ReadWrite(torch.zeros(0, total), torch.zeros(0, total))
    return ReadWrite(torch.stack(read).float(), torch.stack(write).float())


def _key_shift(plain: Tensor, with_one: Tensor, with_other: Tensor) -> float:
    """The mean distance between keys `[keys, size]` after the two questions, relative to the mean norm of the keys."""
    return float((with_one - with_other).norm(dim=-1).mean() / plain.norm(dim=-1).mean())


def _leading_projection(plain: Tensor, other: Tensor, share: float) -> Tensor:
    """The projection `[size, size]` on the leading left singular vectors of `plain.T @ other`, both `[keys, size]`."""
    vectors, count = _singular_vectors(plain, other, share)
    return vectors[:, :count] @ vectors[:, :count].T


def _remaining_projection(plain: Tensor, other: Tensor, share: float) -> Tensor:
    """The projection on the remaining singular vectors."""
    vectors, count = _singular_vectors(plain, other, share)
    return vectors[:, count:] @ vectors[:, count:].T


def _singular_vectors(plain: Tensor, other: Tensor, share: float) -> tuple[Tensor, int]:
    vectors, sizes, _ = torch.linalg.svd(plain.T @ other / len(plain))
    held = (sizes / sizes.sum()).cumsum(0)
    return vectors, min(int((held < share - 1e-12).sum()) + 1, len(sizes))


def _by_head(keys: tuple[Tensor, Tensor, Tensor], heads: int) -> list[tuple[Tensor, ...]]:
    return list(zip(*(tensor.unflatten(1, (heads, -1)).unbind(1) for tensor in keys), strict=True))


def _keys(
    lm: LM, examples: Sequence[Highlight], sites: Sequence[Site], progress: Progress | None
) -> dict[Site, tuple[Tensor, Tensor, Tensor]]:
    """At each site, the keys of all phrases' tokens in each of the three texts, `[tokens, width]`, float64."""
    by_site: dict[Site, list[list[Tensor]]] = {site: [[], [], []] for site in sites}
    for batch in read_batches(lm, [_texts(lm, example) for example in examples], sites, progress):
        for site, values in batch.values.items():
            for members in values:
                for kind, x in enumerate(members):
                    by_site[site][kind].append(x.double().cpu())
    return {site: (torch.cat(a), torch.cat(b), torch.cat(c)) for site, (a, b, c) in by_site.items()}


def _texts(lm: LM, example: Highlight) -> list[Text]:
    """The context alone, after the relevant and after the irrelevant question, with the phrase at the same positions.

    Raises:
        TrimtabError: The tokenizer splits the phrase differently in the three texts.
    """
    framed = [f"\nContext: {example.context}"]
    framed += [
        f"\nQuestion: {question}\nContext: {example.context}" for question in (example.relevant, example.irrelevant)
    ]
    fill = lm.encode("\n", chat=False)[-1:] or lm.encode(".", chat=False)[-1:]  # some tokenizers drop line breaks
    ids, spans = [], []
    for text in framed:
        ids.append(list(lm.encode(text, chat=False)))
        (span,) = lm.spans(text, example.phrase, chat=False)
        spans.append(span)
    if len({stop - start for start, stop in spans}) > 1:
        raise TrimtabError(
            f"the phrase {example.phrase!r} is tokenized differently in other texts; use a phrase between spaces"
        )
    first = max(start for start, _ in spans)
    texts = []
    for text_ids, (start, stop) in zip(ids, spans, strict=True):
        lead = 1 if lm.bos_token_id is not None and text_ids[0] == lm.bos_token_id else 0
        filled = [*text_ids[:lead], *(fill * (first - start)), *text_ids[lead:]]
        texts.append(Text(filled, list(range(first, first + stop - start))))
    return texts


NAMES = ("Maria", "Jonas", "Priya", "Tom", "Aiko", "Samuel", "Lena", "Omar", "Ruth", "Pavel", "Irina", "Kofi")
FACTS = (
    ("Where does {} live?", "{} lives in {}.", ("Lisbon", "Oslo", "Nairobi", "Kyoto", "Lima", "Dublin", "Vienna")),
    ("What does {} eat?", "{} eats {}.", ("rice", "bread", "soup", "apples", "cheese", "noodles", "beans")),
    ("What is the work of {}?", "{} works as a {}.", ("nurse", "pilot", "baker", "lawyer", "farmer", "plumber")),
    ("What does {} play?", "{} plays the {}.", ("violin", "piano", "drums", "flute", "guitar", "harp", "trumpet")),
    ("Which animal does {} have?", "{} has a {}.", ("dog", "cat", "horse", "parrot", "rabbit", "goat", "turtle")),
    ("Which colour does {} like?", "{} likes {} best.", ("red", "green", "blue", "yellow", "purple", "orange")),
)
"""Questions about a person, sentences that answer them, and the possible values."""
