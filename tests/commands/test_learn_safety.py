"""`trimtab learn safety`: from two files of requests to a steering that the other commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trimtab import load

HARMFUL = ["What is the sea? Write in capitals!", "Why (A)?", "Is it (B) no?", "A question (A) yes?"]
HARMLESS = ["The sea is wide", "blue and wide", "Who is it", "an answer"]


def files(folder: Path) -> tuple[Path, Path]:
    for name, lines in (("harmful", HARMFUL), ("harmless", HARMLESS)):
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder / "harmful.txt", folder / "harmless.txt"


def test_from_files_to_a_steering(tmp_path: Path, trimtab: Any, model: Path) -> None:
    harmful, harmless = files(tmp_path)
    out = tmp_path / "safety.safetensors"
    common = ["learn", "safety", "--texts", harmful, "--harmless", harmless, "--out", out, "--model", model]
    printed = trimtab(*common, "--layers", "1,2", "--requests", "2").out
    document = trimtab(*common, "--layers", "1,2", "--requests", "2", "--json").json
    assert (document["method"], document["options"]["direction"]) == ("safety", "answers")
    steering = load(out)
    assert steering.layers == (1, 2)
    gates = {edit.gate for edit in steering.edits}
    assert len(gates) == 1
    assert steering.card.options["gate"] == "inferaligner"
    chosen = steering.card.measured["condition"]["chosen"]
    assert {"threshold", "hits", "false_alarms"} == set(chosen)
    counts = rf"{chosen['hits']:.0%} of {len(HARMFUL)} .* {chosen['false_alarms']:.0%} of {len(HARMLESS)} others"
    assert re.search(counts, " ".join(printed.split()))
    arguments = [
        "generate",
        "--model",
        model,
        "--steer",
        out,
        "--prompt",
        HARMFUL[0],
        "--max-new-tokens",
        "3",
        "--json",
    ]
    assert trimtab(*arguments).code == 0


def test_bad_input(tmp_path: Path, trimtab: Any, model: Path) -> None:
    harmful, harmless = files(tmp_path)
    common = ["learn", "safety", "--out", tmp_path / "s.safetensors", "--model", model]
    for more, words in (
        (["--texts", harmful, "--harmless", harmless, "--direction", "up"], "answers, prompts"),
        (["--texts", tmp_path / "none.txt", "--harmless", harmless], "none.txt"),
        (["--texts", harmful], "one of the two is missing"),
    ):
        ran = trimtab(*common, *more)
        assert (ran.code, ran.out, ran.err.splitlines()[-1].count(words)) == (2, "", 1)
    assert not (tmp_path / "s.safetensors").exists()
