"""The same where the model is compiled, as vLLM does by default: a Python hook would silently never run there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cases import PROMPTS, added, direction, small_model, without_plugin
from test_processes import run

from trimtab import LM, Edit, Positions, SetProjection, Site, Steering

OPTIONS = {
    "dtype": "bfloat16",
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "num_gpu_blocks_override": 32,
    "seed": 0,
}
NEW = 16


@pytest.fixture(scope="module")
def vllm() -> Iterator[Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    made = LM.load(engine="vllm", **OPTIONS)
    assert int(made._engine.vllm_config.compilation_config.mode) > 0
    yield made
    made.close()


def test_the_compiled_graph_has_the_operator_after_every_block(vllm: Any) -> None:
    (hello,) = vllm._rpc("trimtab_hello")
    assert hello["unfired"] == []
    assert hello["here"] == list(range(30))


def test_unsteered_is_what_a_compiled_engine_without_the_plugin_says(tmp_path: Path) -> None:
    """To the bit in float32. In bfloat16 the compiler left alone rounds the stream less often than the model does."""
    options = {**OPTIONS, "dtype": "float32", "model": small_model(tmp_path / "model")}
    body = f"""
options = {options!r}
lm = LM.load(options.pop("model"), engine="vllm", **options)
ids = [lm.encode(prompt) for prompt in PROMPTS]
asked = dict(max_new_tokens={NEW}, logprobs=True)
answers = lm.generate(PROMPTS, **asked)
steered = lm.generate(PROMPTS, added(1, layers=(1, 2)), **asked)
rows = [(list(a.token_ids), list(a.logprobs)) for a in answers]
print(json.dumps(dict(ids=ids, rows=rows, changed=sum(a != b for a, b in zip(answers, steered)))))
lm.close()
"""
    printed = json.loads(run(tmp_path, body).strip().splitlines()[-1])
    assert printed["changed"] == len(PROMPTS)
    assert [(tokens, logprobs) for tokens, logprobs in printed["rows"]] == without_plugin(
        options, printed["ids"], NEW, tmp_path
    )


def test_rows_of_a_mixed_batch_are_identical_to_the_bit_and_steered_ones_change(vllm: Any) -> None:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "logprobs": True, "chat": False}
    assert vllm.llm.reset_prefix_cache()
    plain = vllm.generate(PROMPTS[:8], **options)
    rows = [added(3) if i % 2 else None for i in range(8)]
    rows[5] = Steering((Edit(Site(9), SetProjection(direction(4), 60.0), Positions.all()),))
    rows[7] = added(5, positions=Positions.generated())
    assert vllm.llm.reset_prefix_cache()
    mixed = vllm.generate(PROMPTS[:8], rows, **options)
    for i in range(8):
        assert (mixed[i].logprobs == plain[i].logprobs) == (rows[i] is None)
    assert mixed[7].logprobs[0] == plain[7].logprobs[0]  # the prompt yields the first token, and it isn't steered
    assert vllm.llm.reset_prefix_cache()
    zero = vllm.generate(PROMPTS[:8], [0.0 * added(3)] * 8, **options)
    assert [a.logprobs for a in zero] == [a.logprobs for a in plain]


def test_an_added_vector_is_added(vllm: Any) -> None:
    """Captured after the block: exactly the vector, up to what bfloat16 rounds."""
    steering = Steering(tuple(edit for edit in added(2, 50.0).edits if edit.site == Site(11)))
    everywhere = Positions.prompt()
    plain = vllm.capture(PROMPTS[0], [10, 11], everywhere)[0]
    steered = vllm.capture(PROMPTS[0], [10, 11], everywhere, steering=steering)[0]
    assert steered[Site(10)].equal(plain[Site(10)])
    change = (steered[Site(11)] - plain[Site(11)])[1:]  # the first token's activation is so large that little is left
    wanted = steering.edits[0].operation.direction
    assert float((change - wanted).norm(dim=-1).max() / wanted.norm()) < 0.05


def test_the_operators_of_captured_graphs_in_a_compiled_model(tmp_path: Path) -> None:
    """All that they can do, in one batch: as transformers has it, and unsteered rows to the bit."""
    options = {**OPTIONS, "dtype": "float32", "model": small_model(tmp_path / "model")}
    body = f"""
import torch
from trimtab import Ablate, Add, Edit, Positions, ScaleElements, SetProjection, Site, Steering, Threshold
from cases import direction
options = {options!r}
name = options.pop("model")
ours, theirs = LM.load(name, engine="vllm", **options), LM.load(name, dtype="float32")
(hello,) = ours._rpc("trimtab_hello")
print("static", hello["static"], hello["unfired"])
gate = Threshold(Site(1), direction(60), 0.0, each_token=True)
given = [
    Edit(Site(1), SetProjection(direction(2), 4.0), Positions.span(2, 7)),
    Edit(Site(1), Ablate(direction(3)), Positions.all(), gate=gate),
    Edit(Site(2), Add(direction(4, 2.0), keep_norm=True), Positions.all()),
    Edit(Site(2), ScaleElements((direction(5) > 0.02).float()), Positions.prompt()),
    Edit(Site(0), Add(direction(6, 2.0)), Positions.all()),
]
for edit in given:
    steering = Steering((edit, Edit(Site(3), Add(direction(7)), Positions.span(0, 4))))
    read = ours.capture(PROMPTS[5], [0, 1, 2, 3], Positions.prompt(), steering=steering)[0]
    with theirs.steered(steering):
        wanted = theirs.capture(PROMPTS[5], [0, 1, 2, 3], Positions.prompt())[0]
    for site, there in wanted.items():
        assert float((read[site] - there).norm() / there.norm()) < 2e-4, (edit, site)
print("the same activations")
asked = dict(max_new_tokens={NEW}, min_new_tokens={NEW}, logprobs=True, chat=False)
ours.llm.reset_prefix_cache()
plain = ours.generate(PROMPTS[:8], **asked)
ours.llm.reset_prefix_cache()
mixed = ours.generate(PROMPTS[:8], [Steering((given[i // 2],)) if i % 2 else None for i in range(8)], **asked)
print("unsteered", [plain[i].logprobs == mixed[i].logprobs for i in range(8)])
ours.close()
"""
    said = run(tmp_path, body, TRIMTAB_STATIC="256", TRIMTAB_KERNEL="all", TRIMTAB_STEPS="2")
    assert "static True []" in said
    assert "the same activations" in said
    assert f"unsteered {[True, False] * 4}" in said, said


@pytest.mark.long
@pytest.mark.parametrize("static", [False, True], ids=["in Python", "replayed"])
def test_keys_in_a_compiled_model(tmp_path: Path, static: bool) -> None:
    """What is emphasized, and other edits of keys, as transformers has them; unsteered rows to the bit."""
    options = {**OPTIONS, "dtype": "float32", "model": small_model(tmp_path / "model")}
    body = f"""
import torch
from cases import LONG
from trimtab import Add, Edit, Positions, ScaleElements, ScaleScores, Site, Steering, by_keys
from trimtab.steering import emphasis
options = {options!r}
name = options.pop("model")
ours, theirs = LM.load(name, engine="vllm", **options), LM.load(name, dtype="float32")
(hello,) = ours._rpc("trimtab_hello")
print("static", hello["static"], hello["unfired"])
key = torch.randn(ours._link.inside["keys"], generator=torch.Generator().manual_seed(1)) / 8
heeded = emphasis(ScaleScores(1.5), [(3, 12)], range(4))
edits = (
    Edit(Site(1, "keys"), ScaleElements(2 + key), Positions.span(2, 14)),
    Edit(Site(2, "keys"), Add(key), Positions.all()),
)
prompts = [LONG, LONG, PROMPTS[5], PROMPTS[0], PROMPTS[10], PROMPTS[1]]
rows = [heeded, None, Steering(edits), None, heeded + Steering(edits), None]
asked = dict(max_new_tokens=6, min_new_tokens=6, logprobs=True, chat=False)
plain = ours.generate(prompts, **asked)
ours.llm.reset_prefix_cache()
found = ours.generate(prompts, rows, **asked)
wanted = theirs.generate(prompts, [row and by_keys(row) for row in rows], **asked)
print("the same tokens", [a.token_ids for a in found] == [a.token_ids for a in wanted])
print("off", max(abs(a - b) for x, y in zip(found, wanted) for a, b in zip(x.logprobs, y.logprobs)))
print("unsteered", [a.logprobs == b.logprobs for a, b in zip(found, plain)])
ours.close()
"""
    graphs = {"TRIMTAB_STATIC": "256", "TRIMTAB_KERNEL": "all", "TRIMTAB_STEPS": "2"} if static else {}
    said = run(tmp_path, body, TRIMTAB_SITES="keys", **graphs)
    assert f"static {static} []" in said
    assert "the same tokens True" in said
    assert float(said.split("off ")[1].split()[0]) < 2e-4, said
    assert f"unsteered {[False, True] * 3}" in said, said
