"""The promises of the engine, on tiny random models of many families."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from batches import steering
from tiny import (
    FAMILIES,
    LAYERS,
    MIXTURES,
    SINGLE,
    direction,
    naive_edit,
    naive_generate,
    naive_holds,
    prompt,
    read_write,
)

from trimtab import (
    LM,
    Ablate,
    Add,
    Edit,
    Positions,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
)
from trimtab.steering import Rotate, RotateInPlane

RULES = [
    Positions.all(),
    Positions.all_but_first(),
    Positions.prompt(),
    Positions.generated(),
    Positions.from_last_prompt_token(),
    Positions.last_prompt_token(),
    Positions.first_generated(2),
    Positions.opening(3),
    Positions.window(1, 4),
    Positions.span(1, 3),
    Positions.tokens([2, 0, -2]),
]
OPERATIONS = [
    Add(direction(1, 2.0)),
    SetProjection(direction(2), target=1.5),
    Ablate(direction(3)),
    Add(direction(4, 2.0), keep_norm=True),
    SetProjection(direction(5), target=-2.0, keep_norm=True),
    Ablate(direction(6), keep_norm=True),
    Rotate(direction(7), one_sided=False),
    RotateInPlane(direction(8), direction(9), 0.7),
    read_write(10, 3, low=-0.3),
    read_write(11, 5, low=-1.0, high=torch.tensor([torch.inf, 0.5, 0.5, 1.0, torch.inf]), keep_norm=0.5),
]
PROMPTS = [prompt(seed, length) for seed, length in enumerate((4, 9, 6, 13, 5))]
NEW = 6


SEVERAL_SEEDS = ("llama", "qwen3", "gemma3", "gpt2", "falcon", "mixtral")
pytestmark = pytest.mark.long_unless(lambda lm: lm[0] == "llama" or lm[1] == 0)
MODELS = [(family, seed) for family in FAMILIES for seed in range(3 if family in SEVERAL_SEEDS else 1)]


@pytest.fixture(scope="module", params=MODELS, ids=lambda case: f"{case[0]}-{case[1]}")
def lm(request: pytest.FixtureRequest) -> LM:
    family, seed = request.param
    return tiny.tiny(family, seed=seed)


def tolerance(lm: LM) -> float:
    """Norms and rotary embeddings compute in float32 whatever the model's dtype."""
    return 2e-3 if lm.model.dtype == torch.float32 else 1e-4


# One steering a request: every operation, every rule, several at one layer, interleaved so that order matters.
MIXED = [
    steering((1, OPERATIONS[0], RULES[4]), (1, OPERATIONS[1], RULES[0]), (1, Add(direction(7)), RULES[3])),
    None,
    steering((0, OPERATIONS[2], RULES[1]), (3, OPERATIONS[3], RULES[2]), (3, OPERATIONS[0], RULES[7])),
    steering((2, OPERATIONS[0], RULES[8]), (2, Add(direction(8)), RULES[0]), (2, OPERATIONS[5], RULES[6])),
    0.5 * steering(*((layer, OPERATIONS[4], RULES[5]) for layer in range(LAYERS)), (1, OPERATIONS[8], RULES[0])),
]


def prefills_in_chunks(lm: LM) -> bool:
    """Whether transformers itself, unsteered, can: Qwen2-VL's positions broke it before 5.17."""
    if lm.name == "tiny-qwen2_vl":
        try:
            lm.generate(PROMPTS[1], max_new_tokens=1, prefill_chunk_size=3)
        except RuntimeError:
            return False
    return True


GREEDY = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def padded(lm: LM) -> dict[str, Any]:
    """The prompts as one batch for transformers' own `generate`."""
    ids = [lm.encode(p) for p in PROMPTS]
    width = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[0] * (width - len(i)) + i for i in ids]),
        "attention_mask": torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids]),
        "pad_token_id": 0,
    }


@pytest.fixture(scope="module")
def plain(lm: LM) -> Any:
    """What transformers gives, without trimtab."""
    return lm.model.generate(**padded(lm), **GREEDY)


class TestNothingMeansNothing:
    @pytest.mark.parametrize(
        "nothing",
        [
            None,
            Steering(),
            0.0 * steering((1, OPERATIONS[0], RULES[0]), (2, OPERATIONS[1], RULES[0])),
            steering((1, OPERATIONS[0], RULES[0])).when(Threshold(Site(0), direction(1), 1e9)),
            steering((1, OPERATIONS[1], RULES[0])).when(~Threshold(Site(2), direction(1), -1e9, "cosine")),
        ],
        ids=["none", "empty", "strength 0", "gate shut", "negated gate shut"],
    )
    def test_output_is_bit_identical_to_transformers(self, lm: LM, plain: Any, nothing: Steering | None) -> None:
        texts = padded(lm)
        width = texts["input_ids"].shape[1]
        options = {} if nothing is None else {"steering": nothing}
        answers = lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True, **options)
        assert [list(a.token_ids) for a in answers] == plain.sequences[:, width:].tolist()
        if nothing is not None:
            with lm.steered(nothing):
                inside = lm.model.generate(**texts, **GREEDY)
            for a, b in zip(plain.logits, inside.logits, strict=True):
                assert torch.equal(a, b)

    def test_a_shut_gate_beside_an_open_one_leaves_its_request_bit_identical(self, lm: LM) -> None:
        """An inactive row takes `x + -0.0` or a `where`: not even the sign of a zero changes."""
        if lm.name.removeprefix("tiny-") in MIXTURES:
            pytest.skip("experts multiply the tokens of all requests together, so a neighbour changes rounding")
        rows = [MIXED[0], None, MIXED[2], None, MIXED[4]]
        steered = lm.generate(PROMPTS, rows, max_new_tokens=NEW, logprobs=True)
        plain = lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
        for i in (1, 3):
            assert steered[i].token_ids == plain[i].token_ids
            assert steered[i].logprobs == plain[i].logprobs
            assert steered[i].applied.doses == ()

    def test_hooks_are_gone_afterwards(self, lm: LM) -> None:
        before = hook_count(lm)
        lm.generate(PROMPTS[:2], MIXED[0], max_new_tokens=2)
        assert hook_count(lm) == before
        during = []

        def interrupted() -> None:
            with lm.steered(MIXED[0]):
                during.append(hook_count(lm))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert during[0] > before
        assert hook_count(lm) == before
        assert "generate" not in vars(lm.model)

    def test_hooks_are_gone_when_generation_raises(self, lm: LM) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        before = hook_count(lm)
        handle = lm.layout.blocks[2].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            lm.generate(PROMPTS[:2], MIXED[0], max_new_tokens=2)
        handle.remove()
        assert hook_count(lm) == before
        assert lm.generate(PROMPTS[:1], max_new_tokens=2)


def hook_count(lm: LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


class TestNeighboursDontMatter:
    def test_a_mixed_batch_equals_the_naive_reference_row_by_row(self, lm: LM) -> None:
        """No cache, a batch of one, explicit loops: the fast path gives the same tokens and log-probabilities."""
        answers = lm.generate(PROMPTS, MIXED, max_new_tokens=NEW, logprobs=True)
        for text, acting, answer in zip(PROMPTS, MIXED, answers, strict=True):
            tokens, logprobs = naive_generate(lm, text, acting, NEW)
            assert list(answer.token_ids) == tokens
            assert answer.logprobs == pytest.approx(logprobs, abs=tolerance(lm))

    def test_order_and_batch_size_dont_matter(self, lm: LM) -> None:
        reference = lm.generate(PROMPTS, MIXED, max_new_tokens=NEW)
        backwards = lm.generate(PROMPTS[::-1], MIXED[::-1], max_new_tokens=NEW, batch_size=2)[::-1]
        assert [a.token_ids for a in reference] == [a.token_ids for a in backwards]

    def test_several_answers_to_a_prompt_are_all_steered(self, lm: LM) -> None:
        once = lm.generate(PROMPTS[:2], MIXED[:2], max_new_tokens=NEW)
        beams = lm.generate(
            PROMPTS[:2], MIXED[:2], max_new_tokens=1, num_beams=2, num_return_sequences=2, early_stopping=True
        )
        assert len(beams) == 4
        assert [beams[0].token_ids[0], beams[2].token_ids[0]] == [a.token_ids[0] for a in once]


class TestTheCacheIsExact:
    @pytest.mark.parametrize(
        "rules", [RULES[:5], RULES[5:10], RULES[10:]], ids=["endless rules", "bounded rules", "tokens"]
    )
    def test_every_rule_with_cache_without_and_in_chunks(self, lm: LM, rules: list[Positions]) -> None:
        steerings = [steering((1, OPERATIONS[0], rule), (2, OPERATIONS[1], rule)) for rule in rules]
        texts = PROMPTS[: len(rules)]
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}]
        ways += [{"prefill_chunk_size": 4}] if prefills_in_chunks(lm) else []
        runs = [lm.generate(texts, steerings, max_new_tokens=4, logprobs=True, **way) for way in ways]
        for text, acting, *answers in zip(texts, steerings, *runs, strict=True):
            tokens, logprobs = naive_generate(lm, text, acting, 4)
            for answer in answers:
                assert list(answer.token_ids) == tokens
                assert answer.logprobs == pytest.approx(logprobs, abs=tolerance(lm))

    def test_generate_inside_steered_equals_lm_generate(self, lm: LM) -> None:
        expected = lm.generate(PROMPTS[0], MIXED[0], max_new_tokens=NEW)[0].token_ids
        ids = torch.tensor([lm.encode(PROMPTS[0])])
        for chunk in (None, 3) if prefills_in_chunks(lm) else (None,):
            with lm.steered(MIXED[0]):
                output = lm.model.generate(ids, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=chunk)
            assert tuple(output[0, ids.shape[1] :].tolist()) == expected

    def test_a_loop_of_ones_own_equals_lm_generate(self, lm: LM) -> None:
        expected = lm.generate(PROMPTS[0], MIXED[0], max_new_tokens=NEW)[0].token_ids
        ids = torch.tensor([lm.encode(PROMPTS[0])])
        tokens: list[int] = []
        with lm.steered(MIXED[0]), torch.no_grad():
            output = lm.model(input_ids=ids, use_cache=True)
            for _ in range(NEW):
                tokens.append(int(output.logits[0, -1].argmax()))
                step = torch.tensor([tokens[-1:]])
                output = lm.model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        assert tuple(tokens) == expected


class TestAnEditDoesWhatItsNameSays:
    @pytest.mark.parametrize("operation", OPERATIONS, ids=str)
    def test_activations_differ_by_exactly_the_operation(self, lm: LM, operation: Any) -> None:
        (before,) = lm.capture(PROMPTS[1], range(LAYERS), Positions.all())
        for rule in (*RULES[:6], RULES[10]):
            self.check_operation(lm, before, operation, rule)

    @staticmethod
    def check_operation(lm: LM, before: Any, operation: Any, rule: Positions) -> None:
        layer = 2
        edit = Edit(Site(layer), operation, rule, strength=0.75)
        n = len(lm.encode(PROMPTS[1]))
        with lm.steered(Steering((edit,))):
            (after,) = lm.capture(PROMPTS[1], range(LAYERS), Positions.all())
        for earlier in range(layer):
            assert torch.equal(before[Site(earlier)], after[Site(earlier)])
        x, y = before[Site(layer)], after[Site(layer)]
        for t in range(n):
            if naive_holds(edit, t, n):
                assert torch.allclose(y[t], naive_edit(edit, x[t]), atol=tolerance(lm) * 1e-2, rtol=1e-5)
            else:
                assert torch.equal(x[t], y[t])
        first = next((t for t in range(n) if naive_holds(edit, t, n)), n)
        assert torch.allclose(before[Site(3)][:first], after[Site(3)][:first], atol=1e-6)
        if first < n:
            assert not torch.equal(before[Site(3)][first], after[Site(3)][first])

    def test_the_dose_is_the_ratio_of_norms(self, lm: LM) -> None:
        edit = Edit(Site(1), Add(direction(1, 3.0)), Positions.prompt())
        (x,) = lm.capture(PROMPTS[0], [1], Positions.prompt())
        (answer,) = lm.generate(PROMPTS[0], Steering((edit,)), max_new_tokens=2)
        (dose,) = answer.applied.doses
        assert (dose.layer, dose.tokens) == (1, len(lm.encode(PROMPTS[0])))
        assert dose.ratio == pytest.approx(float((3.0 / x[Site(1)].norm(dim=-1)).mean()), rel=1e-4)

    def test_an_addition_is_made_once(self, lm: LM) -> None:
        """A block that returns zeros gives m * v afterwards, not 2 m v (the doubled vector of early CAA code)."""
        block = lm.layout.blocks[1]
        blank = block.register_forward_hook(
            lambda _m, _a, o: torch.zeros_like(o) if isinstance(o, torch.Tensor) else (torch.zeros_like(o[0]), *o[1:])
        )
        try:
            with lm.steered(steering((1, Add(direction(1, 2.0)), RULES[0]))):
                (activations,) = lm.capture(PROMPTS[0], [1], Positions.all())
        finally:
            blank.remove()
        expected = direction(1, 2.0).to(activations[Site(1)].dtype).expand_as(activations[Site(1)])
        assert torch.allclose(activations[Site(1)], expected, atol=1e-6)

    def test_clamping_twice_is_clamping_once(self, lm: LM) -> None:
        clamp = (2, SetProjection(direction(2), target=1.5), RULES[0])
        with lm.steered(steering(clamp)):
            (once,) = lm.capture(PROMPTS[1], [2], Positions.all())
        with lm.steered(steering(clamp, clamp)):
            (twice,) = lm.capture(PROMPTS[1], [2], Positions.all())
        assert torch.allclose(once[Site(2)], twice[Site(2)], atol=1e-6)
        projections = once[Site(2)] @ direction(2).to(once[Site(2)].dtype)
        assert torch.allclose(projections, torch.full_like(projections, 1.5), atol=1e-5)


class TestNothingIsGuessed:
    def test_a_layer_that_is_not_there(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="layers 0 to 3"):
            lm.generate(PROMPTS[0], steering((4, OPERATIONS[0], RULES[0])), max_new_tokens=NEW)
        with pytest.raises(TrimtabError, match="layers 0 to 3"):
            lm.capture(PROMPTS[0], [7])

    def test_a_width_that_is_not_this_models(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="width is 5, this model's is 32"):
            lm.generate(PROMPTS[0], steering((1, Add(torch.ones(5)), RULES[0])))

    def test_a_span_that_is_not_in_the_prompt(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="span 3:99 is not in the prompt, which has 4 tokens"):
            lm.generate(PROMPTS[0], steering((1, OPERATIONS[0], Positions.span(3, 99))), max_new_tokens=NEW)

    def test_more_prompt_or_generated_text(self, lm: LM) -> None:
        ids = torch.tensor([lm.encode(PROMPTS[1])])
        with lm.steered(MIXED[0]), torch.no_grad():
            output = lm.model(input_ids=ids[:, :4], use_cache=True)
            with pytest.raises(TrimtabError, match="prompt_lengths"):
                lm.model(input_ids=ids[:, 4:], past_key_values=output.past_key_values, use_cache=True)

    def test_chunks_of_ones_own_with_announced_lengths(self, lm: LM) -> None:
        ids = torch.tensor([lm.encode(PROMPTS[1])])
        n = ids.shape[1]
        with lm.steered(MIXED[0]), torch.no_grad():
            whole = lm.model(input_ids=ids).logits[0, -1]
        with lm.steered(MIXED[0], prompt_lengths=[n]), torch.no_grad():
            output = lm.model(input_ids=ids[:, :4], use_cache=True)
            parts = lm.model(input_ids=ids[:, 4:], past_key_values=output.past_key_values, use_cache=True).logits
        assert torch.allclose(whole, parts[0, -1], atol=tolerance(lm))

    def test_batches_that_dont_match(self, lm: LM) -> None:
        ids = torch.tensor([lm.encode(PROMPTS[0])] * 3)
        with lm.steered([MIXED[0], None]), pytest.raises(TrimtabError, match="2 steerings for 3"):
            lm.model(input_ids=ids)
        with pytest.raises(TrimtabError, match="2 steerings for 1 prompts"):
            lm.generate(PROMPTS[0], [MIXED[0], None])

    def test_steering_twice_at_once(self, lm: LM) -> None:
        with lm.steered(MIXED[0]):
            with pytest.raises(TrimtabError, match="steered already"):
                lm.generate(PROMPTS[0], MIXED[0], max_new_tokens=NEW)
            lm.model(torch.tensor([lm.encode(PROMPTS[0])]))


def test_the_families_of_single_precision_are_few() -> None:
    assert set(SINGLE) == {"gemma2"}
