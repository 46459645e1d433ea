"""Two workers: the blocks in two stages (pipeline), and each block in two halves (tensor parallelism).

The default model's nine attention heads can't be halved, so it is a small random model of four.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import small_model
from test_processes import run

COMPARED = """
import re
from trimtab import Edit, Positions, SetProjection, Site, Steering
from cases import direction
everywhere = Positions.prompt()
projected = Edit(Site(READ[1]), SetProjection(direction(4), 20.0), Positions.span(2, 7))
both = added(1, 6.0, layers=READ) + Steering((projected,))
lm = LM.load(NAME, engine="vllm", **OPTIONS | PARALLEL)
if "inside" in globals():
    both = both + inside
    print("refused", re.search("heads are split", lm.supports(refused)).group())
print("here", [hello["here"] for hello in lm._rpc("trimtab_hello")])
rows = [None, both, None, 2 * both]
ours = lm.generate(PROMPTS[:4], rows, max_new_tokens=12)
again = lm.generate(PROMPTS[:4], [None] * 4, max_new_tokens=12)
print("unsteered", [ours[i].token_ids == again[i].token_ids for i in (0, 2)])
print("steered", [ours[i].token_ids != again[i].token_ids for i in (1, 3)])
read = lm.capture(PROMPTS[5], READ, everywhere, steering=both)[0]
plain = LM.load(NAME, dtype="float32")
print("the same model", lm.identity == plain.identity)
with plain.steered(both):
    wanted = plain.capture(PROMPTS[5], READ, everywhere)[0]
for site, there in wanted.items():
    assert float((read[site] - there).norm() / there.norm()) < 1e-4, site
print("the same activations")
lm.close()
"""
SPLIT = """
from trimtab import Ablate, Add, Edit, Positions, Site, Steering
from cases import direction
HEADS, WIDE = Site(1, "heads"), 256
inside = Steering((
    Edit(HEADS, Add(direction(5)[:WIDE]), Positions.prompt()),
    Edit(Site(2, "mlp"), Ablate(direction(6)), Positions.prompt()),
))
refused = Steering((Edit(HEADS, Ablate(direction(6)[:WIDE] / direction(6)[:WIDE].norm()), Positions.prompt()),))
"""
SAID = ("unsteered [True, True]", "steered [True, True]", "the same model True", "the same activations")


def test_stages(tmp_path: Path) -> None:
    """Compiled: on a CPU, vLLM makes what a stage receives its input in only when it warms up a compiled model."""
    settings = "READ, PARALLEL = [0, 1, 3], {'pipeline_parallel_size': 2, 'enforce_eager': False}"
    out = run(tmp_path, f"NAME = {small_model(tmp_path / 'model')!r}\n{settings}{COMPARED}")
    assert "here [[0, 1], [2, 3]]" in out
    assert all(line in out for line in SAID), out


def test_halves(tmp_path: Path) -> None:
    settings = "READ, PARALLEL = [0, 1, 3], {'tensor_parallel_size': 2}"
    out = run(
        tmp_path, f"NAME = {small_model(tmp_path / 'model')!r}\n{settings}{SPLIT}{COMPARED}", TRIMTAB_SITES="heads,mlp"
    )
    assert f"here {[list(range(4))] * 2}" in out
    assert "refused heads are split" in out
    assert all(line in out for line in SAID), out


@pytest.mark.long
def test_keys_over_two_workers(tmp_path: Path) -> None:
    """Each has some of the key heads: their scores are scaled together, and the whole key is nobody's to project."""
    body = f"""
import torch
from cases import LONG
from trimtab import Ablate, Edit, ScaleScores, Site, Steering, by_keys
from trimtab.steering import emphasis
name = {small_model(tmp_path / "model")!r}
ours = LM.load(name, engine="vllm", **OPTIONS | {{"tensor_parallel_size": 2, "block_size": 32}})
theirs = LM.load(name, dtype="float32")
width = ours._link.inside["keys"]
print("here", sorted(ours._link.split), width)
unit = torch.ones(width) / width**0.5
print("refused", ours.supports(Steering((Edit(Site(1, "keys"), Ablate(unit)),))))
heeded = emphasis(ScaleScores(1.5), [(3, 12), (40, 50)], range(4))
prompts, rows = [LONG, LONG, PROMPTS[5]], [heeded, None, emphasis(ScaleScores(2.0), [(2, 6)], range(4))]
asked = dict(max_new_tokens=6, min_new_tokens=6, logprobs=True, chat=False)
worst = []
for order in ((0, 1, 2), (1, 0), (0, 1)):
    found = ours.generate([prompts[i] for i in order], [rows[i] for i in order], **asked)
    wanted = theirs.generate([prompts[i] for i in order], [rows[i] and by_keys(rows[i]) for i in order], **asked)
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    worst += [abs(a - b) for x, y in zip(found, wanted) for a, b in zip(x.logprobs, y.logprobs)]
print("off", max(worst))
ours.close()
"""
    said = run(tmp_path, body, TRIMTAB_SITES="keys")
    assert "here ['keys'] 128" in said
    assert "keys are split over tensor-parallel workers" in said
    assert float(said.split("off ")[1].split()[0]) < 2e-4, said
