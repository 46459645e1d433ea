"""What must hold of decoding with rejection, on tiny random models of many families."""

from __future__ import annotations

import math
from functools import cache
from itertools import cycle
from typing import Any

import naive_rejection
import pytest
import tiny
import torch
from tiny import FAMILIES, LAYERS, direction, prompt

from trimtab import LM, Ablate, Add, Edit, Positions, Site, Steering, TrimtabError
from trimtab.decoding.rejection import Rejection
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest
from trimtab.engines.transformers.rows import NewestTokens, Rows, compile_versions
from trimtab.steering import BiasScores, ScaleScores, ScoreOperation, TargetMass, emphasis

PROMPTS = [prompt(seed, length) for seed, length in enumerate((9, 14, 6, 11))]
SPANS = [((2, 5),), ((3, 4), (6, 9)), ((0, 2),), ((4, 8),)]
NEW = 8
SCHEDULES = ("optimistic", "fused")
OPERATIONS: dict[str, ScoreOperation] = {
    "scaling": ScaleScores(20.0),
    "pasta": BiasScores(math.log(0.01), heads=(0, 2), outside=True),
    "boost": BiasScores(3.0),
    "spotlight": TargetMass(0.6),
    "spotlight exact layer": TargetMass(0.6, pool="layer", exact=True),
}
# Falcon computes its attention outside of the interface, which test_a_model_without_the_interface_raises covers.
STEERABLE = [family for family in FAMILIES if family != "falcon"]
SEVERAL_SEEDS = ("llama", "qwen3", "gemma3", "mistral", "gpt2", "olmo2")
MODELS = [(family, seed) for family in STEERABLE for seed in range(2 if family in SEVERAL_SEEDS else 1)]
# All schedules and operations on these, one schedule on the others: how a family computes attention is what differs.
FULL = ("llama", "qwen3", "gemma3", "gpt2")
pytestmark = [
    pytest.mark.long_unless(lambda lm: lm[0] == "llama" or lm[1] == 0),
    pytest.mark.long_unless(lambda lm, schedule: lm[0] in FULL or schedule == "optimistic"),
]
PLAIN = ("pasta", "boost", "spotlight", "spotlight exact layer")
TURNS = dict(zip(STEERABLE, cycle(PLAIN), strict=False))
"""Each family has one of these in turn, Llama all."""
FEW_OPERATIONS = pytest.mark.long_unless(lambda lm, name: lm[0] in FULL or name in ("scaling", "spotlight"))
# The final soft cap of 30 leaves the logits of this family so far apart that few gates open.
BETAS = {"gemma3_multimodal": 0.02, "gemma2": 0.1, "gemma3": 0.1}


@pytest.fixture(scope="module", params=MODELS, ids=lambda case: f"{case[0]}-{case[1]}")
def lm(request: pytest.FixtureRequest) -> LM:
    family, seed = request.param
    return tiny.tiny(family, seed=seed)


def beta_of(lm: LM) -> float:
    return BETAS.get(lm.name.removeprefix("tiny-"), 0.3)


def steering(operation: ScoreOperation, i: int) -> Steering:
    return emphasis(operation, SPANS[i], range(LAYERS))


def residual(seed: int) -> Steering:
    edits = [Edit(Site(layer), Add(direction(seed + layer, 3.0))) for layer in range(LAYERS)]
    return Steering((*edits, Edit(Site(1), Ablate(direction(9)), Positions.all())))


@cache
def reference(lm: LM, i: int, name: str | None, beta: float, **more: Any) -> tuple[list[int], list[int | None]]:
    """What the naive reference gives for prompt `i`; every schedule is compared with it."""
    acting = residual(3) if name == "residual" else None if name is None else steering(OPERATIONS[name], i)
    return naive_rejection.generate(lm, PROMPTS[i], acting.edits if acting else (), beta, NEW, **more)


def tokens(answers: list[Any]) -> list[list[int]]:
    return [list(answer.token_ids) for answer in answers]


def ranks(lm: LM, text: str, answer: Any) -> list[int]:
    """The place of each token in the raw model's order, 0 for its best."""
    raw = naive_rejection.raw_rows(lm, (*lm.encode(text), *answer.token_ids), len(lm.encode(text)))
    return [int((row > row[token]).sum()) for row, token in zip(raw, answer.token_ids, strict=True)]


def rungs(answer: Any) -> list[int | None]:
    """The rung of each token at which the gate was open."""
    return [step.candidate for step in answer.trace.steps if step.open]


class TestAgainstTheNaiveReference:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_a_mixed_batch_equals_each_prompt_alone_recomputed(self, lm: LM, schedule: str) -> None:
        """Different prompts, spans and ladders, an unsteered request, residual edits: left-padded in one batch."""
        beta = beta_of(lm)
        names = ("scaling", "scaling", None, "residual")
        steerings = [steering(OPERATIONS["scaling"], 0), steering(OPERATIONS["scaling"], 1), None, residual(3)]
        ways = [
            Rejection(beta, schedule=schedule),
            Rejection(beta, 1, schedule=schedule, ranking="repo"),
            Rejection(beta, schedule=schedule),
            Rejection(beta, ladder="strength", schedule=schedule),
        ]
        answers = lm.generate(PROMPTS, steerings, rejection=ways, max_new_tokens=NEW)
        for i, (name, way) in enumerate(zip(names, ways, strict=True)):
            more = {"min_layers": way.min_layers, "halve": way.ladder == "halve", "kind": str(way.ranking)}
            expected, accepted = reference(lm, i, name, beta, **more)
            assert list(answers[i].token_ids) == expected
            open_steps = [k for k, step in enumerate(answers[i].trace.steps) if step.open]
            assert rungs(answers[i]) == [accepted[k] for k in open_steps]

    @pytest.mark.long_unless(lambda lm, name: lm[0] == "llama" or name == TURNS[lm[0]])
    @pytest.mark.parametrize("schedule", ["optimistic", "fused"])
    @pytest.mark.parametrize("name", PLAIN)
    def test_every_operation_on_scores(self, lm: LM, name: str, schedule: str) -> None:
        beta = beta_of(lm)
        for i in (0, 1):
            acting = steering(OPERATIONS[name], i)
            (answer,) = lm.generate(
                PROMPTS[i], acting, rejection=Rejection(beta, schedule=schedule), max_new_tokens=NEW
            )
            expected, _ = reference(lm, i, name, beta)
            assert list(answer.token_ids) == expected

    @pytest.mark.parametrize("kind", ["paper", "repo"])
    def test_one_pass_ranks_the_layers_as_separate_passes_do(self, lm: LM, kind: str) -> None:
        for i in range(3):
            acting = steering(OPERATIONS["scaling"], i)
            (answer,) = lm.generate(PROMPTS[i], acting, rejection=Rejection(ranking=kind), max_new_tokens=1)
            assert answer.trace.order == naive_rejection.ranking(lm, lm.encode(PROMPTS[i]), acting.edits, kind)


class TestTheLoop:
    def test_schedules_give_the_same_tokens_and_count_their_passes(self, lm: LM) -> None:
        answers = {}
        for schedule in SCHEDULES:
            way = Rejection(beta_of(lm), schedule=schedule)
            (answers[schedule],) = lm.generate(
                PROMPTS[1], steering(ScaleScores(), 1), rejection=way, max_new_tokens=NEW
            )
        assert len({answer.token_ids for answer in answers.values()}) == 1
        first = answers["optimistic"]
        opened = sum(step.open for step in first.trace.steps)
        # the first token's raw logits come from the prompt's pass, so its rungs have a pass of their own
        assert answers["fused"].trace.passes == NEW - 1 + first.trace.steps[0].open
        places = ranks(lm, PROMPTS[1], first)
        # the rungs' pass is the next raw pass too where the token was one of the raw model's best two
        assert first.trace.passes == NEW - 1 + opened - sum(
            step.open and place < 2 for step, place in zip(first.trace.steps[:-1], places, strict=False)
        )

    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_alpha_one_changes_nothing(self, lm: LM, schedule: str) -> None:
        way = Rejection(beta_of(lm), schedule=schedule)
        steerings = [steering(ScaleScores(1.0), i) for i in range(4)]
        assert tokens(lm.generate(PROMPTS, steerings, rejection=way, max_new_tokens=NEW)) == tokens(
            lm.generate(PROMPTS, max_new_tokens=NEW)
        )

    @FEW_OPERATIONS
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_beta_one_is_the_raw_model(self, lm: LM, name: str) -> None:
        steerings = [steering(OPERATIONS[name], i) for i in range(4)]
        answers = lm.generate(PROMPTS, steerings, rejection=Rejection(1.0), max_new_tokens=NEW)
        assert tokens(answers) == tokens(lm.generate(PROMPTS, max_new_tokens=NEW))
        assert not any(step.open for answer in answers for step in answer.trace.steps)

    @FEW_OPERATIONS
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_beta_zero_always_takes_the_strongest_rung(self, lm: LM, name: str) -> None:
        steerings = [steering(OPERATIONS[name], i) for i in range(4)]
        way = Rejection(0.0)
        answers = lm.generate(PROMPTS, steerings, rejection=way, max_new_tokens=4)
        assert all(step.open and step.candidate == 0 for answer in answers for step in answer.trace.steps)
        for i in (0, 1):
            ids = lm.encode(PROMPTS[i])
            for _ in range(4):
                ids.append(int(naive_rejection.row(lm, ids, len(lm.encode(PROMPTS[i])), steerings[i].edits).argmax()))
            assert list(answers[i].token_ids) == ids[-4:]

    @FEW_OPERATIONS
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_every_token_is_plausible_and_an_exhausted_step_gives_the_raw_one(self, lm: LM, name: str) -> None:
        beta = beta_of(lm)
        steerings = [steering(OPERATIONS[name], i) for i in range(4)]
        for i, answer in enumerate(lm.generate(PROMPTS, steerings, rejection=Rejection(beta), max_new_tokens=NEW)):
            ids = lm.encode(PROMPTS[i])
            raw = naive_rejection.raw_rows(lm, (*ids, *answer.token_ids), len(ids))
            for row, token, step in zip(raw, answer.token_ids, answer.trace.steps, strict=True):
                p = row.softmax(-1)
                assert float(p[token]) >= beta * float(p.max()) * (1 - 1e-5)
                assert step.replaced == (None if token == int(p.argmax()) else int(p.argmax()))
                if step.candidate is None:
                    assert token == int(p.argmax())

    def test_neighbours_and_order_do_not_matter(self, lm: LM) -> None:
        steerings = [steering(ScaleScores(), 0), None, residual(5), steering(TargetMass(0.5), 3)]
        way = Rejection(beta_of(lm))
        together = tokens(lm.generate(PROMPTS, steerings, rejection=way, max_new_tokens=NEW))
        turned = tokens(lm.generate(PROMPTS[::-1], steerings[::-1], rejection=way, max_new_tokens=NEW))[::-1]
        alone = [
            tokens(lm.generate(PROMPTS[i], steerings[i], rejection=way, max_new_tokens=NEW, batch_size=1))[0]
            for i in range(4)
        ]
        assert together == turned == alone

    def test_the_cache_is_the_raw_one(self, lm: LM) -> None:
        """To rounding, as raw tokens share passes with rungs; bit for bit where no gate opens."""
        ids = lm.encode(PROMPTS[1])
        for schedule, beta in (("optimistic", 1.0), *((schedule, beta_of(lm)) for schedule in SCHEDULES)):
            exact = beta == 1
            way = Rejection(beta, schedule=schedule, ladder="strength")
            batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout, ends=())
            key = batch.insert(GenerationRequest(tuple(ids), steering(ScaleScores(), 1), NEW + 1, rejection=way))
            tokens = [batch.step()[0].token for _ in range(NEW)]
            forced = compat.whole_cache(lm.model.config)
            with torch.no_grad():
                lm.model(torch.tensor([ids]), past_key_values=forced, use_cache=True)
                for token in tokens[:-1]:
                    lm.model(torch.tensor([[token]]), past_key_values=forced, use_cache=True)
            assert any(step.open for step in batch.trace(key).steps) != exact
            for mine, other in zip(batch._cache.layers, forced.layers, strict=True):
                for x, y in zip(mine.window(), (other.keys, other.values), strict=True):
                    if exact:
                        assert torch.equal(x, y)
                    else:
                        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)

    def test_nothing_is_left_behind_when_a_pass_of_rows_raises(self, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        def state() -> tuple:
            from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())
            name = lm.layout.decoder.config._attn_implementation
            return hooks, name, sorted(ALL_ATTENTION_FUNCTIONS), sorted(ALL_MASK_ATTENTION_FUNCTIONS)

        def fail(*_: Any, **__: Any) -> None:
            raise RuntimeError("in the middle")

        before = state()
        monkeypatch.setattr("trimtab.engines.transformers.rows.refuse_unknown", fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            lm.generate(PROMPTS[0], steering(ScaleScores(), 0) + residual(1), rejection=Rejection(), max_new_tokens=2)
        assert state() == before
        monkeypatch.undo()
        lm.generate(PROMPTS[0], steering(ScaleScores(), 0) + residual(1), rejection=Rejection(), max_new_tokens=2)
        assert state() == before


class TestRows:
    def test_scaling_scores_is_scaling_keys(self, lm: LM) -> None:
        """The logits of a row under key scaling equal those over a copied cache whose keys are multiplied."""
        ids = lm.encode(PROMPTS[1])
        edits = steering(ScaleScores(20.0), 1).edits
        rows = Rows(lm.model, lm.layout)
        cache = compat.whole_cache(lm.model.config)
        with torch.no_grad(), rows.open([]):
            lm.model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
            versions = compile_versions(lm.layout, [(0, edits)], [len(ids)], [0])
            token = NewestTokens(torch.tensor([ids[-1:]]), torch.tensor([[len(ids) - 1]]), None)
            result = rows.run(token, cache, len(ids), versions, [0, None], [0, 0])
        bound = 5e-3 if lm.model.dtype == torch.float32 else 1e-4
        exact = {"llama", "qwen2", "mistral", "phi3", "gpt2", "opt", "gpt_neox"}
        if lm.name.removeprefix("tiny-") in exact:  # the others' norms or rotary embeddings compute in float32
            bound = 1e-5
        torch.testing.assert_close(result[0], naive_rejection.row(lm, ids, len(ids), edits), rtol=bound, atol=bound)
        torch.testing.assert_close(result[1], naive_rejection.row(lm, ids, len(ids), ()), rtol=bound, atol=bound)


def test_a_model_without_the_interface_raises() -> None:
    lm = tiny.tiny("falcon")
    with pytest.raises(TrimtabError, match="attention interface"):
        lm.generate(PROMPTS[0], steering(ScaleScores(), 0), rejection=Rejection(), max_new_tokens=2)
    with pytest.raises(TrimtabError, match="attention interface"):
        lm.generate(PROMPTS[0], steering(ScaleScores(), 0), max_new_tokens=2)
