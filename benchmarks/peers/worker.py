"""One contender of `extract` in a process of its own: it loads a model once, then extracts whenever it is asked.

It reads a job from the file named on the command line, then one request a line; each answer is one line of JSON.
This file runs in the peers' environments too, so it needs no more than torch and safetensors.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Directions = dict[int, torch.Tensor]
Extract = Callable[[dict[str, Any]], Directions]


def serve(prepare: Callable[[dict[str, Any]], tuple[Any, Extract]]) -> None:
    """Answer requests until there are no more. `prepare(job)` gives the model and what extracts directions."""
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever a library prints is no answer
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    model, extract = prepare(job)
    with torch.no_grad():
        logits = model(torch.tensor([job["probe"]])).logits[0].contiguous()
    save_file({"logits": logits}, sys.argv[2])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        directions = extract(request)
        seconds = time.perf_counter() - start
        if request.get("save"):
            save_file({str(layer): v.double().contiguous() for layer, v in directions.items()}, request["save"])
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def load_peer(job: dict[str, Any]) -> tuple[Any, Any]:
    """The model and tokenizer for a peer, which must tokenize the texts as trimtab does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    model = AutoModelForCausalLM.from_pretrained(job["folder"], torch_dtype=torch.float32).eval()
    for texts, expected in zip(job["texts"], job["ids"], strict=True):
        if tokenizer(texts)["input_ids"] != expected:
            raise SystemExit(f"other tokens than trimtab's for {texts[0][:60]!r}")
    return model, tokenizer
