"""Emphasis by keys on small random models of some families: what vLLM says is what transformers says.

Steered and unsteered requests stand in one batch, prompts are computed in chunks, and what they begin with comes from
the prefix cache, whoever put it there. In Python, and by the operators of captured graphs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cases import TINY, small_model
from test_processes import run

pytestmark = pytest.mark.long

FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {"num_attention_heads": 9, "num_key_value_heads": 3},
    "Qwen3": {},
    "Gemma3": {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
BODY = """
import torch
from cases import LONG
from trimtab import Add, BiasScores, Edit, Positions, Rejection, ScaleElements, ScaleScores, Site, Steering, by_keys
from trimtab.steering import ReadWrite, emphasis

options = {options!r}
name = options.pop("model")
ours, theirs = LM.load(name, engine="vllm", **options), LM.load(name, dtype="float32")
width = ours._link.inside["keys"]
key, *rest = torch.randn(5, width, generator=torch.Generator().manual_seed(1)) / width**0.5

def says(lm, prompts, rows):
    return lm.generate(prompts, rows, max_new_tokens=6, min_new_tokens=6, logprobs=True, chat=False)

def far(rows, prompts, keys=True):
    found = says(ours, prompts, rows)
    wanted = says(theirs, prompts, [by_keys(one) if one and keys else one for one in rows])
    assert [a.token_ids for a in found] == [a.token_ids for a in wanted]
    return max(abs(a - b) for x, y in zip(found, wanted) for a, b in zip(x.logprobs, y.logprobs)), found

heeded = emphasis(ScaleScores(1.5), [(3, 12), (40, 50)], range(4))
edits = (
    Edit(Site(1, "keys"), ScaleElements(4 * key), Positions.span(2, 70)),
    Edit(Site(2, "keys"), Add(3 * key), Positions.all()),
    Edit(Site(3, "keys"), ReadWrite(torch.stack(rest[:2]), torch.stack(rest[2:]), 0.3, low=0.0), Positions.prompt()),
)
others = Steering(edits)
prompts = [LONG, LONG, LONG + " The end.", PROMPTS[5] * 5, PROMPTS[12] * 12, LONG]
rows = [heeded, None, heeded, 0.5 * heeded, others, others]
off, first = far(rows, prompts)
assert len({{tuple(a.logprobs) for a in (first[0], first[1], first[5])}}) == 3
worst = [off]
for order in ((1, 0, 5), (5, 1, 0), (0, 5, 1)):  # what is in the cache was put there by others as well
    for i in order:
        off, found = far([rows[i]], [LONG])
        worst.append(off)
hits = sum(m.value for m in ours.llm.get_metrics() if m.name == "vllm:prefix_cache_hits")
off, _ = far(rows, prompts, keys=False)  # scores themselves, which come to the same
worst.append(off)
assert hits > 0
read = ours.capture(LONG, [Site(2, "keys")], Positions.prompt(), steering=heeded)[0][Site(2, "keys")]
with theirs.steered(by_keys(heeded)):
    wanted = theirs.capture(LONG, [Site(2, "keys")], Positions.prompt())[0][Site(2, "keys")]
apart = float((read - wanted).norm() / wanted.norm())
for asked in (dict(steering=emphasis(BiasScores(1.0), [(0, 2)], [1])), dict(emphasize="day 1"),
              dict(steering=heeded, rejection=Rejection())):
    try:
        ours.generate(LONG, max_new_tokens=1, **asked)
    except Exception as error:
        print("refused", type(error).__name__, error)
(hello,) = ours._rpc("trimtab_hello")
print("static", hello["static"])
print("off", max(worst), apart)
ours.close()
"""


@pytest.mark.parametrize("static", [False, True], ids=["in Python", "replayed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_transformers_says(tmp_path: Path, family: str, static: bool) -> None:
    options = {**TINY, "model": small_model(tmp_path / "model", family, **FAMILIES[family])}
    graphs = {"TRIMTAB_STATIC": "48", "TRIMTAB_KERNEL": "all", "TRIMTAB_MAPS": "9"} if static else {}
    said = run(tmp_path, BODY.format(options=options), TRIMTAB_SITES="keys", **graphs)
    assert f"static {static}" in said
    assert said.count("refused UnsupportedError") == 3, said
    assert "can't run bias_scores" in said
    assert "rejection=False" in said
    off, apart = map(float, said.split("off ")[1].split()[:2])
    assert off < 2e-4, said
    assert apart < 2e-4, said
