"""Where an answer is read: what can be asked for, and the tokens that this comes to."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.text.answers import LAST, EncodedSide, ReadAt, as_read_at, check_read_at, encode_sides, read_positions
from trimtab.text.pairs import Pair

EVERY = ReadAt("answer")


MERGES = [(">", "Ċ"), (">Ċ", "Ċ"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("Ġ", "y"), (":", "Ġ"), ("e", "s"), ("Ġy", "es"), ("Ġ", "Ã")]


def byte_level(*, trims: bool = False, added: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE that merges across words' edges, with offsets that leave out spaces or don't."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: i for i, sign in enumerate([*signs, *(a + b for a, b in MERGES)])}
    inner = Tokenizer(models.BPE(vocabulary, MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.ByteLevel(trim_offsets=trims)
    if added:
        inner.add_tokens([added])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


BYTES = {trims: byte_level(trims=trims) for trims in (False, True)}


def words(begins: bool = False) -> PreTrainedTokenizerFast:
    """A word a token; with `begins`, a token before and one after every text."""
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(9))])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        special = [("<s>", 0), ("</s>", 1)]
        inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


# ---- what can be asked for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("last", LAST),
        ("answer", EVERY),
        ("first:8", ReadAt("first", count=8)),
        ("after:</think>", ReadAt("after", marker="</think>")),
        ("after:a:b", ReadAt("after", marker="a:b")),
        (r'after:"\n\n"', ReadAt("after", marker="\n\n")),
        ('after:"</think>"', ReadAt("after", marker="</think>")),
        ("after: x", ReadAt("after", marker=" x")),
    ],
)
def test_what_is_parsed(text: str, expected: ReadAt) -> None:
    assert ReadAt.parse(text) == as_read_at(text) == as_read_at(expected) == expected
    assert ReadAt.parse(str(expected)) == expected


@given(st.text(min_size=1), st.integers(min_value=1))
def test_what_is_written_is_read_back(marker: str, count: int) -> None:
    for rule in (ReadAt("after", marker=marker), ReadAt("first", count=count), EVERY, LAST):
        assert ReadAt.parse(str(rule)) == rule


@pytest.mark.parametrize(
    "text", ["", "first", "first:", "first:x", "first:-1", "first:٣", "answer:", "all", "after", "Last"]
)
def test_what_is_not_known_is_refused_with_what_is(text: str) -> None:
    with pytest.raises(TrimtabError, match="use last, answer, first:K or after:MARKER"):
        ReadAt.parse(text)


def test_values_check_themselves() -> None:
    for text, said in (("first:0", "1 or more"), ("after:", "empty"), ('after:""', "empty"), ('after:"x', "JSON")):
        with pytest.raises(TrimtabError, match=said):
            ReadAt.parse(text)
    for odd in ({"kind": "first"}, {"kind": "answer", "count": 2}, {"kind": "after"}, {"kind": "last", "marker": "x"}):
        with pytest.raises(TrimtabError, match="'first' needs a count, and 'after' a marker"):
            ReadAt(**odd)  # type: ignore[arg-type]
    with pytest.raises(TrimtabError, match="read at last, answer, first, after"):
        ReadAt("middle")  # type: ignore[arg-type]
    assert check_read_at(None, "letters") is None
    assert check_read_at("answer", "answers") == EVERY
    with pytest.raises(TrimtabError, match="read at their letter"):
        check_read_at("last", "letters")


# ---- which tokens these are ----------------------------------------------------------------------------------


def encoded(tokenizer: Any, answer: str, prompt: str = "so") -> EncodedSide:
    text, _ = encode_sides(tokenizer, Pair(answer, answer + " no", prompt, "answers"))
    return text


def pieces(tokenizer: Any, text: EncodedSide, read_at: ReadAt) -> list[str]:
    return [tokenizer.decode([text.ids[p]]) for p in read_positions(tokenizer, text, read_at)]


def test_the_answer_is_what_comes_after_the_prompt() -> None:
    tokenizer = byte_level()
    text = encoded(tokenizer, "yes, it is so.", prompt="Is it so?")
    assert tokenizer.decode(text.ids[: text.start]) == "Is it so?"
    assert "".join(pieces(tokenizer, text, EVERY)) == "yes, it is so."
    every = list(read_positions(tokenizer, text, EVERY))
    assert list(read_positions(tokenizer, text, LAST)) == every[-1:] == [len(text.ids) - 1]
    assert list(read_positions(tokenizer, text, ReadAt("first", count=2))) == every[:2]
    assert list(read_positions(tokenizer, text, ReadAt("first", count=999))) == every


@pytest.mark.parametrize("trims", [False, True])
def test_a_token_that_holds_some_of_the_marker_is_not_after_it(trims: bool) -> None:
    tokenizer = byte_level(trims=trims)
    answer = "It is.\n</think>\n\nAnswer: yes, it"
    whole = [tokenizer.decode([i]) for i in tokenizer(answer)["input_ids"]]
    assert ">\n\n" in whole  # the marker's end is merged with what follows
    text = encoded(tokenizer, answer)
    assert "".join(pieces(tokenizer, text, ReadAt("after", marker="</think>"))) == "Answer: yes, it"
    assert "".join(pieces(tokenizer, text, ReadAt("after", marker="</think"))) == ">\n\nAnswer: yes, it"


@pytest.mark.parametrize("trims", [False, True])
def test_white_space_at_the_markers_end_may_belong_to_the_next_word(trims: bool) -> None:
    tokenizer = BYTES[trims]

    def after(answer: str, marker: str) -> list[str]:
        return pieces(tokenizer, encoded(tokenizer, answer), ReadAt("after", marker=marker))

    assert after("a. yes", "a.") == after("a. yes", "a. ") == [" yes"]
    assert after("a. b", "a.") == [" ", "b"]
    assert (
        after("a. b", "a. ") == after("a: b", "a: ") == after("a: b", "a:") == ["b"]
    )  # of the last, ": " is one token


def test_a_marker_that_is_a_token_of_its_own_and_the_first_of_several() -> None:
    tokenizer = byte_level(added="</think>")
    parts = pieces(tokenizer, encoded(tokenizer, "It is</think>so. </think> no"), ReadAt("after", marker="</think>"))
    assert "".join(parts) == "so. </think> no"


PARTS = st.lists(st.sampled_from([*"abs<>.é", " ", "\n", " yes", "so", "Answer: ", "</think>"]), max_size=9).map(
    "".join
)


@settings(deadline=None)
@given(PARTS, st.sampled_from(["</think>", "</think>\n", "Answer:", "Answer: ", "\n\n", "b", "> ", "so"]), PARTS)
@pytest.mark.parametrize("trims", [False, True])
def test_tokens_after_a_marker_are_those_of_the_text_after_it(trims: bool, before: str, marker: str, rest: str) -> None:
    """By the lengths of the tokens' own texts, without the tokenizer's offsets."""
    tokenizer, answer = BYTES[trims], before + marker + rest
    said, ids = answer.encode(), tokenizer(answer)["input_ids"]
    end, at, expected = said.index(marker.encode()) + len(marker.encode()), 0, []
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        start, at = at, at + len(token)  # each of its signs is a byte
        if at > end and not said[start:end].strip():
            expected.append(i)
    assert at == len(said)
    text = EncodedSide(tuple(ids), 0, answer)
    if expected:
        assert list(read_positions(tokenizer, text, ReadAt("after", marker=marker))) == expected
    else:
        with pytest.raises(TrimtabError, match="nothing comes after"):
            read_positions(tokenizer, text, ReadAt("after", marker=marker))


def test_characters_of_several_tokens() -> None:
    tokenizer = byte_level()
    text = encoded(tokenizer, "é語 ü")
    after = list(read_positions(tokenizer, text, ReadAt("after", marker="é語")))
    assert tokenizer.decode([text.ids[p] for p in after]) == " ü"


def test_a_marker_that_is_not_there_or_has_nothing_after_it() -> None:
    tokenizer = byte_level()
    with pytest.raises(TrimtabError, match="the answer has no '</think>' in it: 'It is so'"):
        pieces(tokenizer, encoded(tokenizer, "It is so"), ReadAt("after", marker="</think>"))
    with pytest.raises(TrimtabError, match=r"nothing comes after '</think>' in the answer: '… .* so</think>'"):
        pieces(tokenizer, encoded(tokenizer, "so " * 99 + "so</think>"), ReadAt("after", marker="</think>"))
    with pytest.raises(TrimtabError, match="has no 'It is' in it"):  # it is in the prompt
        pieces(tokenizer, encoded(tokenizer, "so", prompt="It is"), ReadAt("after", marker="It is"))


def test_bare_texts_are_all_answer_without_special_tokens() -> None:
    tokenizer = words(begins=True)
    (text, _) = encode_sides(tokenizer, Pair("w1 w2 w3", "w4"))
    assert text.ids == (0, 4, 5, 6, 1)
    assert list(read_positions(tokenizer, text, EVERY)) == [1, 2, 3]
    assert list(read_positions(tokenizer, text, ReadAt("first", count=2))) == [1, 2]
    assert list(read_positions(tokenizer, text, ReadAt("after", marker="w1"))) == [2, 3]
    assert list(read_positions(tokenizer, text, LAST)) == [4]  # as it always was


def test_a_tokenizer_without_offsets_reads_all_but_after_a_marker() -> None:
    class Slow:
        chat_template = None
        is_fast = False

        def __call__(self, text: str, **options: Any) -> Any:
            return {"input_ids": [len(word) for word in text.split()]}

    text = encoded(Slow(), "ab c", "x")
    assert list(read_positions(Slow(), text, EVERY)) == [1, 2]
    with pytest.raises(UnsupportedError, match="load its fast version"):
        read_positions(Slow(), text, ReadAt("after", marker="ab"))


# ---- system prompts ------------------------------------------------------------------------------------------

KEEPS = "{% for m in messages %}{{ m.content }} {% endfor %}w0"
DROPS = "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}w0"


def test_each_side_is_rendered_under_its_own_system_prompt() -> None:
    tokenizer = words()
    tokenizer.chat_template = KEEPS
    pair = Pair("w5 w6", "w5 w6", "w3", "answers", positive_system="w1", negative_system="w2")
    assert [tokenizer.decode(side.ids) for side in encode_sides(tokenizer, pair)] == [
        "w1 w3 w0 w5 w6",
        "w2 w3 w0 w5 w6",
    ]
    talk = Pair((("user", "w4"), ("assistant", "w5")), "w6", "w3", "answers")
    assert [tokenizer.decode(side.ids) for side in encode_sides(tokenizer, talk)] == ["w3 w4 w0 w5", "w3 w0 w6"]


def test_a_template_that_leaves_system_prompts_out_is_an_error() -> None:
    tokenizer = words()
    tokenizer.chat_template = DROPS
    talk = [{"role": "system", "content": "w1"}, {"role": "user", "content": "w3"}]
    for pair in (
        Pair("w5", "w6", "w3", "answers", positive_system="w1", negative_system="w2"),
        Pair("w5", "w6", "w3", "answers", positive_system="w1", negative_system="w1"),
        Pair("w5", "w6", talk, "answers"),  # type: ignore[arg-type]
    ):
        with pytest.raises(TrimtabError, match="the chat template drops system prompts"):
            encode_sides(tokenizer, pair)
    tokenizer.chat_template = None
    with pytest.raises(TrimtabError, match="a system message needs a chat template"):
        encode_sides(tokenizer, Pair("w5", "w6", "w3", "answers", positive_system="w1"))


def test_other_shapes_are_no_answers() -> None:
    with pytest.raises(TrimtabError, match="pairs of prompts"):
        encode_sides(words(), Pair("w1", "w2", "", "prompts"))
    with pytest.raises(TrimtabError, match="has no tokens"):
        encode_sides(words(), Pair(" ", "w2", "w1", "answers"))
