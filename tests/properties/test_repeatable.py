"""The same seed gives the same bytes: what is learned, what is sampled and what is greedy, over all families."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from tiny import FAMILIES, direction, prompt

from trimtab import Add, Edit, Pair, Rejection, Site, Steering, save
from trimtab.methods.caa import learn_caa

PAIRS = [Pair(prompt(3 * i, 3 + i % 3), prompt(3 * i + 1, 4), prompt(3 * i + 2, 5), "answers") for i in range(4)]
PROMPTS = [prompt(seed, length) for seed, length in enumerate((4, 9, 6))]
ADDED = Steering((Edit(Site(1), Add(direction(1, 2.0))),))


@pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_two_runs_with_models_of_their_own_give_the_same_bytes(family: str, tmp_path: Path) -> None:
    files = []
    for run in ("one", "two"):
        lm = tiny.tiny(family)
        save(learn_caa(lm, PAIRS, [1, 2]), tmp_path / f"{run}.safetensors")
        sampled = {"do_sample": True, "temperature": 1.5, "seed": 3, "num_return_sequences": 2}
        rejecting = {"rejection": Rejection(ladder="strength", schedule="optimistic")}
        ways = [{}, sampled, *([] if family == "falcon" else [rejecting])]
        answers = [lm.generate(PROMPTS, ADDED, max_new_tokens=4, logprobs=True, **way) for way in ways]
        files.append([[(answer.token_ids, answer.logprobs) for answer in run] for run in answers])
        assert answers[1][0].token_ids != answers[1][1].token_ids  # it did sample
    assert files[0] == files[1]
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
