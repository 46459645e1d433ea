"""A model over two engines on a Ray cluster that is started for it: what one says, whoever is killed meanwhile."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from test_processes import run

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray isn't installed in this environment"),
]
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "RAY_worker_niceness": "0"}
BEGINNING = """
import signal, sys, time, warnings
from pathlib import Path
from cases import TINY, direction, small_model
from trimtab import Add, Edit, Positions, Site, Steering
from trimtab.engines.vllm import replicas
from trimtab.engines.vllm.replicated import ReplicatedLM
replicas.PORTION = 3
folder = small_model(Path(sys.argv[0]).parent / "small")
processes = []
greeted = ReplicatedLM._check_engine
def remember(lm, hello):
    processes.append(int(hello.process.split()[1]))
    greeted(lm, hello)
ReplicatedLM._check_engine = remember
def alive():
    return [pid for pid in processes if Path(f"/proc/{pid}").exists()]
WHOLE = TINY | {"max_num_batched_tokens": 2048}  # vLLM on a CPU can't sample by a seed where prompts are cut
def load(count):
    return LM.load(folder, engine="vllm", replicas=count, **WHOLE)
"""


def test_a_killed_engine_is_made_up_for(tmp_path: Path) -> None:
    """One of two is killed after the first answers came; an interrupt ends both."""
    body = (
        BEGINNING
        + """
steered = [added(i, 3.0, layers=(1, 2)) if i % 2 else None for i in range(20)]
two, said = load(2), []
def progress(done, total):
    if not said:
        os.kill(processes[0], signal.SIGKILL)
    said.append((done, total))
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    answers = two.generate(PROMPTS, steered, max_new_tokens=12, progress=progress)
print("heard", [str(w.message) for w in heard if "lost" in str(w.message)])
print("lost", two._replicas.lost)
print("progress", said[-1] == (20, 20), [done for done, _ in said] == sorted({done for done, _ in said}))
sampled = two.generate([PROMPTS[0]] * 8, max_new_tokens=6, do_sample=True, seed=3)
many = Steering(tuple(Edit(Site(1), Add(direction(i)), Positions.window(i, i + 1)) for i in range(30)))
try:
    two.generate(PROMPTS[0], many, max_new_tokens=4)
except TrimtabError as error:
    print("refused", error)
try:
    two.generate(PROMPTS, max_new_tokens=64, progress=lambda *_: os.kill(os.getpid(), signal.SIGINT))
except KeyboardInterrupt:
    print("interrupted")
deadline = time.monotonic() + 60
while alive() and time.monotonic() < deadline:
    time.sleep(0.2)
print("alive", alive())
one = LM.load(folder, engine="vllm", **WHOLE)
wanted = one.generate(PROMPTS, steered, max_new_tokens=12)
print("same", sum(a == b for a, b in zip(answers, wanted)))
print("sampled", sampled == one.generate([PROMPTS[0]] * 8, max_new_tokens=6, do_sample=True, seed=3))
print("samples", len({a.token_ids for a in sampled}))
"""
    )
    out = run(tmp_path, body, **SETTINGS, TRIMTAB_SLOTS="9")
    assert "heard ['an engine was lost (its process ended); its call is repeated']" in out
    assert "lost 1" in out
    assert "progress True True" in out
    assert "refused this request needs" in out
    assert "interrupted" in out
    assert "alive []" in out
    assert "same 20" in out
    assert "sampled True" in out
    assert "samples 8" in out
    assert "raylet" not in out  # no pages of Ray's where results are


def test_what_two_learn_and_score_is_what_one_does(tmp_path: Path) -> None:
    """To the bit, where what is read depends on the texts alone; and a run that stopped goes on over another number."""
    body = (
        BEGINNING
        + """
from trimtab import Pair, learn_caa
from trimtab.engines.request import Text
from trimtab.evaluate.ab import ABItem, ab_requests, score_ab
from trimtab.evaluate.answers import answer
from trimtab.evaluate.fluency import perplexities
from trimtab.evaluate.records import ArmPrompt
pairs = [Pair(PROMPTS[i], PROMPTS[i + 7], "", "texts") for i in range(8)]
items = [ABItem(str(i), PROMPTS[i], "A", "B") for i in range(8)]
here, results = Path(sys.argv[0]).parent, []
def stop(done, total):
    if done > 8:
        raise KeyboardInterrupt
for count in (2, 1):
    lm = load(count)
    learned = learn_caa(lm, pairs, [1, 2])
    read = [batch for batch in lm.read([[Text(lm.encode(p), (1, 4))] for p in PROMPTS], [Site(2)], tokens_per_batch=99)]
    arms = {"plain": None, "steered": 3 * learned}
    asked = [ArmPrompt(arm, str(i), p, s) for i, p in enumerate(PROMPTS[:10]) for arm, s in arms.items()]
    score = lambda request, given: {"tokens": float(len(given.token_ids))}
    options = dict(score=score, max_new_tokens=8, batch_size=8)
    if count == 2:
        try:
            answer(lm, asked, out=here / "resumed.jsonl", progress=stop, **options)
        except KeyboardInterrupt:
            print("stopped", len((here / "resumed.jsonl").read_bytes().splitlines()))
    else:
        answer(lm, asked, out=here / "resumed.jsonl", **options)
    answer(lm, asked, out=here / f"{count}.jsonl", **options)
    letters = score_ab(lm, ab_requests(lm, items, arms), items)
    nlls = perplexities(lm, [(lm.encode(p), lm.encode(PROMPTS[0], chat=False)) for p in PROMPTS[:6]])
    results.append((learned, read, letters, nlls))
    lm.close()
two, one = results
print("directions", [a.operation.direction.equal(b.operation.direction) for a, b in zip(two[0].edits, one[0].edits)])
print("batches", len(two[1]) > 3, [b.groups for b in two[1]] == [b.groups for b in one[1]])
near = lambda a, b: abs(a - b) < 1e-4
print("letters", all(near(a.scores["matching"], b.scores["matching"]) for a, b in zip(two[2], one[2])))
print("perplexities", all(near(a / b, 1) for a, b in zip(two[3], one[3])))
files = {(here / f"{name}.jsonl").read_bytes() for name in ("resumed", "1", "2")}
print("files", len(files))
"""
    )
    out = run(tmp_path, body, **SETTINGS)
    assert "directions [True, True]" in out
    assert "batches True True" in out
    assert "letters True" in out
    assert "perplexities True" in out
    assert "stopped 17" in out
    assert "files 1" in out
