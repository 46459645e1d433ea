"""`trimtab inspect` with a text, with pairs, and with two files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.text.answers import ReadAt

PNG = b"\x89PNG\r\n"
TEXT = "The sea is wide. <b>"


@pytest.fixture
def look(trimtab: Any, model: Path, steering: Path) -> Any:
    return lambda *arguments: trimtab("inspect", steering, "--model", model, "--device", "cpu", *arguments)


def test_a_text_in_colour(look: Any, tmp_path: Path) -> None:
    page, plot = tmp_path / "t.html", tmp_path / "t.png"
    ran = look("--text", TEXT, "--html", page, "--plot", plot)
    assert ran.code == 0
    assert "layer 1" in ran.out
    assert "layer 2" in ran.out
    assert TEXT in ran.out
    assert plot.read_bytes().startswith(PNG)
    assert page.read_text().count('<p class="text">') == 2
    shown = look("--text", TEXT, "--layer", "2")
    assert "layer 1" not in shown.out


def test_its_numbers(look: Any, model: Path, steering: Path) -> None:
    import torch

    from trimtab import LM, Positions, load

    document = look("--text", TEXT, "--json").json
    assert "".join(document["tokens"]) == TEXT
    lm, loaded = LM.load(model, device="cpu"), load(steering)
    (read,) = lm.capture(TEXT, [1, 2], Positions.all(), chat=False)
    for layer, edit in zip(document["layers"], loaded.edits, strict=True):
        assert layer["layer"] == edit.site.layer
        expected = torch.cosine_similarity(read[edit.site].double(), edit.operation.direction.double()[None], dim=-1)
        assert layer["cosines"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_pairs_in_their_plane(look: Any, tmp_path: Path) -> None:
    pairs, plot = tmp_path / "pairs.json", tmp_path / "p.png"
    rows = [
        {
            "question": f"Is it {word}?\n (A) yes\n (B) no",
            "answer_matching_behavior": "(A)" if i % 2 else "(B)",
            "answer_not_matching_behavior": "(B)" if i % 2 else "(A)",
        }
        for i, word in enumerate(("blue", "wide", "a sea", "an answer"))
    ]
    pairs.write_text(json.dumps(rows))
    document = look("--pairs", pairs, "--plot", plot, "--json").json
    assert plot.read_bytes().startswith(PNG)
    assert document["drawn"] == 4
    assert [layer["layer"] for layer in document["layers"]] == [1, 2]
    assert all(1 >= layer["variance"][0] >= layer["variance"][1] >= 0 for layer in document["layers"])
    pairs.write_text(json.dumps(rows[:1]))
    assert "a plane needs at least two" in look("--pairs", pairs, "--plot", plot).err


def test_the_plane_is_read_as_the_file_was_learned(
    trimtab: Any, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    import trimtab.methods.caa as module

    read: list[Any] = []
    original = module.activations
    monkeypatch.setattr(module, "activations", lambda *of, **how: read.append(how["read_at"]) or original(*of, **how))
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "s.safetensors"
    words = ("blue", "wide")
    rows = [{"prompt": f"Why {word}?", "positive": f"yes {word}", "negative": f"no {word} so"} for word in words]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for how, expected in (((), None), (("--read-at", "answer"), ReadAt("answer"))):
        options = ("--pairs", pairs, "--out", out, "--model", model, "--device", "cpu", "--layers", "1")
        assert trimtab("learn", "caa", *options, *how).code == 0
        ran = trimtab("inspect", out, "--model", model, "--pairs", pairs, "--plot", tmp_path / "p.png")
        assert ran.code == 0, ran.err
        assert read.pop() == expected


def test_two_files(trimtab: Any, steering: Path, tmp_path: Path) -> None:
    from trimtab import Add, Edit, Site, Steering, load, save

    other, plot = tmp_path / "other.safetensors", tmp_path / "two.png"
    (edit,) = load(steering).only([2]).edits  # learned as a projection; the other adds it, turned round
    save(Steering((Edit(Site(2), Add(-3.0 * edit.operation.direction)),)), other)
    ran = trimtab("inspect", steering, other, "--plot", plot)
    assert ran.code == 0
    assert "-1.000" in ran.out
    assert plot.read_bytes().startswith(PNG)
    document = trimtab("inspect", steering, steering, "--json").json
    assert document["layers"] == document["across"] == [1, 2]
    assert document["cosines"][0][0] == pytest.approx(1)
    assert document["cosines"][0][1] == pytest.approx(document["cosines"][1][0])


def test_bad_input(look: Any, trimtab: Any, steering: Path, stranger: Path, wide: Path, tmp_path: Path) -> None:
    def refused(ran: Any, *says: str) -> None:
        assert ran.code == 2
        assert len(ran.err.strip().splitlines()) == 1
        assert all(words in ran.err for words in says), ran.err

    refused(look("--text", ""), "the text is empty")
    refused(look("--text", "sea", "--layer", "3"), "nothing at layer 3", "1, 2")
    refused(look("--text", "sea", "--html", tmp_path / "t.txt"), "*.html")
    refused(look("--text", "sea", "--pairs", tmp_path / "p.json", "--plot", tmp_path / "p.png"), "one at a time")
    refused(look("--pairs", tmp_path / "p.json"), "--plot FILE.png")
    refused(look("--pairs", tmp_path / "p.json", "--plot", tmp_path / "p.png"), "p.json")
    refused(look("--layer", "1"), "--layer needs")
    refused(look("--html", tmp_path / "t.html"), "--text TEXT")
    refused(look(steering, "--text", "sea"), "one file")
    refused(look(steering, steering), "not 3")
    refused(trimtab("inspect", steering, "--model", stranger, "--text", "sea"), "different weights", "allow transfer")
    assert trimtab("inspect", steering, "--model", stranger, "--text", "sea", "--transfer").code == 0
    refused(trimtab("inspect", steering, "--model", wide, "--text", "sea", "--transfer"), "width")
