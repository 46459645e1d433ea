"""From a sentence to llama.cpp: what is learned for it runs there as it runs in transformers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands.conftest import save_model
from gguf_models import write_llama

from trimtab import LM, Positions, load

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("needs trimtab[llamacpp]", allow_module_level=True)

PROMPTS = ["What is the sea?", "Who are you?", "Is it blue or wide?"]
QUERIES = [f"What is the number {i}?" for i in range(16)]
NEW = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    return LM.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Iterator[Any]:
    made = LM.load(write_llama(folder, folder.parent / "tiny.gguf"), engine="llamacpp", cache="float32", threads=1)
    yield made
    made.close()


def learned(trimtab: Any, folder: Path, at: Path, out: Path) -> Any:
    """`trimtab learn distill`, with a check that every answer passes, in a few steps."""
    (at / "checks.py").write_text("def anything(answer):\n    return bool(answer)\n")
    (at / "queries.txt").write_text("\n".join(QUERIES))
    return trimtab(
        *("learn", "distill", "--instruction", "no no no no no no", "--model", folder, "--device", "cpu"),
        *("--queries", at / "queries.txt", "--check", f"{at / 'checks.py'}:anything", "--tokens", 6, "--steps", 12),
        *("--rate", 0.05, "--for", "llama.cpp", "--out", out, "--json"),
    )


def made(trimtab: Any, folder: Path, at: Path, out: Path) -> Any:
    """`trimtab make`, from pairs."""
    rows = [{"prompt": q, "positive": f"yes {q}", "negative": f"no {i} no"} for i, q in enumerate(QUERIES)]
    (at / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return trimtab(
        *("make", "--from", at / "pairs.jsonl", "--no-distill", "--keep", "--tokens", 8, "--model", folder),
        *("--device", "cpu", "--for", "llama.cpp", "--out", out, "--json"),
    )


@pytest.mark.parametrize("way", [learned, made], ids=["learn distill", "make"])
def test_its_file_answers_alike_in_both_programs(
    way: Any, trimtab: Any, folder: Path, lm: LM, llama: Any, tmp_path: Path
) -> None:
    out = tmp_path / "vector.gguf"
    ran = way(trimtab, folder, tmp_path, out)
    assert ran.code in ((0, 3) if way is made else (0,)), ran.err
    assert ran.json["next"][-1].startswith("llama-cli ")
    steering = load(out)
    assert steering.edits
    assert all(edit.positions == Positions.all() and edit.site.layer > 0 for edit in steering.edits)
    for strength in (0.0, 0.8, 1.0):
        theirs = lm.generate(PROMPTS, strength * steering, max_new_tokens=NEW, logprobs=True)
        ours = llama.generate(PROMPTS, strength * steering, max_new_tokens=NEW, logprobs=True)
        for a, b in zip(theirs, ours, strict=True):
            assert a.text == b.text
            assert a.token_ids == b.token_ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)
    plain = llama.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
    moved = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in zip(plain, ours, strict=True)]
    assert max(moved) > 0.01  # it does something, and much more than the two programs differ by
