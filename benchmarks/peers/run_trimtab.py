"""trimtab's `learn_caa`, as a contender."""

from __future__ import annotations

from typing import Any

from worker import Directions, Extract, serve

from trimtab.lm import LM
from trimtab.methods.caa import learn_caa
from trimtab.text.pairs import read_pairs


def prepare(job: dict[str, Any]) -> tuple[Any, Extract]:
    lm = LM.load(job["folder"], device="cpu", dtype="float32")
    pairs = read_pairs(job["data"])

    def extract(request: dict[str, Any]) -> Directions:
        steering = learn_caa(lm, pairs[: request["pairs"]], request["layers"])
        return {edit.site.layer: edit.operation.direction for edit in steering.edits}

    return lm.model, extract


serve(prepare)
