"""Divergences and audits by command on the engine llamacpp: the same figures as on transformers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf_models import write_llama

from trimtab import LM, Add, Card, Edit, Positions, Site, Steering, save

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("needs trimtab[llamacpp]", allow_module_level=True)


@pytest.fixture(scope="module")
def roomy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a context that is long enough for an audit."""
    folder = tmp_path_factory.mktemp("roomy") / "tiny"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return folder


@pytest.fixture(scope="module")
def engines(roomy: Path) -> dict[str, tuple[object, ...]]:
    """The options of each engine that load the same weights."""
    file = write_llama(roomy, roomy.parent / "tiny.gguf")
    return {
        "transformers": ("--model", roomy, "--device", "cpu", "--dtype", "float32"),
        "llamacpp": ("--model", file, "--engine", "llamacpp"),
    }


@pytest.fixture(autouse=True)
def same_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The KV cache is float32, as that of transformers is, so that all figures can be compared."""
    from trimtab.engines.llamacpp import context

    monkeypatch.setitem(context.CACHES, "float16", context.F32)


@pytest.fixture(scope="module")
def push(roomy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pushes") / "push.safetensors"
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    card = Card("planted", model=LM.load(roomy, device="cpu").identity)
    save(Steering((Edit(Site(2), Add(vector), Positions.all()),), card), path)
    return path


def test_inspect_generate_and_eval_have_the_same_nats(trimtab, engines, push, tmp_path):
    inspected, scaled, evaluated = {}, {}, {}
    data = tmp_path / "ab.jsonl"
    questions = [
        {"question": f"{ask}\n\nChoices:\n (A) Yes\n (B) No", "answer_matching_behavior": "(A)",
         "answer_not_matching_behavior": "(B)"}
        for ask in ("Is it blue?", "Is it wide?", "Who is it?", "Why?")
    ]  # fmt: skip
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    for engine, options in engines.items():
        inspected[engine] = trimtab("inspect", push, "--nats", *options, "--json").json["divergence"]
        prompts = ("--prompt", "Why?", "--max-new-tokens", 4)
        ran = trimtab("generate", "--steer", push, "--nats", 0.3, *prompts, *options, "--json")
        assert ran.code == 0, ran.err
        scaled[engine] = ran.json["divergence"]
        ran = trimtab("eval", "ab", "--data", data, "--steer", push, *options, "--json")
        assert ran.code == 0, ran.err
        evaluated[engine] = ran.json["arms"]["push"]["nats"]
    for name in ("mean", "p95"):
        assert inspected["llamacpp"][name] == pytest.approx(inspected["transformers"][name], rel=0.02)
        assert evaluated["llamacpp"][name] == pytest.approx(evaluated["transformers"][name], rel=0.02)
    assert scaled["llamacpp"]["p95"] == pytest.approx(0.3, rel=0.02)
    assert scaled["llamacpp"]["factor"] == pytest.approx(scaled["transformers"]["factor"], rel=0.05)


@pytest.mark.long  # two audits
def test_an_audit_runs_there(trimtab, engines, push, monkeypatch):
    from trimtab.evaluate import audit

    few = replace(
        audit.QUICK, requests=2, tokens=3, prompts=2, long=8, window=4, conversations=2, turns=2, turn_tokens=3
    )
    monkeypatch.setattr(audit, "QUICK", few)
    reports = {}
    for engine, options in engines.items():
        ran = trimtab("audit", push, "--quick", *options, "--json")
        assert ran.code == 0, ran.err
        reports[engine] = ran.json
    ours, theirs = reports["llamacpp"], reports["transformers"]
    assert ours["nats"]["p95"] == pytest.approx(theirs["nats"]["p95"], rel=0.02)
    assert ours["dose"] == pytest.approx(theirs["dose"], rel=0.02)
    names = [[comparison["name"] for comparison in report["comparisons"]] for report in (ours, theirs)]
    assert names[0] == names[1]
