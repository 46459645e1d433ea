"""Files with a bare tensor, of torch, NumPy and safetensors: which axes it has, where it acts, and how to say so."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab import Ablate, Add, Card, Edit, Positions, Site, Steering, TrimtabError, load, save
from trimtab.files.load import load_direction

WIDTH = 6
DIFFS = torch.randn(3, 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WRITE: dict[str, Callable[[Tensor, Path], object]] = {
    ".pt": torch.save,
    ".npy": lambda value, path: np.save(path, value.numpy()),
    ".safetensors": lambda value, path: save_file({"direction": value.contiguous()}, path),
}


@pytest.fixture(params=WRITE)
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Path]:
    def writing(value: Tensor, stem: str = "direction") -> Path:
        path = tmp_path / f"{stem}{request.param}"
        WRITE[request.param](value, path)
        return path

    return writing


def only(steering: Steering) -> Edit:
    (edit,) = steering.edits
    assert type(edit.operation) is Add
    assert (edit.positions, edit.strength) == (Positions.all(), 1)
    return edit


def test_a_vector(write: Callable[..., Path]) -> None:
    path = write(DIFFS[0, 0])
    with pytest.raises(TrimtabError, match=r"trimtab convert .* --layer N .*layer=N.*--as ablate"):
        load(path)
    edit = only(load(path, layer=2))
    assert edit.site == Site(2)
    assert torch.equal(edit.operation.direction, DIFFS[0, 0])
    with pytest.raises(TrimtabError, match=r"trimtab convert '.*/my vector\.\w+' steering"):
        load(write(DIFFS[0, 0], "my vector"))
    assert only(load(write(DIFFS[:1, 0], "layer_3"))).site == Site(3)
    with pytest.raises(TrimtabError, match="no axis of token positions"):
        load(path, layer=2, position=-1)


def test_rows_are_asked_for(write: Callable[..., Path]) -> None:
    """Blocks, blocks behind the embeddings, or concepts: the file doesn't tell, and none is taken for granted."""
    path = write(DIFFS[0])
    for options in ({}, {"layer": 1}):
        with pytest.raises(TrimtabError, match=r"holds 4 rows of 6 numbers.*--row R --layer N.*--layer-offset K"):
            load(path, **options)
    assert [edit.site for edit in load(path, layer_offset=0).edits] == [Site(layer) for layer in range(4)]
    embedded = load(path, layer_offset=-1)
    assert [edit.site for edit in embedded.edits] == [Site(0, "block_input"), Site(0), Site(1), Site(2)]
    for steering in (load(path, layer_offset=0), embedded):
        for edit, row in zip(steering.edits, DIFFS[0], strict=True):
            assert torch.equal(edit.operation.direction, row)
    concept = only(load(path, row=2, layer=7))
    assert (concept.site, concept.operation.direction.tolist()) == (Site(7), DIFFS[0, 2].tolist())
    assert load(path, row=2, layer=7).card.options["row"] == 2
    layer = only(load(path, row=2, layer_offset=-1))  # one of its layers alone
    assert (layer.site, layer.operation.direction.tolist()) == (Site(1), DIFFS[0, 2].tolist())
    assert only(load(write(DIFFS[0], "layer_3"), row=1)).site == Site(3)
    for options, words in (
        ({"row": 4, "layer": 1}, "no row 4; rows are numbered from 0 to 3"),
        ({"row": "joy", "layer": 1}, "rows have no names"),
        ({"row": 1}, "doesn't say at which block"),
        ({"row": 1, "layer": 2, "position": -1}, "no axis of token positions"),
    ):
        with pytest.raises(TrimtabError, match=words):
            load(path, **options)
    assert only(load(write(DIFFS[0, :1, None]), layer=5)).site == Site(5)  # axes of length 1 are no choice
    assert len(load(write(DIFFS[0, :, None]), layer_offset=0).edits) == 4


def test_three_axes_are_asked_for(write: Callable[..., Path]) -> None:
    path = write(DIFFS)
    for options in ({}, {"layer": 1}, {"row": 1, "layer": 2}, {"layer_offset": 0}):
        with pytest.raises(TrimtabError, match=r"3 x 4 x 6 numbers.*--position P --layer N.*--row R --layer-offset K"):
            load(path, **options)
    every = load(path, row=1, layer_offset=-1)
    assert [edit.site for edit in every.edits] == [Site(0, "block_input"), Site(0), Site(1), Site(2)]
    assert torch.equal(every.edits[2].operation.direction, DIFFS[1, 2])
    picked = only(load(path, row=1, layer=2, layer_offset=-1))
    assert (picked.site, picked.operation.direction.tolist()) == (Site(1), DIFFS[1, 2].tolist())
    with pytest.raises(TrimtabError, match="4 rows of 6"):
        load(path, row=1)
    with pytest.raises(TrimtabError, match="no rows to choose from"):
        load(path, row=1, layer=1, position=-1)


def test_layers(write: Callable[..., Path]) -> None:
    steering = load(write(DIFFS[0]), layer_offset=0)
    assert [edit.site for edit in steering.edits] == [Site(layer) for layer in range(4)]
    assert torch.equal(steering.edits[2].operation.direction, DIFFS[0, 2])


@pytest.mark.parametrize(("layer", "site"), [(2, Site(1)), (0, Site(0, "block_input"))])
def test_positions_and_layers(write: Callable[..., Path], layer: int, site: Site) -> None:
    """Their layer N is the input of block N: the output of the one before it."""
    path = write(DIFFS, "mean_diffs")
    edit = only(load(path, layer=layer, position=-2))
    assert edit.site == site
    assert torch.equal(edit.operation.direction, DIFFS[-2, layer])
    with pytest.raises(TrimtabError, match=r"3 positions x 4 layers x 6 wide.*--position P .*--layer N"):
        load(path, position=-1)
    for options in ({"layer": 4, "position": -1}, {"layer": 1, "position": 3}, {"layer": 1, "position": -4}):
        with pytest.raises(TrimtabError, match="positions -3 to -1 and layers 0 to 3"):
            load(path, **options)


def test_a_sidecar_says_where(write: Callable[..., Path], tmp_path: Path) -> None:
    path, beside = write(DIFFS[0, 0]), tmp_path / "direction_metadata.json"
    beside.write_text(json.dumps({"pos": -1, "layer": 3}))
    steering = load(path)
    assert only(steering).site == Site(2)
    assert steering.card.options["position"] == -1
    assert "input of block 3" in steering.card.options["read_at"]
    assert only(load(path, layer=1)).site == Site(1)
    for damaged in ("{", "[1]", '{"pos": -1}', '{"layer": "three"}', '{"layer": -1}'):
        beside.write_text(damaged)
        with pytest.raises(TrimtabError, match=r"direction_metadata\.json"):
            load(path)


def test_one_direction_wherever_it_acts(write: Callable[..., Path], tmp_path: Path) -> None:
    direction, card = load_direction(write(DIFFS[0, 0]))
    assert torch.equal(direction, DIFFS[0, 0])
    assert card.method == "imported"
    assert torch.equal(load_direction(write(DIFFS, "mean_diffs"), layer=0, position=1)[0], DIFFS[1, 0])
    layers = write(DIFFS[0], "layers")
    assert torch.equal(load_direction(layers, layer=3)[0], DIFFS[0, 3])
    assert torch.equal(load_direction(layers, row=3)[0], DIFFS[0, 3])
    with pytest.raises(TrimtabError, match=r"several directions, 4 rows; pass --row R"):
        load_direction(layers)
    with pytest.raises(TrimtabError, match="no layer 9; layers are numbered from 0 to 3"):
        load_direction(layers, layer=9)


def test_one_direction_of_our_own(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    edits = (Edit(Site(1), Add(DIFFS[0, 0])), Edit(Site(2), Add(DIFFS[0, 1])))
    Steering(edits, Card("caa", options={"norm": "raw"})).save(path)
    direction, card = load_direction(path, layer=2)
    assert torch.equal(direction, DIFFS[0, 1])
    assert (card.method, card.options) == ("caa", {"norm": "raw"})
    with pytest.raises(TrimtabError, match=r"layers 1, 2"):
        load_direction(path)


def test_numpy_files_that_are_none(tmp_path: Path) -> None:
    """No pickle is opened, and a header isn't believed."""
    path = tmp_path / "layer_1.npy"
    np.save(path, np.ones(WIDTH))
    whole = path.read_bytes()
    for damaged in (whole[:-8], whole[:40], whole.replace(b"(6,)", b"(9,)"), whole.replace(b"'<f8'", b"'<zz'")):
        path.write_bytes(damaged)
        with pytest.raises(TrimtabError, match="damaged"):
            load(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(TrimtabError, match="damaged, or isn't an array"):
        load(path)
    np.save(path, np.arange(WIDTH))
    with pytest.raises(TrimtabError, match="int64"):
        load(path)
    path.write_bytes(pickle.dumps(np.ones(3)))
    with pytest.raises(TrimtabError, match="pickle"):
        load(path)
    np.save(path, np.ones(WIDTH, dtype=">f4"))
    assert only(load(path)).operation.direction.dtype == torch.float32


def test_ours_is_still_ours(tmp_path: Path) -> None:
    """A damaged file of trimtab's isn't taken for another program's."""
    path = tmp_path / "s.safetensors"
    save(Steering((Edit(Site(1), Ablate(DIFFS[0, 0] / DIFFS[0, 0].norm())),)), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrimtabError, match="cut short or damaged"):
        load(path)
