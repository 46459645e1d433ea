"""What is learned, scored and looked at on vLLM is what it is on transformers: one small random model on both.

The engine computes prompts in chunks of 48 tokens and has a tiny pool of blocks, so that texts are cut and wait.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LONG, PROMPTS, TINY, added, direction, small_model

import trimtab as public
from trimtab import (
    LM,
    Add,
    Edit,
    Pair,
    Positions,
    Site,
    Steering,
    Threshold,
    UnsupportedError,
    learn_caa,
    learn_condition,
    learn_instruct,
    learn_many,
    learn_repe,
)
from trimtab.engines.request import Batch, Choice, Text
from trimtab.evaluate.ab import ABItem, ab_requests, score_ab
from trimtab.evaluate.fluency import perplexities
from trimtab.learn.activations import read_pooled
from trimtab.methods.recipe import recipes
from trimtab.steering.gates import Reading
from trimtab.tune.letters import tune_letters

LETTERS = [
    Pair(f"({'AB'[i % 2]})", f"({'BA'[i % 2]})", f"{PROMPTS[i]}\n (A) yes\n (B) no", "letters") for i in range(6)
]
ANSWERS = [Pair(PROMPTS[i + 1], PROMPTS[i + 2] + " And so on.", PROMPTS[i], "answers") for i in range(6)]
TEXTS = [Pair(PROMPTS[i], PROMPTS[i + 7], "", "texts") for i in range(6)]
INSTRUCTED = [Pair(f"{PROMPTS[i]} Answer in capitals.", PROMPTS[i], "", "texts") for i in range(6)]
CHOICES = [(2, 3, 4), (5,), (6, 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def vllm(folder: str) -> Iterator[Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    made = LM.load(folder, engine="vllm", **TINY)
    yield made
    made.close()


@pytest.fixture(scope="module")
def small(folder: str) -> LM:
    return LM.load(folder, dtype="float32")


def same_directions(ours: Steering, theirs: Steering) -> None:
    """The same edits but for rounding: cosines of 0.9999 and more, and lengths within a thousandth."""
    assert [(e.site, e.positions, type(e.operation)) for e in ours.edits] == [
        (e.site, e.positions, type(e.operation)) for e in theirs.edits
    ]
    for mine, other in zip(ours.edits, theirs.edits, strict=True):
        v, w = mine.operation.direction.double(), other.operation.direction.double()
        assert float(torch.cosine_similarity(v, w, dim=0)) >= 0.9999
        assert float(v.norm()) == pytest.approx(float(w.norm()), rel=1e-3)
        assert mine.strength == pytest.approx(other.strength, rel=1e-3)
    assert (ours.card.method, ours.card.data, ours.card.options) == (
        theirs.card.method,
        theirs.card.data,
        theirs.card.options,
    )
    assert ours.card.model == theirs.card.model


def by_group(read: Iterator[Batch]) -> dict[Any, list[torch.Tensor]]:
    """The members' activations by the group's number and the site."""
    by_site = {}
    for batch in read:
        for site, groups in batch.values.items():
            by_site |= {(g, site): members for g, members in zip(batch.groups, groups, strict=True)}
    return by_site


class TestReading:
    def test_every_text_at_every_site_and_position(self, vllm: Any, small: LM) -> None:
        ids = [vllm.encode(prompt) for prompt in (*PROMPTS[:5], LONG)]
        groups = [
            [Text(token_ids, sorted({0, len(token_ids) // 2, len(token_ids) - 2})), Text(token_ids, [3])]
            for token_ids in ids
        ]
        sites = [Site(0), Site(2), Site(3)]
        for budget in (1, 4096):
            ours, theirs = (by_group(lm.read(groups, sites, tokens_per_batch=budget)) for lm in (vllm, small))
            assert ours.keys() == theirs.keys()
            for key in ours:
                for mine, other in zip(ours[key], theirs[key], strict=True):
                    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)

    def test_under_a_steering_whose_gate_the_text_decides(self, vllm: Any, small: LM) -> None:
        everywhere, sites = Positions.all(), [Site(1), Site(2)]
        for threshold in (-1e9, 1e9):
            gated = added(5, 3.0, layers=(2,)).when(Threshold(Site(1), direction(9), threshold))
            ours, theirs = (lm.capture(PROMPTS[:3], sites, everywhere, steering=gated) for lm in (vllm, small))
            plain = vllm.capture(PROMPTS[:3], sites, everywhere)
            for mine, other, unsteered in zip(ours, theirs, plain, strict=True):
                for site in sites:
                    torch.testing.assert_close(mine[site], other[site], rtol=1e-3, atol=1e-3)
                moved = (mine[Site(2)] - unsteered[Site(2)]).norm(dim=-1)
                assert bool((moved > 1).all() if threshold < 0 else (moved < 1e-3).all())

    def test_what_gates_read(self, vllm: Any, small: LM) -> None:
        readings = [Reading(Site(1)), Reading(Site(2), Positions.all(), "unit-mean")]
        ours, theirs = (read_pooled(lm, PROMPTS[:4], readings) for lm in (vllm, small))
        for reading in readings:
            torch.testing.assert_close(ours[reading], theirs[reading], rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("kind", ["heads", "neurons", "mlp", "attention", "block_input"])
    def test_sites_that_cant_be_read_are_refused_by_name(self, vllm: Any, kind: str) -> None:
        ran = vllm.llm.llm_engine.output_processor.request_states
        with pytest.raises(UnsupportedError, match=rf"the vllm engine reads the residual stream .*, not .*{kind}"):
            vllm.read([[Text([1, 2, 3], [2])]], [Site(1, kind)])
        assert not ran


class TestLearning:
    @pytest.mark.parametrize(
        ("pairs", "options"),
        [
            (LETTERS, {}),
            (ANSWERS, {"read_at": "answer"}),
            (ANSWERS, {"read_at": "first:3", "norm": "relative"}),
            (TEXTS, {}),
        ],
        ids=["letters", "answers", "first tokens", "texts"],
    )
    def test_caa(self, vllm: Any, small: LM, pairs: list[Pair], options: dict[str, Any]) -> None:
        ours, theirs = (learn_caa(lm, pairs, range(4), **options) for lm in (vllm, small))
        same_directions(ours, theirs)

    @pytest.mark.parametrize("operation", ["add", "project"])
    def test_instruct(self, vllm: Any, small: LM, operation: str) -> None:
        ours, theirs = (learn_instruct(lm, INSTRUCTED, [1, 3], operation=operation) for lm in (vllm, small))
        same_directions(ours, theirs)

    def test_many_in_one_pass(self, vllm: Any, small: LM) -> None:
        sets = {"a": INSTRUCTED, "b": INSTRUCTED[::-1][:3]}
        ours, theirs = (learn_many(lm, sets, [2]) for lm in (vllm, small))
        for name in sets:
            torch.testing.assert_close(ours[name][2].difference, theirs[name][2].difference, rtol=1e-3, atol=1e-4)

    def test_repe(self, vllm: Any, small: LM) -> None:
        ours, theirs = (learn_repe(lm, TEXTS, [1, 2], reader="cluster-mean") for lm in (vllm, small))
        same_directions(ours, theirs)

    def test_a_condition_opens_on_the_same_prompts(self, vllm: Any, small: LM) -> None:
        ours, theirs = (learn_condition(lm, PROMPTS[:6], PROMPTS[6:12], [1, 2]) for lm in (vllm, small))
        assert ours.gate.site == theirs.gate.site
        assert ours.gate.threshold == pytest.approx(theirs.gate.threshold, rel=1e-3, abs=1e-4)

    def test_what_is_learned_here_runs_here(self, vllm: Any) -> None:
        steering = 4 * learn_caa(vllm, TEXTS, 2)
        (answer,) = vllm.generate(PROMPTS[0], steering, max_new_tokens=4)
        assert answer.applied.edits == tuple(str(edit) for edit in steering.edits)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("name", recipes())
    def test_every_method_learns_or_says_what_it_lacks(self, vllm: Any, name: str) -> None:
        recipe = recipes()[name]
        learn = recipe.load()
        data: dict[str, Any] = {"pairs": [INSTRUCTED if name == "instruct" else ANSWERS], "texts": [PROMPTS[:6]]}
        more = {
            "cast": {"when": PROMPTS[:6], "unless": PROMPTS[6:12]},
            "safety": {"harmless": PROMPTS[6:12]},
            "inferaligner": {"harmless": PROMPTS[6:12]},
            "actadd": {"positive": "Love", "negative": "Hate"},
            "hpr": {"epochs": 1},
        }
        lacks = {
            "actadd": "residual stream",
            "iti": "heads",
            "sadi": "heads",
            "tda": "from the weights",
            "bipo": "with gradients",
            "reps": "with gradients",
            "loreft": "with gradients",
            "distill": "with gradients",
            "steermoe": "modules",
        }
        if name in lacks:
            with pytest.raises(UnsupportedError, match=f"vllm engine .*{lacks[name]}.* the transformers engine can"):
                learn(vllm, *data.get(recipe.takes, []), **more.get(name, {}))
        else:
            assert learn(vllm, *data.get(recipe.takes, []), **more.get(name, {})).edits


class TestScoring:
    STEERINGS = (
        None,
        added(1, 3.0, layers=(1,)),
        added(2, 3.0, layers=(2,), positions=Positions.generated()),
        added(3, 3.0, layers=(2,), positions=Positions.last_prompt_token()),
        added(4, 3.0, layers=(3,)).when(Threshold(Site(1), direction(9), -1e9)),
        added(4, 3.0, layers=(3,)).when(Threshold(Site(1), direction(9), 1e9)),
    )

    def test_next_tokens_whose_positions_count_from_the_prompt(self, vllm: Any, small: LM) -> None:
        choices, steerings = [], []
        for i, steering in enumerate(self.STEERINGS):
            ids = vllm.encode(PROMPTS[i])
            for beyond, candidates in zip((0, 1, 3), CHOICES, strict=True):
                choices.append(Choice([*ids, *range(20, 20 + beyond)], len(ids), candidates))
                steerings.append(steering)
        ours, theirs = (lm.next_logprobs(choices, steerings) for lm in (vllm, small))
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.logprobs == pytest.approx(other.logprobs, abs=2e-3)
            assert mine.applied.edits == other.applied.edits
        assert any(abs(a.logprobs[0] - b.logprobs[0]) > 0.01 for a, b in zip(theirs[:3], theirs[3:6], strict=True))

    def test_a_or_b(self, vllm: Any, small: LM) -> None:
        items = [ABItem(str(i), pair.prompt, "A", "B") for i, pair in enumerate(LETTERS)]  # type: ignore[arg-type]
        arms = {"plain": None, "steered": self.STEERINGS[1], "system": None}
        answers = []
        for lm in (vllm, small):
            requests = ab_requests(lm, items, arms, {"system": "Say yes."})
            answers.append(score_ab(lm, requests, items))
        for mine, other in zip(*answers, strict=True):
            assert (mine.arm, mine.item, mine.edits) == (other.arm, other.item, other.edits)
            assert mine.scores["matching"] == pytest.approx(other.scores["matching"], abs=2e-3)
            assert math.isnan(mine.dose) == (mine.arm == "steered")  # it isn't measured, and isn't told as none

    def test_perplexities(self, vllm: Any, small: LM) -> None:
        texts = [(vllm.encode(PROMPTS[i]), vllm.encode(PROMPTS[i + 1], chat=False)) for i in range(4)]
        texts += [([], texts[0][1]), (texts[0][0], texts[0][1][:1]), (vllm.encode(LONG), texts[1][1])]
        ours, theirs = (perplexities(lm, texts) for lm in (vllm, small))
        assert ours == pytest.approx(theirs, rel=5e-3)

    def test_a_search_by_letters(self, vllm: Any, small: LM) -> None:
        from trimtab.tune import grid

        learned = {"add": learn_caa(vllm, LETTERS, [1, 2])}
        candidates = grid(learned, [2.0], [Positions.from_last_prompt_token()])
        ours, theirs = (tune_letters(lm, candidates, LETTERS, held_out=0.5) for lm in (vllm, small))
        for mine, other in zip(ours.table, theirs.table, strict=True):
            assert (mine.setting, mine.items) == (other.setting, other.items)
            assert mine.score == pytest.approx(other.score, abs=2e-3)

    def test_a_sweep(self, vllm: Any) -> None:
        swept = vllm.sweep(added(1, layers=(1, 2)), strengths=[1.0], prompts=PROMPTS[:2], max_new_tokens=3)
        assert [row.layer for row in swept.rows] == [1, 2]
        assert all(row.perplexity > 1 and math.isnan(row.dose) for row in swept.rows)


class TestLookingAt:
    def test_a_texts_tokens(self, vllm: Any, small: LM) -> None:
        steering = Steering((Edit(Site(2), Add(direction(3))), Edit(Site(3), Add(direction(4)))))
        for text in (LONG, [{"role": "user", "content": PROMPTS[0]}]):
            ours, theirs = (lm.project(text, steering) for lm in (vllm, small))
            assert ours.tokens == theirs.tokens
            for layer in (2, 3):
                assert ours.cosines[layer] == pytest.approx(theirs.cosines[layer], abs=1e-4)


class TestFeatures:
    def test_it_says_what_it_has(self, vllm: Any, small: LM) -> None:
        assert vllm.supports(added(1, layers=(1,)), "perplexity") is None
        assert "support rejection" in vllm.supports(None, "rejection")
        assert "inside a block" in vllm.supports(Steering((Edit(Site(1, "heads"), Add(direction(1))),)))
        assert small.supports(None, "rejection", "training", "doses") is None


class TestCommands:
    """`--engine vllm` on the command line; the engine that is there is taken for the one that it would load."""

    @pytest.fixture(autouse=True)
    def loaded(self, vllm: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        names: list[str] = []

        def load(_name: Any, *, engine: str, **_: Any) -> Any:
            names.append(engine)
            return vllm

        monkeypatch.setattr(LM, "load", load)
        return names

    @pytest.fixture
    def learned(self, trimtab: Callable[..., Any], tmp_path: Path) -> Path:
        keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
        rows = [dict(zip(keys, (pair.prompt, pair.positive, pair.negative), strict=True)) for pair in LETTERS]
        pairs, out = tmp_path / "ab.json", tmp_path / "learned.safetensors"
        pairs.write_text(json.dumps(rows))
        ran = trimtab("learn", "caa", "--pairs", pairs, "--layers", "1,2", "--out", out, "--engine", "vllm", "--json")
        assert ran.code == 0, ran.err
        return out

    def test_learn_inspect_and_eval(
        self, trimtab: Callable[..., Any], learned: Path, small: LM, loaded: list[str]
    ) -> None:
        same_directions(public.load(learned), learn_caa(small, LETTERS, [1, 2]))
        there = ("--engine", "vllm", "--json")
        looked = trimtab("inspect", learned, "--text", LONG, "--layer", 2, *there)
        assert looked.code == 0, looked.err
        assert len(looked.json["layers"][0]["cosines"]) == len(small.encode(LONG, chat=False))
        scored = trimtab("eval", "ab", "--data", learned.parent / "ab.json", "--steer", learned, *there)
        assert scored.code == 0, scored.err
        assert scored.json["items"] == len(LETTERS)
        instructed = learned.parent / "shout.safetensors"
        rows = "".join(json.dumps({"positive": p.positive, "negative": p.negative}) + "\n" for p in INSTRUCTED)
        (learned.parent / "shout.jsonl").write_text(rows)
        ran = trimtab("learn", "instruct", "--pairs", learned.parent / "shout.jsonl", "--out", instructed, *there)
        assert ran.code == 0, ran.err
        assert set(loaded) == {"vllm"}
        refused = trimtab("learn", "iti", "--pairs", learned.parent / "ab.json", "--out", instructed, *there)
        assert refused.code != 0
        assert "heads" in refused.err
