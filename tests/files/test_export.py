"""Steerings written for other programs: what comes back, and what is refused."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from trimtab import (
    Ablate,
    Add,
    Card,
    Edit,
    FormatWarning,
    Positions,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
    export,
    load,
)
from trimtab.files.export import TARGETS
from trimtab.files.foreign import sum_additions
from trimtab.steering import ModelId

WIDTH = 6
MODEL = ModelId("tiny", None, "llama", WIDTH, 20, "f" * 16)


def vector(seed: int, unit: bool = False) -> torch.Tensor:
    made = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return made / made.norm() if unit else made


def adding(*layers: int, strength: float = 1.0) -> Steering:
    edits = tuple(Edit(Site(layer), Add(vector(layer)), Positions.all(), strength) for layer in layers)
    return Steering(edits, Card("caa", MODEL))


WRITTEN = [
    *((".gguf", to) for to in (None, "repeng", "easysteer")),
    *((".pt", to) for to in (None, "torch")),
    (".npz", None),
]
numbers = st.floats(-1e6, 1e6, width=32)


@st.composite
def steerings(draw):
    width = draw(st.integers(1, 40))
    layers = draw(st.lists(st.integers(1, 200), min_size=1, max_size=6))
    edits = []
    for layer in layers:
        direction = torch.from_numpy(draw(arrays.arrays(np.float32, width, elements=numbers)))
        edits.append(Edit(Site(layer), Add(direction), Positions.all(), draw(st.floats(-100, 100))))
    return Steering(tuple(edits))


@settings(max_examples=60, deadline=None)
@given(steerings(), st.sampled_from(WRITTEN))
def test_what_is_written_comes_back(steering, target):
    """To the bit in float32, for layers in any order, given twice, with any strengths."""
    suffix, to = target
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"v{suffix}"
        export(steering, path, to)
        first = path.read_bytes()
        back = load(path)
        assert sum_additions(back, "x").keys() == sum_additions(steering, "x").keys()
        for site, expected in sum_additions(steering, "x").items():
            assert torch.equal(sum_additions(back, "x")[site], expected)
        export(steering, path, to)
        if suffix != ".pt":
            assert path.read_bytes() == first


def test_what_gguf_readers_find(tmp_path):
    """The `gguf` package reads it back: names, types, hint and count."""
    path = tmp_path / "v.gguf"
    assert export(adding(1, 5, strength=2.0), path) == "llama.cpp"
    reader = gguf.GGUFReader(path)
    assert {t.name for t in reader.tensors} == {"direction.1", "direction.5"}
    for tensor in reader.tensors:
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, 2 * vector(int(tensor.name.split(".")[1])).numpy())
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "llama"
    assert fields["controlvector.layer_count"] == 2
    assert fields["controlvector.trimtab.method"] == "caa"
    export(adding(0, 5), path, "easysteer")
    assert gguf.GGUFReader(path).fields["controlvector.method"].contents() == "caa"


def test_block_0(tmp_path):
    path = tmp_path / "v.gguf"
    with pytest.warns(FormatWarning, match="block 0"):
        export(adding(0, 3), path)
    assert load(path).layers == (3,)
    with pytest.raises(TrimtabError, match="no other"):
        export(adding(0), tmp_path / "w.gguf")
    assert not (tmp_path / "w.gguf").exists()
    for to in ("repeng", "easysteer"):
        export(adding(0, 3), path, to)
        assert load(path).layers == (0, 3)


def steering_of(**more) -> Steering:
    edit = {"site": Site(3), "operation": Add(vector(1)), "positions": Positions.all(), **more}
    return Steering((Edit(**edit),))


REFUSED = {
    "can only add directions": steering_of(operation=Ablate(vector(1, unit=True))),
    "keep the activation's norm": steering_of(operation=Add(vector(1), keep_norm=True)),
    "no gates": steering_of(gate=Threshold(Site(1), vector(2), 0.5)),
    "--positions all": steering_of(positions=Positions.from_last_prompt_token()),
    "residual only": steering_of(site=Site(3, "mlp")),
    "no edits": Steering(),
}


@pytest.mark.parametrize("words", REFUSED)
@pytest.mark.parametrize("to", ["llama.cpp", "repeng", "easysteer", "lm-eval", "torch", "numpy"])
def test_what_cannot_be_carried(tmp_path, words, to):
    if to == "lm-eval" and words == "can only add directions":
        return  # it clamps, see below
    with pytest.raises(TrimtabError, match=words):
        export(REFUSED[words], tmp_path / f"v{TARGETS[to].suffix}", to)
    assert list(tmp_path.iterdir()) == []


def test_lm_eval_clamps(tmp_path):
    path = tmp_path / "v.pt"
    unit = vector(1, unit=True)
    made = (
        steering_of(operation=SetProjection(unit, 2.0))
        + steering_of(site=Site(5))
        + steering_of(site=Site(7), operation=Ablate(unit))
    )
    export(made, path)
    clamp, add, ablate = load(path).edits
    assert (clamp.site, clamp.operation.target) == (Site(3), 2.0)
    assert torch.allclose(clamp.operation.direction, unit, atol=1e-6)
    assert (add.site, type(add.operation)) == (Site(5), Add)
    assert (ablate.site, ablate.operation.target) == (Site(7), 0.0)
    hooks = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
    assert set(hooks) == {"layers.3", "layers.5", "layers.7"}
    for words, steering in {
        "wholly|whole": 0.5 * steering_of(operation=SetProjection(unit, 2.0)),
        "two-sided": steering_of(operation=SetProjection(unit, 2.0, one_sided=True)),
        "several": steering_of(operation=Ablate(unit)) + steering_of(),
        "every token": steering_of(operation=Ablate(unit), positions=Positions.generated()),
    }.items():
        with pytest.raises(UnsupportedError, match=words):
            export(steering, path)


def test_where_to(tmp_path):
    with pytest.raises(TrimtabError, match=r"\.gguf \(llama\.cpp\)"):
        export(adding(1), tmp_path / "v.bin")
    with pytest.raises(TrimtabError, match=r"'vim'; known: trimtab, llama\.cpp"):
        export(adding(1), tmp_path / "v.gguf", "vim")
    with pytest.raises(TrimtabError, match=r"named \*\.gguf"):
        export(adding(1), tmp_path / "v.pt", "repeng")
    export(adding(1), tmp_path / "v.safetensors")
    assert load(tmp_path / "v.safetensors") == adding(1)
