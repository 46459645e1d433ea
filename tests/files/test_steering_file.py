import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from trimtab.errors import TrimtabError
from trimtab.files import steering_file
from trimtab.files.steering_file import load_steering, save_steering, steering_digest
from trimtab.steering import (
    Ablate,
    Add,
    AddScaled,
    Always,
    Card,
    Edit,
    HoldElements,
    MaskNeurons,
    ModelId,
    Positions,
    ReadWrite,
    Rotate,
    RotateInPlane,
    RotatePredicted,
    ScaleElements,
    SetProjection,
    Site,
    Steering,
    Threshold,
)
from trimtab.steering.gates import AllOf, AnyOf, Not
from trimtab.steering.rotations import weight_count

WIDTH = 6
MODEL = ModelId("tiny", "abc123", "llama", WIDTH, 4, "f" * 16, None)


def vector(seed, dtype=torch.float32, unit=False):
    made = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return made / made.norm() if unit else made


def card(**more):
    settings = {"options": {"layers": [1, 2], "größe": "ü"}, "measured": {"agreement": {"1": 0.5}}, **more}
    return Card("caa", MODEL, "d1", versions={"torch": "2"}, **settings)


def everything():
    """Every operation, gate and kind of positions in one steering."""
    dot, cosine = Threshold(Site(0), vector(1), -0.25), Threshold(Site(2), vector(2, torch.float64), 0.5, "cosine")
    gates = [Always(), dot, cosine, Not(dot), AllOf((dot, cosine)), AnyOf((cosine, dot)), ~(dot & (cosine | ~dot))]
    rules = [
        Positions.all(),
        Positions.all_but_first(),
        Positions.prompt(),
        Positions.generated(),
        Positions.last_prompt_token(),
        Positions.first_generated(3),
        Positions.window(1, 4) | Positions.span(0, 2),
    ]
    operations = [
        Add(vector(3)),
        Add(vector(4, torch.float64), keep_norm=True),
        SetProjection(vector(5, unit=True), 2.5),
        SetProjection(vector(6, unit=True), -1e-7, keep_norm=True, one_sided=True),
        Ablate(vector(7, unit=True)),
        Ablate(vector(8, torch.float64, unit=True), keep_norm=True),
        Add(torch.tensor([0.0, -0.0, 1e-45, 3e38, 1.0, -1.0])),
    ]
    strengths = [1.0, 0.0, -2.5, 1e-300, 1e30, 1 / 3, 7]
    edits = [
        Edit(Site(i % 3), operation, rule, strength, gate)
        for i, (operation, rule, strength, gate) in enumerate(zip(operations, rules, strengths, gates, strict=True))
    ]
    return Steering(tuple(edits), Card("sum", parts=(card(), Card("sum", parts=(card(), Card())))))


def simple(card_=None):
    return Steering((Edit(Site(3), Add(vector(9))), Edit(Site(11), Add(vector(10)))), card_ or card())


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "s.safetensors"
    save_steering(simple(), path)
    return path


@pytest.mark.parametrize("make", [everything, simple])
def test_round_trip(tmp_path, make):
    path = tmp_path / "s.safetensors"
    digest = save_steering(make(), path)
    loaded = load_steering(path)
    assert loaded == make()
    assert loaded.card == make().card
    assert digest == steering_digest(make()) == steering_digest(loaded)
    first = path.read_bytes()
    save_steering(loaded, path)
    assert path.read_bytes() == first


def test_a_file_from_before_projections_had_a_side(tmp_path):
    """Such files have no `one_sided`, and read as they were written: both ways."""
    made = Steering((Edit(Site(3), SetProjection(vector(9, unit=True), 1.5)),), card())
    path = tmp_path / "s.safetensors"
    save_steering(made, path)
    tensors, kept = load_file(path), {}
    header = steering_file._header(made, kept)
    del header["edits"][0]["operation"]["one_sided"]
    header["digest"] = steering_file._digest(header, tensors)
    path.write_bytes(save(tensors, metadata={"trimtab": json.dumps(header)}))
    assert load_steering(path) == made
    assert load_steering(path).edits[0].operation.one_sided is False


def test_the_digest_covers_edits_and_card():
    other = Steering((simple().edits[0], Edit(Site(11), Add(vector(10)), strength=1.5)), card())
    assert len({steering_digest(s) for s in (simple(), simple(Card()), other)}) == 3


def test_tensor_names(tmp_path):
    for make, names in (
        (simple, {"direction.3", "direction.11"}),
        (everything, {f"edit.{i}.direction" for i in range(7)}),
    ):
        save_steering(make(), tmp_path / "s.safetensors")
        tensors = load_file(tmp_path / "s.safetensors")
        assert {name for name in tensors if "gate" not in name} == names


@pytest.mark.slow
def test_the_same_bytes_in_every_process(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); from test_steering_file import *;"
        " save_steering(everything(), sys.argv[2])"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path / "there.safetensors")]
    other = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    assert subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": other}).returncode == 0
    save_steering(everything(), tmp_path / "here.safetensors")
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


# ---- what is refused ---------------------------------------------------------------------------------------


def refused(path, *words):
    with pytest.raises(TrimtabError) as caught:
        load_steering(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_truncated_anywhere(saved):
    data = saved.read_bytes()
    for size in {*range(0, len(data), 17), *range(12), len(data) - 1}:
        saved.write_bytes(data[:size])
        refused(saved)


@pytest.mark.parametrize("flip", [0xFF, 0x01, 0x20])
def test_a_changed_byte_anywhere(saved, flip):
    data = saved.read_bytes()
    for place in range(0, len(data), 1 if flip == 0xFF else 7):
        saved.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
        refused(saved)


def test_appended_bytes(saved):
    saved.write_bytes(saved.read_bytes() + b"\0" * 8)
    refused(saved)


def test_headers_of_every_size_are_read(tmp_path):
    """A header's size comes first in the file, and may look like the beginning of a pickle or of a zip."""
    path, begins = tmp_path / "s.safetensors", set()
    for text in (*("x" * n for n in range(0, 272, 8)), "x" * (0x4B50 - 1000), "x" * (0x4B50 - 500)):
        made = simple(card(options={"note": text}))
        save_steering(made, path)
        begins.add(path.read_bytes()[:1])
        assert load_steering(path) == made
    assert b"\x80" in begins
    pad = 0x4B50 - int.from_bytes(path.read_bytes()[:8], "little") + 0x4B50 - 500
    save_steering(simple(card(options={"note": "x" * pad})), path)
    assert path.read_bytes()[:2] == b"PK"
    assert load_steering(path).edits == simple().edits


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("how", ["pickle", "pickle 0", "torch", "torch legacy"])
def test_a_pickle_is_never_opened(tmp_path, how):
    path, sprung = tmp_path / "s.safetensors", tmp_path / "sprung"
    trap = {"direction.1": Trap(sprung)}
    with path.open("wb") as stream:
        if how.startswith("torch"):
            torch.save(trap, stream, _use_new_zipfile_serialization=how == "torch")
        else:
            pickle.dump(trap, stream, protocol=0 if how == "pickle 0" else None)
    refused(path, *(["pickle"] if how != "pickle 0" else []))
    assert not sprung.exists()
    with path.open("rb") as stream:  # and the trap does work
        torch.load(stream, weights_only=False) if how.startswith("torch") else pickle.load(stream)
    assert sprung.exists()


def test_a_foreign_safetensors(tmp_path):
    path = tmp_path / "s.safetensors"
    save_file({"direction.1": vector(1)}, path)
    refused(path, "not a trimtab steering")
    save_file({"direction.1": vector(1)}, path, metadata={"format": "pt"})
    refused(path, "not a trimtab steering")


def test_other_files(tmp_path):
    path = tmp_path / "s.safetensors"
    refused(path, "there is no file")
    for content in (b"", b"{}", b"GGUF\3\0\0\0" + bytes(64), b"\xff" * 64, (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(content)
        refused(path)
    path.unlink()
    path.mkdir()
    refused(path, "can't read")


def craft(path, change=lambda header: None, tensors=None, seal=True):
    """A file whose digest is right, whatever is in it."""
    kept = {}
    header = steering_file._header(simple(), kept)
    kept |= tensors or {}
    change(header)
    if seal:
        header["digest"] = steering_file._digest(header, kept)
    path.write_bytes(save(kept, metadata={"trimtab": json.dumps(header)}))
    return path


def test_a_newer_format(tmp_path):
    path = craft(tmp_path / "s.safetensors", lambda header: header.update(format=3))
    refused(path, "format 3", "update trimtab")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_direction_that_is_not_finite(tmp_path, value):
    bad = vector(9)
    bad[2] = value
    refused(craft(tmp_path / "s.safetensors", tensors={"direction.3": bad}), "NaN", "1 value")


CRAFTED = {
    "unknown operation": lambda h: h["edits"][0]["operation"].update(name="explode"),
    "unknown setting": lambda h: h["edits"][0]["operation"].update(boom=1),
    "missing tensor": lambda h: h["edits"][0]["operation"].update(direction="direction.99"),
    "no strength": lambda h: h["edits"][0].pop("strength"),
    "text for a strength": lambda h: h["edits"][0].update(strength="1"),
    "negative layer": lambda h: h["edits"][0].update(site={"layer": -1, "kind": "residual"}),
    "unknown site": lambda h: h["edits"][0].update(site={"layer": 1, "kind": "somewhere"}),
    "unknown gate": lambda h: h["edits"][0].update(gate="never"),
    "odd positions": lambda h: h["edits"][0].update(positions=[["middle", 0, None, None]]),
    "edits as text": lambda h: h.update(edits="add"),
    "no card": lambda h: h.pop("card"),
    "odd card": lambda h: h.update(card=[]),
}


@pytest.mark.parametrize("case", CRAFTED)
def test_a_header_that_makes_no_sense(tmp_path, case):
    refused(craft(tmp_path / "s.safetensors", CRAFTED[case]))


def test_numbers_that_are_not_finite_in_the_header(tmp_path):
    path = craft(tmp_path / "s.safetensors", lambda h: h["edits"][0].update(strength=float("nan")), seal=False)
    refused(path, "isn't a valid steering")


def test_odd_tensors(tmp_path):
    for odd in (vector(1).half().reshape(2, 3), torch.arange(WIDTH), torch.tensor(1.0), torch.zeros(0, WIDTH)):
        if odd.dim() == 0:
            path = craft(tmp_path / "s.safetensors", seal=False)
            kept = {"direction.3": odd, "direction.11": vector(1)}
            path.write_bytes(save(kept, metadata={"trimtab": json.dumps({"format": 1, "edits": [], "card": {}})}))
        else:
            path = craft(tmp_path / "s.safetensors", tensors={"direction.3": odd})
        refused(path)


# ---- what can't be saved -----------------------------------------------------------------------------------


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "s.safetensors"
    with pytest.raises(TrimtabError, match=r"\.safetensors"):
        save_steering(simple(), tmp_path / "s.pt")
    with pytest.raises(TrimtabError, match="no edits"):
        save_steering(Steering(), path)
    with pytest.raises(TrimtabError, match="finite"):
        save_steering(simple(card(measured={"x": float("nan")})), path)
    with pytest.raises(TrimtabError, match="finite"):
        save_steering(simple(card(options={"x": vector(1)})), path)
    with pytest.raises(TrimtabError, match="folder must exist"):
        save_steering(simple(), tmp_path / "nowhere" / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_files_keep_their_digests():
    """A steering of every operation with round numbers: the digests that its files have had since it was there."""
    u, v = torch.eye(6)[0], torch.eye(6)[1]
    older = [
        Add(2 * u),
        SetProjection(u, 1.5, one_sided=True),
        Ablate(u, keep_norm=True),
        Rotate(u, 0.25),
        Rotate(u),
        RotatePredicted(u, torch.ones(weight_count(6))),
        AddScaled(u, by="sign", keep_norm=True),
        ScaleElements(u),
        MaskNeurons(u),
        HoldElements(u),
    ]
    newer = [ReadWrite(u[None], v[None], 1.0, low=0.0, keep_norm=0.5), RotateInPlane(u, v, 0.25)]
    steerings = [
        Steering(tuple(Edit(Site(i), operation) for i, operation in enumerate(some))) for some in (older, newer)
    ]
    assert [steering_digest(steering)[:16] for steering in steerings] == ["674861301e4e6058", "59af4999706e9444"]
