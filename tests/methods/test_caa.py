from __future__ import annotations

import itertools
import json
import os
import warnings
from pathlib import Path
from typing import Any

import lettered
import pytest
import tiny
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab import LM, Add, Edit, Positions, Site, Steering, TrimtabError
from trimtab.engines.transformers.next_token import Choice
from trimtab.learn.moments import PairMoments
from trimtab.methods.caa import (
    BASE_FORMAT,
    PairsWarning,
    activations,
    beyond_chance,
    equalised,
    learn_behaviours,
    learn_caa,
    moved,
)
from trimtab.methods.instruct import learn_instruct
from trimtab.text.letters import answer_ids, letter_balance, letter_of, letter_question
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


# three pairs, as in most tests here, are too few to be balanced or to agree
pytestmark = pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning")


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
    rows: list[torch.Tensor] = []
    handle = lm.layout.blocks[layer].register_forward_hook(lambda _m, _a, o: rows.append(o[0, -1]))
    with torch.no_grad():
        lm.model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    return rows[0]


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
    with pytest.raises(TrimtabError, match="isn't a bracketed letter"):
        learn_caa(lm, [Pair("yes", "no", "is it", "letters")])
    with pytest.raises(TrimtabError, match="pairs of prompts are for the method instruct"):
        learn_caa(lm, [Pair("is it", "is", "", "prompts")])
    with pytest.raises(TrimtabError, match="are for the method caa"):
        learn_instruct(lm, PAIRS)
    with pytest.raises(TrimtabError, match="no layer 9"):
        learn_caa(lm, PAIRS, [1, 9])
    with pytest.raises(TrimtabError, match="no pairs"):
        learn_caa(lm, [])


# ---- several behaviours, lengths, layers ---------------------------------------------------------------------

OTHERS = [Pair("(A)", "(B)", text, "letters") for text in ("so it is", "go on", "is it not")]


def vector(steering: Steering, layer: int) -> torch.Tensor:
    (edit,) = steering.only([layer]).edits
    return edit.operation.direction.double()


def test_behaviours_learned_together_are_those_learned_alone(lm: LM) -> None:
    together = learn_behaviours(lm, {"one": PAIRS, "two": OTHERS}, [1, 2])
    for name, pairs in (("one", PAIRS), ("two", OTHERS)):
        alone = learn_caa(lm, pairs, [1, 2])
        for layer in (1, 2):
            assert vector(together[name], layer) == pytest.approx(vector(alone, layer).numpy(), abs=1e-6)
        assert together[name].card.data == alone.card.data
        assert together[name].card.measured["agreement"] == pytest.approx(alone.card.measured["agreement"])


def test_norms(lm: LM) -> None:
    raw, unit, relative = (learn_caa(lm, PAIRS, [1, 2], norm=norm) for norm in ("raw", "unit", "relative"))
    for layer in (1, 2):
        direction = vector(raw, layer) / vector(raw, layer).norm()
        assert vector(unit, layer) == pytest.approx(direction.numpy(), abs=1e-6)
        length = raw.card.measured["activation_norm"][str(layer)]
        assert vector(relative, layer) == pytest.approx((length * direction).numpy(), abs=1e-4)
    assert [s.card.options["norm"] for s in (raw, unit, relative)] == ["raw", "unit", "relative"]
    with pytest.raises(TrimtabError, match="no norm 'long'; norms: raw, unit, relative"):
        learn_caa(lm, PAIRS, norm="long")  # type: ignore[arg-type]
    (edit,) = learn_caa(lm, PAIRS, 2, positions=Positions.generated()).edits
    assert edit.positions == Positions.generated()


def test_a_relative_push_of_strength_one_has_a_dose_near_one(lm: LM) -> None:
    steering = learn_caa(lm, PAIRS, 1, norm="relative")
    (answer,) = lm.generate(BASE_FORMAT.format(question="is it"), 0.5 * steering, max_new_tokens=8)
    assert answer.applied.dose == pytest.approx(0.5, rel=0.5)


def test_equalised_vectors_keep_direction_and_mean_length(lm: LM) -> None:
    learned = learn_behaviours(lm, {"one": PAIRS, "two": OTHERS}, [1, 2])
    equal = equalised(learned)
    for layer in (1, 2):
        before = [vector(learned[name], layer) for name in learned]
        after = [vector(equal[name], layer) for name in learned]
        mean = sum(float(v.norm()) for v in before) / 2
        assert [float(v.norm()) for v in after] == pytest.approx([mean, mean], rel=1e-6)
        assert abs(float(before[0].norm()) - mean) > 0.01 * mean  # there was something to do
        for old, new in zip(before, after, strict=True):
            assert float(torch.cosine_similarity(old, new, dim=0)) == pytest.approx(1, abs=1e-6)
    assert equal["one"].card.options["with"] == ["one", "two"]
    with pytest.raises(TrimtabError, match="'two' doesn't have exactly one edit at each of the same layers"):
        equalised({"one": learned["one"], "two": learned["two"].only([1])})
    with pytest.raises(TrimtabError, match="strength 1"):
        equalised({"one": 2 * learned["one"]})
    with pytest.raises(TrimtabError, match="'one' at layer 1 is zero"):
        equalised({"one": Steering((Edit(Site(1), Add(torch.zeros(tiny.WIDTH))),))})


def test_moved_acts_elsewhere_with_the_same_vector(lm: LM) -> None:
    steering = learn_caa(lm, PAIRS, 1)
    there = moved(steering, 3)
    assert there.layers == (3,)
    assert torch.equal(vector(there, 3), vector(steering, 1))
    assert there.card.options["moved_from"] == 1
    (plain, pushed) = lm.next_logprobs([Choice(lm.encode("is it"), 5, (3, 4))] * 2, [None, there])
    assert plain.logprobs != pushed.logprobs
    with pytest.raises(TrimtabError, match="acts at 2 layers"):
        moved(learn_caa(lm, PAIRS, [1, 2]), 3)
    with pytest.raises(TrimtabError, match="layer 9"):
        lm.check(moved(steering, 9))


def test_another_width_is_refused_and_another_model_needs_transfer(lm: LM) -> None:
    steering = learn_caa(lm, PAIRS, 1)
    other = tiny.tiny("llama", seed=1)
    other = LM(other.model, lm.tokenizer, name="tiny-other")
    with pytest.raises(TrimtabError, match="different weights"):
        other.check(steering)
    other.check(steering, transfer=True)
    narrow = Steering((Edit(Site(1), Add(torch.ones(tiny.WIDTH + 1))),))
    with pytest.raises(TrimtabError, match="width is 33"):
        other.check(narrow, transfer=True)


def test_order_and_repetition_of_pairs_do_not_matter(lm: LM) -> None:
    once = learn_caa(lm, PAIRS, [1, 2])
    for pairs in (PAIRS[::-1], PAIRS * 2, [PAIRS[i] for i in (2, 0, 1)]):
        for layer in (1, 2):
            assert vector(learn_caa(lm, pairs, [1, 2]), layer) == pytest.approx(vector(once, layer).numpy(), abs=1e-6)
    swapped = learn_caa(lm, [Pair(p.negative, p.positive, p.prompt, p.shape) for p in PAIRS], [1, 2])
    assert all(torch.equal(vector(swapped, layer), -vector(once, layer)) for layer in (1, 2))


def test_activations_are_what_is_averaged(lm: LM) -> None:
    read = activations(lm, PAIRS, [1, 2])
    learned = learn_caa(lm, PAIRS, [1, 2])
    for layer, values in read.items():
        assert values.shape == (3, 2, tiny.WIDTH)
        assert (values[:, 0] - values[:, 1]).mean(0) == pytest.approx(vector(learned, layer).float().numpy(), abs=1e-5)


def test_a_direction_that_is_planted_in_a_block_is_learned_there() -> None:
    """Positives get a known push at the token that is read; texts differ in much else."""
    lm, mark, planted = tiny.tiny("llama"), 85, tiny.direction(5, 60.0)
    pairs = [Pair(f"{tiny.prompt(i, 6)} w{mark}", f"{tiny.prompt(100 + i, 6)} w84", "", "texts") for i in range(60)]
    read: list[torch.Tensor] = []
    handles = [
        lm.model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: read.append(args[0])),
        lm.layout.blocks[1].register_forward_hook(lambda _m, _a, o: o + (read[-1] == mark)[..., None] * planted),
    ]
    try:
        steering = learn_caa(lm, pairs, [0, 1])
    finally:
        for handle in handles:
            handle.remove()
    cosines = [float(torch.cosine_similarity(vector(steering, layer), planted, dim=0)) for layer in (0, 1)]
    assert cosines[1] > 0.99
    assert abs(cosines[0]) < 0.9  # before it is planted, it isn't there


# ---- what the letters put into it ----------------------------------------------------------------------------


@pytest.fixture
def bigram() -> LM:
    """A model whose activations are its embeddings: whatever a token's block reads, it passes on."""
    lm = lettered.letters_lm()
    with torch.no_grad():
        for block in lm.layout.blocks:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return lm


@pytest.mark.parametrize(("first", "net"), [(4, 1.0), (2, 0.0), (3, 0.5), (0, -1.0)])
def test_letters_add_their_own_direction_by_their_balance(bigram: LM, first: int, net: float) -> None:
    pairs = [Pair(*(("(A)", "(B)") if i < first else ("(B)", "(A)")), f"w{i + 3} w9", "letters") for i in range(4)]
    assert letter_balance(pairs) == {"A": net, "B": -net}
    embedding = bigram.model.get_input_embeddings().weight.detach().double()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        learned = learn_caa(bigram, pairs, [0, 3])
    for layer in (0, 3):
        expected = net * (embedding[lettered.A] - embedding[lettered.B])
        assert vector(learned, layer) == pytest.approx(expected.numpy(), abs=1e-6)
    assert learned.card.measured["letter_balance"] == {"A": net, "B": -net}
    assert any("are unbalanced" in str(warning.message) for warning in said) == (net != 0)
    assert all(warning.category is PairsWarning for warning in said)


def test_agreement_beyond_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.3, 0.8):
        for count in (20, 400):
            noise = torch.randn(count, 4000, generator=generator, dtype=torch.float64) / 4000**0.5
            common = torch.zeros(4000, dtype=torch.float64)
            common[0] = share
            moments = PairMoments(4000)
            moments.add(common + (1 - share**2) ** 0.5 * noise, torch.zeros(count, 4000))
            assert beyond_chance(moments.agreement, count) == pytest.approx(share, abs=0.09)
    assert beyond_chance(0.4, 1) == 1.0


def test_pairs_that_do_not_agree_are_warned_about(lm: LM) -> None:
    texts = "abcdefghijklmnopqrst"
    odd = [Pair(a, b, "", "texts") for a, b in itertools.pairwise(texts)]
    with pytest.warns(PairsWarning, match=r"the 19 pairs barely agree on a direction at layer 1, 2 \(less than 0.23"):
        learn_caa(lm, odd, [1, 2])
    alike = [Pair(f"{a} yes", f"{a} no", "", "texts") for a in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learn_caa(lm, alike, [1, 2])


# ---- real tokenizers -----------------------------------------------------------------------------------------

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared" / "data") / "caa"
GGUF = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab-bench"
QWEN = GGUF / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"


def real_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    if name == "smollm2":
        from trimtab.engines.transformers.default_model import default_folder

        return AutoTokenizer.from_pretrained(default_folder())
    if not QWEN.is_file():
        pytest.skip(f"needs Qwen2.5's tokenizer, in {QWEN}")
    return AutoTokenizer.from_pretrained(QWEN.parent, gguf_file=QWEN.name)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.long_unless(lambda name, template: name == "smollm2" and template)
@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("name", ["smollm2", "qwen2.5"])
def test_the_letter_is_read_on_real_tokenizers(name: str, template: bool) -> None:
    """For every record of every set, the position read holds the letter, and what comes before it is the question."""
    if not DATA.is_dir():
        pytest.skip(f"CAA's data aren't in {DATA}; set TRIMTAB_DATA to their folder")
    tokenizer = real_tokenizer(name)
    if not template:
        tokenizer.chat_template = None
    merged = tokenizer("\n(A)", add_special_tokens=False)["input_ids"]
    assert (len(merged) == 3) == (name == "qwen2.5")  # a trap on one of them: "(A" is a token there
    count = 0
    for path in sorted(DATA.glob("*/*.json")):
        if "open_ended" in path.name:
            continue
        for row in json.loads(path.read_text()):
            letter = row["answer_matching_behavior"].strip()[1]
            question = letter_question(tokenizer, row["question"], (letter,))
            ids = question.ids_with_answer(letter)
            assert tokenizer.decode([ids[len(question.ids)]]) == letter
            assert tokenizer.decode(ids[len(question.prompt) :]) in (f"({letter})", f" ({letter})")
            count += 1
    assert count > 3000


def test_a_text_that_is_too_long_is_named_by_its_pair(lm: LM) -> None:
    pairs = [Pair("a", "b", "q", "answers"), Pair("c", "d" * 999, "q", "answers")]
    with pytest.raises(TrimtabError, match="pair 2, negative: the text has 1000 tokens, the model's context is"):
        learn_caa(lm, pairs, [1])
    with pytest.raises(TrimtabError, match="pair 1: the question has"):
        learn_caa(lm, [Pair("(A)", "(B)", "q" * 999, "letters")], [1])
