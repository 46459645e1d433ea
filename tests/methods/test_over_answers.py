"""Reading over answers, and pairs whose sides have system prompts, by every method that takes pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from lettered import letters_lm

from trimtab import LM, Steering, TrimtabError
from trimtab.engines.transformers.read import Text
from trimtab.evaluate.lora import target
from trimtab.learn.contrast import contrast
from trimtab.methods.caa import activations, answer_texts, learn_behaviours, learn_caa, read_at_of
from trimtab.methods.instruct import learn_instruct
from trimtab.methods.iti import split
from trimtab.methods.recipe import recipes
from trimtab.methods.repe import learn_repe
from trimtab.text.answers import ReadAt
from trimtab.text.pairs import Pair
from trimtab.tune.letters import tune_letters

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}w70{% elif m.role == 'user' %}w71{% else %}w72{% endif %}"
    " {{ m.content }} {% endfor %}{% if add_generation_prompt %}w72{% endif %}"
)
COUNT = 6
pytestmark = [
    pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning"),
    pytest.mark.filterwarnings("ignore::trimtab.methods.repe.ReaderWarning"),
]


@pytest.fixture(scope="module")
def lm() -> LM:
    """Words, brackets and letters as tokens, and a chat template."""
    lm = letters_lm()
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def answers(count: int = COUNT, **systems: str) -> list[Pair]:
    """Answers of different length to questions of different length."""
    return [
        Pair(
            tiny.prompt(100 + i, 2 + i % 4),
            tiny.prompt(200 + i, 5 - i % 3),
            tiny.prompt(i, 4 + i),
            "answers",
            **systems,
        )
        for i in range(count)
    ]


def same_answers(count: int = COUNT, **systems: str) -> list[Pair]:
    """As persona vectors' may be: the sides differ in their system prompts alone."""
    return [Pair(p.positive, p.positive, p.prompt, "answers", **systems) for p in answers(count)]


def vectors(steering: Steering) -> list[torch.Tensor]:
    """What each edit has learned."""
    differences = []
    for edit in steering.edits:
        operation = edit.operation
        names = [name for name in ("direction", "scales", "mask", "write") if hasattr(operation, name)]
        differences.append(edit.strength * getattr(operation, names[0]).double().flatten())
    return differences


# ---- caa, read over answers ----------------------------------------------------------------------------------


@torch.no_grad()
def naive(lm: LM, ids: list[int], where: list[int], layer: int) -> torch.Tensor:
    at_tokens: list[torch.Tensor] = []
    handle = lm.layout.blocks[layer].register_forward_hook(lambda _m, _a, o: at_tokens.append(o[0]))
    lm.model(input_ids=torch.tensor([ids]), use_cache=False)
    handle.remove()
    total = torch.zeros(tiny.WIDTH, dtype=torch.float64)
    for p in where:
        total += at_tokens[0][p]
    return total / len(where)


@pytest.mark.parametrize(
    ("read_at", "where"),
    [
        ("answer", lambda start, stop: range(start, stop)),
        ("first:3", lambda start, stop: range(start, min(stop, start + 3))),
        ("last", lambda start, stop: [stop - 1]),
    ],
)
def test_each_side_is_read_over_its_own_answer(lm: LM, read_at: str, where: Callable[..., Any]) -> None:
    pairs = answers(positive_system="w5 w6", negative_system="w7")
    (edit,) = learn_caa(lm, pairs, 2, read_at=read_at).edits
    expected = torch.zeros(tiny.WIDTH, dtype=torch.float64)
    for pair in pairs:
        for side, system, sign in ((pair.positive, "w5 w6", 1), (pair.negative, "w7", -1)):
            assert isinstance(pair.prompt, str)
            assert isinstance(side, str)
            opening = lm.tokenizer(f"w70 {system} w71 {pair.prompt} w72")["input_ids"]
            ids = [*opening, *lm.tokenizer(side)["input_ids"]]
            expected += sign * naive(lm, ids, list(where(len(opening), len(ids))), 2)
    assert edit.operation.direction.double() == pytest.approx((expected / COUNT).numpy(), abs=1e-6)


def test_after_a_marker(lm: LM) -> None:
    marked = [Pair(f"w9 w80 {p.positive}", f"w80 {p.negative}", p.prompt, "answers") for p in answers()]
    marked_texts = answer_texts(lm, marked, "after:w80")
    for pair, texts in zip(answers(), marked_texts, strict=True):
        for side, text in zip((pair.positive, pair.negative), texts, strict=True):
            assert lm.tokenizer.decode([text.ids[p] for p in text.positions]) == side
    moments = contrast(lm, marked_texts, [1])
    (edit,) = learn_caa(lm, marked, 1, read_at=ReadAt("after", marker="w80")).edits
    assert torch.equal(edit.operation.direction, moments[1].difference.float())


def test_the_card_says_where_and_the_default_is_as_it_was(lm: LM) -> None:
    learned = {at: learn_caa(lm, answers(), 1, read_at=at) for at in (None, "last", "answer", "first:2", "after:w")}
    said = {at: learned_there.card.options["read_at"] for at, learned_there in learned.items() if at != "after:w"}
    assert said == {None: "last token", "last": "last token", "answer": "answer", "first:2": "first:2"}
    assert learned["last"] == learned[None]
    assert learned["last"].card == learned[None].card
    for at in ("answer", "first:2", "after:w"):
        assert learned[at] != learned[None]
        assert read_at_of(learned[at].card) == ReadAt.parse(at)
    assert read_at_of(learned[None].card) is None


def test_activations_are_what_is_averaged(lm: LM) -> None:
    values = activations(lm, answers(), [1], read_at="answer")[1]
    assert values.shape == (COUNT, 2, tiny.WIDTH)
    (edit,) = learn_caa(lm, answers(), 1, read_at="answer").edits
    assert (values[:, 0] - values[:, 1]).mean(0) == pytest.approx(edit.operation.direction.numpy(), abs=1e-5)


def test_errors_name_the_pair(lm: LM) -> None:
    marked = [Pair("w80 w4", "w80 w5", "w6", "answers"), Pair("w80 w4", "w5 w7", "w6", "answers")]
    with pytest.raises(TrimtabError, match="pair 2, negative: the answer has no 'w80' in it: 'w5 w7'"):
        learn_caa(lm, marked, 1, read_at="after:w80")
    with pytest.raises(TrimtabError, match="pair 1 of 'odd', positive: nothing comes after 'w80 w4'"):
        learn_behaviours(lm, {"odd": marked[:1], "other": answers()}, 1, read_at="after:w80 w4")
    with pytest.raises(TrimtabError, match="pair 2, negative: the answer has no 'w80'"):
        learn_repe(lm, marked, 1, read_at="after:w80")
    with pytest.raises(TrimtabError, match="multiple-choice answers are read at their letter"):
        learn_caa(lm, [Pair("(A)", "(B)", "w6", "letters")], 1, read_at="answer")
    with pytest.raises(TrimtabError, match="use last, answer, first:K or after:MARKER"):
        learn_caa(lm, answers(), 1, read_at="middle")


def test_behaviours_learned_together_are_those_learned_alone(lm: LM) -> None:
    sets = {"one": answers(), "two": same_answers(positive_system="w5", negative_system="w6")}
    together = learn_behaviours(lm, sets, [1, 2], read_at="answer")
    for name, pairs in sets.items():
        for mine, alone in zip(
            vectors(together[name]), vectors(learn_caa(lm, pairs, [1, 2], read_at="answer")), strict=True
        ):
            assert mine == pytest.approx(alone.numpy(), abs=1e-6)


def test_repe_reads_means_too(lm: LM) -> None:
    pairs = answers()
    steering = learn_repe(lm, pairs, 1, reader="cluster-mean", read_at="answer")
    (caa,) = learn_caa(lm, pairs, 1, read_at="answer").edits
    unit = caa.operation.direction / caa.operation.direction.norm()
    assert steering.edits[0].operation.direction == pytest.approx(unit.numpy(), abs=1e-5)
    assert steering.card.options["read_at"] == "answer"
    assert "read_at" not in learn_repe(lm, pairs, 1).card.options


# ---- system prompts and messages -----------------------------------------------------------------------------

USUAL: dict[str, dict[str, Any]] = {
    "hpr": {"keep": 1, "turn": "fixed"},
    "iti": {"heads": 2},
    "sadi": {"k": 2, "operation": "add"},
    "cast": {"when": [tiny.prompt(i, 5) for i in range(60, 66)], "unless": [tiny.prompt(i, 5) for i in range(70, 76)]},
}
LEARN = {
    recipe.name: recipe
    for recipe in recipes().values()
    if "answers" in recipe.shapes and recipe.sites != "router"  # no mixture of experts here: see test_routers.py
}


def as_conversations(pair: Pair) -> Pair:
    """The same pair with all that is said in the sides."""

    def whole(system: str | None, answer: Any) -> list[dict[str, str]]:
        opening = [] if system is None else [{"role": "system", "content": system}]
        messages = [{"role": "user", "content": str(pair.prompt)}, {"role": "assistant", "content": answer}]
        return [*opening, *messages]

    positive, negative = whole(pair.positive_system, pair.positive), whole(pair.negative_system, pair.negative)
    return Pair(positive, negative, "", "answers")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LEARN)
def test_every_method_of_answers_reads_them_under_their_system_prompts(lm: LM, name: str) -> None:
    learn = LEARN[name].load()
    pairs = answers(positive_system="w5 w6", negative_system="w7")
    mine = learn(lm, pairs, [1, 2], **USUAL.get(name, {}))
    theirs = learn(lm, [as_conversations(pair) for pair in pairs], [1, 2], **USUAL.get(name, {}))
    without = learn(lm, answers(), [1, 2], **USUAL.get(name, {}))
    assert [edit.site for edit in mine.edits] == [edit.site for edit in theirs.edits]
    for a, b in zip(vectors(mine), vectors(theirs), strict=True):
        assert torch.equal(a, b)
    assert mine.card.data != without.card.data
    assert [edit.site for edit in mine.edits] != [edit.site for edit in without.edits] or any(
        not torch.allclose(a, b, atol=1e-4) for a, b in zip(vectors(mine), vectors(without), strict=True)
    )


@pytest.mark.parametrize("name", [name for name, recipe in LEARN.items() if "letters" in recipe.shapes])
def test_letters_are_asked_under_system_prompts(lm: LM, name: str) -> None:
    learn = LEARN[name].load()
    pairs = [("(A)", "(B)") if i % 2 else ("(B)", "(A)") for i in range(COUNT)]
    plain, under = (
        learn(
            lm,
            [Pair(*both, tiny.prompt(i, 5), "letters", system, system) for i, both in enumerate(pairs)],
            [1, 2],
            **USUAL.get(name, {}),
        )
        for system in (None, "w5 w6")
    )
    assert [edit.site for edit in plain.edits] != [edit.site for edit in under.edits] or any(
        not torch.allclose(a, b, atol=1e-4) for a, b in zip(vectors(plain), vectors(under), strict=True)
    )
    ((text, _),) = answer_texts(lm, [Pair("(A)", "(B)", "w8", "letters", "w5 w6", "w5 w6")])
    assert lm.tokenizer.decode(text.ids) == "w70 w5 w6 w71 w8 w72 ( A )"
    assert lm.tokenizer.decode([text.ids[p] for p in text.positions]) == "A"


def test_instructions_may_be_in_the_system_prompt(lm: LM) -> None:
    pairs = [Pair(tiny.prompt(i, 5), tiny.prompt(i, 5), "", "prompts", positive_system="w5 w6") for i in range(COUNT)]
    texts = []
    for pair in pairs:
        assert isinstance(pair.positive, str)
        both = (f"w70 w5 w6 w71 {pair.positive} w72", f"w71 {pair.positive} w72")
        ids = [lm.tokenizer(text)["input_ids"] for text in both]
        texts.append((Text(ids[0], [len(ids[0]) - 1]), Text(ids[1], [len(ids[1]) - 1])))
    (edit,) = learn_instruct(lm, pairs, 1, operation="add").edits
    expected = contrast(lm, texts, [1])[1].difference
    assert edit.operation.direction.double() == pytest.approx(expected.numpy(), abs=1e-6)


def test_a_template_that_leaves_system_prompts_out_is_an_error_everywhere(lm: LM) -> None:
    deaf = LM(lm.model, letters_lm().tokenizer, name="deaf")
    deaf.tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}w71 {{ m.content }} {% endfor %}w72"
    for pair in (
        Pair("w8", "w9", "w3", "answers", "w5", "w6"),
        Pair("(A)", "(B)", "w3", "letters", "w5", "w6"),
        Pair("w3", "w3", "", "prompts", "w5", "w6"),
    ):
        learn = learn_instruct if pair.shape == "prompts" else learn_caa
        with pytest.raises(TrimtabError, match="pair 1: the chat template drops system prompts"):
            learn(deaf, [pair], 1)


def test_questions_with_messages_stay_together_when_heads_are_ranked() -> None:
    pairs = [as_conversations(pair) for pair in answers(2) * 4]
    fitted, held = split(pairs, 0.5)
    assert {i % 2 for i in fitted}.isdisjoint(i % 2 for i in held)


def test_a_lora_is_finetuned_under_the_system_prompt(lm: LM) -> None:
    pair = Pair("w8 w9", "w10", "w3", "answers", "w5 w6", "w7")
    for side, said, count in (("positive", "w70 w5 w6 w71 w3 w72 w8 w9", 2), ("negative", "w70 w7 w71 w3 w72 w10", 1)):
        ids_of_target = target(lm, pair, side)  # type: ignore[arg-type]
        assert (lm.tokenizer.decode(ids_of_target.ids), ids_of_target.count) == (said, count)
    letters = target(lm, Pair("(A)", "(B)", "w3", "letters", "w5", "w5"), "negative")
    assert (lm.tokenizer.decode(letters.ids), letters.count) == ("w70 w5 w71 w3 w72 ( B", 1)


def test_tuning_asks_a_question_under_one_system_prompt(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="a question is asked under one system prompt"):
        tune_letters(lm, [], [Pair("(A)", "(B)", "w3", "letters", "w5", "w6")])
