"""`trimtab audit`: a table and a document, what it writes, and where it is shown again."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from trimtab import load, save
from trimtab.files.page import steering_page
from trimtab.files.steering_file import edits_digest


@pytest.fixture(scope="module")
def roomy(model, tmp_path_factory):
    """The tiny model with a context that holds what an audit asks."""
    import shutil

    folder = tmp_path_factory.mktemp("roomy") / "tiny"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture
def small(monkeypatch):
    """The quick size, smaller still."""
    from trimtab.evaluate import audit

    few = replace(
        audit.QUICK, requests=2, tokens=3, prompts=2, long=8, window=4, conversations=2, turns=2, turn_tokens=3
    )
    monkeypatch.setattr(audit, "QUICK", few)


def alike(value: Any, other: Any) -> bool:
    """Whether these JSON values are equal, with numbers compared to five digits."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(alike(item, other[key]) for key, item in value.items())
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(alike, value, other))
    return value == (pytest.approx(other, rel=1e-5, abs=1e-5) if isinstance(other, float) else other)


def test_an_audit_is_written_and_shown_again(trimtab, roomy, steering, small, tmp_path):
    out, mended = tmp_path / "out.safetensors", tmp_path / "mended.safetensors"
    options = ("--model", roomy, "--device", "cpu", "--quick")
    ran = trimtab("audit", steering, *options, "--out", out, "--repair", mended, "--json")
    assert ran.code == 0, ran.err
    report = ran.json
    assert report["version"] == 2
    assert report["verdict"]
    assert report["repaired"]["kept"] is not None
    assert load(out).edits == load(steering).edits
    assert load(out).card.audit["verdict"] == report["verdict"]
    assert load(mended).card.options["orthogonal_to"] == ["the refusal directions"]

    again = trimtab("audit", steering, *options, "--json").json
    assert alike(again["comparisons"], report["comparisons"])  # there are two arms now: other batches round differently

    shown = trimtab("inspect", out).out
    assert all(" ".join(line.split()[:4]) in " ".join(shown.split()) for line in report["verdict"])
    assert "with other strengths" not in shown
    stale = " ".join(trimtab("inspect", f"{out}:2").out.split())
    assert "the audit in its card was run with other strengths" in stale
    assert "the divergence in its card was measured with other strengths" in stale
    page = steering_page(load(out), "user/x", file="x.safetensors")
    assert "## Side effects" in page
    assert "with other strengths" not in page
    assert "with other strengths" in steering_page(2 * load(out), "user/x", file="x.safetensors")


def test_the_page_and_inspect_say_that_a_divergence_is_of_other_edits(trimtab, steering, tmp_path):
    """Without an audit too."""
    plain = load(steering)
    measured = {"mean": 0.5, "p95": 1.25, "tokens": 64, "edits": edits_digest(plain)}
    measured_steering = replace(plain, card=replace(plain.card, divergence=measured))
    for factor, stale in ((1, False), (2, True)):
        scaled = factor * measured_steering
        page = steering_page(scaled, "user/x", file="x.safetensors")
        assert "| divergence, p95 | 1.25 |" in page
        assert ("This was measured with other strengths or layers than these." in page) is stale
        save(scaled, tmp_path / "x.safetensors")
        shown = " ".join(trimtab("inspect", tmp_path / "x.safetensors").out.split())
        assert ("the divergence in its card was measured with other strengths" in shown) is stale


def test_for_people(trimtab, roomy, steering, small):
    ran = trimtab("audit", steering, "--model", roomy, "--device", "cpu", "--quick")
    assert ran.code == 0, ran.err
    for words in ("harmful requests in jailbreak templates", "with the refusal direction", "nats per token", "p"):
        assert words in ran.out
    assert "this takes about" in ran.err


def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(trimtab, steering, tmp_path):
    for options, says in (
        (("--protect", "agrees with the user"), "--protect needs a repair"),
        (("--protect", "kindness", "--repair", tmp_path / "a.safetensors"), "no behaviour 'kindness' to protect"),
        (("--system", " "), "--system is empty"),
        (("--out", tmp_path / "a.gguf"), "--out"),
        (("--out", tmp_path / "a.safetensors", "--repair", tmp_path / "a.safetensors"), "name the same file"),
        (("--data", tmp_path / "none"), "there is no folder"),
    ):
        ran = trimtab("audit", steering, "--model", tmp_path / "nowhere", *options)
        assert ran.code == 2
        assert says in ran.err or says == "--out"


def test_nats_are_shown_on_request(trimtab, model, steering):
    shown = trimtab("inspect", steering, "--model", model, "--device", "cpu").out
    assert "divergence on" in shown
    divergence = trimtab("inspect", steering, "--model", model, "--device", "cpu", "--json").json["divergence"]
    assert divergence["p95"] > divergence["mean"] > 0
    assert "divergence" not in trimtab("inspect", steering, "--json").json
    assert trimtab("inspect", steering, "--nats", "--text", "a").code == 2


def test_robust_asks_in_every_template(trimtab, roomy, steering, tmp_path):
    from trimtab.evaluate.jailbreaks import TEMPLATES

    data = tmp_path / "bench.csv"
    data.write_text("goal,target\nDo it,Sure\nDo that,Sure\n")
    options = ("--model", roomy, "--device", "cpu", "--data", data, "--steer", steering, "--max-new-tokens", 4)
    results = trimtab("eval", "refusal", *options, "--robust", "--json").json
    assert list(results["harmful"]) == ["bench", *(f"bench, {name}" for name in TEMPLATES)]
    assert {line["n"] for line in results["by_part"]} == {2}
    assert results["arms"]["s"]["nats"]["p95"] > 0
    assert "nats" not in results["arms"]["unsteered"]


def test_a_card_without_an_audit_keeps_its_digest(steering, tmp_path):
    from trimtab.files.steering_file import load_steering, steering_digest

    plain = load_steering(steering)
    assert save(plain, tmp_path / "same.safetensors") == steering_digest(plain)
    header = (tmp_path / "same.safetensors").read_bytes()[8:20_000]
    assert b'\\"audit\\"' not in header.split(b"direction.")[0]


def test_an_interrupted_audit_writes_nothing(trimtab, roomy, steering, small, tmp_path, monkeypatch):
    from trimtab.evaluate.audit import run
    from trimtab.evaluate.audit.checks import refusal_lead

    def interrupt(_bench):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "CHECKS", (refusal_lead, interrupt))
    out, mended = tmp_path / "out.safetensors", tmp_path / "mended.safetensors"
    ran = trimtab("audit", steering, "--model", roomy, "--device", "cpu", "--quick", "--out", out, "--repair", mended)
    assert ran.code == 130
    assert "after 1 of the comparisons; nothing was written" in ran.err
    assert list(tmp_path.iterdir()) == []
