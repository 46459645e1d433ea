from __future__ import annotations

import itertools

import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab import LM, Add, Positions, Site, TrimtabError
from trimtab.methods.caa import BASE_FORMAT, learn_caa
from trimtab.methods.instruct import learn_instruct
from trimtab.text.letters import answer_ids, letter_of
from trimtab.text.pairs import Pair


def letters_tokenizer(merges: bool) -> PreTrainedTokenizerFast:
    """Characters as tokens; with `merges`, `(A` and `(B` are one, as after a newline in Qwen2.5."""
    signs = [chr(c) for c in range(32, 112)]
    vocabulary = {sign: i for i, sign in enumerate([*signs, "\n", "(A", "(B", "?"][: tiny.VOCABULARY])}
    vocabulary.setdefault("(A", len(vocabulary))
    inner = Tokenizer(models.BPE(vocabulary, [("(", "A"), ("(", "B")] if merges else [], unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("|||", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


@pytest.fixture(scope="module")
def lm() -> LM:
    lm = tiny.tiny("llama")
    return LM(lm.model, letters_tokenizer(merges=True), name="tiny-letters")


PAIRS = [
    Pair("(A)", "(B)", "is it", "letters"),
    Pair("(B)", "(A)", "was it so", "letters"),
    Pair("(B)", "(A)", "why", "letters"),
]


@pytest.mark.parametrize("merges", [False, True])
def test_letters_are_three_tokens_whatever_the_tokenizer_merges(merges: bool) -> None:
    tokenizer = letters_tokenizer(merges)
    for letter, after_space in itertools.product("AB", (False, True)):
        opening, token, closing = answer_ids(tokenizer, letter, after_space=after_space)
        assert tokenizer.decode(opening) == (" (" if after_space else "(")
        assert tokenizer.decode([token]) == letter
        assert tokenizer.decode(closing) == ")"
        assert (len(tokenizer(f"({letter})", add_special_tokens=False)["input_ids"]) == 2) == merges


def test_the_difference_is_read_at_the_letter(lm: LM) -> None:
    steering = learn_caa(lm, PAIRS, [1, 2])
    for layer in (1, 2):
        total = torch.zeros(tiny.WIDTH, dtype=torch.float64)
        for pair in PAIRS:
            for side, sign in ((pair.positive, 1), (pair.negative, -1)):
                ids = [*lm.encode(BASE_FORMAT.format(question=pair.prompt))]
                ids += lm.tokenizer(" (", add_special_tokens=False)["input_ids"]
                ids += lm.tokenizer(letter_of(side), add_special_tokens=False)["input_ids"]
                total += sign * _read(lm, ids, layer)
        (edit,) = steering.only([layer]).edits
        assert edit.operation.direction == pytest.approx((total / len(PAIRS)).numpy(), abs=1e-5)


def _read(lm: LM, ids: list[int], layer: int) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = lm.layout.blocks[layer].register_forward_hook(lambda _m, _a, o: found.append(o[0, -1]))
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return found[0]


def test_the_recipe(lm: LM) -> None:
    steering = learn_caa(lm, PAIRS, 2)
    (edit,) = steering.edits
    assert (edit.site, edit.positions, edit.strength) == (Site(2), Positions.from_last_prompt_token(), 1.0)
    assert isinstance(edit.operation, Add)
    assert not edit.operation.keep_norm
    assert steering.card.method == "caa"
    assert steering.card.model == lm.identity
    assert steering.card.measured["pairs"] == 3
    assert -1 <= steering.card.measured["agreement"]["2"] <= 1
    assert learn_caa(lm, PAIRS).layers == (round(0.4 * tiny.LAYERS),)
    assert learn_caa(lm, PAIRS, 2) == steering
    assert learn_caa(lm, PAIRS, 2).card == steering.card


def test_swapped_pairs_negate(lm: LM) -> None:
    swapped = [Pair(p.negative, p.positive, p.prompt, p.shape) for p in PAIRS]
    mine, theirs = learn_caa(lm, PAIRS, 2).edits[0].operation, learn_caa(lm, swapped, 2).edits[0].operation
    assert mine.direction == pytest.approx(-theirs.direction.numpy(), abs=1e-6)


def test_bad_input(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="no bracketed letter"):
        learn_caa(lm, [Pair("yes", "no", "is it", "letters")])
    with pytest.raises(TrimtabError, match="pairs of prompts are for the method instruct"):
        learn_caa(lm, [Pair("is it", "is", "", "prompts")])
    with pytest.raises(TrimtabError, match="are for the method caa"):
        learn_instruct(lm, PAIRS)
    with pytest.raises(TrimtabError, match="no layer 9"):
        learn_caa(lm, PAIRS, [1, 9])
    with pytest.raises(TrimtabError, match="no pairs"):
        learn_caa(lm, [])
