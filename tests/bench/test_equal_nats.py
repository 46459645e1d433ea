"""The benchmark on tiny models, with methods and tasks of which it is known what comes out."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import direction, prompt, tiny

from trimtab.bench import Settings, bench, plan, results_of
from trimtab.bench.learning import inputs_for
from trimtab.bench.measures import by_answers
from trimtab.bench.page import write_page
from trimtab.bench.plan import Plan, Speed, fit_to_budget, restrict_plan
from trimtab.bench.results import RELIABLE, SPLITS, _agreement, _more_items, _rank, ranked
from trimtab.bench.store import Store, canonical
from trimtab.bench.tasks import PLAIN, PROMPT, TWICE, Cost, Outline, Task, TrainingData
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.evaluate.divergence import divergence, reference
from trimtab.lm import LM
from trimtab.methods.recipe import Recipe, recipes
from trimtab.steering import Add, Card, Edit, Site, Steering
from trimtab.text.pairs import Pair

WANTED = 7
ITEMS = 12
ASKED = [prompt(seed, 4 + seed % 3) for seed in range(ITEMS)]
PAIRS = tuple(Pair(prompt(100 + n, 5), prompt(200 + n, 5), "", "texts") for n in range(10))
NATS = (1.0, 4.0)


def learn_planted(lm, pairs, layers=None, **_):
    """Pushes towards one word, whatever the pairs are."""
    assert len(pairs) == len(PAIRS)
    row = lm.model.get_output_embeddings().weight[WANTED].detach().float()
    return Steering((Edit(Site(3), Add(row)),), Card("planted", model=lm.identity))


def learn_nothing(lm, pairs, layers=None, **_):
    """Pushes somewhere."""
    return Steering((Edit(Site(1), Add(direction(9).float())),), Card("nothing", model=lm.identity))


def learn_broken(lm, pairs, layers=None, **_):
    raise TrimtabError("it can't learn this")


def learn_foreign(lm, pairs, layers=None, **_):
    raise RuntimeError("a fault of theirs")


def learn_interrupted(lm, pairs, layers=None, **_):
    """As a descent that somebody stopped: the best so far, and its card says so."""
    return Steering(
        (Edit(Site(1), Add(direction(9).float())),), Card("x", model=lm.identity, measured={"interrupted": True})
    )


def own(name):
    return Recipe(name, name, "none", "pairs", "texts", "adds", f"test_equal_nats:learn_{name}", shapes=("texts",))


RECIPES = (
    {name: own(name) for name in ("planted", "nothing", "broken", "interrupted")}
    | {"foreign": replace(own("foreign"), distribution="theirs 1.0")}
    | {name: recipes()[name] for name in ("random", "caa", "bipo", "actadd", "safety", "tda")}
)


def task_of(lm, _store, count):
    arms = {PLAIN: ASKED[:count], PROMPT: [f"w{WANTED} {p}" for p in ASKED[:count]], TWICE: ASKED[:count]}
    return Task(
        name="says it",
        about="answers with the word",
        unit="share",
        items=tuple(f"item {n}" for n in range(count)),
        groups=tuple(f"item {n}" for n in range(count)),
        prompted=(PROMPT, TWICE),
        training_data=TrainingData(pairs={"texts": PAIRS}),
        reference_prompts=tuple(prompt(300 + n, 5) for n in range(4)),
        measure=by_answers(arms, lambda _, text, __: float(f"w{WANTED}" in text.split()), 4),
    )


def planned(rows=tuple(name for name in RECIPES if name != "interrupted"), nats=NATS, **settings):
    outline = Outline("says it", "mine", ITEMS, Cost(4, 10), Cost(), 10.0, 4.0, 6.0, task_of)
    rows = tuple(sorted(rows, key=lambda name: name != "random"))
    return Plan(Settings(nats=nats, items=ITEMS, **settings), (outline,), RECIPES, rows, ())


@pytest.fixture(scope="module")
def lm():
    return tiny("llama")


@pytest.fixture(scope="module")
def done(lm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, bench(lm, planned(), folder)


def test_what_was_planted_is_found_and_what_does_nothing_is_not(done):
    _, report = done
    (task,) = report.tasks
    rows = {row.method: row for row in task.rows}
    assert rows["planted"].cell.verdict == "better"
    assert rows["planted"].cell.decision.after > task.unsteered
    assert rows["planted"].cell.orthogonal is not None
    assert rows["planted"].cell.orthogonal <= 0.05
    assert "text" in rows["planted"].cell.sides
    assert rows["nothing"].cell.verdict != "better"
    assert report.methods[0].method == "planted"
    assert any("better on most tasks (1): planted" in line for line in report.words())


def test_methods_that_cannot_act_are_listed_with_the_reason(done):
    (task,) = done[1].tasks
    assert "pairs of answers" in task.left_out["bipo"]
    assert "two texts" in task.left_out["actadd"]
    assert "all prompts are of one kind" in task.left_out["safety"]
    assert "isn't directed at any behaviour" in task.left_out["tda"]
    assert task.left_out["broken"] == "it couldn't be learned: it can't learn this"
    assert task.left_out["foreign"] == "it couldn't be learned: RuntimeError: a fault of theirs (theirs 1.0)"


def test_every_strength_has_the_divergence_that_was_asked_for(lm, done):
    _, report = done
    base = reference(lm, [prompt(300 + n, 5) for n in range(4)], tokens=16)
    for row in report.tasks[0].rows:
        for cell in row.cells:
            assert cell.reached == pytest.approx(cell.nats, rel=0.1)
    planted = next(row for row in report.tasks[0].rows if row.method == "planted")
    steering = learn_planted(lm, PAIRS)
    for cell in planted.cells:
        assert divergence(lm, cell.factor * steering, base).p95 == pytest.approx(cell.reached, rel=1e-3)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interrupted_run_ends_with_the_same_bytes(lm, done, tmp_path):
    def stop(number, _total):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(lm, planned(), tmp_path, progress=stop)
    assert not (tmp_path / "results.json").exists()
    before = files(tmp_path)
    bench(lm, planned(), tmp_path)
    assert files(tmp_path) == files(done[0])
    assert all(files(tmp_path)[name] == data for name, data in before.items())


class Elsewhere(LM):
    """The same model on an engine that knows no random directions."""

    engine = "elsewhere"
    calls = 0

    def check(self, steering, *, transfer=False):
        if steering.card.method == "nothing":
            raise UnsupportedError("the elsewhere engine can't do nothing")
        super().check(steering, transfer=transfer)

    def generate(self, *args, **kwargs):
        self.calls += 1
        return super().generate(*args, **kwargs)


def test_answers_may_come_from_another_engine(lm, done, tmp_path):
    """What it can run is what it would be here; what it can't is left out with the reason, and so is no other model."""
    answering = Elsewhere(lm.model, lm.tokenizer, name=lm.name)
    rows = ("random", "nothing", "planted")
    report = bench(lm, planned(rows), tmp_path, answering=answering)
    here, there = files(done[0]), files(tmp_path)
    cells = [name for name in there if name.startswith("cells/") and "nothing" not in name]
    assert len(cells) >= 6  # three arms, the task, two methods
    assert all(here[name] == there[name] for name in cells)
    assert answering.calls > 3
    assert report.tasks[0].left_out["nothing"] == "the elsewhere engine can't do nothing"
    assert json.loads(there["run.json"])["answers"]["engine"] == "elsewhere"
    with pytest.raises(TrimtabError, match="answers differ"):
        bench(lm, planned(rows), tmp_path)
    with pytest.raises(TrimtabError, match="isn't the one that methods are learned on: weights"):
        bench(lm, planned(rows), tmp_path / "other", answering=Elsewhere(tiny("llama", 5).model, lm.tokenizer))


def test_what_was_learned_in_part_only_is_not_kept(lm, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        bench(lm, planned(("random", "interrupted")), tmp_path)
    assert not list((tmp_path / "learned").glob("*interrupted*"))
    assert not list((tmp_path / "cells").glob("*interrupted*"))


def test_a_task_that_cannot_be_measured_is_left_out_with_the_reason(lm, tmp_path):
    long = Outline("too long", "mine", 4, Cost(), Cost(), 1.0, 1.0, 1.0, too_long)
    whole = planned(("random", "planted"))
    report = bench(lm, replace(whole, outlines=(long, *whole.outlines)), tmp_path)
    assert [task.name for task in report.tasks] == ["says it"]
    assert "tokens" in report.left_out["too long"]
    with pytest.raises(TrimtabError, match=r"no task could be measured: too long: prompt 1 has .* tokens"):
        bench(lm, replace(whole, outlines=(long,)), tmp_path / "alone")


def too_long(lm, store, count):
    arms = {PLAIN: [prompt(1, 500)] * count}
    return replace(task_of(lm, store, count), name="too long", prompted=(), measure=by_answers(arms, lambda *_: 0.0, 4))


def test_another_runs_folder_is_refused(lm, done):
    with pytest.raises(TrimtabError, match="other settings \\(seed: 0 there and 1 now\\)"):
        bench(lm, planned(seed=1), done[0])
    with pytest.raises(TrimtabError, match="doesn't contain a benchmark"):
        results_of(Path(done[0]) / "cells")


def test_the_page_stands_alone_and_says_the_verdict(done, tmp_path):
    write_page(tmp_path / "page.html", done[1])
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert "http" not in page
    for line in done[1].words():
        assert line.replace("'", "&#x27;") in page
    assert "it can&#x27;t learn this" in page


def test_results_are_plain_values_without_times(done):
    document = json.loads((done[0] / "results.json").read_text())
    assert canonical(document) == (done[0] / "results.json").read_bytes()
    assert document["tasks"][0]["rows"][0]["method"] == "random"
    assert not any("time" in key or "second" in key for key in document)


# ---- parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[3, 1, 2], [1, 1, 0], [2, 2, 2], [0.5, 0.25, 0.5, 1]])
def test_ranks_are_those_of_a_naive_count(values):
    for value, rank in zip(values, ranked(values), strict=True):
        lower, same = sum(v < value for v in values), values.count(value)
        assert rank == lower + (same - 1) / 2


def agreement_of(items, noise, seed):
    """Of nine methods, each a step better than the one before."""
    generator = np.random.default_rng(seed)
    halves = [({}, {}) for _ in range(SPLITS)]
    scores = {n: n + noise * generator.standard_normal(items) for n in range(9)}
    by_method = {f"method {n}": {"runs": [{"nats": 1.0, "scores": list(s)}]} for n, s in scores.items()}
    _rank("task", {"scores": [0.0] * items}, [str(i) for i in range(items)], by_method, halves, {})
    return _agreement(halves)


def test_so_many_more_items_as_the_verdict_says_make_the_order_reliable():
    assert agreement_of(8, 0.0, 0) == 1
    assert _more_items(1.0) == ""
    few = float(np.mean([agreement_of(8, 7.0, seed) for seed in range(16)]))
    times = float(re.search(r"about ([\d.]+) times", _more_items(few))[1])
    more = float(np.mean([agreement_of(round(8 * times), 7.0, seed) for seed in range(16)]))
    assert few < 0.8
    assert times > 2
    assert abs(more - RELIABLE) < 0.04
    assert "chance" in _more_items(-0.1)


def test_a_budget_is_met_by_fewer_items():
    whole = planned()
    seconds = Speed(10, 100).seconds(whole.cost())
    assert fit_to_budget(whole, Speed(10, 100), seconds).settings.items == ITEMS
    assert fit_to_budget(whole, Speed(10, 100), seconds * 0.999).settings.items == 8
    with pytest.raises(TrimtabError, match="fewer --methods or --tasks"):
        fit_to_budget(whole, Speed(10, 100), 1.0)


def test_a_budget_too_small_for_all_tasks_keeps_one_of_each_kind_and_says_which_it_left_out():
    (outline,) = planned().outlines
    kinds = [("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")]
    whole = replace(planned(), outlines=tuple(replace(outline, name=name, kind=kind) for name, kind in kinds))
    speed, seconds = Speed(10, 100), Speed(10, 100).seconds(planned().cost())  # of one task
    for share, kept in ((6.01, "a1 a2 a3 b1 b2 c1"), (5.01, "a1 a2 b1 b2 c1"), (4.5, "a1 b1 b2 c1"), (3.5, "a1 b1 c1")):
        smaller = fit_to_budget(whole, speed, share * seconds)
        assert [outline.name for outline in smaller.outlines] == kept.split()
        assert [name for name, _ in smaller.left_out] == [name for name, _ in kinds if name not in kept.split()]
        assert smaller.settings.items == ITEMS
    assert fit_to_budget(whole, speed, 2.9 * seconds).settings.items == 8
    again = restrict_plan(whole, ["a1", "c1"], 9)
    assert ([outline.name for outline in again.outlines], again.settings.items) == (["a1", "c1"], 9)


def test_every_method_of_the_registry_says_what_it_learns_from_or_why_not():
    prompts = tuple(Pair(f"{p} w3", p, "", "prompts") for p in ASKED)
    answers = tuple(Pair("w1 w2", "w3 w4", p, "answers") for p in ASKED)
    full = TrainingData({"prompts": prompts, "answers": answers}, ("w5",), ("w6",), ("w7", "w8"), {"system": "w9"})
    for recipe in recipes().values():
        inputs = inputs_for(recipe, full, 0)
        assert isinstance(inputs, str) == (recipe.name == "tda")
    bare = TrainingData({"letters": ()})
    reasons = {name: inputs_for(recipe, bare, 0) for name, recipe in recipes().items()}
    assert all(isinstance(reason, str) for name, reason in reasons.items() if name != "random")


def test_unknown_methods_and_tasks_are_named():
    with pytest.raises(TrimtabError, match="there is no method 'cab'"):
        plan(Settings(methods=("cab",)))
    with pytest.raises(TrimtabError, match="there is no task 'behaviours'; its data aren't there"):
        plan(Settings(tasks=("behaviours",)))
    with pytest.raises(TrimtabError, match="nats above 0"):
        Settings(nats=(0.0,))


def test_patterns_choose_and_the_control_is_always_there():
    filtered = plan(Settings(methods=("re*",), tasks=("traits",)))
    assert filtered.rows == ("random", "repe", "reps")
    assert {outline.kind for outline in filtered.outlines} == {"traits"}
    some = plan(Settings(methods=("re*", "!reps"), tasks=("traits", "!p*")))
    assert some.rows == ("random", "repe")
    assert {outline.name for outline in filtered.outlines} - {outline.name for outline in some.outlines} == {
        "pirate",
        "poetic",
    }
    with pytest.raises(TrimtabError, match="no task is left"):
        plan(Settings(tasks=("pirate", "!pirate")))


def test_a_part_that_is_damaged_is_named(tmp_path):
    store = Store(tmp_path, {"a": 1})
    assert store.get_or_create("cells", "x", make=lambda: [1.0, math.nan]) == [1.0, None]
    (tmp_path / "cells" / "x.json").write_text("{")
    with pytest.raises(TrimtabError, match=r"x\.json is damaged; delete it"):
        store.get_or_create("cells", "x", make=lambda: 0)


def test_names_that_look_alike_as_files_are_kept_apart(tmp_path):
    store = Store(tmp_path, {})
    assert store.get_or_create("cells", "a b", make=lambda: 1) == 1
    assert store.get_or_create("cells", "a-b", make=lambda: 2) == 2
    assert store.get_or_create("cells", "a/b", make=lambda: 3) == 3
