"""A prompt compiled into an edit, on a tiny random model: it gets nearer to the prompted model, and does so again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS, WIDTH, prompt

from trimtab import LM, Add, Positions, ReadWrite, Site, Steering, TrimtabError, load, save
from trimtab.learn.descent import DescentHistory, descend
from trimtab.learn.own_answers import TRIAL_QUERIES
from trimtab.learn.soft_targets import TEMPERATURE
from trimtab.learn.teachers import Teacher
from trimtab.methods import distill as module
from trimtab.methods.distill import learn_distill

QUERIES = [prompt(i, 3 + i % 4) for i in range(12)]
SAID = "w7 w8"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}w70{% elif m.role == 'user' %}w71{% else %}w72{% endif %}"
    " {{ m.content }} {% endfor %}{% if add_generation_prompt %}w72{% endif %}"
)
QUICK: dict[str, Any] = {"queries": QUERIES, "tokens": 8, "steps": 4, "rate": 0.05}
FITS = ["gradient", "closed", "both"]


def anything(_query: str, _answer: str, _cut: bool) -> bool:
    return True


def fresh(dtype: torch.dtype = torch.float32) -> LM:
    """Of all tiny models one whose answers seldom loop; it has a chat template."""
    lm = tiny.tiny("llama", seed=1, dtype=dtype)
    lm.tokenizer.chat_template = TEMPLATE
    return lm


@pytest.fixture(scope="module")
def lm() -> LM:
    return fresh()


@pytest.fixture(scope="module")
def usual(lm: LM) -> Steering:
    return learn(lm)


def learn(lm: LM, **more: Any) -> Steering:
    prompting = {} if {"teacher", "instruction", "system"} & set(more) else {"instruction": SAID}
    return learn_distill(lm, **{"check": anything, **QUICK, **prompting, **more})


@pytest.fixture
def courses(monkeypatch: pytest.MonkeyPatch) -> list[DescentHistory]:
    """What happened in each descent."""
    recorded: list[DescentHistory] = []

    def watched(*arguments: Any, **more: Any) -> Any:
        trained, course = descend(*arguments, **more)
        recorded.append(course)
        return trained, course

    monkeypatch.setattr(module, "descend", watched)
    return recorded


@torch.no_grad()
def divergence(
    lm: LM, steering: Steering | None, teacher: Teacher, *, with_prompt: bool = False, temperature: float = 1.0
) -> float:
    """KL from the prompted model, in nats per token, over its own answers: in a loop, over the whole vocabulary."""
    total = []
    for query in QUERIES:
        prompt_ids = lm.encode(teacher.ask(query, 0), system=teacher.system)
        (answer,) = lm.generate(teacher.ask(query, 0), system=teacher.system, max_new_tokens=QUICK["tokens"])
        plain = prompt_ids if with_prompt else lm.encode(query)
        target = lm.model(input_ids=torch.tensor([[*prompt_ids, *answer.token_ids[:-1]]])).logits[
            0, len(prompt_ids) - 1 :
        ]
        ids = torch.tensor([[*plain, *answer.token_ids[:-1]]])
        if steering is None:
            logits = lm.model(input_ids=ids).logits
        else:
            with lm.steered(steering, prompt_lengths=[len(plain)]):
                logits = lm.model(input_ids=ids, use_cache=False).logits
        p, q = (target.double() / temperature).log_softmax(-1), logits[0, len(plain) - 1 :].double().log_softmax(-1)
        total.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return sum(total) / len(total)


# ---- it learns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "rank"),
    [
        ("gradient", 0),
        pytest.param("gradient", 4, marks=pytest.mark.long),
        pytest.param("closed", 0, marks=pytest.mark.long),
        ("closed", 4),
        pytest.param("both", 0, marks=pytest.mark.long),
        ("both", 4),
    ],
)
def test_it_gets_nearer_and_again_to_the_same_bytes(
    fit: str, rank: int, tmp_path: Path, courses: list[DescentHistory]
) -> None:
    digests = []
    for run in ("one", "two"):
        lm = fresh()
        steering = learn(lm, fit=fit, rank=rank, steps=12, with_prompt=0.0)
        digests.append(save(steering, tmp_path / f"{run}.safetensors"))
    assert digests[0] == digests[1]
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    loaded = load(tmp_path / "one.safetensors")
    assert loaded == steering
    assert loaded.card.options["fit"] == fit

    teacher = Teacher((SAID,))
    temperature = 1.0 if fit == "closed" else TEMPERATURE
    before, after = (divergence(lm, acting, teacher, temperature=temperature) for acting in (None, loaded))
    assert after < (0.85 if fit == "gradient" else 0.97) * before
    assert len(courses) == (0 if fit == "closed" else 2)
    assert all(course.losses[-1] < 0.9 * course.losses[0] for course in courses)
    kind = ReadWrite if rank else Add
    assert all(type(edit.operation) is kind for edit in steering.edits)
    assert {edit.positions for edit in steering.edits} == {Positions.from_last_prompt_token()}


@pytest.mark.parametrize("fit", FITS)
def test_layers(lm: LM, fit: str) -> None:
    layers = [edit.site for edit in learn(lm, fit=fit, rank=1, steps=1).edits]
    every = range(LAYERS) if fit == "gradient" else range(0, LAYERS, 2)
    assert layers == [Site(layer) for layer in every]
    chosen = learn(lm, layers=[3, 1], fit=fit, rank=1, steps=1)
    assert [edit.site for edit in chosen.edits] == [Site(1), Site(3)]
    assert [edit.site for edit in learn(lm, layers=2, fit=fit, steps=1).edits] == [Site(2)]
    assert chosen.card.options["layers"] == [1, 3]


def test_the_rank_is_8_and_of_a_closed_fit_64_or_all(lm: LM) -> None:
    (edit,) = learn(lm, layers=1).edits
    assert isinstance(edit.operation, ReadWrite)
    assert edit.operation.rank == 8 + 1
    (edit,) = learn(lm, layers=1, fit="closed").edits
    assert isinstance(edit.operation, ReadWrite)
    assert edit.operation.rank == WIDTH + 1  # a row for the vector


TEACHERS = {
    "an instruction": Teacher((SAID,)),
    "phrasings": Teacher((SAID, f"w9 {SAID}", f"{SAID} w8"), times=2),
    "a system message": Teacher(system="w5 w6"),
    "a text in front": Teacher(text="w5 w6 w7"),
    "a text around": Teacher(text="w5 {query} w7"),
    "examples": Teacher(examples=(("w5 w6", "w44 w45"), ("w3", "w46"))),
    "all at once": Teacher((SAID,), system="w5 w6", text="w9 {query}", examples=(("w5 w6", "w44 w45"),)),
}


@pytest.mark.long_unless(lambda name: name in ("phrasings", "a text around", "all at once"))
@pytest.mark.parametrize("name", TEACHERS)
def test_every_kind_of_teacher(lm: LM, name: str, courses: list[DescentHistory]) -> None:
    teacher = TEACHERS[name]
    steering = learn(lm, teacher=teacher, steps=24, with_prompt=0.0)
    losses = courses[0].losses
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    card = steering.card.options
    assert card.get("instruction") == (teacher.instruction[0] if teacher.instruction else None)
    assert (card.get("system"), card.get("text")) == (teacher.system, teacher.text)
    assert card.get("examples", 0) == len(teacher.examples)
    assert card.get("times", 1) == teacher.times


def test_a_teacher_and_its_short_forms_are_the_same(lm: LM) -> None:
    for short, teacher in (
        ({"instruction": [SAID, "w9"]}, Teacher((SAID, "w9"))),
        ({"instruction": SAID, "system": "w5"}, Teacher((SAID,), system="w5")),
    ):
        short_form, by_teacher = learn(lm, steps=1, **short), learn(lm, steps=1, teacher=teacher)
        assert short_form == by_teacher
        assert short_form.card == by_teacher.card


def test_a_share_of_answers_is_learned_with_the_prompt(lm: LM) -> None:
    """With none of them the prompted model may go astray; with all of them it stays where it is."""
    teacher = Teacher((SAID,))
    never, always = (learn(lm, with_prompt=share, steps=8, rate=0.1) for share in (0.0, 1.0))
    astray, stays = (divergence(lm, acting, teacher, with_prompt=True) for acting in (never, always))
    assert stays < 0.2 * astray
    assert divergence(lm, never, teacher) < divergence(lm, always, teacher)


def test_the_dose_is_bounded(lm: LM) -> None:
    doses = learn(lm, rate=0.5, max_dose=0.05, steps=10).card.measured["doses"]
    assert set(doses) == {str(layer) for layer in range(LAYERS)}
    assert max(doses.values()) <= 0.05 + 1e-6


def test_the_model_is_as_it_was() -> None:
    lm = fresh()
    weights = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    answers = lm.generate(QUERIES[:3], max_new_tokens=5)
    learn(lm)
    assert all(torch.equal(weight, weights[name]) for name, weight in lm.model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in lm.model.parameters())
    assert [answer.token_ids for answer in lm.generate(QUERIES[:3], max_new_tokens=5)] == [
        answer.token_ids for answer in answers
    ]


def test_other_seeds_and_other_prompts_are_other_steerings(lm: LM, usual: Steering) -> None:
    assert learn(lm, seed=1) != usual
    other = learn(lm, instruction="w9 w9")
    assert other != usual
    assert other.card.data != usual.card.data


@pytest.mark.slow
def test_a_model_in_bfloat16(courses: list[DescentHistory]) -> None:
    """What is learned is float32 all the same."""
    lm = fresh(torch.bfloat16)
    steering = learn(lm, steps=10, with_prompt=0.0)
    assert {edit.operation.write.dtype for edit in steering.edits} == {torch.float32}
    assert courses[0].losses[-1] < 0.8 * courses[0].losses[0]
    closed = learn(lm, fit="closed", rank=4)
    assert divergence(lm, closed, Teacher((SAID,))) < divergence(lm, None, Teacher((SAID,)))


# ---- answers that are hard to get ----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [pytest.param([0], marks=pytest.mark.long), [1, 3], None])
def test_help_acts_where_nothing_is_learned(lm: LM, layers: list[int] | None) -> None:
    """The help has a layer of its own, which need not be one of those that are learned."""
    texts: list[str] = []

    def later(query: str, _answer: str, _cut: bool) -> bool:
        texts.append(query)
        return len(texts) > len(QUERIES) + TRIAL_QUERIES

    steering = learn(lm, layers=layers, check=later)
    tries = [attempt["help"] for attempt in steering.card.measured["tries"]]
    assert tries[:3] == ["", "said in other ways", "tried at several blocks"]
    assert [edit.site.layer for edit in steering.edits] == (layers or list(range(LAYERS)))


def test_few_queries_have_something_held_out_as_well(lm: LM, tmp_path: Path) -> None:
    few = QUERIES[:4]
    steering = learn(lm, instruction=[SAID, "w9 w9"], queries=few)
    assert steering.card.measured["answers"] == 8
    assert math.isfinite(steering.card.measured["divergence_before"])
    assert math.isfinite(steering.card.measured["divergence_after"])
    save(steering, tmp_path / "few.safetensors")
    assert load(tmp_path / "few.safetensors") == steering


def test_queries_that_repeat_count_once(lm: LM, usual: Steering) -> None:
    assert learn(lm, queries=QUERIES * 2) == usual


def test_without_a_check(lm: LM) -> None:
    steering = learn(lm, check=None)
    assert steering.card.measured["answers"] >= 8
    assert steering.card.measured["divergence_after"] < steering.card.measured["divergence_before"]


# ---- on the way ----------------------------------------------------------------------------------------------


def test_an_interrupted_descent_is_kept(lm: LM, tmp_path: Path) -> None:
    total = 4 * len(QUERIES) + 4 * 30
    pressed = []

    def stop(done: int, of: int) -> None:
        assert of == total
        if done >= total - 4 * 15 and not pressed:
            pressed.append(done)
            raise KeyboardInterrupt

    steering = learn(lm, rank=0, steps=30, progress=stop)
    measured = steering.card.measured
    assert (measured["interrupted"], measured["steps"], measured["best_step"]) == (True, 15, 10)
    assert measured["divergence_after"] < measured["divergence_before"]
    save(steering, tmp_path / "interrupted.safetensors")
    lm.generate(QUERIES[0], steering, max_new_tokens=2)


@pytest.mark.parametrize("fit", FITS)
def test_progress_goes_on_and_words_say_how_it_stands(lm: LM, fit: str) -> None:
    steps: list[tuple[int, int]] = []
    said: list[str] = []
    learn(lm, fit=fit, rank=2, steps=20, progress=lambda done, total: steps.append((done, total)), say=said.append)
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    assert "answers kept" in said[0]
    assert len(said) == (1 if fit == "closed" else 3)


def test_the_card_says_what_was_measured(lm: LM) -> None:
    steering = learn(lm, fit="both", rank=2, options={"name": "mine"})
    card = steering.card
    assert card.method == "distill"
    assert card.model == lm.identity
    assert card.options["name"] == "mine"
    assert {"fit", "rank", "tokens", "queries", "seed", "steps", "rate", "with_prompt", "max_dose"} <= set(card.options)
    assert set(card.measured["explained"]) == {"0", "2"}
    assert all(0 <= share <= 1 for share in card.measured["explained"].values())


# ---- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "open"}, "there is no fit 'open'; fits: gradient, closed, both"),
        ({"rank": -1}, "rank is 0 or more, got -1"),
        ({"with_prompt": 1.5}, "with_prompt is a share from 0 to 1"),
        ({"layers": LAYERS}, "there is no layer 4"),
        ({"steps": 0}, "steps of a descent is above 0"),
        ({"rate": -0.1}, "rate of a descent is above 0"),
        ({"max_dose": 0}, "max_dose of a descent is above 0"),
        ({"instruction": ""}, "is empty"),
        ({"instruction": []}, "needs an instruction, a system message, a text or examples"),
        ({"teacher": Teacher((SAID,)), "system": "w5"}, "not both"),
        ({"check": lambda *_: False}, "answers written under this prompt follow it; 8 are needed"),
        ({"queries": QUERIES[:2]}, "8 are needed"),
    ],
)
def test_errors(lm: LM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TrimtabError, match=message):
        learn(lm, **options)
