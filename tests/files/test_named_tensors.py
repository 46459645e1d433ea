"""Tensors with names, in `.pt`, `.npz`, `.safetensors` and `.json` files: layers, one vector's parts, or concepts."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab import Add, Site, Steering, TrimtabError, load
from trimtab.files.foreign import FormatWarning
from trimtab.files.load import load_direction

WIDTH = 6
GIVEN = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
WRITE: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    ".pt": torch.save,
    ".npz": lambda value, path: np.savez(path, **{key: item.numpy() for key, item in value.items()}),
    ".safetensors": save_file,
    ".json": lambda value, path: path.write_text(json.dumps({k: v.tolist() for k, v in value.items()})),
}


@pytest.fixture(params=WRITE)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    def writing(value: dict[str, Tensor]) -> Path:
        path = tmp_path / f"v{request.param}"
        WRITE[request.param](value, path)
        return path

    return writing


def directions_of(steering: Steering) -> dict[Site, list[float]]:
    assert all(type(edit.operation) is Add and edit.strength == 1 for edit in steering.edits)
    return {edit.site: edit.operation.direction.tolist() for edit in steering.edits}


@pytest.mark.parametrize(
    "name",
    [
        "{}",
        "layer_{}",
        "layer{}",
        "layer.{}",
        "layers.{}",
        "model.layers.{}",
        "model.language_model.layers.{}",
        "transformer.h.{}",
        "direction.{}",
        "blocks.{}.hook_resid_post",
    ],
)
def test_names_of_layers(write: Callable[..., Path], name: str) -> None:
    path = write({name.format(layer): GIVEN[i] for i, layer in enumerate((3, 14))})
    assert directions_of(load(path)) == {Site(3): GIVEN[0].tolist(), Site(14): GIVEN[1].tolist()}
    assert directions_of(load(path, layer_offset=-1)) == {Site(2): GIVEN[0].tolist(), Site(13): GIVEN[1].tolist()}
    assert torch.equal(load_direction(path, layer=14)[0], GIVEN[1])
    for options, words in (
        ({"layer": 3}, "already names its layers"),
        ({"row": 1}, "no rows"),
        ({"position": 0}, "axis"),
    ):
        with pytest.raises(TrimtabError, match=words):
            load(path, **options)


def test_one_layer_alone_is_where_its_name_says(write: Callable[..., Path]) -> None:
    assert directions_of(load(write({"layer_14": GIVEN[0]}))) == {Site(14): GIVEN[0].tolist()}


def test_before_a_block_is_behind_the_one_before(write: Callable[..., Path]) -> None:
    path = write({"blocks.0.hook_resid_pre": GIVEN[0], "blocks.3.hook_resid_pre": GIVEN[1]})
    assert directions_of(load(path)) == {Site(0, "block_input"): GIVEN[0].tolist(), Site(2): GIVEN[1].tolist()}
    for names, words in (
        (["blocks.3.hook_mlp_out", "blocks.4.hook_mlp_out"], "isn't a place in the residual stream"),
        (["blocks.3.hook_resid_pre", "blocks.2.hook_resid_post"], "two of its tensors are for the same block"),
    ):
        with pytest.raises(TrimtabError, match=words):
            load(write({name: GIVEN[i] for i, name in enumerate(names)}))


def test_a_vector_and_its_layer(write: Callable[..., Path]) -> None:
    for key in ("layer", "layer_idx", "layer_index"):
        path = write({"vector": GIVEN[0], key: torch.tensor([14])})
        assert directions_of(load(path)) == {Site(14): GIVEN[0].tolist()}
        assert directions_of(load(path, layer=2)) == {Site(2): GIVEN[0].tolist()}  # who says so knows better
    path = write({"direction": GIVEN[0]})
    assert directions_of(load(path, layer=5)) == {Site(5): GIVEN[0].tolist()}
    with pytest.raises(TrimtabError, match="--layer N"):
        load(path)


def test_a_layer_as_a_plain_number(tmp_path: Path) -> None:
    torch.save({"vector": GIVEN[0], "layer": 14, "model": "m", "note": None}, tmp_path / "v.pt")
    save_file({"vector": GIVEN[0]}, tmp_path / "v.safetensors", metadata={"layer": "14", "model": "m"})
    (tmp_path / "v.json").write_text(json.dumps({"vector": GIVEN[0].tolist(), "layer": 14, "model": "m"}))
    for path in tmp_path.iterdir():
        steering = load(path)
        assert directions_of(steering) == {Site(14): GIVEN[0].tolist()}
        assert steering.card.options["model"] == "m"
    torch.save({"vector": GIVEN[0], "layer": 1.5}, tmp_path / "v.pt")
    with pytest.raises(TrimtabError, match="isn't the number of a block"):
        load(tmp_path / "v.pt")
    torch.save({"vector": GIVEN[0], "layer": [3]}, tmp_path / "v.pt")
    with pytest.raises(TrimtabError, match="under 'layer', a list"):
        load(tmp_path / "v.pt")


def test_names_of_concepts_are_picked_by_name(write: Callable[..., Path]) -> None:
    path = write({"happy": GIVEN[0], "sad": GIVEN[1]})
    with pytest.raises(TrimtabError, match=r"happy \[6\], sad \[6\].*trimtab convert .*--row NAME --layer N"):
        load(path)
    steering = load(path, row="sad", layer=3)
    assert directions_of(steering) == {Site(3): GIVEN[1].tolist()}
    assert steering.card.options["row"] == "sad"
    with pytest.raises(TrimtabError, match="no tensor 'angry'; its tensors are happy"):
        load(path, row="angry", layer=3)
    every = write({"happy": GIVEN, "sad": 2 * GIVEN})  # a matrix of layers each
    with pytest.raises(TrimtabError, match="4 rows of 6 numbers"):
        load(every, row="sad")
    assert load(every, row="sad", layer_offset=-1).layers == (0, 1, 2)


def test_rows_in_each_layer(write: Callable[..., Path]) -> None:
    path = write({"layer_1": GIVEN[:2], "layer_2": GIVEN[2:]})
    with pytest.raises(TrimtabError, match=r"'layer_1' has 2 rows; pass --row R"):
        load(path)
    assert directions_of(load(path, row=1)) == {Site(1): GIVEN[1].tolist(), Site(2): GIVEN[3].tolist()}
    with pytest.raises(TrimtabError, match="no row 2"):
        load(path, row=2)


def test_lists_in_json(tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    path.write_text(json.dumps(GIVEN[0].tolist()))
    assert directions_of(load(path, layer=2)) == {Site(2): GIVEN[0].tolist()}
    path.write_text(json.dumps(GIVEN.tolist()))
    assert len(load(path, layer_offset=0).edits) == 4
    path.write_text("\ufeff" + json.dumps({"vector": GIVEN[0].tolist(), "layer": 2, "strength": 3}))
    with pytest.warns(FormatWarning, match=r"strength of 3 isn't applied.*--strength 3"):
        assert directions_of(load(path)) == {Site(2): GIVEN[0].tolist()}
    path.write_text(json.dumps({"2": [0.0, 0.0]}))
    with pytest.warns(FormatWarning, match="all zero, so it has no effect"):
        load(path)
    path.write_text("[[1.0, 2.0], [1.0]]")
    with pytest.raises(TrimtabError, match="different lengths"):
        load(path, layer_offset=0)


def test_archives_that_are_damaged_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    np.savez_compressed(path, layer_1=np.ones(WIDTH), layer_2=np.ones(WIDTH))
    assert load(path).layers == (1, 2)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"layer_2", b"layer_1"))
    with pytest.raises(TrimtabError, match="two entries of the same name"):
        load(path)
    path.write_bytes(whole[:-30])
    with pytest.raises(TrimtabError, match="damaged"):
        load(path)
    np.savez(path, layer_1=np.array([{"a": 1}], dtype=object))
    with pytest.raises(TrimtabError, match="damaged, or isn't an array"):
        load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer_1.npy", bytes(1 << 20))
        archive.infolist()[0].file_size = 1 << 40  # what the directory says, which is believed before it is read
    with pytest.raises(TrimtabError, match="MB; a steering is smaller"):
        load(path)


def test_neuronpedia(tmp_path: Path) -> None:
    """A feature as its interface answers, cut down to what tells of its vector."""
    answer = {
        "modelId": "gemma-2-2b",
        "layer": "20-gemmascope-res-16k",
        "index": "1234",
        "maxActApprox": 60.5,
        "hasVector": True,
        "vector": GIVEN[0].tolist(),
        "vectorLabel": None,
        "vectorDefaultSteerStrength": 40,
        "hookName": "blocks.20.hook_resid_post",
        "explanations": [{"description": "dogs"}],
        "activations": [],
    }
    path = tmp_path / "feature.json"

    def written(**more: object) -> Path:
        path.write_text(json.dumps(answer | more))
        return path

    steering = load(written())
    assert directions_of(steering) == {Site(20): GIVEN[0].tolist()}
    about = {"modelId": "gemma-2-2b", "layer": "20-gemmascope-res-16k", "index": "1234"}
    about |= {"maxActApprox": 60.5, "vectorDefaultSteerStrength": 40}
    assert steering.card.options == {"format": "Neuronpedia", **about}
    assert directions_of(load(written(hookName="blocks.6.hook_resid_pre"))) == {Site(5): GIVEN[0].tolist()}
    assert directions_of(load(written(hookName=None), layer=4)) == {Site(4): GIVEN[0].tolist()}
    for more, words in (
        ({"vector": []}, "doesn't include the feature's vector.*--feature INDEX"),
        ({"hookName": None}, "pass --layer N"),
        ({"hookName": "blocks.9.hook_mlp_in"}, "isn't a place in the residual stream"),
    ):
        with pytest.raises(TrimtabError, match=words):
            load(written(**more))
