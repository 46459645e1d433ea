"""From an idea to a steering, on a tiny random model: what is kept, what is measured, and what is chosen."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import direction, prompt

from trimtab import LM, Add, Edit, Positions, Site, Steering, Threshold, TrimtabError, load, make, save
from trimtab.evaluate.ab import evenly_spaced
from trimtab.evaluate.controls import means_for, random_like
from trimtab.evaluate.decision import decide
from trimtab.files.steering_file import edits_digest
from trimtab.making import contrasts as contrasts_module
from trimtab.making.candidates import (
    FROM_LAST,
    _enough,
    candidates,
    distillation_candidates,
    learn_closed_form,
    learn_distilled,
    mean_differences,
)
from trimtab.making.contrasts import Contrasts, check_enough, contrasts, supports_system_prompt, with_system_prompt
from trimtab.making.effect import Effect, effect, prompt_effect, share_of
from trimtab.making.evaluation import _chance_of_random
from trimtab.making.idea import Idea
from trimtab.making.material import TrainedCandidate
from trimtab.making.verdict import Verdict
from trimtab.report.pushes import pushes

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}w70{% elif m.role == 'user' %}w71{% else %}w72{% endif %}"
    " {{ m.content }} {% endfor %}{% if add_generation_prompt %}w72{% endif %}"
)
IDEA = Idea(
    "odd",
    ("w7 w8", "w9 w9 w9"),
    ("w20 w21", "w22 w23 w24"),
    tuple(prompt(i, 3 + i % 4) for i in range(16)),
    tuple(prompt(100 + i, 3 + i % 4) for i in range(12)),
    signs=("w5",),
)
TOKENS = 10


@pytest.fixture(scope="module")
def lm() -> LM:
    """Of all tiny models one whose answers seldom loop; it has a chat template."""
    lm = tiny.tiny("llama", seed=1, dtype=torch.float32)
    lm.tokenizer.chat_template = TEMPLATE
    return lm


@pytest.fixture(scope="module")
def both_sides(lm: LM) -> Contrasts:
    return contrasts(lm, IDEA, IDEA.learn, 2, TOKENS)


@torch.no_grad()
def naive(lm: LM, steering: Steering | None, prompt_ids: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """The mean log-probability of an answer's tokens, one text at a time, through the engine's own hooks."""
    ids = torch.tensor([[*prompt_ids, *answer[:-1]]])
    if steering is None:
        logits = lm.model(input_ids=ids).logits
    else:
        with lm.steered(steering, prompt_lengths=[len(prompt_ids)]):
            logits = lm.model(input_ids=ids, use_cache=False).logits
    rows = logits[0, len(prompt_ids) - 1 :].double().log_softmax(-1)
    return sum(float(rows[i, token]) for i, token in enumerate(answer)) / len(answer)


# ---- answers for and against ---------------------------------------------------------------------------------


def test_every_question_is_asked_under_prompts_of_both_sides(lm: LM, both_sides: Contrasts) -> None:
    assert both_sides.asked == 2 * 2 * len(IDEA.learn)
    for side, own, other in (
        (both_sides.positive, IDEA.positive, IDEA.negative),
        (both_sides.negative, IDEA.negative, IDEA.positive),
    ):
        assert {text.question for text in side} <= set(IDEA.learn)
        for written in side:
            assert written.own in [tuple(lm.encode(written.question, system=system)) for system in own]
            assert written.other in [tuple(lm.encode(written.question, system=system)) for system in other]
            assert written.bare == tuple(lm.encode(written.question))
            answers = [lm.generate(written.question, system=s, max_new_tokens=TOKENS)[0] for s in own]
            assert written.ids in [tuple(answer.token_ids) for answer in answers]


def test_answers_count_that_are_likelier_under_their_own_prompt(lm: LM, both_sides: Contrasts) -> None:
    for written in [*both_sides.positive, *both_sides.negative]:
        assert naive(lm, None, written.own, written.ids) > naive(lm, None, written.other, written.ids)
    assert len(both_sides.positive) + len(both_sides.negative) <= both_sides.asked


def test_a_template_without_system_prompts_has_them_in_front(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    assert supports_system_prompt(lm)
    for deaf in ("{% for m in messages %}{% if m.role != 'system' %}w71 {{ m.content }} {% endif %}{% endfor %}", None):
        monkeypatch.setattr(lm.tokenizer, "chat_template", deaf)
        assert not supports_system_prompt(lm)
        some = contrasts(lm, IDEA, IDEA.learn[:3], 1, TOKENS)
        for written in some.positive:
            prompts = [with_system_prompt(system, written.question, False) for system in IDEA.positive]
            assert written.own in [tuple(lm.encode(text)) for text in prompts]


def test_too_few_are_an_error_that_says_what_to_do(lm: LM, both_sides: Contrasts) -> None:
    check_enough(both_sides, IDEA.name)
    with pytest.raises(
        TrimtabError, match=r"for and against 'odd' barely differ: of 64, \d+ and \d+ do, and 8 of each"
    ):
        check_enough(both_sides.for_questions(IDEA.learn[:5]), IDEA.name)


# ---- what is measured ----------------------------------------------------------------------------------------


def test_effects_are_the_models_own_log_probabilities(lm: LM, both_sides: Contrasts) -> None:
    steering = 0.7 * Steering(
        tuple(Edit(Site(at), Add(direction(at, 3.0)), Positions.from_last_prompt_token()) for at in (1, 2))
    )
    for arm in (None, steering, steering.at(Positions.all())):
        mine = effect(lm, arm, both_sides)
        for question in both_sides.questions[::4]:
            sides = [
                [naive(lm, arm, written.bare, written.ids) for written in side if written.question == question]
                for side in (both_sides.positive, both_sides.negative)
            ]
            wanted, other = (sum(side) / len(side) for side in sides)
            assert mine.wanted[question] == pytest.approx(wanted, abs=1e-3)
            assert mine.leads[question] == pytest.approx(wanted - other, abs=1e-3)
    by_prompt = prompt_effect(lm, both_sides)
    (question, *_) = both_sides.questions
    wanted = [
        naive(lm, None, written.own, written.ids) for written in both_sides.positive if written.question == question
    ]
    assert by_prompt.wanted[question] == pytest.approx(sum(wanted) / len(wanted), abs=1e-3)
    written_elsewhere = Contrasts(
        *(
            tuple(replace(answer, own_likelihood=None, other_likelihood=None) for answer in side)
            for side in (both_sides.positive, both_sides.negative)
        ),
        both_sides.asked,
    )
    computed = prompt_effect(lm, written_elsewhere)
    assert computed.wanted == pytest.approx(by_prompt.wanted, abs=1e-3)
    assert computed.leads == pytest.approx(by_prompt.leads, abs=1e-3)


def test_the_share_is_0_of_nothing_and_1_of_the_prompt_itself(lm: LM, both_sides: Contrasts) -> None:
    base, by_prompt = effect(lm, None, both_sides), prompt_effect(lm, both_sides)
    nothing, all_ = share_of(base, base, by_prompt), share_of(base, by_prompt, by_prompt)
    assert (nothing.estimate, nothing.low, nothing.high) == (0, 0, 0)
    assert (all_.estimate, all_.low, all_.high) == pytest.approx((1, 1, 1))


def test_a_prompt_without_an_effect_is_nothing_to_measure_by(lm: LM, both_sides: Contrasts) -> None:
    """Two negative effects would give a share above 0."""
    base, by_prompt = effect(lm, None, both_sides), prompt_effect(lm, both_sides)
    for less in (base, Effect(by_prompt.wanted, {question: base.leads[question] - 1 for question in base.leads})):
        with pytest.raises(
            TrimtabError, match="the system prompts themselves don't make the wanted answers more likely"
        ):
            share_of(base, less, less)


def test_what_is_not_read_is_refused(lm: LM, both_sides: Contrasts) -> None:
    edit = Edit(Site(1), Add(direction(1, 3.0)), Positions.from_last_prompt_token())
    with pytest.raises(TrimtabError, match="from the last prompt token on"):
        effect(lm, Steering((replace(edit, positions=Positions.generated()),)), both_sides)
    with pytest.raises(TrimtabError, match="from the last prompt token on"):
        effect(lm, Steering((edit, replace(edit, site=Site(2), positions=Positions.all()))), both_sides)
    with pytest.raises(TrimtabError, match="without a gate"):
        effect(lm, Steering((edit,)).when(Threshold(Site(1), direction(3, 2.0), 0.0)), both_sides)
    with pytest.raises(TrimtabError, match="one edit per site"):
        effect(lm, Steering((edit, edit)), both_sides)


# ---- what is chosen ------------------------------------------------------------------------------------------


def test_mean_differences_are_those_of_the_answers_tokens(lm: LM, both_sides: Contrasts) -> None:
    _, steering = mean_differences(lm, IDEA.name, both_sides).at([1])
    (edit,) = steering.edits
    assert edit.strength == 1
    assert edit.positions == Positions.from_last_prompt_token()
    differences: list[torch.Tensor] = []
    norms: list[float] = []
    for question in both_sides.questions:
        sides = [
            [item for item in side if item.question == question] for side in (both_sides.positive, both_sides.negative)
        ]
        for mine, other in zip(*sides, strict=False):
            means = []
            for written in (mine, other):
                text = torch.tensor([[*written.own, *written.ids]])
                with torch.no_grad():
                    hidden = lm.model(input_ids=text, output_hidden_states=True).hidden_states[2][0]
                means.append(hidden[len(written.own) :].double().mean(0))
            differences.append(means[0] - means[1])
            norms += [float(mean.norm()) for mean in means]
    expected = torch.stack(differences).mean(0)
    assert torch.allclose(edit.operation.direction.double(), expected, atol=1e-3)
    assert steering.card.measured["pairs"] == len(differences)
    (push,) = pushes(2.0 * steering)
    assert push.activation_norm == pytest.approx(sum(norms) / len(norms), rel=1e-3)
    assert push.share == pytest.approx(2 * float(expected.norm()) / push.activation_norm, rel=1e-3)
    cosines = torch.cosine_similarity(torch.stack(differences), expected[None])
    assert push.agreement == pytest.approx(float(cosines.mean()), abs=1e-3)
    _, band = mean_differences(lm, IDEA.name, both_sides).at([1, 2])
    for name in ("agreement", "activation_norm"):
        assert list(band.card.measured[name]) == ["1", "2"]
        assert band.card.measured[name]["1"] == steering.card.measured[name]["1"]


def test_the_best_leads_most_of_those_that_make_the_wanted_answers_likelier(lm: LM, both_sides: Contrasts) -> None:
    aside = IDEA.learn[::4]
    learned, held_out = (
        both_sides.for_questions([question for question in IDEA.learn if question not in aside]),
        both_sides.for_questions(aside),
    )
    steps: list[tuple[int, int]] = []
    ranked = candidates(
        lm,
        IDEA.name,
        learned,
        held_out,
        trained=distillation_candidates(lm, IDEA.name),
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps[-1] == (len(ranked), len(ranked))
    base = effect(lm, None, held_out).wanted
    least = sum(base.values()) / len(base)
    helps = [better for better in ranked if better.likelihood > least]
    assert helps
    assert ranked[: len(helps)] == helps
    for some in (helps, ranked[len(helps) :]):
        assert [candidate.lead for candidate in some] == sorted((candidate.lead for candidate in some), reverse=True)
    for best in ranked[:2]:
        found_again = effect(lm, best.steering, held_out)
        assert best.likelihood == pytest.approx(sum(found_again.wanted.values()) / len(base))
        assert best.lead == pytest.approx(sum(found_again.leads.values()) / len(base))
    names = {candidate.name.split(",")[0] for candidate in ranked}
    assert {"distilled", "in closed form"} <= names
    assert {candidate.name.split(",")[0] for candidate in candidates(lm, IDEA.name, learned, held_out, trained=())} == {
        name for name in names if name.startswith("mean difference")
    }


def test_of_those_that_reach_the_system_prompt_the_likeliest_comes_first(
    lm: LM, both_sides: Contrasts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["trimtab.making.candidates"], "ENOUGH", 0.05)
    ranked = candidates(lm, IDEA.name, both_sides, both_sides, trained=(), prompted=True)
    base, by_prompt = effect(lm, None, both_sides), prompt_effect(lm, both_sides)
    lead, least, goal = (sum(values.values()) / len(values) for values in (base.leads, base.wanted, by_prompt.leads))
    reached = [c for c in ranked if c.lead >= lead + 0.05 * (goal - lead) and c.likelihood > least]
    assert 2 <= len(reached) < len(ranked)
    assert ranked[: len(reached)] == sorted(reached, key=lambda candidate: -candidate.likelihood)


@pytest.mark.parametrize(
    ("prompt_leads", "lead"),
    [
        ([1.0, 2.0, 3.0, 2.0], 1.4),  # each of four questions
        ([1.0, 2.0, 3.0, -0.1], math.inf),
        ([-1.0, -2.0, -3.0, -2.0], math.inf),  # the opposite: every candidate would have enough of it
        ([0.0] * 4, math.inf),
        ([2.0] * 9 + [-0.1], 0.7 * 1.79),  # beyond chance, though not on each
    ],
)
def test_enough_of_an_effect_that_is_there(prompt_leads: list[float], lead: float) -> None:
    questions = [str(n) for n in range(len(prompt_leads))]
    plain = dict.fromkeys(questions, 0.0)
    by_prompt = Effect(plain, dict(zip(questions, prompt_leads, strict=True)))
    assert _enough(Effect(plain, plain), by_prompt) == pytest.approx(lead)


def test_training_ends_where_the_system_prompt_is_nearly_reached(
    lm: LM, both_sides: Contrasts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a prompt to compare with, the next kind is trained only if none before has enough of its effect."""

    def trained_with(enough: float, *, prompted: bool) -> list[str]:
        learned: list[str] = []

        def kind(name: str) -> TrainedCandidate:
            def learn(*_: Any) -> Steering:
                learned.append(name)
                return mean_differences(lm, IDEA.name, both_sides).at([1])[1]

            return TrainedCandidate(name, learn, (1.0,))

        monkeypatch.setattr(module, "ENOUGH", enough)
        candidates(lm, IDEA.name, both_sides, both_sides, trained=[kind("a"), kind("b")], prompted=prompted)
        return learned

    module = sys.modules["trimtab.making.candidates"]
    assert trained_with(1e9, prompted=True) == ["a", "b"]
    assert trained_with(-1e9, prompted=True) == []
    assert trained_with(-1e9, prompted=False) == ["a", "b"]


def test_strengths_are_tried_at_the_best_depth(lm: LM, both_sides: Contrasts) -> None:
    ranked = candidates(lm, IDEA.name, both_sides, both_sides, trained=())
    by_name = {candidate.name: candidate for candidate in ranked}
    assert len(by_name) == len(ranked)
    difference = mean_differences(lm, IDEA.name, both_sides)
    compared = [by_name[f"mean difference at layer {depth}, strength 2"] for depth in difference.depths]
    best = min(compared, key=ranked.index)
    others = {
        candidate.name for candidate in ranked if ", strength 1" in candidate.name or ", strength 3" in candidate.name
    }
    assert others == {best.name.replace("strength 2", f"strength {strength}") for strength in (1, 3)}
    for candidate in ranked:
        measured = effect(lm, candidate.steering, both_sides)
        assert candidate.effect.leads == pytest.approx(measured.leads, abs=1e-4)
        assert len({edit.strength for edit in candidate.steering.edits}) == 1


def test_the_closed_form_does_much_of_what_the_system_prompt_does(lm: LM, both_sides: Contrasts) -> None:
    steering = learn_closed_form(lm, IDEA.name, both_sides, FROM_LAST, 0)
    before, after = (effect(lm, acting, both_sides) for acting in (None, steering))
    assert share_of(before, after, prompt_effect(lm, both_sides)).low > 0.1
    assert learn_closed_form(lm, IDEA.name, both_sides, FROM_LAST, 0) == steering


def test_what_is_not_an_addition_is_not_tried_at_all_tokens(lm: LM, both_sides: Contrasts) -> None:
    kinds = [replace(kind, strengths=(1.0,)) for kind in distillation_candidates(lm, IDEA.name)]
    _, everywhere = mean_differences(lm, IDEA.name, both_sides, Positions.all()).at([1])
    kinds[1] = replace(kinds[1], learn=lambda *_: everywhere)
    ranked = candidates(lm, IDEA.name, both_sides, both_sides, trained=kinds, positions=Positions.all())
    assert {type(edit.operation) for candidate in ranked for edit in candidate.steering.edits} == {Add}


def test_distilling_makes_the_wanted_answers_likelier(lm: LM, both_sides: Contrasts) -> None:
    steering = learn_distilled(lm, IDEA.name, both_sides, FROM_LAST, 0)
    before, after = (effect(lm, acting, both_sides).wanted for acting in (None, steering))
    assert sum(after.values()) > sum(before.values())
    assert learn_distilled(lm, IDEA.name, both_sides, FROM_LAST, 0) == steering


def test_a_random_direction_that_breaks_the_text_is_compared_by_the_wanted_answers() -> None:
    """Its leads are noise, so a few large ones say nothing; one that leaves the text whole is compared by its leads."""

    def made(wanted: float, leads: list[float]) -> Effect:
        questions = [str(n) for n in range(len(leads))]
        return Effect(dict.fromkeys(questions, wanted), dict(zip(questions, leads, strict=True)))

    noise = [6.0, -5.0, 4.0, -6.0, 5.0, -4.0, 0.5, 0.1]
    base, mine = made(-1.2, [0.0] * 8), made(-1.1, [0.3] * 8)
    assert _chance_of_random(base, made(-4.0, noise), mine) == 1 / 2**8
    assert _chance_of_random(base, made(-1.1, noise), mine) > 0.3
    assert _chance_of_random(base, made(-1.1, [0.3] * 8), mine) == 1.0
    assert _chance_of_random(base, made(-4.0, [0.0] * 8), made(-5.0, [9.0] * 8)) == 1.0


# ---- all of it -----------------------------------------------------------------------------------------------


def test_prompts_without_an_effect_are_noticed_before_anything_is_learned(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[str] = []
    module = sys.modules["trimtab.making.make"]
    monkeypatch.setattr(module, "prompt_effect", lambda lm, answers: effect(lm, None, answers))
    with pytest.raises(TrimtabError, match="don't make the wanted answers more likely"):
        make(lm, IDEA, tokens=TOKENS, stage=lambda what, done, total: stages.append(what) or None)
    assert list(dict.fromkeys(stages)) == ["answering for and against", "answering the test questions"]


def test_make(lm: LM, tmp_path: Any) -> None:
    stages: list[str] = []
    made = make(lm, IDEA, tokens=TOKENS, stage=lambda what, done, total: stages.append(what) or None)
    assert list(dict.fromkeys(stages)) == [
        "answering for and against",
        "answering the test questions",
        "learning",
        "measuring",
    ]
    assert made.candidates[0].name == made.name
    measured = made.steering.card.measured
    assert measured["share_of_prompt"] == pytest.approx(made.verdict.share, abs=1e-4)
    assert (made.steering.card.options["idea"], made.steering.card.options["chosen"]) == ("odd", made.name)
    assert len(made.examples) == len(IDEA.test)
    (plain,) = lm.generate(made.examples[3].question, max_new_tokens=TOKENS)
    (steered,) = lm.generate(made.examples[3].question, made.steering, max_new_tokens=TOKENS)
    assert (made.examples[3].unsteered, made.examples[3].steered) == (plain.text.strip(), steered.text.strip())

    test_answers = contrasts(lm, IDEA, IDEA.test, 2, TOKENS)  # nothing was learned from these
    base, by_prompt = effect(lm, None, test_answers), prompt_effect(lm, test_answers)
    share = share_of(base, effect(lm, made.steering, test_answers), by_prompt)
    assert made.verdict.share == pytest.approx(share.estimate)
    means = means_for(lm, [made.steering], list(IDEA.test))  # a map's push depends on what it reads
    assert made.verdict.random[0] == pytest.approx(
        share_of(base, effect(lm, random_like(made.steering, 0, means), test_answers), by_prompt).estimate
    )
    signs = [sum("w5 " in f"{example.steered} " for example in made.examples) / len(made.examples)]
    assert made.verdict.signs[2] == pytest.approx(signs[0])

    nats = lm.divergence(made.steering, evenly_spaced(IDEA.test, 8))
    assert made.steering.card.divergence == {
        "mean": pytest.approx(nats.mean, abs=1e-6),
        "p95": pytest.approx(nats.p95, abs=1e-6),
        "tokens": nats.tokens,
        "edits": edits_digest(made.steering),
    }

    save(made.steering, tmp_path / "odd.safetensors")
    assert load(tmp_path / "odd.safetensors") == made.steering
    again = make(lm, IDEA, tokens=TOKENS)
    assert again.steering == made.steering
    assert again.verdict == made.verdict


def test_no_answer_differs(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrasts_module, "_distinguishable", lambda _lm, _answers: [])
    with pytest.raises(TrimtabError, match="barely differ"):
        make(lm, IDEA, tokens=TOKENS)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, ""),
        ({"p": 0.051}, "can't be told from luck, or from that of a random direction (p = 0.051)"),
        ({"p": 0.05}, ""),
        ({"effect": 0.05, "low": 0.02, "random": (0.0,)}, "less than 10%"),
        ({"loops": 0.45}, "45% of its answers are repetitive"),
        (
            {"loops": 0.25, "loops_p": 0.05},
            "25% of its answers are repetitive, and 10% under the system prompt (p = 0.05)",
        ),
        ({"loops": 0.3, "loops_p": 0.06}, ""),
    ],
)
def test_verdicts(changed: dict[str, Any], why: str) -> None:
    usual: dict[str, Any] = {
        "effect": 0.7, "low": 0.5, "high": 0.9, "random": (0.0, 0.02, -0.01), "p": 0.001, "questions": 20, "loops": 0.0,
        "loops_before": 0.1, "loops_p": 1.0, "perplexity": 1.2, "signs": (0.0, 1.0, 0.8),
    }  # fmt: skip
    verdict = Verdict(**{**usual, **changed})
    assert verdict.holds == (not why)
    assert why in verdict.why_not
    lines = "\n".join(verdict.lines())
    assert ("verdict: it works" in lines) == (not why)
    assert why in lines
    assert "random directions" in lines
    assert ("caution" in lines) == (changed == {"loops": 0.3, "loops_p": 0.06})


@pytest.mark.parametrize(
    ("before", "after", "least", "most"),
    [(0.1, 0.1, 0.0, 0.03), (0.55, 0.55, 0.0, 0.05), (0.1, 0.6, 0.9, 1.0), (0.3, 0.85, 0.93, 1.0)],
)
def test_how_often_repetition_alone_decides(before: float, after: float, least: float, most: float) -> None:
    """Of steerings that repeat themselves no more than the prompt few are turned down; of those that do, most are."""
    drawn, refused, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        mine, other = (drawn.random(20) < after).astype(float), (drawn.random(20) < before).astype(float)
        more = decide(list(other), list(mine))
        verdict = Verdict(0.7, 0.5, 0.9, (0.0,), 0.001, 20, more.after, more.before, more.p, 1.2)
        refused += not verdict.holds
    assert least <= refused / runs <= most
