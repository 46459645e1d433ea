"""`trimtab eval inspect`: a task's metrics, arm by arm."""

from __future__ import annotations

import pytest

from trimtab import LM, load

pytest.importorskip("inspect_ai", reason="needs trimtab[inspect]")

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import includes

@task
def letters(letter="e"):
    samples = [Sample(id=str(n), input=text, target=letter) for n, text in enumerate(["Who?", "Why?", "The sea."])]
    return Task(dataset=samples, scorer=includes(), config=GenerateConfig(max_tokens=6))
"""


def test_a_task_runs_in_every_arm(trimtab, model, steering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    options = ("--model", model, "--device", "cpu", "--dtype", "float32", "--steer", steering, "--strength", "0.5,1")
    ran = trimtab("eval", "inspect", "task.py", *options, "-T", "letter=a", "--limit", 2, "--json")
    assert ran.code == 0, ran.err
    assert list(ran.json["arms"]) == ["unsteered", "s x0.5", "s"]
    for arm in ran.json["arms"].values():
        right = [scores["includes"] == "C" for scores in arm["scores"].values()]
        assert arm["samples"] == 2
        assert arm["metrics"]["includes/accuracy"] == pytest.approx(sum(right) / 2)
        assert right == ["a" in text.lower() for text in arm["answers"].values()]
    assert len({str(arm["answers"]) for arm in ran.json["arms"].values()}) == 3
    assert len(list((tmp_path / "logs").iterdir())) == 3
    assert "nats" not in ran.json["arms"]["unsteered"]
    lm = LM.load(model, device="cpu", dtype="float32")
    for arm, strength in (("s x0.5", 0.5), ("s", 1.0)):
        expected = lm.divergence(strength * load(steering), ["Who?", "Why?"], tokens=16)
        assert ran.json["arms"][arm]["nats"] == pytest.approx({"mean": expected.mean, "p95": expected.p95})


def test_the_table_has_the_nats_of_each_arm(trimtab, model, steering, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    options = ("--model", model, "--device", "cpu", "--dtype", "float32", "--limit", 1)
    header = trimtab("eval", "inspect", "task.py", *options, "--steer", steering).out.splitlines()[1]
    assert header.split()[-2:] == ["nats", "samples"]
    assert "nats" not in trimtab("eval", "inspect", "task.py", *options).out


def test_what_makes_no_sense_is_refused(trimtab, model, steering, tmp_path):
    assert "don't apply to Inspect tasks" in trimtab("eval", "inspect", "t.py", "--steer", steering, "--random", 1).err
    assert "isn't NAME=VALUE" in trimtab("eval", "inspect", "t.py", "-T", "letter").err
    missing = trimtab("eval", "inspect", tmp_path / "none.py", "--model", model, "--device", "cpu")
    assert missing.code == 2
    assert "none.py" in missing.err
