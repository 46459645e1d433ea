"""Features of sparse autoencoders: folders as SAELens writes them, clamps against its formulas written out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab import Add, Positions, ReadWrite, Site, TrimtabError, UnsupportedError, load, load_features, save

WIDTH, FEATURES = tiny.WIDTH, 20
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = {
    "W_enc": torch.randn(WIDTH, FEATURES, generator=GENERATOR) / WIDTH**0.5,
    "W_dec": torch.randn(FEATURES, WIDTH, generator=GENERATOR) / WIDTH**0.5,
    "b_enc": torch.randn(FEATURES, generator=GENERATOR) / 4,
    "b_dec": torch.randn(WIDTH, generator=GENERATOR) / 4,
}
THRESHOLD = {"threshold": torch.rand(FEATURES, generator=GENERATOR) / 2}
X = torch.randn(120, WIDTH, generator=GENERATOR, dtype=torch.float64)


def folder(path: Path, weights: dict[str, Tensor] = WEIGHTS, **more: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(weights, path / "sae_weights.safetensors")
    config = {"d_in": WIDTH, "d_sae": FEATURES, "architecture": "standard", "normalize_activations": "none"}
    metadata = {"hook_name": "blocks.2.hook_resid_post", "model_name": "m"} | more.pop("metadata", {})
    (path / "cfg.json").write_text(json.dumps({**config, "metadata": metadata, **more}))
    return path


def activations(x: Tensor, weights: dict[str, Tensor], *, subtracts: bool = True, centred: bool = False) -> Tensor:
    """SAELens' `encode`, number by number: `[tokens, features]`."""
    features_of_x = torch.zeros(len(x), FEATURES, dtype=torch.float64)
    for t, token in enumerate(x):
        centred_token = token - token.mean() if centred else token
        centred_token = centred_token - weights["b_dec"].double() if subtracts else centred_token
        for i in range(FEATURES):
            z = float(centred_token @ weights["W_enc"][:, i].double() + weights["b_enc"][i])
            theta = max(0.0, float(weights["threshold"][i])) if "threshold" in weights else 0.0
            features_of_x[t, i] = z if z > theta and z > 0 else 0.0
    return features_of_x


def clamped(x: Tensor, features: dict[int, float], weights: dict[str, Tensor], **how: bool) -> Tensor:
    f = activations(x, weights, **how)
    return x + sum((v - f[:, [i]]) * weights["W_dec"][i].double() for i, v in features.items())


def applied(steering: Any, x: Tensor, strength: float = 1.0) -> Tensor:
    (edit,) = steering.edits
    assert isinstance(edit.operation, ReadWrite)
    return torch.stack([tiny.naive_read_write(edit.operation, token, strength) for token in x])


def test_features_are_added(tmp_path: Path) -> None:
    steering = load_features(folder(tmp_path / "sae"), {3: 40.0, 7: -2.5})
    assert [(e.site, e.strength, e.positions) for e in steering.edits] == [
        (Site(2), 40.0, Positions.all()),
        (Site(2), -2.5, Positions.all()),
    ]
    for edit, i in zip(steering.edits, (3, 7), strict=True):
        assert isinstance(edit.operation, Add)
        assert torch.equal(edit.operation.direction, WEIGHTS["W_dec"][i])
    assert steering.card.method == "features"
    assert steering.card.options["features"] == {"3": 40.0, "7": -2.5}
    assert steering.card.options["model_name"] == "m"


@pytest.mark.parametrize("features", [{3: 2.0}, {3: 2.0, 7: 0.0, 11: -1.0}])
@pytest.mark.parametrize("subtracts", [True, False])
def test_clamps_are_the_formula(tmp_path: Path, features: dict[int, float], subtracts: bool) -> None:
    path = folder(tmp_path / "sae", apply_b_dec_to_input=subtracts)
    clamps = load_features(path, features, how="clamp")
    expected = clamped(X, features, WEIGHTS, subtracts=subtracts)
    assert torch.allclose(applied(clamps, X), expected, atol=1e-5)
    half = X + (expected - X) / 2
    assert torch.allclose(applied(clamps, X, 0.5), half, atol=1e-5)


def test_a_jump_is_a_ramp_over_a_thousandth(tmp_path: Path) -> None:
    weights = WEIGHTS | THRESHOLD
    path = folder(tmp_path / "sae", weights, architecture="jumprelu")
    features = dict.fromkeys(range(FEATURES), 1.0)
    z = activations(X, WEIGHTS)
    theta = THRESHOLD["threshold"].double()
    clear = ((z < theta) | (z > 1.002 * theta)).all(1)
    assert clear.double().mean() > 0.9
    assert bool(((z > 0) & (z < theta)).any())  # where a ReLU would answer otherwise
    result = applied(load_features(path, features, how="clamp"), X[clear])
    assert torch.allclose(result, clamped(X[clear], features, weights), atol=1e-4)


def test_a_centred_stream(tmp_path: Path) -> None:
    """TransformerLens takes the mean off a LayerNorm model's stream, where SAELens says that it had it do so."""
    path = folder(tmp_path / "sae", metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    clamps = load_features(path, {3: 2.0, 5: 1.0}, how="clamp")
    assert torch.allclose(applied(clamps, X), clamped(X, {3: 2.0, 5: 1.0}, WEIGHTS, centred=True), atol=1e-5)


def test_gemma_scope(tmp_path: Path) -> None:
    weights = WEIGHTS | THRESHOLD
    path = tmp_path / "params.npz"
    np.savez(path, **{name: value.numpy() for name, value in weights.items()})
    with pytest.raises(TrimtabError, match="pass --layer N"):
        load_features(path, {3: 2.0})
    clamps = load_features(path, {3: 2.0}, how="clamp", layer=1)
    assert clamps.edits[0].site == Site(1)
    z = activations(X, WEIGHTS, subtracts=False)[:, 3]
    theta = float(THRESHOLD["threshold"][3])
    clear = (z < theta) | (z > 1.002 * theta)
    expected = clamped(X[clear], {3: 2.0}, weights, subtracts=False)
    assert torch.allclose(applied(clamps, X[clear]), expected, atol=1e-4)


def test_a_model_runs_clamped(tmp_path: Path) -> None:
    """All of its features read after the steering, at the block where it reads: the clamped ones are what was said."""
    weights = WEIGHTS | {
        "W_dec": torch.linalg.pinv(WEIGHTS["W_enc"].double()).float()
    }  # a write moves its own read alone
    lm = tiny.tiny("llama")
    steering = load_features(folder(tmp_path / "sae", weights), {3: 2.0, 7: 5.0}, how="clamp")
    save(steering, tmp_path / "s.safetensors")
    steering = load(tmp_path / "s.safetensors")
    text = tiny.prompt(1, 6)
    before = lm.capture(text, [2], Positions.all())[0][Site(2)]
    with lm.steered(steering):
        after = lm.capture(text, [2], Positions.all())[0][Site(2)]
    was, now = activations(before, weights), activations(after, weights)
    open_ = (was[:, [3, 7]] > 0).all(1)  # where a feature was shut, its pre-activation was below 0, and counts as 0
    assert bool(open_.any())
    assert torch.allclose(
        now[open_][:, [3, 7]], torch.tensor([2.0, 5.0]).double().expand(int(open_.sum()), 2), atol=1e-4
    )
    others = [i for i in range(FEATURES) if i not in (3, 7)]
    assert torch.allclose(now[:, others], was[:, others], atol=1e-4)
    (tokens, logprobs), answer = (
        tiny.naive_generate(lm, text, steering, 4),
        lm.generate(text, steering, max_new_tokens=4),
    )
    assert list(answer[0].token_ids) == tokens
    assert logprobs


def test_who_doesnt_name_a_feature_is_told_how(tmp_path: Path) -> None:
    path = folder(tmp_path / "sae")
    np.savez(tmp_path / "params.npz", **{name: value.numpy() for name, value in WEIGHTS.items()})
    for file in (path, path / "sae_weights.safetensors", tmp_path / "params.npz"):
        with pytest.raises(TrimtabError, match=r"trimtab convert .* --feature NUMBER:VALUE .*load_features"):
            load(file)


def test_older_configurations(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    path.mkdir()
    save_file(WEIGHTS, path / "sae_weights.safetensors")
    for key in ("hook_name", "hook_point"):
        (path / "cfg.json").write_text(json.dumps({key: "blocks.2.hook_resid_pre", "activation_fn_str": "relu"}))
        assert load_features(path, {3: 1.0}, how="clamp").edits[0].site == Site(1)


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    clamp: dict[str, Any] = {"how": "clamp"}
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"architecture": "topk"}, clamp, r"\(topk\) depend on each other.*--as add"),
        ({"architecture": "gated"}, clamp, r"\(gated\) depend"),
        ({"activation_fn_str": "topk"}, clamp, r"\(topk\) depend"),
        ({"normalize_activations": "layer_norm"}, clamp, r"scales activations before it reads them \(layer_norm\)"),
        ({"architecture": "jumprelu"}, clamp, "no thresholds"),
        ({"metadata": {"hook_name": "blocks.2.hook_mlp_out"}}, {}, "isn't a place in the residual stream"),
        ({"metadata": {"hook_name": "transformer.wte"}}, {}, "isn't the output of a block"),
        ({}, {"layer": 1}, "reads the output of block 2; leave layer 1 out"),
        ({}, {"how": "set"}, "add or clamp, got 'set'"),
    ]
    for config, options, words in cases:
        folder(path, **config)
        with pytest.raises(TrimtabError, match=words):
            load_features(path, {3: 1.0}, **options)
    folder(path, architecture="topk")
    assert load_features(path, {3: 1.0}).edits  # which can be added
    for features, words in (
        ({FEATURES: 1.0}, f"no feature {FEATURES}; features are numbered from 0 to {FEATURES - 1}"),
        ({-1: 1.0}, "no feature -1"),
        ({3: float("nan")}, "finite number"),
        ({}, "no feature was given"),
    ):
        with pytest.raises(TrimtabError, match=words):
            load_features(path, features)
    save_file({"W_dec": WEIGHTS["W_dec"], "W_enc": WEIGHTS["W_dec"].clone()}, path / "sae_weights.safetensors")
    with pytest.raises(TrimtabError, match=r"no W_enc \[width, features\]"):
        load_features(path, {3: 1.0})
    (path / "sae_weights.safetensors").write_bytes(b"x")
    with pytest.raises(TrimtabError, match=r"sae_weights.safetensors can't be read"):
        load_features(path, {3: 1.0})
    (path / "cfg.json").write_text("{")
    with pytest.raises(TrimtabError, match="isn't valid JSON"):
        load_features(path, {3: 1.0})
    (path / "cfg.json").unlink()
    with pytest.raises(TrimtabError, match=r"no cfg\.json"):
        load_features(path, {3: 1.0})
    (tmp_path / "v.bin").write_bytes(b"abc")
    with pytest.raises(TrimtabError, match="neither a SAELens folder"):
        load_features(tmp_path / "v.bin", {3: 1.0})
    with pytest.raises(UnsupportedError):
        load_features(folder(path, architecture="gated"), {3: 1.0}, how="clamp")
