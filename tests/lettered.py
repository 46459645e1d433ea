"""A tiny model whose tokenizer has brackets and letters, each a token."""

from __future__ import annotations

import torch
from tiny import VOCABULARY, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.lm import LM

OPENING, A, B, CLOSING = 80, 81, 82, 83


def letters_lm(seed: int = 0, dtype: torch.dtype | None = None) -> LM:
    """`tiny("llama")` with that tokenizer, which has no chat template."""
    lm = tiny("llama", seed=seed, dtype=dtype)
    words = {**{f"w{i}": i for i in range(3, OPENING)}, "<pad>": 0, "<unk>": 2}
    words |= {"(": OPENING, "A": A, "B": B, ")": CLOSING}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), *(pre_tokenizers.Split(sign, "isolated") for sign in "()")]
    )
    assert max(words.values()) < VOCABULARY
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
    return LM(lm.model, tokenizer, name="tiny-letters")
