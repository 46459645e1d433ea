"""`trimtab bake`: a folder that plain transformers loads, and errors on one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import Add, Edit, Site, Steering, directional_ablation, save

WIDTH = 32


@pytest.fixture
def ablation(tmp_path: Path) -> Path:
    save(directional_ablation(torch.ones(WIDTH), 4), tmp_path / "ablation.safetensors")
    return tmp_path / "ablation.safetensors"


@pytest.fixture
def adding(tmp_path: Path) -> Path:
    save(Steering((Edit(Site(1), Add(torch.ones(WIDTH))),)), tmp_path / "adding.safetensors")
    return tmp_path / "adding.safetensors"


def test_two_steerings_in_one_model(trimtab: Any, model: Path, ablation: Path, adding: Path, tmp_path: Path) -> None:
    """The baked model answers without a steering as the old one does with both."""
    out = tmp_path / "out"
    options = [ablation, f"{adding}:0.5", "--positions", "all", "--model", model, "--out", out, "--device", "cpu"]
    done = trimtab("bake", *options, "--json")
    assert done.code == 0, done.err
    assert done.json["folder"] == str(out)
    assert done.json["config"] == {"mlp_bias": True}
    assert done.json["edits"][-1] == "0.5 * add @ residual[1] all"
    assert done.json["checked"]["difference"] < 1e-4 < done.json["checked"]["effect"]
    prompting = ["--prompt", "What is the sea?", "--max-new-tokens", 6, "--json", "--device", "cpu"]
    ours = trimtab("generate", "--model", out, *prompting)
    theirs = trimtab(
        "generate", "--model", model, "--steer", ablation, "--steer", f"{adding}:0.5", "--positions", "all", *prompting
    )
    assert ours.json["answers"][0]["text"] == theirs.json["answers"][0]["text"]


def test_what_it_says(trimtab: Any, model: Path, ablation: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = trimtab("bake", ablation, "--model", model, "--out", out, "--no-check")
    assert done.code == 0, done.err
    assert done.out == f"wrote {out}: tiny with 9 edits in its weights (9 tensors changed)\n"
    assert f"--model {out}" in done.err


def test_what_is_refused(
    trimtab: Any, model: Path, stranger: Path, ablation: Path, adding: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for words, arguments in {
        "--positions all": [adding],
        "no file": [tmp_path / "nowhere.safetensors"],
        "'hard' isn't a number": [f"{ablation}:hard"],
        "'sometimes' are not known": [ablation, "--positions", "sometimes"],
        "nothing to bake": [f"{ablation}:0"],
        "already exists": [ablation, "--out", model],
        "no config.json": [ablation, "--model", tmp_path],
        "width is 32, this model's is 576": [ablation, "--model", tmp_path / "wide"],
    }.items():
        if "576" in words:
            _config_of(tmp_path / "wide", 576)
        done = trimtab("bake", "--model", model, "--out", out, *arguments)
        assert (done.code, done.out) == (2, "")
        assert words in done.err
        assert done.err.count("\n") == 1
        assert not out.exists()


def _config_of(folder: Path, width: int) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=width, num_hidden_layers=4, num_attention_heads=4, vocab_size=90).save_pretrained(folder)
