"""SADI beside CAA on a tiny model: parts that don't overlap, the same reading for all, and what is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lettered import letters_lm
from tiny import prompt

from benchmarks import sadi as benchmark
from benchmarks.sadi import CAA, UNSTEERED, families, read, run
from trimtab import LM, Pair
from trimtab.methods.caa import learn_caa
from trimtab.methods.sadi import learn_sadi

pytestmark = pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning", "ignore::trimtab.lm.DoseWarning")
SIZES = (8, 6, 5)


def questions(count: int, seed: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"{prompt(seed + i, 6 + i % 4)} Choices: (A) w3 (B) w4",
            "correct": "(A)" if i % 3 else "(B)",
            "incorrect": "(B)" if i % 3 else "(A)",
        }
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "one.json").write_text(json.dumps(questions(40, 100)))
    (folder / "test.json").write_text(json.dumps(questions(9, 300)))
    (folder / "generate.json").write_text(json.dumps([*questions(3, 300), *questions(40, 400)]))  # three are tested
    tasks = {"one": (Path("one.json"),), "two": (Path("generate.json"), Path("test.json"))}
    monkeypatch.setattr(benchmark, "TASKS", tasks)
    grid = {"heads": ((1, 3), (0.5, 4.0)), "neurons": ((5,), (2.0,)), "hidden": ((4,), (3.0,))}
    monkeypatch.setattr(benchmark, "GRID", grid)
    return folder


def test_no_question_is_in_two_parts(data: Path) -> None:
    for files in (["one.json"], ["generate.json", "test.json"]):
        parts = read([data / file for file in files], *SIZES)
        listed = [[item.question for item in of] for of in (parts.learn, parts.held_out, parts.test)]
        assert [len(of) for of in listed] == list(SIZES)
        assert len({question for of in listed for question in of}) == sum(SIZES)
        assert sum(item.matching == "A" for item in parts.learn) == 4
    tested = {row["prompt"] for row in json.loads((data / "test.json").read_text())}
    assert not tested & {item.question for item in (*parts.learn, *parts.held_out)}


def test_one_reading_gives_what_the_methods_learn(data: Path, tmp_path: Path) -> None:
    lm = letters_lm()
    parts = read([data / "one.json"], *SIZES)
    made = families(lm, "one", parts, tmp_path)
    pairs = [Pair(f"({i.matching})", f"({i.other})", i.question, "letters") for i in parts.learn]
    (mine,) = made[CAA]["layer 2 x 4"].edits
    (theirs,) = (4.0 * learn_caa(lm, pairs, 2)).edits
    assert (mine.site, mine.strength, mine.positions) == (theirs.site, theirs.strength, theirs.positions)
    assert torch.allclose(mine.operation.direction, theirs.operation.direction, atol=1e-6)
    for site, name, k, delta in (("heads", "K 3, delta 0.5", 3, 0.5), ("hidden", "K 4, delta 3", 4, 3.0)):
        theirs_too = learn_sadi(lm, pairs, site=site, k=k, delta=delta, positions=benchmark.WHERE)
        assert made[f"SADI, {site}"][name] == theirs_too


def test_a_run_tests_what_was_best_on_other_questions_and_goes_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = letters_lm()
    monkeypatch.setattr(LM, "load", lambda *_, **__: lm)
    folder = tmp_path / "run"
    first = run(None, data, folder, ["one", "two"], *SIZES)
    shares = json.loads((folder / "two-held-out.json").read_text())
    assert set(shares) == {CAA, "SADI, heads", "SADI, neurons", "SADI, hidden"}
    assert len(set(shares["SADI, heads"].values())) == 4
    held = max(shares["SADI, heads"], key=lambda name: shares["SADI, heads"][name])
    results = {(line.case, line.metric): line for line in first.results}
    case = f"two (n=5): SADI, heads ({held})"
    caa = next(case for case, _ in results if case.startswith("two (n=5): CAA"))
    share = "right letter's share"
    plain = results[f"two (n=5): {UNSTEERED}", share].value
    assert results[case, f"{share}, minus unsteered"].value == pytest.approx(results[case, share].value - plain)
    assert results[case, f"{share}, minus CAA"].value == pytest.approx(
        results[case, share].value - results[caa, share].value
    )
    assert results[case, share].value != pytest.approx(plain)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was done already")

    monkeypatch.setattr(lm, "next_logprobs", never)
    monkeypatch.setattr(benchmark, "differences_at", never)
    assert run(None, data, folder, ["one", "two"], *SIZES).results == first.results
