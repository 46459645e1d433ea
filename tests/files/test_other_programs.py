"""The other programs themselves: they read what trimtab writes, and trimtab what they write."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import tiny
import torch
from commands.conftest import save_model
from other_programs import FOLDER, library

from trimtab import (
    LM,
    Ablate,
    Add,
    Card,
    Edit,
    FormatWarning,
    Positions,
    Site,
    Steering,
    TrimtabError,
    UnsupportedError,
    export,
    from_repeng,
    from_steering_vectors,
    load,
    to_repeng,
    to_steering_vectors,
)

PROMPTS = [tiny.prompt(seed, length) for seed, length in ((0, 5), (1, 9))]


def adding(*layers: int, kind: str = "residual", strength: float = 1.0) -> Steering:
    edits = (Edit(Site(i, kind), Add(tiny.direction(i, 2.0).float()), Positions.all(), strength) for i in layers)
    return Steering(tuple(edits), Card(options={"model_hint": "llama"}))


def numbers(layers) -> dict[int, np.ndarray]:
    return {layer: tiny.direction(layer, 3.0).float().numpy() for layer in layers}


def same(steering: Steering, expected: dict[int, np.ndarray]) -> None:
    assert steering.layers == tuple(sorted(expected))
    for edit in steering.edits:
        assert np.array_equal(edit.operation.direction.numpy(), expected[edit.site.layer])


def test_repeng_files(monkeypatch, tmp_path):
    repeng = library(monkeypatch, "repeng")
    theirs, path = numbers((1, 2, 3)), tmp_path / "v.gguf"
    repeng.ControlVector("llama", theirs).export_gguf(path)
    steering = load(path)
    same(steering, theirs)
    assert steering.card.options["format"] == "repeng"
    for to in ("llama.cpp", "repeng", "easysteer"):
        export(adding(1, 3, strength=-0.5), path, to)
        read = repeng.ControlVector.import_gguf(path)
        assert read.model_type == "llama"
        assert {k: v.tolist() for k, v in read.directions.items()} == {
            i: (-0.5 * tiny.direction(i, 2.0).float()).tolist() for i in (1, 3)
        }


def test_repeng_objects(monkeypatch):
    repeng = library(monkeypatch, "repeng")
    theirs = repeng.ControlVector("llama", numbers((0, 2)))
    same(from_repeng(theirs), theirs.directions)
    assert to_repeng(from_repeng(theirs)) == theirs
    assert to_repeng(adding(1)).model_type == "llama"
    with pytest.raises(UnsupportedError, match="residual"):
        to_repeng(adding(1, kind="mlp"))
    with pytest.raises(TrimtabError, match="no directions"):
        from_repeng(object())


def test_repeng_steers_alike(monkeypatch):
    """The logits of a model under repeng's own control, and under trimtab's reading of its vector."""
    repeng = library(monkeypatch, "repeng")
    lm = tiny.tiny("llama", dtype=torch.float32)
    vector = repeng.ControlVector("llama", numbers((1, 3)))
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with lm.steered(0.7 * from_repeng(vector)), torch.no_grad():
        ours = lm.model(input_ids=ids).logits
    controlled = repeng.ControlModel(lm.model, [1, 3])
    controlled.set_control(vector, 0.7)
    with torch.no_grad():
        theirs = controlled(input_ids=ids).logits
    controlled.unwrap()
    assert torch.allclose(ours, theirs, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(ours, lm.model(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize("kind", ["residual", "attention", "mlp"])
def test_steering_vectors(monkeypatch, kind):
    """Objects both ways, and the logits of a model under both programs."""
    library(monkeypatch, "steering_vectors")
    lm = tiny.tiny("llama", dtype=torch.float32)
    made = adding(1, 3, kind=kind, strength=0.7)
    theirs = to_steering_vectors(made)
    assert theirs.layer_type == {"residual": "decoder_block", "attention": "self_attn", "mlp": "mlp"}[kind]
    back = from_steering_vectors(theirs)
    for edit, original in zip(back.edits, made.edits, strict=True):
        assert edit.site == original.site
        assert torch.equal(edit.operation.direction, (0.7 * original.operation.direction.double()).float())
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with lm.steered(made), torch.no_grad():
        ours = lm.model(input_ids=ids).logits
    handle = theirs.patch_activations(lm.model)
    with torch.no_grad():
        patched = lm.model(input_ids=ids).logits
    handle.remove()
    assert torch.allclose(ours, patched, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(ours, lm.model(input_ids=ids).logits, atol=1e-2)


def test_steering_vectors_that_are_no_site(monkeypatch):
    library(monkeypatch, "steering_vectors")
    vector = to_steering_vectors(adding(1))
    vector.layer_type = "input_layernorm"
    with pytest.raises(TrimtabError, match="'input_layernorm' isn't supported"):
        from_steering_vectors(vector)
    with pytest.raises(TrimtabError, match="no layer_activations"):
        from_steering_vectors({})
    with pytest.raises(UnsupportedError, match="steers residual only"):
        to_steering_vectors(adding(1) + adding(2, kind="mlp"))
    with pytest.raises(UnsupportedError, match="can only add"):
        to_steering_vectors(Steering((Edit(Site(1), Ablate(tiny.direction(1)), Positions.all()),)))


def test_without_the_libraries(monkeypatch):
    import sys

    for name in ("steering_vectors", "repeng"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrimtabError, match="pip install steering-vectors"):
        to_steering_vectors(adding(1))
    with pytest.raises(TrimtabError, match="pip install repeng"):
        to_repeng(adding(1))


def test_saklas_files(monkeypatch, tmp_path):
    codec = library(monkeypatch, "saklas.io.gguf_io")
    theirs, path = numbers((0, 2)), tmp_path / "v.gguf"
    codec.write_gguf_profile({i: torch.tensor(v) for i, v in theirs.items()}, path, model_hint="llama")
    same(load(path), theirs)
    export(adding(1, 3), path)
    profile, about = codec.read_gguf_profile(path)
    assert about["model_hint"] == "llama"
    same(adding(1, 3), {i: v.numpy() for i, v in profile.items()})


def test_steerkit_files(monkeypatch, tmp_path):
    package = types.ModuleType("steerkit")  # its own imports TransformerLens, which its files have no need of
    package.__path__ = [str(FOLDER / "steerkit")]
    monkeypatch.setitem(sys.modules, "steerkit", package)
    lens = types.ModuleType("transformer_lens")
    lens.HookedTransformer = object
    monkeypatch.setitem(sys.modules, "transformer_lens", lens)
    kit = library(monkeypatch, "steerkit.gguf_export")
    probe = library(monkeypatch, "steerkit.probe")
    unit = tiny.direction(3).float()
    made = probe.Probe(
        directions={"logistic": unit, "diff_of_means": -unit},
        bias={"logistic": 0.0, "diff_of_means": 0.0},
        layer=2,
        metrics={"auc_test_logistic": 0.9},
        model_id="tiny",
        hook_site="resid_post",
        hook_name="blocks.2.hook_resid_post",
        n_total_layers=4,
        default_method="logistic",
    )
    kit.export_probe_to_gguf(made, tmp_path / "v.gguf", scale=2.0)
    made.save(tmp_path / "v.safetensors")
    same(load(tmp_path / "v.gguf"), {2: (2 * unit).numpy()})
    saved = load(tmp_path / "v.safetensors")
    same(saved, {2: unit.numpy()})
    assert saved.card.options["format"] == load(tmp_path / "v.gguf").card.options["format"] == "steerkit"
    assert saved.card.options["metrics"] == {"auc_test_logistic": 0.9}


def test_lm_eval(tmp_path):
    """EleutherAI's harness reads the file and steers by it: its logits are those of trimtab's steering."""
    steered = pytest.importorskip("lm_eval.models.hf_steered", reason="needs trimtab[lm-eval]")
    folder = save_model(tmp_path / "model")
    lm = LM.load(folder, device="cpu", dtype="float32")
    unit = tiny.direction(7).float()
    made = adding(1, 3) + Steering((Edit(Site(2), Ablate(unit), Positions.all()),))
    path = tmp_path / "v.pt"
    export(made, path)
    theirs = steered.SteeredModel(pretrained=str(folder), steer_path=str(path), device="cpu", dtype="float32")
    ids = torch.tensor([lm.encode("What is the sea?")])
    with lm.steered(made), torch.no_grad():
        ours = lm.model(input_ids=ids).logits
    assert torch.allclose(ours, theirs._model_call(ids), atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(ours, lm.model(input_ids=ids).logits, atol=1e-2)


def test_no_warning_where_the_layers_are_sure(monkeypatch, tmp_path, recwarn):
    repeng = library(monkeypatch, "repeng")
    repeng.ControlVector("llama", numbers((1,))).export_gguf(tmp_path / "v.gguf")
    load(tmp_path / "v.gguf")
    assert not [w for w in recwarn if issubclass(w.category, FormatWarning)]
