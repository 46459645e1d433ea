"""`trimtab eval ab --finetune`: a LoRA trained on pairs as two more arms, alone and steered."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from trimtab.evaluate.records import read_records

pytestmark = pytest.mark.slow

pytest.importorskip("peft", reason="needs trimtab[finetune]")

WORDS = ["the sea", "a question", "an answer", "the user", "it", "capitals", "blue"]


def questions(path: Path, words: list[str]) -> Path:
    """A always matches, so that what a few steps of training do is seen on other questions, too."""
    keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    rows = [(f"Is {word} wide?\n (A) yes\n (B) no", "(A)", "(B)") for word in words]
    path.write_text(json.dumps([dict(zip(keys, row, strict=True)) for row in rows]))
    return path


@pytest.fixture
def finetuning(model, steering, tmp_path):
    test = questions(tmp_path / "test.json", WORDS)
    pairs = questions(tmp_path / "pairs.json", [f"{a} or {b}" for a in WORDS for b in WORDS])
    shared = ["eval", "ab", "--model", model, "--device", "cpu", "--data", test, "--steer", steering]
    return [*shared, "--strength", "-1,1", "--random", 1, "--finetune", pairs]


@pytest.mark.smoke
def test_both_sides_alone_and_steered(trimtab, finetuning, tmp_path):
    out = tmp_path / "r.jsonl"
    ran = trimtab(*finetuning, "--system-prompt", "Write yes.", "--out", out, "--json")
    assert (ran.code, ran.err) == (0, "")
    tuned = [f"finetuned {side}{rest}" for side in ("positive", "negative") for rest in ("", ", s x-1", ", s")]
    assert list(ran.json["arms"])[-6:] == tuned
    assert len(ran.json["arms"]) == 6 + 6
    assert ran.json["finetune"] == {"pairs": str(tmp_path / "pairs.json"), "count": 49}
    means = {score["arm"]: score["mean"]["estimate"] for score in ran.json["scores"] if score["score"] == "matching"}
    assert len({means[name] for name in ("unsteered", "s", *tuned)}) == 8  # each arm says something of its own
    assert means["finetuned positive"] > means["unsteered"] > means["finetuned negative"]
    for side in ("positive", "negative"):
        header, records = read_records(tmp_path / f"r-finetuned-{side}.jsonl")
        assert len(records) == 3 * len(WORDS)
        assert header["about"]["finetuned"]["side"] == side
        assert (tmp_path / f"r-finetuned-{side}" / "adapter_model.safetensors").is_file()
    kept = {path: path.read_bytes() for path in tmp_path.rglob("r*") if path.is_file()}
    (tmp_path / "r-finetuned-negative.jsonl").unlink()  # as if stopped before it
    again = trimtab(*finetuning, "--system-prompt", "Write yes.", "--out", out, "--json")
    assert again.json == ran.json
    assert {path: path.read_bytes() for path in kept} == kept


def test_the_other_arms_are_what_they_are_without_it(trimtab, finetuning):
    with_it = trimtab(*finetuning, "--json").json
    without = trimtab(*finetuning[:-2], "--json").json
    for name, facts in without["arms"].items():
        assert with_it["arms"][name] == facts
    mine = [score for score in with_it["scores"] if "finetuned" not in score["arm"]]
    assert mine == without["scores"]


@pytest.mark.long
def test_the_page_draws_the_steering_alone(trimtab, finetuning, tmp_path):
    pytest.importorskip("matplotlib")
    pages = []
    for n, arguments in enumerate((finetuning, finetuning[:-2])):  # with --finetune, and without
        ran = trimtab(*arguments, "--report", tmp_path / f"{n}.html")
        assert ran.code == 0
        pages.append((tmp_path / f"{n}.html").read_text())
    pictures = [re.findall(r"data:image/png;base64,[^\"']+", page) for page in pages]
    assert pictures[0] == pictures[1]
    assert pictures[0]
    assert ["finetuned negative, s x-1" in page for page in pages] == [True, False]


def test_bad_input(trimtab, finetuning, prompt_pairs, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("trimtab.commands.model.load_model", load)
    for file, word in ((prompt_pairs, "no answer to learn"), (tmp_path / "none.json", "none.json")):
        ran = trimtab(*finetuning[:-1], file)
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert word in ran.err
