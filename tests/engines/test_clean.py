"""Steering over a clean cache, compared with a form that recomputes everything, on tiny random models."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import tiny
import torch
import transformers
from batches import drain, steering
from tiny import direction, naive_holds, naive_together, prompt
from torch import Tensor
from transformers import DynamicCache

from trimtab import (
    LM,
    Ablate,
    Add,
    Edit,
    Positions,
    Rejection,
    ScaleScores,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
)
from trimtab.engines.request import Text
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.batch_row import GenerationRequest
from trimtab.engines.transformers.chunked_prefill import CHUNK
from trimtab.engines.transformers.clean import CleanBatch
from trimtab.steering import emphasis
from trimtab.steering.gates import NEVER

FAMILIES = ["llama", "gemma3_multimodal", "gemma2", "qwen3_moe", "gpt2", "opt", "gpt_neox", "qwen2_vl"]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> LM:
    return tiny.tiny("llama")


STEERINGS = [
    steering((1, Add(direction(1, 2.0)), Positions.from_last_prompt_token())),
    steering((1, SetProjection(direction(2), target=1.5), Positions.all()), (3, Add(direction(3)), Positions.all())),
    steering((0, Ablate(direction(4)), Positions.all_but_first()), (2, Add(direction(5, 3.0)), Positions.generated())),
    steering((2, Add(direction(6, 2.0), keep_norm=True), Positions.first_generated(2))),
    steering((1, Add(direction(8, 3.0)), Positions.all())).when(Threshold(Site(0), direction(9), 0.0)),
    steering((1, Add(direction(8, 3.0)), Positions.all())).when(~Threshold(Site(0), direction(9), 0.0)),
    None,
    0.0 * steering((1, Add(direction(1, 2.0)), Positions.all())),
]


@torch.no_grad()
def raw_cache(lm: LM, ids: Sequence[int]) -> DynamicCache:
    """The unsteered model's cache of these tokens."""
    cache = DynamicCache(config=lm.model.config)
    if ids:
        lm.model(input_ids=torch.tensor([list(ids)]), **compat.with_cache(lm.model, {}, cache))
    return cache


@torch.no_grad()
def naive_logits(lm: LM, ids: Sequence[int], prompt_length: int, edits: Sequence[Edit]) -> Tensor:
    """The newest token read steered, over a cache that is made anew of the tokens before it, unsteered."""
    last = len(ids) - 1
    cache = raw_cache(lm, ids[:-1])
    with ExitStack() as stack:
        for layer, block in enumerate(lm.layout.blocks):
            here = [e for e in edits if e.site.layer == layer and naive_holds(e, last, prompt_length)]

            def hook(_m: Any, _a: Any, output: Any, here: list[Edit] = here) -> Any:
                x = (output if isinstance(output, Tensor) else output[0]).clone()
                x[0, 0] = naive_together(here, x[0, 0])
                return x if isinstance(output, Tensor) else (x, *output[1:])

            stack.callback(block.register_forward_hook(hook).remove)
        inputs = compat.with_cache(lm.model, {"position_ids": torch.tensor([[last]])}, cache)
        return lm.model(input_ids=torch.tensor([[ids[-1]]]), **inputs).logits[0, -1]


def edits_of(lm: LM, ids: Sequence[int], acting: Steering | None) -> tuple[Edit, ...]:
    """What acts on an answer: a gate here is a threshold at the last prompt token, or its negation."""
    if acting is None:
        return ()
    settled = []
    for edit in acting.edits:
        text = Text(list(ids), [len(ids) - 1])
        readings = {r: next(iter(lm.read([[text]], [r.site]))).values[r.site][0][0][-1] for r in edit.gate.readings}
        if edit.strength and edit.gate.settled(readings) != NEVER:
            settled.append(edit)
    return tuple(settled)


def naive(lm: LM, ids: Sequence[int], acting: Steering | None, count: int) -> tuple[list[int], list[float]]:
    text, logprobs, edits = list(ids), [], edits_of(lm, ids, acting)
    for _ in range(count):
        logits = naive_logits(lm, text, len(ids), edits)
        text.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[text[-1]]))
    return text[len(ids) :], logprobs


def close(lm: LM) -> float:
    return 2e-3 if lm.model.dtype == torch.float32 else 1e-6


class TestTokens:
    def test_they_are_those_of_the_naive_form(self, lm: LM) -> None:
        """Under positions, gates and several operations, in one batch whose rows join at any step."""
        chance = random.Random(0)
        batch = CleanBatch(lm.model, lm.tokenizer, lm.layout)
        wanted, collected = {}, {}
        for number in range(12):
            ids = tuple(lm.encode(prompt(number, chance.randint(1 if number else 9, 12))))
            acting, count = STEERINGS[number % len(STEERINGS)], chance.randint(2, 6)
            request = GenerationRequest(ids, acting, count, alternatives=0, clean_cache=number != 9)
            if number != 9:
                wanted[batch.insert(request)] = naive(lm, ids, acting, count)
            else:
                batch.insert(request)  # a neighbour that is steered in the usual way
            for response in batch.step() if chance.random() < 0.6 else ():
                collected.setdefault(response.key, []).append(response)
        for key, responses in drain(batch).items():
            collected.setdefault(key, []).extend(responses)
        for key, (ids_wanted, logprobs) in wanted.items():
            assert [answered.error for answered in collected[key]] == [None] * len(ids_wanted)
            assert [answered.token for answered in collected[key]] == ids_wanted
            assert [answered.logprob for answered in collected[key]] == pytest.approx(logprobs, abs=close(lm))
            assert collected[key][-1].finish == "length"

    def test_steering_acts(self, llama: LM) -> None:
        text = prompt(3, 9)
        clean = llama.generate(text, STEERINGS[1], clean_cache=True, logprobs=True, max_new_tokens=8)[0]
        assert clean.logprobs != pytest.approx(llama.generate(text, logprobs=True, max_new_tokens=8)[0].logprobs)
        assert clean.applied.edits == llama.generate(text, STEERINGS[1], max_new_tokens=8)[0].applied.edits
        assert {dose.tokens for dose in clean.applied.doses} == {
            8
        }  # the last prompt token and all but the last new one
        assert all(dose.ratio > 0 for dose in clean.applied.doses)

    def test_a_long_prompt_is_read_in_chunks(self) -> None:
        lm = _long()
        ids = tuple(lm.encode(prompt(5, CHUNK + 20)))
        for acting in (STEERINGS[0], STEERINGS[4], STEERINGS[5]):
            batch = CleanBatch(lm.model, lm.tokenizer, lm.layout)
            key = batch.insert(GenerationRequest(ids, acting, 3, clean_cache=True))
            assert [response.token for response in drain(batch)[key]] == naive(lm, ids, acting, 3)[0]


def _long() -> LM:
    lm = tiny.tiny("llama")
    config = copy.deepcopy(lm.model.config)
    config.max_position_embeddings = 1024
    torch.manual_seed(0)
    model = type(lm.model)(config).to(torch.float64).eval()
    model.generation_config.eos_token_id = None
    return LM(model, lm.tokenizer)


class TestTheCache:
    def test_it_is_the_unsteered_model_s(self, lm: LM) -> None:
        """Keys and values after a steered turn, in a batch, equal those of one unsteered pass over its tokens."""
        batch = CleanBatch(lm.model, lm.tokenizer, lm.layout)
        recorded = {}
        for number, length in enumerate((7, 3, 10)):
            ids = tuple(lm.encode(prompt(number, length)))
            recorded[batch.insert(GenerationRequest(ids, STEERINGS[number], 20, clean_cache=True))] = ids
        for _ in range(6):
            batch.step()
        twins = batch._twins
        for place, row in enumerate(twins._rows):
            read = [*recorded[row.key], *row.tokens][:-1]
            assert twins._cache.lengths[place] == len(read)
            whole = lm.model(input_ids=torch.tensor([read]), use_cache=True).past_key_values
            for mine, theirs in zip(twins._cache.layers, whole.layers, strict=True):
                stop, kept = twins._cache.stop, theirs.keys.shape[2]  # a window keeps the last columns alone
                for name in ("keys", "values"):
                    mine_kept = getattr(mine, name)[place, :, stop - kept : stop]
                    torch.testing.assert_close(mine_kept, getattr(theirs, name)[0], rtol=0, atol=close(lm))

    def test_without_it_steering_colours_the_cache(self, llama: LM) -> None:
        batch = CleanBatch(llama.model, llama.tokenizer, llama.layout)
        ids = tuple(llama.encode(prompt(0, 7)))
        batch.insert(GenerationRequest(ids, STEERINGS[1], 20))
        for _ in range(4):
            batch.step()
        read = [*ids, *batch._rows[0].tokens][:-1]
        theirs = llama.model(input_ids=torch.tensor([read]), use_cache=True).past_key_values.layers[-1].keys[0]
        mine = batch._cache.layers[-1].keys[0, :, batch._cache.stop - len(read) : batch._cache.stop]
        assert (mine - theirs).abs().max() > 0.01


class TestPromises:
    def test_nothing_means_nothing(self, llama: LM) -> None:
        """Without steering, at strength 0 and behind a shut gate, all is as unsteered, to the bit."""
        texts = [prompt(number, 4 + number) for number in range(4)]
        plain = llama.generate(texts, logprobs=True, max_new_tokens=6)
        for nothing in (None, STEERINGS[7], STEERINGS[1].when(Threshold(Site(0), direction(9), 1e9))):
            answers = llama.generate(texts, nothing, clean_cache=True, logprobs=True, max_new_tokens=6)
            assert [answer.logprobs for answer in answers] == [answer.logprobs for answer in plain]

    def test_samples_are_those_of_the_seed(self, llama: LM) -> None:
        options: dict[str, Any] = {"do_sample": True, "seed": 3, "max_new_tokens": 6, "clean_cache": True}
        texts = [prompt(number, 5 + number) for number in range(3)]
        assert [a.token_ids for a in llama.generate(texts, STEERINGS[0], **options)] == [
            a.token_ids for a in llama.generate(texts, STEERINGS[0], batch_size=1, **{**options})
        ]

    def test_it_equals_rejection_that_rejects_nothing(self, llama: LM) -> None:
        text = prompt(2, 8)
        rejecting = llama.generate(text, STEERINGS[0], rejection=Rejection(0.0, ladder="strength"), max_new_tokens=6)[0]
        assert (
            llama.generate(text, STEERINGS[0], clean_cache=True, max_new_tokens=6)[0].token_ids == rejecting.token_ids
        )

    def test_a_stream_has_it(self, llama: LM) -> None:
        stream = llama.stream(prompt(2, 8), STEERINGS[0], clean_cache=True, max_new_tokens=6, chat=False)
        text = "".join(stream)
        assert text == llama.generate(prompt(2, 8), STEERINGS[0], clean_cache=True, max_new_tokens=6)[0].text

    def test_rows_leave(self, llama: LM) -> None:
        batch = CleanBatch(llama.model, llama.tokenizer, llama.layout)
        keys = [
            batch.insert(GenerationRequest(tuple(llama.encode(prompt(n, 5))), STEERINGS[n], 30, clean_cache=n != 1))
            for n in range(3)
        ]
        batch.step()
        assert (batch.running, len(batch)) == (3, 3)
        assert batch.applied(keys[0]) is not None
        removed = batch.remove(keys[0])
        assert removed is not None
        assert removed.doses[0].tokens == 1
        assert batch.remove(keys[0]) is None
        assert {response.key for response in batch.step()} == {keys[1], keys[2]}
        assert sorted(batch.clear()) == keys[1:]
        assert len(batch) == 0
        key = batch.insert(GenerationRequest(tuple(llama.encode(prompt(1, 5))), STEERINGS[0], 3, clean_cache=True))
        assert len(drain(batch)[key]) == 3


class TestWhatIsRefused:
    def test_recurrent_states(self) -> None:
        config = transformers.Lfm2Config(**tiny.SIZES, full_attn_idxs=[1, 3], block_ff_dim=48)
        hybrid = LM(transformers.Lfm2ForCausalLM(config).double().eval(), tiny.tokenizer())
        assert "recurrent state" in str(hybrid.supports(None, "clean_cache"))
        with pytest.raises(UnsupportedError, match="leave clean_cache out"):
            hybrid.generate(prompt(1, 5), STEERINGS[0], clean_cache=True, max_new_tokens=3)

    def test_edits_of_the_prompt_alone(self, llama: LM) -> None:
        only = Positions.parse("tokens:0,1")
        with pytest.raises(UnsupportedError, match="last prompt token on"):
            llama.generate(prompt(1, 5), steering((1, Add(direction(1)), only)), clean_cache=True, max_new_tokens=3)

    def test_attention_scores(self, llama: LM) -> None:
        with pytest.raises(UnsupportedError, match="rejection does"):
            llama.generate(
                prompt(1, 5), emphasis(ScaleScores(), [(0, 2)], range(4), "x"), clean_cache=True, max_new_tokens=3
            )

    def test_beams(self, llama: LM) -> None:
        with pytest.raises(UnsupportedError, match="continuous batching"):
            llama.generate(prompt(1, 5), STEERINGS[0], clean_cache=True, num_beams=2, max_new_tokens=3)

    def test_another_attention_and_what_is_no_answer(self, llama: LM) -> None:
        with pytest.raises(TrimtabError, match="True or False"):
            llama.generate(prompt(1, 5), STEERINGS[0], clean_cache=1)  # type: ignore[arg-type]
        assert llama.supports(None, "clean_cache") is None

    def test_an_attention_of_its_own(self) -> None:
        assert "attention interface" in str(tiny.tiny("falcon").supports(None, "clean_cache"))
