"""`--keys` and `--ignore`, on every command that reads pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from trimtab import load

ROWS = [(f"What is {word}?", f"{word} yes", f"{word} no") for word in ("the sea", "it", "blue", "an answer")]


@pytest.fixture
def named(tmp_path: Path) -> Path:
    """Pairs under names of their own, with a column that may matter."""
    path = tmp_path / "named.jsonl"
    rows = [{"q": q, "good": good, "bad": bad, "note": f"of {q}, {bad}"} for q, good, bad in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The same pairs under the usual names."""
    path = tmp_path / "plain.jsonl"
    rows = [{"prompt": q, "positive": good, "negative": bad} for q, good, bad in ROWS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SAID = ("--keys", "prompt=q,positive=good,negative=bad")
COMMANDS = {
    "learn caa": ("learn", "caa", "--out", "s.safetensors", "--pairs"),
    "learn hpr": ("learn", "hpr", "--out", "s.safetensors", "--pairs"),
    "tune": ("tune", "--check", "json", "--out", "s.safetensors", "--pairs"),
    "inspect": ("inspect", "STEERING", "--plot", "p.png", "--pairs"),
    "eval ab": ("eval", "ab", "--data", "STEERING", "--finetune"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_pairs(
    trimtab: Any, command: str, named: Path, steering: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command == "eval ab":
        pytest.importorskip("peft", reason="needs trimtab[finetune]")
    monkeypatch.chdir(tmp_path)
    words = [str(steering) if word == "STEERING" else word for word in COMMANDS[command]]

    def said(*more: str) -> str:
        ran = trimtab(*words, named, *more)
        assert ran.code == 2, ran
        return str(ran.err)

    assert "its keys are q, good, bad, note" in said()
    assert "'note' would be ignored" in said(*SAID)
    assert "no column 'other'" in said("--keys", "prompt=q,positive=good,negative=other", "--ignore", "note")
    monkeypatch.setattr("trimtab.commands.model.load_model", _stop)
    if command == "eval ab":
        assert "UTF-8" in said(*SAID, "--ignore", "note")
    else:
        assert trimtab(*words, named, *SAID, "--ignore", "note").code == 1  # it goes on, and loads the model


def _module(command: str) -> str:
    return {"learn caa": "learn", "learn hpr": "learn_method", "eval ab": "eval_ab"}.get(command, command)


def _stop(*_: Any, **__: Any) -> Any:
    raise RuntimeError("here it would be loaded")


def test_the_same_steering_is_learned(trimtab: Any, model: Path, named: Path, plain: Path, tmp_path: Path) -> None:
    def learn(pairs: Path, *more: Sequence[str]) -> Any:
        options = ["--layers", "1", "--model", model, "--device", "cpu", "--out", tmp_path / "s.safetensors", "--json"]
        ran = trimtab("learn", "caa", "--pairs", pairs, *options, *more)
        assert ran.code == 0, ran.err
        return load(tmp_path / "s.safetensors").card.data

    assert learn(named, *SAID, "--ignore", "note") == learn(plain)


def test_statements_are_paired_and_it_is_said(trimtab: Any, model: Path, tmp_path: Path) -> None:
    table = tmp_path / "facts.csv"
    table.write_text("statement,label\nThe sea is wide,1\nThe sea is no,0\nIt is blue,1\nIt is a user,0\nWhy,1\n")
    options = ["--layers", "1", "--model", model, "--device", "cpu", "--out", tmp_path / "s.safetensors"]
    ran = trimtab("learn", "caa", "--pairs", table, *options)
    assert ran.code == 0
    assert "warning: " in ran.err
    assert "2 pairs made of 5 labelled statements" in ran.err
    assert "1 without a partner is left out" in ran.err


def test_columns_of_no_pairs(trimtab: Any, tmp_path: Path) -> None:
    arguments = ["learn", "instruct", "--instruction", "Be brief.", "--out", tmp_path / "s.safetensors"]
    for more, said in [
        (("--keys", "prompt=q"), "--keys applies to the columns of pairs; give --pairs FILE"),
        (("--ignore", "q"), "--ignore applies to the columns of pairs"),
    ]:
        ran = trimtab(*arguments, *more)
        assert (ran.code, said in ran.err) == (2, True)
