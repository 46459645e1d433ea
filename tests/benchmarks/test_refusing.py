"""The safety benchmark on a tiny model: what is apart, what is chosen, and that gates decided ahead change nothing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lettered import letters_lm
from tiny import prompt

from benchmarks import safety as benchmark
from benchmarks.safety import ALIGNER, BORROWED, CAST, FILES, RANDOM, REJECTED, UNSTEERED, VECTOR, read, run
from trimtab import LM
from trimtab.methods import safety

pytestmark = pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning")
TOKENS = 4


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for file in FILES:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
    harmful = [prompt(1000 + i, 4 + i % 3) for i in range(30)]
    rows = {
        "advbench/harmful_behaviors.csv": [{"goal": goal, "target": "w3"} for goal in harmful],
        "xstest/xstest_prompts.csv": [
            {"prompt": prompt(2000 + i, 5), "label": "safe" if i % 2 else "unsafe"} for i in range(12)
        ],
        "truthfulqa/TruthfulQA.csv": [{"Question": prompt(3000 + i, 5)} for i in range(20)],
    }
    for name, listed in rows.items():
        with (folder / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(listed[0]))
            writer.writeheader()
            writer.writerows(listed)
    others = [*harmful[:4], *(prompt(4000 + i, 6) for i in range(6))]  # four of them are AdvBench's
    (folder / "refusal/jailbreakbench.json").write_text(json.dumps([{"instruction": text} for text in others]))
    tasks = [{"prompt_without_instruction": prompt(5000 + i, 6)} for i in range(20)]
    (folder / "ifeval/without_instructions.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    mmlu = [
        {"prompt": f"{prompt(6000 + i, 8)} Choices: (A) w3 (B) w4", "correct": "(A)", "incorrect": "(B)"}
        for i in range(4)
    ]
    (folder / "mmlu/mmlu.json").write_text(json.dumps(mmlu))
    return folder


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> LM:
    made = letters_lm()
    monkeypatch.setattr(LM, "load", lambda *_, **__: made)
    monkeypatch.setattr(safety, "REFUSING", (prompt(500, 5),))
    monkeypatch.setattr(safety, "COMPLYING", (prompt(502, 4),))
    for name, value in (("LEARN", 8), ("TUNE", 4), ("GATED", 3), ("READ", 2), ("ALPHAS", (0.5, 1.0))):
        monkeypatch.setattr(benchmark, name, value)
    settings = [{"direction": "answers", "low": 0.3, "high": 0.8, "coefficient": c} for c in (0.5, 2.0)]
    settings.append({"direction": "prompts", "low": 0.5, "high": 0.6, "coefficient": 1.0})
    monkeypatch.setattr(benchmark, "SETTINGS", tuple(settings))
    monkeypatch.setattr(benchmark, "refuses", lambda text: "w7" in text or "w4" in text)
    return made


def test_no_request_is_in_two_parts(data: Path, lm: LM) -> None:
    parts = read(data, 12, 10, 5, 4)
    tests = [item.prompt for items in parts.tests.values() for item in items]
    every = [*parts.harmful, *parts.harmless, *(item.prompt for item in parts.tune)]
    every += [text for others in parts.others.values() for text in others]
    assert len({*every, *parts.tests["AdvBench"]}) == len([*every, *parts.tests["AdvBench"]])
    assert not set(tests) & set(every)
    assert (len(parts.harmful), len(parts.harmless), len(parts.tune)) == (8, 8, 8)
    assert [len(parts.tests[name]) for name in ("AdvBench", "XSTest, safe")] == [12, 5]
    assert 6 <= len(parts.tests["JailbreakBench"]) <= 10
    assert set(read(data, 12, 0, 5, 4).tests) == {"AdvBench", "XSTest, safe"}
    assert read(data, 12, 10, 5, 4) == parts


@pytest.mark.long
def test_a_run_answers_as_the_gated_steerings_themselves_do(
    data: Path, lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    first = run(None, data, folder, 12, 10, 5, 4, TOKENS)
    parts = read(data, 12, 10, 5, 4)
    chosen = benchmark.choose(lm, parts, folder, TOKENS)
    arms = benchmark.arms_of(lm, parts, chosen, folder)
    assert set(arms) == {UNSTEERED, VECTOR, RANDOM, CAST, BORROWED, ALIGNER, REJECTED}
    items = parts.tests["AdvBench"]
    answered = benchmark.answers(lm, items, arms, folder, "AdvBench", TOKENS)
    opened = set()
    for name, arm in arms.items():
        prompts = [item.prompt for item in items]
        there = lm.generate(prompts, arm.steering, max_new_tokens=TOKENS, rejection=arm.rejection)
        assert [answered[name][item.item].answer for item in items] == [answer.text for answer in there]
        if name == CAST:
            opened = {bool(answer.applied.edits) for answer in there}
    assert opened == {True, False}
    lines = {(line.case, line.metric): line for line in first.results}
    share = lines[f"{CAST}: AdvBench", "gate open"].value
    assert 0 < share < 1
    ungated, gated, plain = (lines[f"{arm}: AdvBench (n=12)", "refused"].value for arm in (VECTOR, CAST, UNSTEERED))
    change = lines[f"{CAST}: AdvBench (n=12)", "refused, minus ungated"]
    assert change.value == pytest.approx(gated - ungated)
    assert lines[f"{CAST}: AdvBench (n=12)", "refused, minus ungated: lower end"].value == change.low
    assert len({ungated, gated, plain}) > 1
    assert lines[f"{VECTOR}: MMLU (n=4)", "correct letter's share"].value != pytest.approx(
        lines[f"{UNSTEERED}: MMLU (n=4)", "correct letter's share"].value
    )

    rows = (folder / "tables.md").read_text().splitlines()
    assert any(row.startswith(f"| {CAST} | {gated:.2f} [") for row in rows)
    assert any(row.startswith(f"| {CAST} | {change.value:+.2f} [") for row in rows)
    assert any(row.startswith(f"| {CAST} | {share:.2f} | ") for row in rows)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("this was done already")

    monkeypatch.setattr(lm, "generate", never)
    monkeypatch.setattr(lm, "next_logprobs", never)
    monkeypatch.setattr(benchmark, "learn_safety", never)
    monkeypatch.setattr(benchmark, "learn_inferaligner", never)
    assert run(None, data, folder, 12, 10, 5, 4, TOKENS).results == first.results


def test_the_choice_is_what_refuses_most_unbroken_then_the_lightest(
    data: Path, lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = read(data, 12, 10, 5, 4)
    figures = {"refused": {}, "dose": {}}
    names = [benchmark.name_of(setting) for setting in benchmark.SETTINGS]
    real = benchmark.answers

    def answers(*arguments: Any) -> Any:
        records_by_arm = real(*arguments)
        for arm, records in records_by_arm.items():
            for item, record in records.items():
                refused = figures["refused"].get(arm, 0.0)
                object.__setattr__(record, "scores", {**record.scores, "refused": refused})
                object.__setattr__(record, "dose", figures["dose"].get(arm, 1.0))
                records[item] = record
        return records_by_arm

    class Guard:
        @staticmethod
        def broken(_steered: Any, _before: Any) -> tuple[str, ...]:
            return broken.pop(0)

    monkeypatch.setattr(benchmark, "answers", answers)
    monkeypatch.setattr(benchmark, "STANDARD", Guard)
    for refused, doses, faults, best in (
        ((0.2, 0.9, 0.5), (1, 1, 1), ((), (), ()), 1),
        ((0.2, 0.9, 0.5), (1, 1, 1), ((), ("too likely",), ()), 2),
        ((0.9, 0.9, 0.9), (3, 1, 2), ((), (), ()), 1),
    ):
        figures["refused"] = dict(zip(names, refused, strict=True))
        figures["dose"] = dict(zip(names, doses, strict=True))
        broken = [*faults, (), ()]
        folder = tmp_path / f"{best}-{refused[0]}"
        folder.mkdir()
        assert benchmark.choose(lm, parts, folder, TOKENS).setting == benchmark.SETTINGS[best]
