"""Prompts over two engines by Ray Data, on a cluster that is started for it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from test_processes import run


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="Ray isn't installed in this environment")
def test_two_engines_say_what_one_says(tmp_path: Path) -> None:
    body = """
from trimtab.engines.vllm.on_ray import RayEngines
said, asked = [], PROMPTS[:8]
engines = RayEngines(None, 2, OPTIONS)
over_two = engines.generate(asked, added(1), max_new_tokens=8, batch_size=2, progress=lambda *n: said.append(n))
print("progress", said == [(i, 8) for i in range(1, 9)])
lm = LM.load(dtype="float32")
wanted = lm.generate(asked, added(1), max_new_tokens=8)
print("same", sum(a.token_ids == b.token_ids for a, b in zip(over_two, wanted)))
print("edits", all(len(a.applied.edits) == 3 for a in over_two))
import ray
ray.shutdown()
"""
    out = run(tmp_path, body)
    assert "progress True" in out
    assert "same 8" in out or "same 7" in out
    assert "edits True" in out
