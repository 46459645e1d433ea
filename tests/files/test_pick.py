"""`FILE[@LAYERS][:STRENGTH]`: which file, which of its layers, how strong; and what is no such thing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trimtab import Add, Edit, Site, Steering, TrimtabError
from trimtab.files.pick import Pick, format_layers, parse_pick
from trimtab.files.steering_file import save_steering


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "s.safetensors"
    save_steering(
        Steering(tuple(Edit(Site(layer), Add(torch.full((4,), 1.0 + layer))) for layer in (3, 5, 6, 7))), path
    )
    return path


@pytest.mark.parametrize(
    ("tail", "layers", "strength"),
    [
        ("", None, 1.0),
        (":0.8", None, 0.8),
        (":-1e-1", None, -0.1),
        ("@5", (5,), 1.0),
        ("@5:0.8", (5,), 0.8),
        ("@6,3:-2", (3, 6), -2.0),
        ("@5-7", (5, 6, 7), 1.0),
        ("@3,5-7:.5", (3, 5, 6, 7), 0.5),
    ],
)
def test_what_is_written_is_what_acts(file, tail, layers, strength):
    pick = parse_pick(f"{file}{tail}")
    assert pick == Pick(file, layers, strength)
    whole = Steering.load(file)
    assert pick.load() == strength * (whole if layers is None else whole.only(layers))
    assert parse_pick(str(pick)) == pick


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        (":strong", "the strength 'strong' isn't a number"),
        (":nan", "a strength is a finite number, got nan"),
        (":0.8@5", "the layers come first: "),
        ("@", "'' isn't a list of layers; write @14, @14,15 or @10-14"),
        ("@five", "'five' isn't a list of layers"),
        ("@5,:1", "'5,' isn't a list of layers"),
        ("@-5", "'-5' isn't a list of layers"),
        ("@7-5", "write 5-7"),
        ("@5,5-6", "name a layer twice"),
        ("@0-99999999999", "more than any model has"),
    ],
)
def test_what_cant_be_meant_is_refused(file, tail, said):
    with pytest.raises(TrimtabError) as error:
        parse_pick(f"{file}{tail}")
    assert str(error.value).startswith(f"--steer {file}{tail}: ")
    assert said in str(error.value)


def test_layers_that_the_file_hasnt_are_said_with_those_it_has(file):
    with pytest.raises(TrimtabError, match=r"steer .*s\.safetensors@5-8:2: .* nothing at layer 8; it has layers 3,5-7"):
        parse_pick(f"{file}@5-8:2", "steer").load()


@pytest.mark.parametrize("text", ["none.safetensors", "none.safetensors:2", "none.safetensors@3", "none@3:2"])
def test_a_file_that_isnt_there(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TrimtabError, match=r"there is no file none(\.safetensors)?$"):
        parse_pick(text)


def test_a_file_whose_name_ends_so(tmp_path):
    for name in ("s:1.safetensors", "s:2", "s@3", "s@3:2", "me@home"):
        (tmp_path / name).write_text("x")
        assert parse_pick(str(tmp_path / name)) == Pick(tmp_path / name)
        assert parse_pick(f"{tmp_path / name}@4:-1") == Pick(Path(tmp_path / name), (4,), -1.0)


def test_layers_in_short():
    assert format_layers([14]) == "14"
    assert format_layers([14, 15]) == "14,15"
    assert format_layers([3, 10, 11, 12, 20]) == "3,10-12,20"
