"""From anyone's pairs to a steering: what is learned from, what tests it, by what it is measured, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_making import TEMPLATE, TOKENS, naive
from tiny import WIDTH, prompt

from trimtab import LM, Positions, TrimtabError, load, make_from_pairs, save
from trimtab.evaluate.controls import random_like
from trimtab.evaluate.intervals import RESAMPLES
from trimtab.making import contrasts as contrasts_module
from trimtab.making.candidates import mean_differences
from trimtab.making.effect import effect, gain_of, prompt_effect
from trimtab.making.from_pairs import material_from_pairs, spread_over
from trimtab.making.verdict import Verdict
from trimtab.text.pairs import Pair, as_pairs

COUNT = 24


def words(seed: int, count: int = 4) -> str:
    return prompt(seed, count)


def row(i: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": words(i),
        "positive": f"w7 w8 {words(200 + i, 2)}",
        "negative": f"w20 {words(300 + i, 3)}",
        **more,
    }


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "answers": row,
    "a system prompt each": lambda i: row(i, positive_system="w7 w8", negative_system="w20"),
    "one system prompt": lambda i: row(i, system="w40"),
    "messages": lambda i: row(
        i,
        prompt="",
        positive=[
            {"role": "user", "content": words(i)},
            {"role": "assistant", "content": f"w7 w8 {words(200 + i, 2)}"},
        ],
        negative=[{"role": "user", "content": words(i)}, {"role": "assistant", "content": "w20 w21 w22"}],
    ),
    "chosen and rejected": lambda i: {"prompt": words(i), "chosen": "w7 w8 w9", "rejected": words(300 + i, 3)},
    "texts": lambda i: {"positive": f"w7 w8 {words(i)}", "negative": f"w20 w21 {words(i)}"},
    "prompts": lambda i: {"prompt": f"{words(i)} w7 w8", "prompt_without_instruction": words(i)},
}


@pytest.fixture(scope="module")
def lm() -> LM:
    lm = tiny.tiny("llama", seed=1, dtype=torch.float32)
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def pairs(kind: str, count: int = COUNT) -> list[Pair]:
    return as_pairs([ROWS[kind](i) for i in range(count)])


# ---- what a pair says --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in ROWS if kind not in ("texts", "prompts")])
def test_answers_stand_after_what_both_sides_have_in_common(lm: LM, kind: str) -> None:
    these_pairs = pairs(kind)
    made_from = material_from_pairs(lm, these_pairs, "mine", TOKENS, trains=True)
    read = [made_from.learn(None), made_from.test(None)]
    answers = [(a, b) for contrast in read for a, b in zip(contrast.positive, contrast.negative, strict=True)]
    assert len(answers) == len(these_pairs)
    by_question = {a.question: (a, b) for a, b in answers}
    systems = {"a system prompt each": ("w7 w8", "w20"), "one system prompt": ("w40", "w40")}.get(kind, (None, None))
    common = systems[0] if systems[0] == systems[1] else None
    for i in range(COUNT):
        mine, other = by_question[words(i)]
        own, not_own = (tuple(lm.encode(words(i), system=system)) for system in systems)
        assert (mine.own, mine.other) == (other.other, other.own) == (own, not_own)
        assert mine.bare == other.bare == tuple(lm.encode(words(i), system=common))
        assert lm.tokenizer.decode(mine.ids).startswith("w7 w8")
        assert tuple(lm.tokenizer(other.text, add_special_tokens=False)["input_ids"]) == other.ids
    assert made_from.prompted == (kind == "a system prompt each")
    names = [candidate.name for candidate in made_from.trained_candidates]
    assert names == (["in closed form", "distilled"] if made_from.prompted else ["by preference"])


def test_a_bare_text_is_told_apart_after_its_first_token(lm: LM) -> None:
    made_from = material_from_pairs(lm, pairs("texts"), "mine", TOKENS, trains=True)
    learned = made_from.learn(None)
    for example in learned.positive:
        assert [*example.own, *example.ids] == lm.encode(example.text, chat=False)
        assert len(example.own) == 1
        assert example.bare == example.own
    assert made_from.trained_candidates == ()


def test_prompts_are_answered_by_the_model(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrasts_module, "_distinguishable", lambda _lm, answers: list(answers))
    made_from = material_from_pairs(lm, pairs("prompts"), "mine", TOKENS, trains=False)
    assert made_from.prompted
    learned = made_from.learn(None)
    for example in learned.positive[:4]:
        assert example.own == tuple(lm.encode(f"{example.question} w7 w8"))
        assert example.bare == example.other == tuple(lm.encode(example.question))
        (said,) = lm.generate(f"{example.question} w7 w8", max_new_tokens=TOKENS)
        assert example.ids == tuple(said.token_ids)
    for example in learned.negative[:4]:
        assert example.own == example.bare == tuple(lm.encode(example.question))


@pytest.mark.parametrize("count", [16, 24, 90, 700])
def test_prompts_are_parted_and_none_is_in_two_parts(lm: LM, count: int) -> None:
    many_pairs = [Pair(f"w7 {i}", f"w8 {i}", words(i, 6) + f" {i % count}", "answers") for i in range(count)]
    made_from = material_from_pairs(lm, [*many_pairs, *many_pairs[:3]], "mine", TOKENS, trains=False)
    learn, test = made_from.learn(None), made_from.test(None)
    assert not set(learn.questions) & set(test.questions)
    assert set(learn.questions) | set(test.questions) == {pair.prompt for pair in many_pairs}
    assert made_from.held_out_questions < set(learn.questions)
    assert 2 <= len(made_from.held_out_questions) <= 40
    assert len(test.questions) == min(count // 2, 100)
    assert len(made_from.final_prompts) == min(len(test.questions), 20)
    again = material_from_pairs(lm, [*many_pairs, *many_pairs[:3]], "mine", TOKENS, trains=False)
    assert (again.held_out_questions, again.final_prompts, again.data) == (
        made_from.held_out_questions,
        made_from.final_prompts,
        made_from.data,
    )


def test_spread_over() -> None:
    assert spread_over(["a", "b", "c", "d"], 2) == ["a", "c"]
    assert spread_over(["a", "b"], 5) == ["a", "b"]
    assert spread_over([], 5) == []


# ---- what is learned, and by what it is measured -----------------------------------------------------------


def test_a_gain_is_a_mean_difference_and_its_bootstrap_interval() -> None:
    values = np.random.default_rng(3).normal(size=(2, 9))
    before, after = (dict(zip("abcdefghi", row.tolist(), strict=True)) for row in values)
    gain = gain_of(before, after)
    drawn = np.random.default_rng(0).integers(9, size=(RESAMPLES, 9))
    means = [float((values[1] - values[0])[some].mean()) for some in drawn]
    assert gain.estimate == pytest.approx(float((values[1] - values[0]).mean()))
    assert (gain.low, gain.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert gain_of(before, before).high == 0


@pytest.mark.parametrize("kind", ["answers", "texts"])
def test_without_a_system_prompt_it_is_measured_in_nats_beside_random_directions(
    lm: LM, kind: str, tmp_path: Any
) -> None:
    these_pairs = pairs(kind)
    stages: list[str] = []
    made = make_from_pairs(
        lm, these_pairs, name="mine", tokens=TOKENS, stage=lambda what, done, total: stages.append(what) or None
    )
    assert list(dict.fromkeys(stages)) == ["learning", "measuring"]
    verdict = made.verdict
    assert verdict.share is None
    test_answers = material_from_pairs(lm, these_pairs, "mine", TOKENS, trains=False).test(None)
    leads: list[list[float]] = [[], []]
    wanted: list[list[float]] = [[], []]
    for mine, other in zip(test_answers.positive, test_answers.negative, strict=True):
        for n, arm in enumerate((None, made.steering)):
            both = [naive(lm, arm, answer.bare, answer.ids) for answer in (mine, other)]
            leads[n].append(both[0] - both[1])
            wanted[n].append(both[0])
    assert verdict.effect == pytest.approx(float(np.mean(leads[1]) - np.mean(leads[0])), abs=1e-3)
    assert verdict.likelier == pytest.approx(float(np.mean(wanted[1]) - np.mean(wanted[0])), abs=1e-3)
    base = effect(lm, None, test_answers)
    assert verdict.random[1] == pytest.approx(
        gain_of(base.leads, effect(lm, random_like(made.steering, 1), test_answers).leads).estimate
    )
    assert verdict.effect > 0
    assert verdict.holds or kind == "texts"  # the answers begin with different words, which is easily learned
    assert "these pairs have no system prompt" in "\n".join(verdict.lines())
    measured = made.steering.card.measured
    assert (measured["gain"], "share_of_prompt" in measured) == (pytest.approx(verdict.effect, abs=1e-4), False)
    assert made.steering.card.options["source"] == f"{COUNT} pairs"
    assert all(example.prompted is None for example in made.examples)
    (said,) = lm.generate(made.examples[0].question, made.steering, max_new_tokens=TOKENS)
    assert made.examples[0].steered == said.text.strip()
    save(made.steering, tmp_path / "mine.safetensors")
    assert load(tmp_path / "mine.safetensors") == made.steering
    assert make_from_pairs(lm, these_pairs, name="mine", tokens=TOKENS).steering == made.steering


def test_with_a_system_prompt_each_it_is_a_share_of_theirs(lm: LM) -> None:
    these_pairs = pairs("a system prompt each")
    made_from = material_from_pairs(lm, these_pairs, "mine", TOKENS, trains=False)
    test_answers = made_from.test(None)
    base, by_prompt = effect(lm, None, test_answers), prompt_effect(lm, test_answers)
    if np.mean(list(by_prompt.leads.values())) <= np.mean(list(base.leads.values())):
        with pytest.raises(TrimtabError, match="the system prompts themselves don't"):
            make_from_pairs(lm, these_pairs, tokens=TOKENS, distill=False)
        these_pairs = [
            Pair(p.negative, p.positive, p.prompt, "answers", p.negative_system, p.positive_system) for p in these_pairs
        ]
        test_answers = material_from_pairs(lm, these_pairs, "mine", TOKENS, trains=False).test(None)
        base, by_prompt = effect(lm, None, test_answers), prompt_effect(lm, test_answers)
    made = make_from_pairs(lm, these_pairs, tokens=TOKENS, distill=False)
    means = [
        np.mean(list(result.leads.values())) for result in (base, effect(lm, made.steering, test_answers), by_prompt)
    ]
    assert made.verdict.share == pytest.approx((means[1] - means[0]) / (means[2] - means[0]))
    assert all(example.prompted is not None for example in made.examples)


def test_pairs_of_one_question_stay_together(lm: LM) -> None:
    these_pairs = [Pair(f"w7 w{i + 10}", f"w8 w{i + 40}", words(i // 2), "answers") for i in range(2 * COUNT)]
    learned = material_from_pairs(lm, these_pairs, "mine", TOKENS, trains=False).learn(None)
    _, steering = mean_differences(lm, "mine", learned).at([1])
    total = torch.zeros(WIDTH, dtype=torch.float64)
    for mine, other in zip(learned.positive, learned.negative, strict=True):
        means = []
        for answer in (mine, other):
            with torch.no_grad():
                hidden = lm.model(input_ids=torch.tensor([[*answer.own, *answer.ids]]), output_hidden_states=True)
            means.append(hidden.hidden_states[2][0][len(answer.own) :].double().mean(0))
        total += means[0] - means[1]
    assert torch.allclose(steering.edits[0].operation.direction.double(), total / len(learned.positive), atol=1e-3)


@pytest.mark.parametrize("kind", ["answers", "a system prompt each"])
def test_at_all_tokens_block_0_is_left_alone_and_the_effect_is_that_of_all_tokens(lm: LM, kind: str) -> None:
    these_pairs = pairs(kind)
    try:
        made = make_from_pairs(lm, these_pairs, tokens=TOKENS, positions=Positions.all())
    except TrimtabError:  # on a random model, these prompts may well bring the other answers about
        these_pairs = [
            Pair(p.negative, p.positive, p.prompt, "answers", p.negative_system, p.positive_system) for p in these_pairs
        ]
        made = make_from_pairs(lm, these_pairs, tokens=TOKENS, positions=Positions.all())
    assert all(0 not in candidate.steering.layers for candidate in made.candidates)
    assert {edit.positions for candidate in made.candidates for edit in candidate.steering.edits} == {Positions.all()}
    test_answers = material_from_pairs(lm, these_pairs, "mine", TOKENS, trains=False).test(None)
    result = effect(lm, made.steering, test_answers)
    first = test_answers.positive[0]
    assert result.wanted[first.question] == pytest.approx(naive(lm, made.steering, first.bare, first.ids), abs=1e-3)


def test_letters() -> None:
    from lettered import letters_lm

    lm = letters_lm(dtype=torch.float32)
    letters = [
        Pair(*(("(A)", "(B)") if i % 2 else ("(B)", "(A)")), f"w{i + 3} w{i + 4} w7", "letters") for i in range(COUNT)
    ]
    made = make_from_pairs(lm, letters, tokens=TOKENS)
    assert made.verdict.likelier is not None
    assert any(candidate.name.startswith("by preference") for candidate in made.candidates)
    assert made.examples[0].question not in {pair.prompt for pair in letters}  # general questions are answered


# ---- what can't be -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row(i) for i in range(15)], r"mine: 15 pairs with different prompts, and 16 are needed"),
        ([row(0)] * 40, r"mine: 1 pairs with different prompts"),
        ([ROWS["texts"](i) for i in range(9)], r"mine: 9 pairs, and 16 are needed"),
        (
            [row(i, positive="w5", negative="w5 ", positive_system="w7", negative_system="w8") for i in range(20)],
            r"pair 1: both sides have the same answer",
        ),
        ([{"positive": f"w{i}", "negative": "w40 w41"} for i in range(20)], r"pair \d+: a text of a single token"),
        ([], "pairs"),
    ],
)
def test_what_cant_be_used_is_named(lm: LM, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(TrimtabError, match=said):
        make_from_pairs(lm, rows, name="mine", tokens=TOKENS)


def test_other_positions_are_refused(lm: LM) -> None:
    with pytest.raises(TrimtabError, match=r"for the last prompt token on, or for all tokens, not for .*; change its"):
        make_from_pairs(lm, pairs("answers"), positions=Positions.generated())


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"likelier": -0.1}, "makes the unwanted answers less likely, but the wanted ones no more likely"),
        ({"p": 0.2}, "or from that of a random direction"),
        ({"loops": 0.9}, "90% of its answers are repetitive, and 10% unsteered"),
    ],
)
def test_verdicts_without_a_system_prompt(changed: dict[str, Any], why: str) -> None:
    usual: dict[str, Any] = {
        "effect": 0.7, "low": 0.5, "high": 0.9, "random": (0.0, 0.02), "p": 0.001, "questions": 20, "loops": 0.0,
        "loops_before": 0.1, "loops_p": 1.0, "perplexity": 1.2, "likelier": 0.4,
    }  # fmt: skip
    verdict = Verdict(**{**usual, **changed})
    assert (verdict.why_not == "") == verdict.holds == (not why)
    assert why in verdict.why_not
    assert "share_of_prompt" not in verdict.as_measured()
    assert verdict.as_measured()["loops_unsteered"] == 0.1
    assert "0.70 nats per token" in "\n".join(verdict.lines())
