"""Rows whose strength isn't set by nats, or that act on a phrase: their controls, side effects and verdicts."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from functools import partial

import pytest
from test_equal_nats import WANTED, planned, task_of
from tiny import prompt, tiny

from trimtab.bench import bench
from trimtab.bench.emphasizing import EMPHASIS
from trimtab.bench.measures import by_answers
from trimtab.bench.results import NO_BETTER, UNCONTROLLED, Cell, Results, Row, TaskResults, _standings
from trimtab.bench.tasks import PLAIN, PROMPT, TWICE, Cost, Outline
from trimtab.evaluate import lora
from trimtab.evaluate.controls import at_random_span, random_span
from trimtab.evaluate.decision import BETTER, LUCK, decide
from trimtab.evaluate.fluency import fluencies
from trimtab.evaluate.lora import Lora
from trimtab.methods.instaboost import instaboost
from trimtab.steering import Positions
from trimtab.text.pairs import Pair

COUNT = 4
PHRASES = [f"w{50 + n} w{60 + n}" for n in range(COUNT)]
INSTRUCTED = [f"{prompt(n, 4)} {phrase} {prompt(20 + n, 3)}" for n, phrase in enumerate(PHRASES)]


def instructed_task(lm, store, count):
    arms = {PLAIN: INSTRUCTED[:count], TWICE: INSTRUCTED[:count]}
    return replace(
        task_of(lm, store, count),
        name="instructed",
        prompted=(TWICE,),
        measure=by_answers(arms, lambda _, text, __: float(f"w{WANTED}" in text.split()), 3),
        prompts=tuple(INSTRUCTED[:count]),
        phrases=tuple(PHRASES[:count]),
        reference_prompts=tuple(INSTRUCTED[:2]),
        reference_phrases=tuple(PHRASES[:2]),
    )


def plan_for(rows, make=instructed_task, **settings):
    outline = Outline(
        "instructed", "mine", COUNT, Cost(4, 10), Cost(), 10.0, 4.0, 6.0, make, instruction_in_prompt=True
    )
    filled = planned(rows, (1.0,), **settings)
    return replace(filled, outlines=(outline,), settings=replace(filled.settings, items=COUNT))


def runs_of(folder, method):
    (path,) = (folder / "cells").glob(f"*instructed*--method--{method}.json")
    return json.loads(path.read_text())["runs"]


@pytest.fixture(scope="module")
def lm():
    return tiny("llama")


# ---- emphasis --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emphasized(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emphasized")
    return folder, bench(lm, plan_for(("random", "directer", "instaboost", "seka"), thorough=True), folder)


def test_the_control_of_an_emphasis_is_a_random_span_at_the_same_strength(emphasized):
    folder, results = emphasized
    (task,) = results.tasks
    rows = {row.method: row for row in task.rows}
    assert set(rows) == {"random", "directer", "instaboost", "seka"}
    (fixed,) = runs_of(folder, "directer")
    assert (fixed["nats"], fixed["span"]["factor"]) == (None, 1.0)
    for name in ("instaboost", "seka"):
        (run,) = runs_of(folder, name)
        assert run["span"]["reached"] == pytest.approx(run["nats"], rel=0.25)
        assert run["span"]["factor"] != run["factor"]
    assert all(rows[name].cell.span is not None for name in ("directer", "instaboost", "seka"))
    assert rows["random"].cell.span is None


def test_what_an_emphasis_learns_is_learned_once_a_model(emphasized, lm):
    folder, _ = emphasized
    (path,) = (folder / "learned").glob("every-task*--seka.safetensors")
    before = path.read_bytes()
    path.with_name("other").write_bytes(before)
    bench(lm, plan_for(("random", "directer", "instaboost", "seka"), thorough=True), folder)
    assert path.read_bytes() == before
    assert set(EMPHASIS) == {"directer", "instaboost", "pasta", "seka", "spotlight"}


@pytest.mark.parametrize("seed", range(6))
def test_a_random_span_is_as_long_as_the_phrase_and_elsewhere(lm, seed):
    draw = random.Random(seed)
    at, length = draw.randrange(1, 9), draw.randrange(1, 4)
    words = prompt(seed, 12).split()
    words[at : at + length] = [f"w{80 + n}" for n in range(len(words[at : at + length]))]
    text, phrase = " ".join(words), " ".join(words[at : at + length])
    ((start, stop),) = lm.spans(text, phrase)
    first, last = random_span(lm, text, phrase)
    assert last - first == stop - start
    assert last <= start or first >= stop
    assert first > 0 or lm.encode(text)[0] != lm.bos_token_id
    assert random_span(lm, text, phrase) == (first, last)
    control = at_random_span(lm, instaboost(lm, text, phrase), text, phrase)
    assert {edit.positions for edit in control.edits} == {Positions.span(first, last)}


# ---- LoRA ------------------------------------------------------------------------------------------------------


def lora_task(lm, store, count):
    pairs = tuple(Pair(prompt(100 + n, 4), prompt(200 + n, 4), prompt(n, 4), "answers") for n in range(8))
    task = instructed_task(lm, store, count)
    return replace(task, training_data=replace(task.training_data, pairs={"texts": (), "answers": pairs}))


@pytest.mark.slow
def test_a_lora_has_side_effects_and_the_perplexity_of_the_original_model(lm, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="needs trimtab[finetune]")
    quick = Lora(learning_rate=2e-2, epochs=4, batch_size=4)
    monkeypatch.setattr(lora, "finetuned", partial(lora.finetuned, lora=quick))
    results = bench(lm, plan_for(("random", "LoRA"), lora_task, thorough=True), tmp_path)
    row = next(row for row in results.tasks[0].rows if row.method == "LoRA")
    assert row.cell.nats is None
    assert row.cell.sides["text"].estimate < -0.1
    (run,) = runs_of(tmp_path, "LoRA")
    answers = lm.generate(INSTRUCTED, max_new_tokens=3)
    assert run["answers"] != [answer.text for answer in answers]
    again = [replace(answer, token_ids=ids_of(lm, text)) for answer, text in zip(answers, run["answers"], strict=True)]
    expected = [fluency.perplexity for fluency in fluencies(lm, INSTRUCTED, again)]
    whole = [n for n, answer in enumerate(again) if len(answer.token_ids) == 3]  # without a token that text hides
    assert whole
    assert [run["beside"]["perplexity"][n] for n in whole] == pytest.approx([expected[n] for n in whole], rel=1e-3)


def ids_of(lm, text):
    return tuple(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


# ---- verdicts --------------------------------------------------------------------------------------------------


def cell(won, nats=1.0, random=None, orthogonal=None, span=None, broken=()):
    decision = decide([0.0] * 8, [1.0] * won + [0.0] * (8 - won))
    return Cell(nats, 1.0, nats, decision, random, orthogonal, span, {"repeated": 0.0}, {}, broken)


def test_a_gain_without_a_control_has_a_verdict_of_its_own():
    assert cell(2).verdict == LUCK
    assert cell(8).verdict == UNCONTROLLED
    for control in ("random", "orthogonal", "span"):
        assert cell(8, **{control: 0.01}).verdict == BETTER
        assert cell(8, **{control: 0.5}).verdict == NO_BETTER
    assert cell(8, random=0.01, span=0.2).verdict == NO_BETTER


def test_a_controlled_gain_is_preferred_to_a_larger_one_without_a_control():
    cells = [cell(8), cell(7, random=0.01), cell(8, random=0.5), cell(8, random=0.01, broken=("it repeats itself",))]
    assert max(cells, key=lambda each: each.rank) is cells[1]
    assert max([cells[0], cells[2], cells[3]], key=lambda each: each.rank) is cells[0]


def results_with(*cells):
    rows = tuple(Row(f"method {n}", (each,), 0, None, (), None) for n, each in enumerate(cells))
    task = TaskResults("a task", "about", "share", 8, 0.0, {PROMPT: cell(8).decision}, rows, {})
    return Results({}, (task,), _standings([task], {}), None, {})


def test_rows_without_a_control_are_not_counted_as_better_than_one():
    results = results_with(cell(8, random=0.01), cell(8), cell(1))
    words = "\n".join(results.words())
    assert "1 of 3 rows (a method on a task) are better than the unsteered model and than their controls" in words
    assert "there is no control: method 1 on a task" in words
    assert [(each.better, each.uncontrolled) for each in results.methods] == [(1, 0), (0, 1), (0, 0)]
    words = "\n".join(results_with(cell(8), cell(1)).words())
    assert "none of the 2 rows (a method on a task) are better than a control" in words
    assert "better on most tasks" not in words
