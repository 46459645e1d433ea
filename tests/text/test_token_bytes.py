"""Tokens that are parts of characters: their bytes join to the text's."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.text.token_bytes import token_bytes


def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte, as GPT-2's vocabulary begins."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def fallback() -> PreTrainedTokenizerFast:
    """A token for each byte, as SentencePiece writes what its vocabulary lacks."""
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    inner = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    inner.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


TOKENIZERS = [byte_level(), fallback()]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte level", "fallback"])
@given(text=st.text(max_size=20))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_they_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(token_bytes(tokenizer, token) or b"" for token in ids) == text.encode()


def test_what_is_not_known() -> None:
    assert token_bytes(TOKENIZERS[1], 0) == b"<unk>"
    assert token_bytes(TOKENIZERS[1], 10_000) is None
