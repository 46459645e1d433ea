"""Text out of tokens one at a time: whole characters, and stop texts that span tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from trimtab.text.detokenizer import Detokenizer


class Bytes:
    """A tokenizer of one token a byte, 256 being special."""

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        assert skip_special_tokens
        return bytes(token for token in tokens if token < 256).decode("utf-8", "replace")


def unfold(text: str, stop: Sequence[str] = ()) -> tuple[list[str], Detokenizer]:
    unfolding = Detokenizer(Bytes(), stop)
    pieces = [unfolding.add(byte) for byte in text.encode()]
    return [*pieces, unfolding.finish()], unfolding


@given(st.text(max_size=30))
@settings(max_examples=300, deadline=None)
def test_all_pieces_together_are_the_text(text: str) -> None:
    pieces, unfolding = unfold(text)
    assert "".join(pieces) == text
    assert not unfolding.stopped


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
@settings(max_examples=500, deadline=None)
def test_the_first_stop_text_ends_it(text: str, stop: list[str]) -> None:
    """However the text comes, it ends where the first stop text that is complete begins; nothing of it is shown."""
    pieces, unfolding = unfold(text, stop)
    shown = ""
    expected = text
    for end in range(len(text) + 1):
        if places := [text[:end].find(ending) for ending in stop if ending in text[:end]]:
            expected = text[: min(places)]
            break
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected
    assert unfolding.stopped == (expected != text or any(ending in text for ending in stop))


def test_a_character_is_shown_when_it_is_whole() -> None:
    unfolding = Detokenizer(Bytes())
    assert [unfolding.add(byte) for byte in "aé€".encode()] == ["a", "", "é", "", "", "€"]


def test_half_a_character_at_the_end_is_not_lost() -> None:
    unfolding = Detokenizer(Bytes())
    assert [unfolding.add(byte) for byte in "a€".encode()[:-1]] == ["a", "", ""]
    assert unfolding.finish() == Bytes().decode("€".encode()[:-1])


def test_special_tokens_have_no_text() -> None:
    unfolding = Detokenizer(Bytes(), ["b"])
    assert [unfolding.add(token) for token in (97, 256, 98, 97)] == ["a", "", "", ""]
    assert unfolding.stopped
    assert unfolding.finish() == ""


def test_a_first_space_that_only_context_tells() -> None:
    """SentencePiece's kind drops the space before the first token of whatever it decodes."""
    inner = Tokenizer(models.WordLevel({"▁the": 0, "▁sea": 1, "s": 2}, unk_token="s"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()

    class Wrapped:
        def decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
            return inner.decode(list(tokens), skip_special_tokens=skip_special_tokens)

    unfolding = Detokenizer(Wrapped())
    assert [unfolding.add(token) for token in (0, 1, 2, 1)] == ["the", " sea", "s", " sea"]


@pytest.mark.parametrize("stop", [["\n\n"], ["ab", "abc"], ["€"]])
def test_what_may_be_a_stop_text_is_held_back(stop: list[str]) -> None:
    text = f"x{stop[0][:-1]}y"
    assert "".join(unfold(text, stop)[0]) == text
