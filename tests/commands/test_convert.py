"""`trimtab convert`, and other programs' files where a steering is asked for."""

from __future__ import annotations

import json

import pytest
import torch
from files.test_foreign_files import gguf_file, vectors

from trimtab import Add, Card, Edit, Positions, Site, Steering, directional_ablation, load, save
from trimtab.steering import ModelId

WIDTH = 8


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.safetensors"
    edits = (Edit(Site(1), Add(torch.ones(WIDTH)), Positions.all()), Edit(Site(2), Add(torch.ones(WIDTH))))
    save(Steering(edits), path)
    return path


def test_there_and_back(trimtab, tmp_path):
    written = vectors(1, 2, 3)
    there = gguf_file(tmp_path / "v.gguf", written, controlvector__model_hint="llama")
    done = trimtab("convert", there, tmp_path / "v.safetensors", "--strength", "2")
    assert done.code == 0, done.err
    assert done.out == f"wrote {tmp_path / 'v.safetensors'} for trimtab: layers 1, 2, 3\n"
    back = trimtab("convert", tmp_path / "v.safetensors", tmp_path / "w.gguf", "--strength", "0.5", "--json")
    assert back.json == {
        "from": str(tmp_path / "v.safetensors"),
        "format": "repeng",
        "to": str(tmp_path / "w.gguf"),
        "target": "llama.cpp",
        "layers": [1, 2, 3],
    }
    for edit in load(tmp_path / "w.gguf").edits:
        assert torch.equal(edit.operation.direction, torch.tensor(written[edit.site.layer]))


def test_options(trimtab, tmp_path, mine):
    generated = gguf_file(tmp_path / "g.gguf", vectors(1), signed=True)
    warned = trimtab("convert", generated, tmp_path / "a.safetensors")
    assert (warned.code, warned.err.startswith("warning: ")) == (0, True)
    assert "--layer-offset -1" in warned.err
    shifted = trimtab("convert", generated, tmp_path / "a.safetensors", "--layer-offset", "-1", "--json")
    assert (shifted.json["layers"], shifted.err) == ([0], "")
    torch.save(torch.ones(WIDTH), tmp_path / "v.pt")
    assert trimtab("convert", tmp_path / "v.pt", tmp_path / "b.safetensors", "--layer", "7", "--json").json[
        "layers"
    ] == [7]
    done = trimtab("convert", mine, tmp_path / "c.pt", "--positions", "all", "--json")
    assert done.json["target"] == "lm-eval"
    assert trimtab("convert", mine, tmp_path / "d.gguf", "--positions", "all", "--to", "repeng").code == 0


def test_what_is_refused(trimtab, tmp_path, mine):
    out = tmp_path / "v.gguf"
    torch.save(torch.ones(WIDTH), tmp_path / "v.pt")
    (tmp_path / "v.json").write_text(json.dumps({"a": 1}))
    cases = {
        "--positions all": [mine, out],
        "no file": [tmp_path / "nowhere", out],
        "steering.safetensors --layer N": [tmp_path / "v.pt", out],
        "no known layout": [tmp_path / "v.json", out],
        "named *.gguf": [mine, tmp_path / "v.safetensors", "--to", "llama.cpp"],
        "no suffix of a known format": [mine, tmp_path / "v"],
        "can't export to 'vim'": [mine, out, "--to", "vim"],
        "unknown kind of file 'x'": [mine, out, "--from", "x"],
        "leave layer_offset out": [mine, out, "--layer-offset", "1"],
        "finite": [mine, out, "--strength", "nan"],
        "'everywhere'": [mine, out, "--positions", "everywhere"],
    }
    for words, arguments in cases.items():
        done = trimtab("convert", *arguments)
        assert (done.code, done.out) == (2, "")
        assert done.err.startswith("error: ")
        assert words in done.err
        assert done.err.count("\n") == 1
        assert not out.exists()


def test_a_direction_ablated_everywhere(trimtab, tmp_path):
    """From a bare vector, from one of several, and from trimtab's own file whose card knows the model."""
    vector = 3 * torch.nn.functional.normalize(torch.arange(1.0, WIDTH + 1), dim=0)
    torch.save(vector, tmp_path / "direction.pt")
    torch.save(torch.stack([vector + 1, vector]), tmp_path / "layers.pt")
    save(
        Steering((Edit(Site(1), Add(vector)),), Card("caa", ModelId("m", None, "llama", WIDTH, 3, "f"))),
        tmp_path / "ours.safetensors",
    )
    out = tmp_path / "out.safetensors"
    for arguments in (
        ["direction.pt", "--blocks", 3],
        ["layers.pt", "--layer", 1, "--blocks", 3],
        ["ours.safetensors"],
    ):
        done = trimtab("convert", tmp_path / arguments[0], out, "--as", "ablate", *arguments[1:], "--json")
        assert (done.code, done.json["layers"]) == (0, [0, 1, 2]), done.err
        assert load(out) == directional_ablation(vector, 3)
        assert load(out).card.options["as"] == "ablate"
    assert load(out).card.models[0].name == "m"
    for words, arguments in {
        "--blocks N": ["direction.pt", "--as", "ablate"],
        "several directions": ["layers.pt", "--as", "ablate", "--blocks", 3],
        "'rotate' is not known": ["direction.pt", "--as", "rotate", "--blocks", 3],
        "add --as ablate": ["layers.pt", "--blocks", 3],
        "shifts nothing": ["layers.pt", "--as", "ablate", "--blocks", 3, "--layer-offset", 1],
        "a model of 3 blocks, not 4": ["ours.safetensors", "--as", "ablate", "--blocks", 4],
    }.items():
        done = trimtab("convert", tmp_path / arguments[0], tmp_path / "none.safetensors", *arguments[1:])
        assert (done.code, words in done.err, done.err.count("\n")) == (2, True, 1), done.err
        assert not (tmp_path / "none.safetensors").exists()


def test_a_direction_as_it_was_published(trimtab, tmp_path, model):
    """A vector with a sidecar steers as it is; of a tensor with three axes one is picked."""
    torch.save(torch.randn(32, dtype=torch.float64), tmp_path / "direction.pt")
    (tmp_path / "direction_metadata.json").write_text('{"pos": -1, "layer": 2}')
    options = ["generate", "--model", model, "--prompt", "Why?", "--max-new-tokens", 2, "--json"]
    answered = trimtab(*options, "--steer", tmp_path / "direction.pt")
    assert answered.json["answers"][0]["edits"] == ["1 * add @ residual[1] all"]
    (tmp_path / "direction_metadata.json").unlink()
    refused = trimtab(*options, "--steer", tmp_path / "direction.pt")
    assert (refused.code, "trimtab convert" in refused.err and "--layer N" in refused.err) == (2, True)
    torch.save(torch.randn(5, 4, 32), tmp_path / "mean_diffs.pt")
    picked = ["convert", tmp_path / "mean_diffs.pt", tmp_path / "v.gguf", "--layer", 3]
    assert "--position P" in trimtab(*picked).err
    done = trimtab(*picked, "--position", -1, "--json")
    assert (done.code, done.json["layers"]) == (0, [2]), done.err


def test_other_programs_files_are_steerings(trimtab, model, tmp_path):
    """`generate` and `inspect` take them as they are."""
    import numpy as np

    there = gguf_file(tmp_path / "v.gguf", {2: np.ones(32, dtype=np.float32)}, controlvector__model_hint="llama")
    shown = trimtab("inspect", there, "--json")
    assert shown.code == 0, shown.err
    assert shown.json["card"]["options"]["format"] == "repeng"
    options = ["generate", "--model", model, "--prompt", "Why?", "--max-new-tokens", 2, "--json"]
    answered = trimtab(*options, "--steer", f"{there}:0.5")
    assert answered.code == 0, answered.err
    assert answered.json["answers"][0]["edits"] == ["0.5 * add @ residual[2] all"]
    assert "isn't a number" in trimtab(*options, "--steer", f"{there}:strong").err


def test_generating_with_llama_cpp(trimtab, model, tmp_path):
    pytest.importorskip("xllamacpp", reason="needs trimtab[llamacpp]")
    from gguf_models import write_llama

    file = write_llama(model, tmp_path / "tiny.gguf")
    save(Steering((Edit(Site(2), Add(torch.ones(32))),)), tmp_path / "s.safetensors")
    options = ["--prompt", "Why?", "--max-new-tokens", 4, "--steer", f"{tmp_path / 's.safetensors'}:0.5", "--json"]
    llama = trimtab("generate", "--model", file, "--engine", "llamacpp", "--compare", *options)
    assert llama.code == 0, llama.err
    plain = trimtab("generate", "--model", model, "--dtype", "float32", "--compare", *options)
    for key in ("text", "edits", "prompt_tokens", "unsteered"):
        assert llama.json["answers"][0][key] == plain.json["answers"][0][key]
    assert llama.json["answers"][0]["dose"] == pytest.approx(plain.json["answers"][0]["dose"], rel=0.5)
    for more, words in (
        (["--model", model, "--engine", "llamacpp"], "needs a .gguf file"),
        (["--model", file, "--engine", "ollama"], "no engine 'ollama'"),
        (["--model", file, "--engine", "llamacpp", "--rejection"], "support rejection"),
        (["--model", file, "--engine", "llamacpp", "--device", "meta"], "has no option device"),
    ):
        done = trimtab("generate", *more, *options)
        assert (done.code, words in done.err) == (2, True), done.err


def test_rows_and_names(trimtab, tmp_path):
    """What a file doesn't say is said with the options that the errors name."""
    import numpy as np

    np.save(tmp_path / "rows.npy", np.ones((4, WIDTH)))
    np.savez(tmp_path / "named.npz", happy=np.ones(WIDTH), sad=np.ones(WIDTH))
    out = tmp_path / "out.safetensors"
    for file, options, layers in (
        ("rows.npy", ["--row", 3, "--layer", 7], [7]),
        ("rows.npy", ["--layer-offset", 0], [0, 1, 2, 3]),
        ("rows.npy", ["--layer-offset", -1], [0, 1, 2]),
        ("rows.npy", ["--row", 3, "--as", "ablate", "--blocks", 2], [0, 1]),
        ("named.npz", ["--row", "sad", "--layer", 5], [5]),
    ):
        refused = trimtab("convert", tmp_path / file, out)
        assert (refused.code, refused.err.count("\n"), "--row" in refused.err) == (2, 1, True)
        done = trimtab("convert", tmp_path / file, out, *options, "--json")
        assert (done.code, done.json["layers"]) == (0, layers), done.err


def test_features(trimtab, tmp_path):
    from files.test_autoencoder import folder

    sae, out = folder(tmp_path / "sae"), tmp_path / "out.safetensors"
    done = trimtab("convert", sae, out, "--feature", "3:40", "--feature", "7:-2.5", "--json")
    assert (done.code, done.json["layers"], done.json["format"]) == (0, [2], "sparse autoencoder"), done.err
    assert [edit.strength for edit in load(out).edits] == [40, -2.5]
    assert trimtab("convert", sae, out, "--feature", "3:40", "--as", "clamp").code == 0
    assert type(load(out).edits[0].operation).__name__ == "ReadWrite"
    for words, options in {
        "NUMBER:VALUE, 1234:40 say, got '3' (how": ["--feature", 3],
        "got 'x:1'": ["--feature", "x:1"],
        "a feature twice": ["--feature", "3:1", "--feature", "3:2"],
        "--as 'ablate' is not known with --feature": ["--feature", "3:1", "--as", "ablate"],
        "--blocks doesn't apply to a feature": ["--feature", "3:1", "--blocks", 3],
        "see --feature": ["--as", "clamp"],
        "no feature 99": ["--feature", "99:1"],
    }.items():
        done = trimtab("convert", sae, out, *options)
        assert (done.code, words in done.err, done.err.count("\n")) == (2, True, 1), done.err
