"""Phrases of a prompt to token positions, on tokenizers that merge at a phrase's edges and split characters."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.text.spans import Part, Pattern, Phrase, find_spans, find_spans_in_rendered, render

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TEXT = "Name a fruit.Do not use commas, please. Do not use commas, or naïve words like 東京 and 🍎."


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE that has learned merges over punctuation and words (`.Do`, ` not use`), with a chat template."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        ["a fruit.Do not use", ".Do not use commas. Do"] * 20,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = CHAT
    return made


def covered(tokenizer: Any, prompt: Any, span: tuple[int, int], **options: Any) -> str:
    return tokenizer.decode(render(tokenizer, prompt, **options).ids[slice(*span)])


def characters(tokenizer: Any, prompt: Any, span: tuple[int, int], **options: Any) -> tuple[int, int]:
    offsets = render(tokenizer, prompt, **options).offsets
    return offsets[span[0]][0], offsets[span[1] - 1][1]


class TestPhrases:
    def test_tokens_are_those_that_hold_its_characters_and_no_others(self, tokenizer: Any) -> None:
        """Checked token by token against the offsets: the one after the phrase isn't in, merged ones are."""
        rendered = render(tokenizer, TEXT)
        start = rendered.text.index("Do not use commas")
        stop = start + len("Do not use commas")
        (span, _) = find_spans(tokenizer, TEXT, "Do not use commas")
        for i, (a, b) in enumerate(rendered.offsets):
            assert (span[0] <= i < span[1]) == (a < stop and b > start), i
        assert "Do not use commas" in covered(tokenizer, TEXT, span)
        assert characters(tokenizer, TEXT, span)[0] <= start

    def test_a_merge_over_the_edge_is_found(self, tokenizer: Any) -> None:
        """The phrase's own tokens are no part of the prompt's: a search for them would miss it."""
        alone = tokenizer("Do not use commas", add_special_tokens=False)["input_ids"]
        ids = list(render(tokenizer, TEXT).ids)
        first = ids[slice(*find_spans(tokenizer, TEXT, Phrase("Do not use commas", 0))[0])]
        assert first[: len(alone)] != alone
        assert not any(ids[i : i + len(alone)] == alone for i in range(15))

    def test_occurrences(self, tokenizer: Any) -> None:
        both = find_spans(tokenizer, TEXT, "Do not use commas")
        assert len(both) == 2
        assert find_spans(tokenizer, TEXT, Phrase("Do not use commas", 0)) == both[:1]
        assert find_spans(tokenizer, TEXT, Phrase("Do not use commas", 1)) == both[1:]
        with pytest.raises(TrimtabError, match=r"2 times.*occurrence 2"):
            find_spans(tokenizer, TEXT, Phrase("Do not use commas", 2))

    @pytest.mark.parametrize("phrase", ["naïve", "東京", "東", "🍎", "like 東京 and"])
    def test_characters_of_several_bytes(self, tokenizer: Any, phrase: str) -> None:
        (span,) = find_spans(tokenizer, TEXT, phrase)
        assert phrase in covered(tokenizer, TEXT, span)
        start = render(tokenizer, TEXT).text.index(phrase)
        assert characters(tokenizer, TEXT, span) == (start, start + len(phrase))

    def test_several_phrases_in_order_and_joined_where_they_overlap(self, tokenizer: Any) -> None:
        (fruit,) = find_spans(tokenizer, TEXT, "fruit")
        (apple,) = find_spans(tokenizer, TEXT, "🍎")
        assert find_spans(tokenizer, TEXT, ["🍎", "fruit"]) == (fruit, apple)
        (wide,) = find_spans(tokenizer, TEXT, ["Name a fruit", "a fruit."])
        assert "Name a fruit." in covered(tokenizer, TEXT, wide)

    def test_patterns(self, tokenizer: Any) -> None:
        assert find_spans(tokenizer, TEXT, Pattern(r"Do \w+ use commas")) == find_spans(
            tokenizer, TEXT, "Do not use commas"
        )
        with pytest.raises(TrimtabError, match="matches nothing"):
            find_spans(tokenizer, TEXT, Pattern(r"\d{9}"))
        with pytest.raises(TrimtabError, match="isn't a regular expression"):
            find_spans(tokenizer, TEXT, Pattern("(("))

    def test_plain_text(self, tokenizer: Any) -> None:
        (span,) = find_spans(tokenizer, TEXT, "fruit", chat=False)
        assert "fruit" in covered(tokenizer, TEXT, span, chat=False)
        assert span[0] < find_spans(tokenizer, TEXT, "fruit")[0][0]


MESSAGES = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "Be brief."},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Sing."},
]


class TestParts:
    def test_a_whole_message(self, tokenizer: Any) -> None:
        spans = [find_spans(tokenizer, MESSAGES, part) for part in (Part(), Part("user", 0), Part("user"))]
        assert [covered(tokenizer, MESSAGES, span) for (span,) in spans] == ["Be brief.", "Be brief.", "Sing."]
        assert spans[0][0][1] < spans[1][0][0] < spans[2][0][0]

    def test_the_system_option(self, tokenizer: Any) -> None:
        (span,) = find_spans(tokenizer, "Sing.", Part("system"), system="Be brief.")
        assert covered(tokenizer, "Sing.", span, system="Be brief.") == "Be brief."

    def test_a_message_that_is_not_there(self, tokenizer: Any) -> None:
        with pytest.raises(TrimtabError, match="no tool message number -1; the messages are system, user"):
            find_spans(tokenizer, MESSAGES, Part("tool"))
        with pytest.raises(TrimtabError, match="plain text"):
            find_spans(tokenizer, "Sing.", Part("user"), chat=False)


class TestWhatAnotherProgramHasRendered:
    MARKS = (Phrase("Sing", 0), Part("system"))

    def test_the_same_spans(self, tokenizer: Any) -> None:
        rendered = render(tokenizer, MESSAGES)
        spans = find_spans_in_rendered(tokenizer, rendered.text, rendered.ids, self.MARKS, messages=MESSAGES)
        assert spans == find_spans(tokenizer, MESSAGES, self.MARKS)
        assert find_spans_in_rendered(tokenizer, rendered.text, rendered.ids, "Sing") == find_spans(
            tokenizer, MESSAGES, "Sing"
        )

    def test_other_tokens_or_another_text(self, tokenizer: Any) -> None:
        rendered = render(tokenizer, MESSAGES)
        with pytest.raises(TrimtabError, match="tokens differ from those of its text"):
            find_spans_in_rendered(tokenizer, rendered.text, rendered.ids[1:], self.MARKS, messages=MESSAGES)
        other = [*MESSAGES[:-1], {**MESSAGES[-1], "content": "Dance."}]
        with pytest.raises(TrimtabError, match="render differently here than there"):
            find_spans_in_rendered(tokenizer, rendered.text, rendered.ids, self.MARKS, messages=other)
        with pytest.raises(TrimtabError, match="plain text and has no system message"):
            find_spans_in_rendered(tokenizer, rendered.text, rendered.ids, self.MARKS)


class TestWhatCannotBeFound:
    def test_an_absent_phrase_shows_the_closest(self, tokenizer: Any) -> None:
        with pytest.raises(TrimtabError) as caught:
            find_spans(tokenizer, TEXT, "do not use any commas")
        assert "isn't in the prompt" in str(caught.value)
        assert "»Do not use commas" in str(caught.value)

    @pytest.mark.parametrize("empty", ["", "  ", []])
    def test_nothing_to_emphasize(self, tokenizer: Any, empty: Any) -> None:
        with pytest.raises(TrimtabError, match="emphasize"):
            find_spans(tokenizer, TEXT, empty)

    def test_a_tokenizer_without_offsets(self, tokenizer: Any) -> None:
        class Slow:
            chat_template = None
            is_fast = False

            def __call__(self, text: str) -> dict:
                return {"input_ids": [1, 2]}

        with pytest.raises(UnsupportedError, match="fast version"):
            find_spans(Slow(), TEXT, "fruit")
