"""The page on the file format: what is written is what it says, read with safetensors and json alone."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from trimtab import Add, Card, Edit, Positions, Site, Steering, Threshold, save
from trimtab.files.steering_file import FORMAT, MEANING_FORMAT
from trimtab.steering import (
    Ablate,
    AddScaled,
    BiasScores,
    HoldElements,
    MaskNeurons,
    ReadWrite,
    Rotate,
    RotateInPlane,
    RotatePredicted,
    RouteExperts,
    ScaleElements,
    ScaleKeys,
    ScaleScores,
    SetProjection,
    TargetMass,
)
from trimtab.steering.attention import SCORE_NAMES, SCORE_OPERATIONS
from trimtab.steering.card import Adapter, ModelId
from trimtab.steering.gates import MEASURES, Gate
from trimtab.steering.operations import NAMES, OPERATIONS
from trimtab.steering.rotations import weight_count

PAGE = (Path(__file__).parents[2] / "docs/file-format.md").read_text(encoding="utf-8")
WIDTH = 4
UNIT, OTHER = torch.eye(WIDTH)[:2]
TENSORS = torch.arange(2.0 * WIDTH).view(2, WIDTH)
MODEL = ModelId("m", None, "llama", WIDTH, 30, "f", "t", (Adapter("a", "d"),), "b")
CARD = Card("caa", MODEL, "d", {"größe": 1}, {"gain": 0.5}, {"torch": "2"}, (Card(),), {"mean": 0.1}, {"version": 1})
OPERATIONS_HERE = [
    Add(UNIT.double(), keep_norm=0.5),
    AddScaled(UNIT),
    SetProjection(UNIT, 2.0),
    Ablate(UNIT),
    ReadWrite(TENSORS, TENSORS, low=0.0),
    Rotate(UNIT, 0.5),
    RotateInPlane(UNIT, OTHER, 0.5),
    RotatePredicted(UNIT, torch.ones(weight_count(WIDTH))),
    ScaleElements(UNIT),
    HoldElements(UNIT),
    MaskNeurons(UNIT),
    RouteExperts(UNIT),
    ScaleKeys(),
    ScaleScores(),
    BiasScores(1.0, (0, 2)),
    TargetMass(),
]
SITES = {"router": RouteExperts, "keys": ScaleKeys, "scores": (ScaleScores, BiasScores, TargetMass)}


def section(heading: str) -> str:
    (text,) = re.findall(rf"(?ms)^#+ {heading}\n(.*?)(?=^#|\Z)", PAGE)
    return text


def listed(heading: str) -> set[str]:
    """The fields in the first column of a section's table."""
    rows = re.findall(r"(?m)^\| (`.*?) \|", section(heading))
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def site(operation: Any, layer: int) -> Site:
    kinds = [kind for kind, classes in SITES.items() if isinstance(operation, classes)]
    return Site(layer, *kinds)


def saved(steering: Steering, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file has, as the page reads it."""
    save(steering, folder / "s.safetensors")
    with safe_open(folder / "s.safetensors", framework="numpy") as file:
        assert set(file.metadata()) == {"trimtab"}
        header = json.loads(file.metadata()["trimtab"])
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it isn't iterable)


def every_operation(**more: Any) -> Steering:
    edits = [Edit(site(operation, layer), operation, **more) for layer, operation in enumerate(OPERATIONS_HERE)]
    return Steering(tuple(edits), CARD)


def gates() -> list[Gate]:
    plain = Threshold(Site(1), UNIT, 0.5)
    full = Threshold(Site(1), UNIT, 0.5, "probability", positions=Positions.prompt(), pool="unit-mean", bias=1.0)
    return [plain, full, Threshold(Site(1), OTHER, 0.5, each_token=True), ~plain & full, plain | ~(full & plain)]


def conditions(gate: Any) -> Iterator[dict[str, Any]]:
    if isinstance(gate, dict) and "site" in gate:
        yield gate
    elif isinstance(gate, dict):
        for parts in gate.values():
            for part in parts if isinstance(parts, list) else [parts]:
                yield from conditions(part)


def test_the_program_reads_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    digest = save(every_operation(strength=1 / 3, gate=gates()[3]), "shout.safetensors")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/file-format.md", "exec"), names)
    assert names["digest"] == names["computed"].hexdigest() == digest
    assert "{'kind': 'residual', 'layer': 0} add 0.3333333333333333\n" in capsys.readouterr().out


def test_the_digest_of_the_text_as_it_stands(tmp_path: Path) -> None:
    digest = save(every_operation(), tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", framework="numpy") as file:
        text = file.metadata()["trimtab"]
        computed = hashlib.sha256(re.sub(r'"digest":"\w+","edits":\[', '"edits":[', text).encode())
        for name in sorted(file.keys()):
            values = file.get_tensor(name)
            computed.update(f"{name} torch.{values.dtype} {list(values.shape)}".encode() + values.tobytes())
    assert computed.hexdigest() == digest
    assert text == json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def test_the_fields_of_the_header_the_card_and_the_model(tmp_path: Path) -> None:
    header, _ = saved(every_operation(), tmp_path)
    assert set(header) == listed("The header")
    assert set(header["edits"][0]) == listed("An edit")
    assert set(header["edits"][0]["site"]) == {"layer", "kind"}
    assert set(header["card"]) == listed("The card")
    assert set(header["card"]["model"]) == listed("The model")
    assert header["card"]["model"]["adapters"] == [{"name": "a", "digest": "d"}]
    bare, _ = saved(Steering((Edit(Site(0), Add(UNIT)),), Card(model=ModelId("m", None, "f", 4, 2, "p"))), tmp_path)
    assert f'"{bare["layer_convention"]}"' in section("The header")
    for heading, fields in (("The card", bare["card"]), ("The model", bare["card"]["model"])):
        optional = set(re.findall(r"(?m)^\| `(\w+)` \| optional:", section(heading)))
        assert set(fields) == listed(heading) - optional


def test_the_settings_of_every_operation(tmp_path: Path) -> None:
    header, tensors = saved(every_operation(), tmp_path)
    written = {edit["operation"].pop("name"): edit["operation"] for edit in header["edits"]}
    ours = {name for name, operation in OPERATIONS.items() if operation.__module__.startswith("trimtab.")}
    assert set(written) == ours | set(SCORE_OPERATIONS)
    rows = re.findall(r"(?m)^\| `(\w+)` \| `(\w+)` \| (.*) \|$", section("Operations"))
    classes = {**{name: operation for operation, name in NAMES.items()}, **SCORE_OPERATIONS}
    assert {name: kind for name, kind, _ in rows} == {name: classes[name].__name__ for name in written}
    assert set(SCORE_NAMES.values()) <= set(written)
    for name, _, settings in rows:
        assert set(re.findall(r"`(\w+)`", settings)) == set(written[name]), name
        for setting, value in written[name].items():
            if isinstance(value, dict):
                assert re.search(rf"tensors? .*`{setting}`|`{setting}`.*: tensors", settings), (name, setting)
                assert value["tensor"] in tensors


def test_the_fields_of_gates(tmp_path: Path) -> None:
    written = [saved(every_operation(gate=gate), tmp_path)[0]["edits"][0]["gate"] for gate in gates()]
    found_fields = [set(condition) for gate in written for condition in conditions(gate)]
    optional = set(re.findall(r"(?m)^\| `(\w+)` \| optional:", section("Gates")))
    assert set.union(*found_fields) == listed("Gates")
    assert set.intersection(*found_fields) == listed("Gates") - optional
    assert set(written[3]) == {"all"}
    assert set(written[4]) == {"any"}
    assert set(written[3]["all"][0]) == {"not"}
    assert saved(every_operation(), tmp_path)[0]["edits"][0]["gate"] == "always"
    assert all(f"`{measure}`" in section("Gates") for measure in MEASURES)


def test_positions_and_versions(tmp_path: Path) -> None:
    def of(positions: Positions) -> tuple[int, Any]:
        header, _ = saved(Steering((Edit(Site(0), Add(UNIT), positions),)), tmp_path)
        return header["format"], header["edits"][0]["positions"]

    version, written = of(Positions.from_last_prompt_token())
    assert version == FORMAT == 1
    assert f"`{json.dumps(written)}` is the last prompt token" in section("Positions")
    thinking, prompt = Positions.thinking(), Positions.prompt()
    fields: set[str] = set()
    for rule in (thinking, thinking | prompt, thinking & prompt, ~thinking):
        version, written = of(rule)
        assert version == MEANING_FORMAT == 2
        fields |= set(written)
    assert fields == listed("Positions")


def test_the_names_of_tensors(tmp_path: Path) -> None:
    for steering, expected in (
        (Steering((Edit(Site(3), Add(UNIT)), Edit(Site(5), Add(UNIT)))), {"direction.3", "direction.5"}),
        (Steering((Edit(Site(3), Add(UNIT)), Edit(Site(3), Add(OTHER)))), {"edit.0.direction", "edit.1.direction"}),
        (Steering((Edit(Site(3, "mlp"), Add(UNIT)),)), {"edit.0.direction"}),
        (Steering((Edit(Site(3), ReadWrite(TENSORS, TENSORS)),)), {"edit.0.read", "edit.0.write", "edit.0.bias"}),
        (Steering((Edit(Site(3), Add(UNIT), gate=gates()[0]),)), {"direction.3", "edit.0.gate"}),
        (
            Steering((Edit(Site(3), Add(UNIT), gate=gates()[3]),)),
            {"direction.3", "edit.0.gate.0.0", "edit.0.gate.1"},
        ),
    ):
        _, tensors = saved(steering, tmp_path)
        assert set(tensors) == expected
        patterns = [re.sub(r"<[Nik]>", r"[\\d.]+", name).replace("<setting>", r"\w+") for name in listed("Tensors")]
        assert all(any(re.fullmatch(pattern, name) for pattern in patterns) for name in tensors)
