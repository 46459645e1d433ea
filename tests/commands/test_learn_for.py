"""`trimtab learn … --for llama.cpp`: what is learned there can be run there, and the commands for it are printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trimtab import Add, Positions, directional_ablation, load, save
from trimtab.commands.for_program import IMPLIED, SCALE
from trimtab.methods.recipe import recipes
from trimtab.report.suggested import suggested_strength


def only_adds(path: Path) -> bool:
    edits = load(path).edits
    return bool(edits) and all(
        type(edit.operation) is Add and edit.site.kind == "residual" and edit.positions == Positions.all()
        for edit in edits
    )


@pytest.mark.parametrize("method", ["caa", "instruct", "repe", "random"])
def test_both_kinds_of_file(
    method: str, trimtab: Any, model: Path, prompt_pairs: Path, answer_pairs: Path, tmp_path: Path
) -> None:
    """The .safetensors file converts to what the .gguf file holds, which is read back as it was learned."""
    pairs = {"instruct": ["--pairs", prompt_pairs], "random": []}.get(method, ["--pairs", answer_pairs])
    arguments = ["learn", method, *pairs, "--model", model, "--layers", "1", "--for", "llama.cpp", "--strength", "2"]
    ours = trimtab(*arguments, "--out", tmp_path / "v.safetensors")
    assert ours.code == 0, ours.err
    assert f"trimtab convert {tmp_path / 'v.safetensors'} {tmp_path / 'v.gguf'}\n" in ours.out
    scale = suggested_strength(load(tmp_path / "v.safetensors")) or SCALE
    assert f"--control-vector-scaled {tmp_path / 'v.gguf'}:{scale:g} " in ours.out
    assert only_adds(tmp_path / "v.safetensors")
    theirs = trimtab(*arguments, "--out", tmp_path / "w.gguf", "--json")
    assert theirs.code == 0, theirs.err
    assert [line.split()[0] for line in theirs.json["next"]] == ["llama-cli"]
    assert only_adds(tmp_path / "w.gguf")
    assert trimtab("convert", tmp_path / "v.safetensors", tmp_path / "v.gguf").code == 0
    assert (tmp_path / "v.gguf").read_bytes() == (tmp_path / "w.gguf").read_bytes()
    alone = trimtab(*arguments[:-4], "--strength", "2", "--out", tmp_path / "x.safetensors")
    assert "llama-cli" not in alone.out
    if method != "instruct":  # which sets a projection unless it is told otherwise
        (a,), (b,) = (load(tmp_path / name).edits for name in ("x.safetensors", "w.gguf"))
        assert torch.allclose(a.strength * a.operation.direction, b.operation.direction)


def scale_in(line: str) -> float:
    """The strength in a llama-cli command."""
    return float(line.partition("--control-vector-scaled ")[2].split(":")[1].split()[0])


def test_the_strength_depends_on_the_layers(trimtab: Any, model: Path, answer_pairs: Path, tmp_path: Path) -> None:
    """It is the one that `try:` has. Block 0, which isn't written, doesn't count."""
    arguments = ["learn", "caa", "--pairs", answer_pairs, "--model", model, "--for", "llama.cpp"]
    scales, suggested = {}, {}
    for layers in ("2", "1,2,3", "all"):
        out = tmp_path / f"{layers.replace(',', '')}.safetensors"
        done = trimtab(*arguments, "--layers", layers, "--out", out)
        assert done.code == 0, done.err
        scales[layers] = scale_in(done.out)
        suggested[layers] = suggested_strength(load(out))
        assert f"{out}:{suggested[layers]:g}" in done.err
    assert scales["2"] == suggested["2"] != SCALE
    assert scales["all"] == scales["1,2,3"] == suggested["1,2,3"] < scales["2"]
    assert suggested["all"] != suggested["1,2,3"]


def test_a_strength_that_isnt_known(trimtab: Any, model: Path, tmp_path: Path) -> None:
    arguments = ["learn", "random", "--model", model, "--for", "llama.cpp", "--layers", "1"]
    done = trimtab(*arguments, "--out", tmp_path / "v.gguf", "--json")
    assert done.code == 0, done.err
    assert (scale_in(done.json["next"][0]), done.json["suggested_strength"]) == (SCALE, None)


def test_a_word(trimtab: Any, model: Path, tmp_path: Path) -> None:
    options = ["--word", "sea", "--queries", 4, "--layers", "2", "--model", model, "--for", "llama.cpp"]
    done = trimtab("learn", "instruct", *options, "--out", tmp_path / "sea.gguf")
    assert done.code == 0, done.err
    assert only_adds(tmp_path / "sea.gguf")


def test_block_0_is_left_out_with_a_word(trimtab: Any, model: Path, answer_pairs: Path, tmp_path: Path) -> None:
    arguments = ["learn", "caa", "--pairs", answer_pairs, "--model", model, "--for", "llama.cpp"]
    done = trimtab(*arguments, "--layers", "all", "--out", tmp_path / "v.gguf")
    assert (done.code, load(tmp_path / "v.gguf").layers) == (0, (1, 2, 3))
    assert "warning: llama.cpp can't steer block 0" in done.err


def test_what_contradicts_it(trimtab: Any, model: Path, prompt_pairs: Path, answer_pairs: Path, tmp_path: Path) -> None:
    """Before a model is loaded, and nothing is written."""
    out = tmp_path / "v.gguf"
    instruct, caa = ["instruct", "--pairs", prompt_pairs], ["caa", "--pairs", answer_pairs]
    repe = ["repe", "--pairs", answer_pairs]
    for words, arguments in (
        ("--operation project was given", [*instruct, "--operation", "project"]),
        ("--positions generated was given", [*instruct, "--positions", "generated"]),
        ("--one-sided is for projections", [*instruct, "--one-sided"]),
        ("can't steer block 0", [*caa, "--layers", "0"]),
        ("'ollama' is not known", [*caa, "--for", "ollama"]),
        ("named *.safetensors", [*caa, "--out", tmp_path / "v.pt"]),
        ("takes one at a time", ["instruct", "--all"]),
        ("--control sign was given", [*repe, "--control", "sign"]),
        ("--keep-norm True was given", [*repe, "--keep-norm"]),
        ("hpr isn't known to only add", ["hpr", "--pairs", answer_pairs]),
        ("--rank 4 was given", ["distill", "--instruction", "Be brief.", "--rank", "4"]),
        ("--fit closed was given", ["distill", "--instruction", "Be brief.", "--fit", "closed"]),
    ):
        done = trimtab("learn", arguments[0], "--for", "llama.cpp", "--out", out, *arguments[1:])
        assert (done.code, done.out) == (2, ""), words
        assert words in done.err
        assert not out.exists()
    without = trimtab("learn", *caa, "--out", out, "--model", model)
    assert (without.code, "--for llama.cpp" in without.err) == (2, True)


def test_the_methods_are_there() -> None:
    assert set(IMPLIED) <= set(recipes())


def test_convert_says_how_to_learn_one(trimtab: Any, steering: Path, tmp_path: Path) -> None:
    done = trimtab("convert", steering, tmp_path / "v.gguf", "--positions", "all")
    assert done.code == 2
    assert "can only add directions" in done.err
    assert "`trimtab learn instruct … --for llama.cpp`" in done.err
    assert done.err.count("\n") == 1


def test_convert_says_what_to_do_with_an_ablation(trimtab: Any, tmp_path: Path) -> None:
    save(directional_ablation(torch.ones(8), 2), tmp_path / "ablation.safetensors")
    done = trimtab("convert", tmp_path / "ablation.safetensors", tmp_path / "v.gguf")
    assert (done.code, "`trimtab bake`" in done.err, done.err.count("\n")) == (2, True, 1)
