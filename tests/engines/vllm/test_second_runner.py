"""vLLM's second model runner, its default on GPUs: here on a CPU, where Triton's interpreter runs its kernels.

vLLM takes that runner only where Triton has a backend, and there is none for CPUs. So the engine's process is told of
one, which the interpreter makes needless.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import TINY, small_model
from test_processes import run

pytestmark = pytest.mark.long

INTERPRETED = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
BODY = """
from types import SimpleNamespace
import triton.backends
triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

import torch
from cases import LONG, direction
from trimtab import Ablate, Add, Edit, Positions, ScaleScores, SetProjection, Site, Steering, by_keys
from trimtab.steering import emphasis

options = {options!r}
name = options.pop("model")
ours, theirs = LM.load(name, engine="vllm", **options), LM.load(name, dtype="float32")
runner = ours._engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
print("runner", type(runner).__mro__[1].__module__)
(hello,) = ours._rpc("trimtab_hello")
print("static", hello["static"], "heard", hello["reasons"], hello["unfired"], hello["untold"])

def says(lm, prompts, rows):
    return lm.generate(prompts, rows, max_new_tokens=16, min_new_tokens=16, logprobs=True, chat=False)

everything = Steering((
    Edit(Site(0), Add(direction(6, 2.0)), Positions.all()),
    Edit(Site(1), SetProjection(direction(2), 4.0), Positions.span(2, 90)),
    Edit(Site(2), Ablate(direction(3)), Positions.generated()),
    Edit(Site(3), Add(direction(4, 2.0)), Positions.from_last_prompt_token()),
))
heeded = emphasis(ScaleScores(1.5), [(3, 12), (40, 50)], range(4))
prompts = [LONG, LONG, PROMPTS[5] * 5, PROMPTS[12] * 12, LONG, PROMPTS[1]]
rows = [everything, None, 2 * added(1, 1.0, (1, 2)), None, heeded, added(2, 1.0, (0, 3), Positions.generated())]
plain = says(ours, prompts, [None] * 6)
ours.llm.reset_prefix_cache()
worst = []
for order in (range(6), (4, 0, 1), (1, 4)):  # the second time what came before is in the cache
    found = says(ours, [prompts[i] for i in order], [rows[i] for i in order])
    wanted = says(theirs, [prompts[i] for i in order], [rows[i] and by_keys(rows[i]) for i in order])
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    worst += [abs(a - b) for x, y in zip(found, wanted) for a, b in zip(x.logprobs, y.logprobs)]
    if len(order) == 6:
        print("unsteered", [found[i].logprobs == plain[i].logprobs for i in range(6)])
read = ours.capture(LONG, [1, 3], Positions.prompt(), steering=everything)[0]
with theirs.steered(everything):
    there = theirs.capture(LONG, [1, 3], Positions.prompt())[0]
print("off", max(worst), max(float((read[site] - x).norm() / x.norm()) for site, x in there.items()))
metrics = {{m.name: m.value for m in ours.llm.get_metrics() if hasattr(m, "value")}}
print("hits", metrics["vllm:prefix_cache_hits"] > 0, "preempted", metrics["vllm:num_preemptions"] > 0)

del runner.prepare_inputs  # the plugin's, so that the runner's own is back
try:
    print("served", says(ours, [PROMPTS[0]], [added(1, 1.0, (1, 2))]))
except TrimtabError as error:
    print("refused:", error)
print("others", len(says(ours, [PROMPTS[0]], [None])))
ours.close()
"""


@pytest.mark.parametrize("static", [False, True], ids=["in Python", "replayed"])
def test_it_says_what_transformers_says(tmp_path: Path, static: bool) -> None:
    """Steered and unsteered in one batch, in chunks, with the prefix cache; in Python also preempted; and unsteered to
    the bit."""
    options = {**TINY, "max_model_len": 256, "num_gpu_blocks_override": 10, "model": small_model(tmp_path / "model")}
    graphs = {"TRIMTAB_STATIC": "48", "TRIMTAB_KERNEL": "all", "TRIMTAB_MAPS": "12"} if static else {}
    said = run(tmp_path, BODY.format(options=options), TRIMTAB_SITES="keys", **INTERPRETED, **graphs)
    assert "runner vllm.v1.worker.gpu.model_runner" in said
    assert f"static {static} heard [] []" in said
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in said
    assert f"unsteered {[False, True, False, True, False, False]}" in said
    assert "hits True" in said, said
    assert static or "preempted True" in said, said  # replayed, requests may wait for slots of maps instead
    off, apart = map(float, said.split("off ")[1].split()[:2])
    assert off < 2e-4, said
    assert apart < 2e-4, said
    assert "served" not in said
    assert "refused: trimtab: vLLM took a step in which the plugin wasn't asked to steer this request" in said
    assert "others 1" in said
