"""The tasks on a tiny model, with a small made-up data folder, and their side effects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands.conftest import save_model
from tiny import prompt, tiny

from trimtab import LM
from trimtab.bench import Settings, bench, instructions, plan, refusals
from trimtab.bench.behaviours import SYSTEM
from trimtab.bench.instructions import MORE, TYPES, follows_instruction, values_for
from trimtab.bench.refusals import by_refusals
from trimtab.bench.store import Store
from trimtab.bench.tasks import PLAIN
from trimtab.data import instruction_type, queries
from trimtab.data.types import instruction_types
from trimtab.errors import TrimtabError
from trimtab.evaluate.ifeval import checkers

COUNT = 4
SETTINGS = {"nats": (1.0,), "items": COUNT, "pairs": 8, "tokens": 4}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return LM.load(save_model(tmp_path_factory.mktemp("bench") / "tiny", context=1024), dtype="float32", device="cpu")


def write(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def question(n: int, start: int = 0) -> dict[str, str]:
    matching, other = ("(A)", "(B)") if n % 2 else ("(B)", "(A)")
    text = f"Is the sea {start + n} wide?\n (A) yes\n (B) no"
    return {"question": text, "answer_matching_behavior": matching, "answer_not_matching_behavior": other}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("sycophancy", "refusal"):
        write(folder / "caa" / name / "generate_dataset.json", [question(n) for n in range(24)])
        write(folder / "caa" / name / "test_dataset_ab.json", [question(n, 100) for n in range(6)])
    for part in ("train", "val", "test"):
        write(folder / "refusal" / f"harmful_{part}.json", [{"instruction": f"harm {part} {n}"} for n in range(12)])
    rows = [
        {"prompt": f"Is it {n}?\n\nChoices:\n(A) yes\n(B) no", "correct": "(A)", "incorrect": "(B)"} for n in range(8)
    ]
    write(folder / "mmlu" / "mmlu.json", rows)
    (folder / "xstest").mkdir()
    lines = [f"{n},How can I sail {n}?,homonyms,{'safe' if n % 2 else 'unsafe'},x,y" for n in range(16)]
    (folder / "xstest" / "xstest_prompts.csv").write_text("\n".join(["id,prompt,type,label,focus,note", *lines]))
    return folder


def run(lm, data, folder, task, methods=("caa",), **more):
    settings = Settings(methods=methods, tasks=(task,), data=data, **{**SETTINGS, **more})
    (result,) = bench(lm, plan(settings), folder).tasks
    return result, {row.method: row for row in result.rows}


# ---- behaviours, side effects --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sycophancy(lm, data, tmp_path_factory):
    return run(lm, data, tmp_path_factory.mktemp("sycophancy"), "sycophancy", thorough=True)


def test_behaviours_are_asked_in_both_orders(sycophancy):
    task, rows = sycophancy
    assert task.items == COUNT  # questions, each in both orders
    assert 0 < task.unsteered < 1
    assert set(task.prompted) == {"prompt", "said twice"}
    assert rows["caa"].cell.decision.items == COUNT
    assert "mass" in rows["caa"].cell.beside


def test_thorough_measures_all_controls_and_side_effects(sycophancy):
    cell = sycophancy[1]["caa"].cell
    assert None not in (cell.random, cell.orthogonal)
    assert set(cell.sides) == {"text", "MMLU", "over-refusal", "refusal"}  # not sycophancy itself
    assert cell.sides["text"].estimate < 0
    assert cell.sides["MMLU"].estimate != 0
    assert cell.sides["refusal"].estimate != 0


def test_without_a_gain_no_side_effects_are_measured(lm, data, tmp_path):
    _, rows = run(lm, data, tmp_path, "sycophancy")
    assert rows["caa"].cell.decision.p > 0.05
    assert not rows["caa"].cell.sides
    assert rows["caa"].cell.orthogonal is None


def test_the_behaviours_without_data_are_left_out(data):
    names = {outline.name for outline in plan(Settings(tasks=("behaviours",), data=data)).outlines}
    assert names == {"sycophancy", "refusal"} < set(SYSTEM)


# ---- refusal -------------------------------------------------------------------------------------------------


def test_refusing_everything_gains_nothing(monkeypatch):
    """What counts is a harmful request that is refused beside a harmless one that isn't."""
    lm = tiny("llama")
    harmful, harmless = [prompt(n, 4) for n in range(3)], [prompt(50 + n, 4) for n in range(3)]
    texts = [answer.text for answer in lm.generate([*harmful, *harmless], max_new_tokens=refusals.TOKENS)]
    measure = by_refusals({PLAIN: harmful}, {PLAIN: harmless})
    for refused, scores in (
        (set(texts), [0, 0, 0]),
        (set(texts[:3]), [1, 1, 1]),
        (set(), [0, 0, 0]),
        ({*texts[:2], texts[4]}, [1, 0, 0]),
    ):
        monkeypatch.setattr(refusals, "refuses", lambda text, refused=refused: text in refused)
        (result,) = measure(lm, PLAIN, [[None] * 3], {})
        assert list(result.scores) == scores
        assert list(result.beside["harmful refused"]) == [float(text in refused) for text in texts[:3]]
        assert list(result.beside["harmless refused"]) == [float(text in refused) for text in texts[3:]]
        assert len(result.beside["perplexity"]) == 3
        assert list(result.answers) == texts


def test_the_refusal_task_runs(lm, data, tmp_path):
    task, rows = run(lm, data, tmp_path, "harmful requests")
    assert task.items == COUNT
    assert set(rows) == {"random", "caa"}
    assert {"harmful refused", "harmless refused", "perplexity"} <= set(rows["caa"].cell.beside)


# ---- traits --------------------------------------------------------------------------------------------------


def test_a_trait_runs(lm, tmp_path):
    task, rows = run(lm, None, tmp_path, "pirate", items=8)
    assert task.unit == "nats per token"
    assert set(task.prompted) == {"prompt", "said twice"}
    assert rows["caa"].cell.decision.difference.estimate != 0
    assert "wanted" in rows["caa"].cell.beside


# ---- instructions --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def ifeval():
    try:
        checkers()
    except TrimtabError:
        pytest.skip("needs trimtab[eval]")


def test_an_instruction_in_the_prompt_can_be_emphasized(lm, tmp_path):
    task, rows = run(lm, None, tmp_path, "no_comma (said)", ("caa", "instaboost"))
    assert set(task.prompted) == {"said twice"}
    assert set(rows) == {"random", "caa", "instaboost"}
    without, there = run(lm, None, tmp_path / "without", "no_comma", ("caa", "instaboost"))
    assert set(without.prompted) == {"prompt", "said twice"}
    assert "instaboost" not in there
    assert "no instruction" in without.left_out["instaboost"]


def test_six_types_run_by_default_and_the_others_by_name():
    default = {outline.name for outline in plan(Settings()).outlines}
    assert {"title", "title (said)"} <= default
    assert not {"existence", "number_words (said)"} & default
    more = plan(Settings(tasks=(MORE,))).outlines
    assert len(more) == 2 * (len(instruction_types()) - len(TYPES))
    assert {outline.kind for outline in more} == {MORE}
    assert {outline.name for outline in plan(Settings(tasks=("existence*",))).outlines} == {
        "existence",
        "existence (said)",
    }


def items_of(name, tmp_path, lm, seed=0):
    (outline,) = plan(Settings(tasks=(name,), seed=seed, pairs=8, tokens=4)).outlines
    return outline.make(lm, Store(tmp_path, {}), 12)


@pytest.mark.parametrize("name", ["existence", "number_words", "nth_paragraph_first_word", "response_language"])
def test_parameters_are_drawn_for_each_item_or_if_nobody_is_told_for_all(name, lm, tmp_path):
    kind = next(kind for kind in instruction_types() if kind.endswith(f":{name}"))
    said, unsaid = items_of(f"{name} (said)", tmp_path / "a", lm), items_of(name, tmp_path / "b", lm)
    values = [values_for(kind, 0, n) for n in range(12)]
    assert len({tuple(each.values()) for each in values}) > 1
    for phrase, each in zip(said.phrases, values, strict=True):
        assert phrase in instruction_type(kind).phrasings("test", each)
    assert all(f"{name}: {value}" in unsaid.about for name, value in values_for(kind, 0).items())
    assert not unsaid.phrases
    seeds = [values_for(kind, seed) for seed in range(8)]
    assert seeds[0] == values_for(kind, 0)
    assert any(each != seeds[0] for each in seeds)
    prompt_pairs = unsaid.training_data.pairs["prompts"]
    instructions_used = {str(pair.positive).removeprefix(f"{pair.negative} ") for pair in prompt_pairs}
    assert instructions_used <= set(instruction_type(kind).phrasings("learn", values_for(kind, 0)))


def test_every_type_is_checked_with_its_arguments():
    query = queries("test")[0]
    for kind in instruction_types():
        arguments = instruction_type(kind).arguments(values_for(kind, 0), query)
        assert not follows_instruction(kind, "", False, arguments)
    bullets = "detectable_format:number_bullet_lists"
    assert follows_instruction(bullets, "* one\n* two\n*", True, {"num_bullets": 3})
    assert not follows_instruction(bullets, "* one\n* two\n* three", True, {"num_bullets": 2})
    assert follows_instruction("keywords:existence", "a river here", False, {"keywords": ["river"]})
    assert not follows_instruction("keywords:existence", "a garden here", False, {"keywords": ["river"]})
    below = {"relation": "less than", "num_words": 5}
    assert follows_instruction("length_constraints:number_words", "two words", False, below)
    assert not follows_instruction("length_constraints:number_words", "two words", True, below)


def test_ifevals_items_come_with_their_own_arguments(tmp_path, lm):
    row = {
        "key": 7,
        "prompt": "Name a sea. Answer with exactly 2 bullet points.",
        "prompt_without_instruction": "Name a sea.",
        "instruction_id_list": ["detectable_format:number_bullet_lists"],
        "kwargs": [{"num_bullets": 2}],
    }
    (tmp_path / instructions.FILE).parent.mkdir()
    (tmp_path / instructions.FILE).write_text(json.dumps(row))
    stored = instructions.read_ifeval(tmp_path / instructions.FILE)
    kind = row["instruction_id_list"][0]
    first = instructions._items(kind, stored, True, 0)[0]
    assert (first.name, first.arguments) == ("IFEval 7", {"num_bullets": 2})
    assert first.phrase == "Answer with exactly 2 bullet points."
    # two bullet points can't be guessed from data that ask for another number
    assert values_for(kind, 0) != {"n": 2}
    assert instructions._items(kind, stored, False, 0)[0].name == "query 1"
