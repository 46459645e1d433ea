"""What generated tokens mean by the definition: from the decoded text up to each of them, looked through anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiny import naive_holds, naive_logits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.lm import LM
from trimtab.steering import Positions, Steering
from trimtab.steering.meanings import Meaning
from trimtab.steering.positions import Combined

ALPHABET = "ab<>"
PIECES = [a + b + c for a in ["", *ALPHABET] for b in ["", *ALPHABET] for c in ALPHABET if not (a and not b)]
"""All texts of one to three of these letters, so that a text to be looked for is cut everywhere by tokens."""


def tokenizer() -> PreTrainedTokenizerFast:
    """90 tokens: these pieces, and a few more. It has no chat template."""
    names = ["<pad>", "<s>", "<unk>", *PIECES, "x", "y", "z"]
    inner = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    assert len(names) == 90
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")


def modes(text: str, opens: str, closes: str) -> tuple[str, int]:
    """Where the text ends, `in` or `out` of what the markers enclose, and how many markers it has."""
    at, inside, count = 0, False, 0
    while (closes or not inside) and (place := text.find(closes if inside else opens, at)) >= 0:
        at = place + len(closes if inside else opens)
        inside, count = not inside, count + 1
    return ("in" if inside else "out"), count


def means(meaning: Meaning, prompt: str, before: str, token: str) -> bool:
    """Of a generated token behind such a text: what was generated `before` it, and the `prompt` before that."""
    if meaning.kind == "after":
        return meaning.texts[0] in before
    if meaning.kind == "at":
        return any(
            (before + token)[: i + 1].endswith(meaning.texts[0]) for i in range(len(before), len(before + token))
        )
    was, then = modes(prompt + before, *meaning.texts), modes(prompt + before + token, *meaning.texts)
    return was == then and was[0] == ("in" if meaning.kind == "thinking" else "out")


def resolved(positions: Positions, t: int, n: int, texts: Sequence[str]) -> bool:
    """Whether these are the positions of token `t` of a text whose prompt has `n` of these tokens."""
    rule = positions.rule
    if isinstance(rule, Combined):
        parts = [resolved(part, t, n, texts) for part in rule.parts]
        return not parts[0] if rule.operator == "not" else any(parts) if rule.operator == "any" else all(parts)
    if isinstance(rule, Meaning):
        return t >= n and means(rule, "".join(texts[:n]), "".join(texts[n:t]), texts[t])
    return naive_holds(type("Rule", (), {"positions": positions})(), t, n)  # type: ignore[arg-type]


def generate(lm: LM, text: str, steering: Steering | None, count: int) -> tuple[list[int], list[float]]:
    """Greedy decoding that recomputes everything at each step; the ids and their log-probabilities."""
    ids = lm.encode(text)
    start, logprobs = len(ids), []
    for _ in range(count):
        logits = naive_logits(lm, ids, start, steering.edits if steering else (), holding_in(lm, ids))[-1]
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids[start:], logprobs


def holding_in(lm: LM, ids: Sequence[int]) -> Any:
    """`holds(edit, t, n)` for a text of these tokens."""
    texts = [lm.tokenizer.decode([token]) for token in ids]
    return lambda edit, t, n: resolved(edit.positions, t, n, texts)
