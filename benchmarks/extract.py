"""Learning directions from contrastive pairs: pairs per second against peers, agreement with them, and memory.

Every contender runs in its own process, with the same weights in float32, the same texts and threads, and the model
already loaded. A peer's batch size is the best of a few, measured beforehand.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized
from benchmarks.machine import machine, versions
from benchmarks.memory import forget_peak, own_peak, peak_of
from benchmarks.peers.environments import PEERS, cache, python_of
from benchmarks.peers.older import older_folder
from trimtab.engines.transformers.default_model import default_folder
from trimtab.lm import LM
from trimtab.methods.caa import DEPTH, learn_caa
from trimtab.text.chat import encode
from trimtab.text.letters import answer_ids, letter_of
from trimtab.text.pairs import Pair, as_texts, read_pairs

DATASET = Path("caa/refusal/generate_dataset.json")
BATCHES = (1, 8, 32)
TRIED = 16  # pairs for comparing batch sizes
PROBE = "A trim tab is the small surface on a ship's rudder."

SPEED = Target(3.0)
AGREEMENT = Target(0.9999)
LOGITS = Target(1e-3, at_least=False)
MEMORY = Target(1.05, at_least=False)

OURS = "trimtab"
REFERENCE = "steering-vectors"  # learns a mean difference, like CAA


@dataclass(frozen=True)
class Worker:
    """A contender's process, and its logits for the probe."""

    process: subprocess.Popen[str]
    logits: torch.Tensor

    def seconds(self, **request: Any) -> float:
        """The time of one extraction, in seconds."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return float(_answer(self.process)["seconds"])


def run(file: Path, pairs: int, rounds: int, *, memory: bool = True) -> Report:
    """All results, on the first `pairs` pairs of a file of CAA's multiple-choice records."""
    listed = read_pairs(file)
    if len(listed) < pairs:
        raise SystemExit(f"{file} has {len(listed)} pairs, but {pairs} were requested")
    measured = _memory(file, pairs) if memory else []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        workers = {name: stack.enter_context(w) for name, w in _workers(file, listed[:pairs], Path(scratch)).items()}
        results = _logits(workers)
        layers = _layers()
        batches = {name: _best_batch(worker, layers) for name, worker in workers.items() if name != OURS}
        workers[OURS].seconds(layers=list(range(layers)), pairs=TRIED)  # warmed up like the others
        for case, chosen in (("all layers", list(range(layers))), ("one layer", [round(DEPTH * layers)])):
            results += _case(case, chosen, workers, batches, pairs, rounds, Path(scratch))
    peers = {peer.name: peer.version for peer in PEERS}
    return Report("extract", machine(), {**versions(), **peers}, (*results, *measured))


def peak(file: Path, pairs: int) -> float:
    """The peak memory in MiB of `learn_caa` at its default layer, on a file's pairs repeated up to `pairs`."""
    lm = LM.load(device="cpu", dtype="float32")
    listed = read_pairs(file)
    many = [listed[i % len(listed)] for i in range(pairs)]
    forget_peak()
    learn_caa(lm, many)
    return own_peak()


def _case(
    case: str,
    layers: Sequence[int],
    workers: Mapping[str, Worker],
    batches: Mapping[str, int],
    pairs: int,
    rounds: int,
    scratch: Path,
) -> list[Result]:
    saved = {name: scratch / f"{name}-{case.replace(' ', '-')}.safetensors" for name in workers}

    def speed(name: str) -> Callable[[], float]:
        request = {"layers": layers, "pairs": pairs, "batch": batches.get(name), "save": str(saved[name])}
        return lambda: pairs / workers[name].seconds(**request)

    values = interleave({name: speed(name) for name in workers}, rounds, warm_ups=0, case=case)
    fastest = [max(values[name][i] for name in batches) for i in range(rounds)]
    named = {name: f"{name} (batch {batches[name]})" if name in batches else name for name in workers}
    cosine = _least_cosine(load_file(saved[OURS]), load_file(saved[REFERENCE]))
    return [
        *(summarized(case, named[name], "pairs/s", values[name]) for name in workers),
        summarized(case, "trimtab / faster peer", "ratio", ratios(values[OURS], fastest), SPEED),
        Result(case, f"least cosine with {REFERENCE}", cosine, "cosine", target=AGREEMENT),
    ]


def _best_batch(worker: Worker, layers: int) -> int:
    """The fastest batch size; peers run the whole model whichever layers they read."""
    request = {"layers": list(range(layers)), "pairs": TRIED}
    seconds = {batch: worker.seconds(**request, batch=batch) for batch in BATCHES}
    return min(seconds, key=lambda batch: seconds[batch])


def _least_cosine(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> float:
    if ours.keys() != theirs.keys():
        raise SystemExit(f"the directions are of different layers: {sorted(ours)} and {sorted(theirs)}")
    return min(float(torch.cosine_similarity(ours[layer], theirs[layer], dim=0)) for layer in ours)


def _logits(workers: Mapping[str, Worker]) -> list[Result]:
    """How far each peer's logits are from ours: a comparison of different models would be meaningless."""
    ours = workers[OURS].logits
    return [
        Result(
            "same model",
            f"largest difference of logits, {name}",
            float((worker.logits - ours).abs().max()),
            "logits",
            target=LOGITS,
        )
        for name, worker in workers.items()
        if name != OURS
    ]


def _memory(file: Path, pairs: int) -> list[Result]:
    few, many = (peak_of("extract", "--file", str(file.resolve()), "--pairs", str(n)) for n in (pairs, 10 * pairs))
    case = "one layer"
    return [
        Result(case, f"peak memory, {pairs} pairs", few, "MiB"),
        Result(case, f"peak memory, {10 * pairs} / {pairs} pairs", many / few, "ratio", target=MEMORY),
    ]


def _layers() -> int:
    return int(json.loads((default_folder() / "config.json").read_text())["num_hidden_layers"])


def _workers(file: Path, pairs: Sequence[Pair], scratch: Path) -> dict[str, Any]:
    """The contenders' processes as context managers: trimtab, then the peers."""
    folder = default_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts, ids = _texts(tokenizer, pairs)
    shared = {
        "threads": torch.get_num_threads(),
        "probe": tokenizer(PROBE)["input_ids"],
        "texts": texts,
        "ids": ids,
        "data": str(file.resolve()),
    }
    scripts = Path(__file__).parent / "peers"
    ours = _worker(OURS, Path(sys.executable), scripts / "run_trimtab.py", {**shared, "folder": str(folder)}, scratch)
    older = str(older_folder(folder, cache() / "older-model"))
    theirs = {
        peer.name: _worker(peer.name, python_of(peer), scripts / peer.script, {**shared, "folder": older}, scratch)
        for peer in PEERS
    }
    return {OURS: ours, **theirs}


def _texts(tokenizer: Any, pairs: Sequence[Pair]) -> tuple[list[list[str]], list[list[list[int]]]]:
    """The input for peers: each pair's two rendered texts, and our token ids for them, which theirs must equal."""
    texts, ids = [], []
    for pair in pairs:
        question, *sides = as_texts(pair, "the benchmark")
        message = [{"role": "user", "content": question}]
        rendered = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompt = encode(tokenizer, question)
        texts.append([rendered + side for side in sides])
        answers = [answer_ids(tokenizer, letter_of(side)) for side in sides]
        ids.append([[*prompt, *opening, letter, *closing] for opening, letter, closing in answers])
    return texts, ids


@contextmanager
def _worker(name: str, python: Path, script: Path, job: dict[str, Any], scratch: Path) -> Iterator[Worker]:
    job_file, logits = scratch / f"{name}.json", scratch / f"{name}-logits.safetensors"
    job_file.write_text(json.dumps(job))
    with (scratch / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            [str(python), str(script), str(job_file), str(logits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            try:
                _answer(process)
                yield Worker(process, load_file(logits)["logits"])
            except EOFError:
                raise SystemExit(f"{name} failed:\n{(scratch / f'{name}.log').read_text()[-2000:]}") from None
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait()


def _answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise EOFError
    return json.loads(line)
