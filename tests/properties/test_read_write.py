"""The general low-rank edit: what it does, number by number; that it is what other operations are; in any batch."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from tiny import WIDTH, direction, naive_edit, naive_generate, prompt, read_write
from torch import Tensor

from trimtab import (
    LM,
    Ablate,
    Add,
    Edit,
    Positions,
    ReadWrite,
    Rejection,
    RotateInPlane,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
    export,
    load,
    save,
)
from trimtab.engines.folding import States, apply
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest
from trimtab.engines.transformers.next_token import Choice
from trimtab.engines.transformers.plan import compile_plan
from trimtab.engines.vllm.admission import check_supported
from trimtab.engines.vllm.capacity import ADDITIONS
from trimtab.evaluate.controls import random_like
from trimtab.files import steering_file
from trimtab.steering.low_rank import FEW

ALL = Positions.all()
PROMPTS = [prompt(seed, length) for seed, length in enumerate((4, 9, 6, 13, 5))]
NEW = 5
U = direction(1)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def some(count: int = 9) -> Tensor:
    return 2 * torch.randn(count, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def done(operation: Any, x: Tensor, strength: float = 1.0) -> Tensor:
    """The operation run as an engine runs it, on activations `[tokens, width]`."""
    (stage,) = compile_plan([(Edit(Site(0), operation, ALL, strength),)], [3], x.dtype).stages[Site(0)]
    rows = stage.gather(States.of(torch.ones(len(x), dtype=torch.long), x.device))
    return apply(stage, rows, True, x)


def at(layer: int, *operations: Any, strength: float = 1.0, positions: Positions = ALL) -> Steering:
    return Steering(tuple(Edit(Site(layer), op, positions, strength) for op in operations))


V = torch.linalg.qr(torch.stack([direction(i) for i in range(2, 6)]).T)[0].T  # [4, width], orthonormal rows
W = torch.stack([direction(i, 0.3) for i in range(6, 10)])
TURN = RotateInPlane(V[0], V[1], 0.9)
EQUAL = {
    "set": (ReadWrite(-U[None], U[None], 1.5), SetProjection(U, 1.5)),
    "raise": (ReadWrite(-U[None], U[None], 1.5, low=0.0), SetProjection(U, 1.5, one_sided=True)),
    "ablate": (ReadWrite(-U[None], U[None]), Ablate(U)),
    "ablate, norm kept": (ReadWrite(-U[None], U[None], keep_norm=True), Ablate(U, keep_norm=True)),
    "add": (ReadWrite(torch.zeros(1, WIDTH), 3 * U[None], 1.0), Add(3 * U)),
    "turn": (ReadWrite(V[:2], (TURN.row(1.0)["angle"].cos() - 1) * V[:2] + TURN.row(1.0)["angle"].sin()
             * torch.stack([V[1], -V[0]])), TURN),
}  # fmt: skip


@pytest.mark.parametrize("case", EQUAL)
def test_operations_that_it_is(case: str) -> None:
    general, special = EQUAL[case]
    for strength in (1.0,) if case == "turn" else (1.0, 0.4, -1.3):
        assert torch.allclose(done(general, some(), strength), done(special, some(), strength), atol=1e-12)


def test_published_formulas_that_it_is() -> None:
    x, b = some(), numbers(0.1, -0.2, 0.3, 0.7)
    tau = 0.5
    capped = torch.stack([h + max(0.0, tau - float(h @ U)) * U for h in x])
    assert torch.allclose(done(ReadWrite(-U[None], U[None], tau, low=0.0), x), capped, atol=1e-12)
    below = torch.stack([h - max(0.0, float(h @ U) - tau) * U for h in x])
    assert torch.allclose(done(ReadWrite(-U[None], U[None], tau, high=0.0), x), below, atol=1e-12)
    loreft = torch.stack([h + V.T @ (W @ h + b - V @ h) for h in x])
    assert torch.allclose(done(ReadWrite(W - V, V, b), x), loreft, atol=1e-12)
    psr = torch.stack([h + torch.relu(W[0] @ h + 0.2) * W[1] for h in x])
    assert torch.allclose(done(ReadWrite(W[:1], W[1:2], 0.2, low=0.0), x), psr, atol=1e-12)
    without = done(ReadWrite(-V, V), x)
    assert float((without @ V.T).abs().max()) < 1e-12
    correlation = x.T @ x / len(x)
    conceptor = correlation @ torch.linalg.inv(correlation + 0.1 * torch.eye(WIDTH))
    values, vectors = torch.linalg.eigh(conceptor - torch.eye(WIDTH))
    low_rank = ReadWrite(vectors.T.contiguous(), (values[:, None] * vectors.T).contiguous())
    assert torch.allclose(done(low_rank, x), x @ conceptor.T, atol=1e-9)
    feature, decoder, bias = W[2], V[2], 0.4  # a feature of a sparse autoencoder, moved from a to 2 where it is active
    moved = torch.stack([h + (2 - (feature @ h + bias)) * decoder for h in x])
    assert torch.allclose(done(ReadWrite(-feature[None], decoder[None], 2 - bias), x), moved, atol=1e-12)


def test_rank_0_is_nothing() -> None:
    nothing = ReadWrite(torch.zeros(0, WIDTH), torch.zeros(0, WIDTH))
    x = torch.cat([some(), torch.full((1, WIDTH), -0.0, dtype=torch.float64)])
    assert torch.equal(done(nothing, x).view(torch.long), x.view(torch.long))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 6), st.floats(-2, 2), st.integers(0, 3)), max_size=4),
    st.lists(st.integers(0, 4), min_size=1, max_size=3 * FEW),
    st.booleans(),
)
def test_any_mix_of_maps_and_tokens(maps: list[Any], tokens: list[int], kept: bool) -> None:
    """Any number of maps of any ranks and bounds, each with any of a pass's tokens, against the loop."""
    bounds: list[dict[str, Any]] = [{}, {"low": 0.0}, {"high": 0.3}, {"low": -0.5, "high": 0.5}]
    edits = [
        Edit(Site(0), read_write(seed, rank, keep_norm=0.3 * kept, **bounds[i]), ALL, strength or 1.0)
        for seed, rank, strength, i in maps
    ]
    requests = [*((edit,) for edit in edits), *[()] * (4 - len(edits))]
    plan = compile_plan(requests, [3] * 4, torch.float64)
    states = torch.tensor([min(t, len({*requests} - {()})) for t in tokens])
    x = some(len(tokens))
    result = x
    for stage in plan.stages.get(Site(0), ()):
        map_states = States.of(states, x.device)
        result = apply(stage, stage.gather(map_states), stage.active[states], result)
    by_state = list(dict.fromkeys(edit for (edit,) in (r for r in requests if r)))
    for t, state in enumerate(states.tolist()):
        if state == 0:
            assert torch.equal(result[t].view(torch.long), x[t].view(torch.long))
        else:
            assert torch.allclose(result[t], naive_edit(by_state[state - 1], x[t]), atol=1e-9)


def test_no_token_has_a_copy_of_a_map() -> None:
    """What a prompt of 2,000 tokens needs is a few times its activations, whatever the ranks."""
    edits = [(Edit(Site(0), read_write(seed, 64, 64), ALL),) for seed in range(4)]
    (stage,) = compile_plan(edits, [3] * 4, torch.float64).stages[Site(0)]
    states = torch.arange(2000) % 5
    picked = stage.gather(States.of(states, torch.device("cpu")))["map"]
    assert [len(at) for _, at in picked.separate] == [400] * 4
    assert picked.batched is None
    few = stage.gather(States.of(states[:20], torch.device("cpu")))["map"]
    assert not few.separate
    assert few.batched.stack.read.shape == (4, 64, 64)
    (single,) = {stage.gather(States.of(torch.full((n,), 2), torch.device("cpu")))["map"].single for n in (1, 2000)}
    assert single is edits[1][0].operation.map
    strengths = [(Edit(Site(0), edits[0][0].operation, ALL, s),) for s in (1.0, 0.5, 0.25)]
    (stage,) = compile_plan(strengths, [3] * 3, torch.float64).stages[Site(0)]
    assert stage.gather(States.of(torch.tensor([1, 2, 3]), torch.device("cpu")))["map"].single is not None


def test_everything_is_where_the_activations_are() -> None:
    """On a device that computes nothing but refuses to be mixed with the CPU."""
    there = torch.device("meta")
    edits = [(Edit(Site(0), read_write(i, 1 + i, low=0.0 if i else None), ALL),) for i in range(4)]
    (stage,) = compile_plan(edits, [3] * 4, torch.float64).stages[Site(0)]
    for states in ([1, 2, 3, 0, 4, 1], [1] * FEW + [2, 2] + [3] * (FEW + 1) + [4, 0], [2, 2], [0, 2], [0]):
        known = torch.tensor(states)
        rows = stage.gather(States.of(known, there))
        new = stage.kernel(torch.ones(len(states), WIDTH, dtype=torch.float64, device=there), rows)
        assert (new.shape, new.device.type) == ((len(states), WIDTH), "meta")
    bank = stage.rows["map"]
    assert bank.to(there) is bank.to(there)  # type: ignore[arg-type]


def test_numbers_that_the_dtype_cant_hold() -> None:
    huge = ReadWrite(V, 1e39 * V)
    compile_plan([(Edit(Site(2), huge, ALL),)], [3], torch.float64)
    with pytest.raises(TrimtabError, match=r"at layer 2 the largest element, .* and the model computes in float32"):
        compile_plan([(Edit(Site(2), huge, ALL),)], [3], torch.bfloat16)


def test_mixed_dtypes() -> None:
    operation = ReadWrite(V.float(), V, numbers(0.1, 0.2, 0.3, 0.4))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = some().to(dtype)
        expected = torch.stack([naive_edit(Edit(Site(0), operation, ALL), row.double()) for row in x])
        result = done(operation, x)
        assert result.dtype == dtype
        assert torch.allclose(result.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


# ---- in models ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gemma3", "gpt2", "gemma2"])
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def tolerance(lm: LM) -> float:
    return 2e-3 if lm.model.dtype == torch.float32 else 1e-4


GATE = Threshold(Site(1), direction(9), 0.0, each_token=True)
MIXED = [
    at(1, read_write(1, 3, low=0.0)) + at(2, read_write(2, 64), strength=0.3, positions=Positions.generated()),
    None,
    at(1, Add(U), read_write(3, 1), SetProjection(U, 1.0), read_write(1, 3, low=0.0), strength=0.5),
    at(1, read_write(4, 8, high=0.2, keep_norm=0.5)) + at(3, read_write(5, 2), positions=Positions.span(1, 3)),
    at(1, read_write(1, 3, low=0.0), strength=-0.7, positions=Positions.from_last_prompt_token()),
]


class TestInAModel:
    def test_every_row_is_what_the_naive_loop_gives(self, lm: LM) -> None:
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"batch_size": 2}, {"prefill_chunk_size": 4}]
        runs = [lm.generate(PROMPTS, MIXED, max_new_tokens=NEW, logprobs=True, **way) for way in ways]
        plain = lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
        assert (runs[0][1].token_ids, runs[0][1].logprobs) == (plain[1].token_ids, plain[1].logprobs)
        for i, (text, acting) in enumerate(zip(PROMPTS, MIXED, strict=True)):
            tokens, logprobs = naive_generate(lm, text, acting, NEW)
            for run in runs:
                assert list(run[i].token_ids) == tokens
                assert run[i].logprobs == pytest.approx(logprobs, abs=tolerance(lm))

    def test_operations_that_it_is(self, lm: LM) -> None:
        for general, special in EQUAL.values():
            answers = [
                lm.generate(PROMPTS, [at(1, op), None] + [at(1, op)] * 3, max_new_tokens=NEW, logprobs=True)
                for op in (general, special)
            ]
            for answer, other in zip(*answers, strict=True):
                assert answer.token_ids == other.token_ids
                assert answer.logprobs == pytest.approx(other.logprobs, abs=tolerance(lm))

    def test_nothing_is_nothing_to_the_bit(self, lm: LM) -> None:
        plain = [(a.token_ids, a.logprobs) for a in lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)]
        shut = at(1, read_write(1, 3)).when(Threshold(Site(0), U, 1e9))
        never = at(1, read_write(1, 3)).when(Threshold(Site(1), U, 1e9, each_token=True))
        for nothing in (0.0 * at(1, read_write(1, 3)), shut, never):
            answers = lm.generate(PROMPTS, nothing, max_new_tokens=NEW, logprobs=True)
            assert [(a.token_ids, a.logprobs) for a in answers] == plain
        beside = lm.generate(
            PROMPTS, [None, at(1, read_write(1, 3)), shut, never, None], max_new_tokens=NEW, logprobs=True
        )
        for i in (0, 2, 3, 4):
            assert (beside[i].token_ids, beside[i].logprobs) == plain[i]

    def test_a_condition_on_each_token(self, lm: LM) -> None:
        operation = read_write(1, 3, keep_norm=0.5)
        (x,) = lm.capture(PROMPTS[1], [1], ALL)
        with lm.steered(at(1, operation).when(GATE)):
            (y,) = lm.capture(PROMPTS[1], [1], ALL)
        x, y = x[Site(1)], y[Site(1)]
        held = x @ GATE.direction.to(x.dtype) > 0
        assert 0 < int(held.sum()) < len(held)
        edit = Edit(Site(1), operation, ALL)
        for t, holds in enumerate(held.tolist()):
            if holds:
                assert torch.allclose(y[t], naive_edit(edit, x[t]), atol=tolerance(lm) * 1e-2)
            else:
                assert torch.equal(x[t], y[t])

    def test_next_logprobs_and_batches_that_are_stepped(self, lm: LM) -> None:
        for text, acting in zip(PROMPTS, MIXED, strict=True):
            tokens, logprobs = naive_generate(lm, text, acting, NEW)
            ids = lm.encode(text)
            (result,) = lm.next_logprobs([Choice(ids, len(ids), tokens[:1])], acting)
            assert result.logprobs == pytest.approx(logprobs[:1], abs=tolerance(lm))
        said: dict[int, list[int]] = {}
        batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
        for text, acting in zip(PROMPTS, MIXED, strict=True):
            batch.insert(GenerationRequest(tuple(lm.encode(text)), acting, NEW))
            for response in batch.step():  # each joins while the others are decoding
                said.setdefault(response.key, []).append(response.token)
        while len(batch):
            for response in batch.step():
                said.setdefault(response.key, []).append(response.token)
        for key, (text, acting) in enumerate(zip(PROMPTS, MIXED, strict=True), 1):
            assert said[key] == naive_generate(lm, text, acting, NEW)[0]

    @pytest.mark.parametrize("schedule", ["optimistic", "fused"])
    def test_rejection(self, lm: LM, schedule: str) -> None:
        if lm.name == "tiny-gemma2":
            pytest.skip("single precision")
        steering = MIXED[0].at(Positions.from_last_prompt_token())  # type: ignore[union-attr]
        never, always = (Rejection(beta, ladder="strength", schedule=schedule) for beta in (0.0, 1.0))
        others = [steering, None, 0.5 * steering]
        free = lm.generate(PROMPTS[:3], others, max_new_tokens=NEW, rejection=never)
        for text, acting, answer in zip(PROMPTS, others, free, strict=False):
            assert answer.token_ids[0] == naive_generate(lm, text, acting, 1)[0][0]
        raw = lm.generate(PROMPTS[:3], max_new_tokens=NEW)
        same = lm.generate(PROMPTS[:3], others, max_new_tokens=NEW, rejection=always)
        assert [a.token_ids for a in same] == [a.token_ids for a in raw]


def test_gradients_pass_through() -> None:
    lm = tiny.tiny("llama")
    ids = torch.tensor([lm.encode(PROMPTS[0])] * 3)
    embedded = lm.model.get_input_embeddings()(ids).detach().requires_grad_()
    with lm.steered([at(1, read_write(1, 3, low=0.0)), None, at(1, read_write(2, 5))]):
        lm.model(inputs_embeds=embedded).logits[:, -1, 5].sum().backward()
    assert bool(embedded.grad.isfinite().all())  # type: ignore[union-attr]
    assert bool((embedded.grad != 0).any(-1).all())  # type: ignore[union-attr]


# ---- as data -----------------------------------------------------------------------------------------------


def test_as_plain_data() -> None:
    operation = read_write(1, 3, low=0.0)
    assert operation == read_write(1, 3, low=0.0) != read_write(1, 3)
    assert operation != read_write(1, 3, low=numbers(0.0, 0.0, 1.0))
    assert read_write(1, 3) == read_write(1, 3, low=-torch.inf, high=numbers(*[torch.inf] * 3))
    assert read_write(1, 3) != operation
    assert len({operation, read_write(1, 3, low=0.0), read_write(1, 3), read_write(1, 3, keep_norm=0.5)}) == 3
    assert (operation.width, operation.rank) == (WIDTH, 3)
    assert repr(operation).startswith(f"ReadWrite(width={WIDTH}, norm=")
    assert "tensor" not in repr(operation)
    _ = operation.map.to(torch.float32)
    for other in (pickle.loads(pickle.dumps(operation)), copy.deepcopy(operation)):
        assert other == operation
        assert "map" not in vars(other)
    vectors = torch.ones(2, WIDTH)
    mine = ReadWrite(vectors, vectors)
    vectors.zero_()
    assert float(mine.read.sum()) == 2 * WIDTH


A = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"read": torch.ones(4)}, r"read is a floating-point tensor of shape \[rank, width\], got torch.float32 of"),
        ({"read": [[1.0]]}, "got list"),
        ({"write": torch.ones(2, 4, dtype=torch.long)}, r"write is .* got torch.int64"),
        ({"write": torch.ones(4, 2)}, r"got \[2, 4\] and \[4, 2\]; row i of write is what row i of read writes"),
        ({"write": torch.ones(3, 4)}, r"got \[2, 4\] and \[3, 4\]"),
        ({"read": torch.ones(2, 0), "write": torch.ones(2, 0)}, r"shape \[2, 0\]"),
        ({"read": A * torch.nan}, "8 values that are NaN or infinite"),
        ({"write": A * torch.inf}, "8 values that are NaN or infinite"),
        ({"bias": torch.ones(3)}, r"one number per row of read \(2 rows\), got 3"),
        ({"bias": torch.ones(2) * torch.inf}, "2 values that are NaN"),
        ({"low": torch.ones(3)}, r"low is one number, or .* of shape \[2\] \(the rank\)"),
        ({"low": "0"}, "low is one number, or .* got '0'"),
        ({"low": torch.inf}, "no value can satisfy"),
        ({"high": -torch.inf}, "no value can satisfy"),
        ({"high": torch.tensor([torch.nan, 1.0])}, "no value can satisfy"),
        ({"high": float("nan")}, "high is one number per row, or one for all rows, got NaN"),
        ({"low": 1.0, "high": 0.5}, "low is above high in row 0: 1 > 0.5"),
        ({"keep_norm": 1.5}, "keep_norm is true, false, or a share from 0 to 1, got 1.5"),
        ({"keep_norm": torch.nan}, "keep_norm is"),
        ({"keep_norm": "yes"}, "keep_norm is"),
    ],
)
def test_what_cant_be_one(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(TrimtabError, match=says):
        ReadWrite(**{"read": A, "write": A, **arguments})


def test_files(tmp_path: Path) -> None:
    for i, steering in enumerate([*MIXED, at(0, ReadWrite(torch.zeros(0, 8), torch.zeros(0, 8), keep_norm=0.25))]):
        if steering is None:
            continue
        digest = save(steering, tmp_path / f"{i}.safetensors")
        data = (tmp_path / f"{i}.safetensors").read_bytes()
        loaded = load(tmp_path / f"{i}.safetensors")
        assert loaded == steering
        assert save(loaded, tmp_path / f"{i}.safetensors") == digest
        assert (tmp_path / f"{i}.safetensors").read_bytes() == data
    assert set(load_file(tmp_path / "0.safetensors")) == {
        f"edit.{i}.{name}"
        for i, name in ((0, "read"), (0, "write"), (0, "bias"), (0, "low"), (1, "read"), (1, "write"), (1, "bias"))
    }


HOSTILE: dict[str, Any] = {
    "read of another width": lambda t, o: t.update({"edit.0.read": torch.ones(3, 8)}),
    "write of another rank": lambda t, o: t.update({"edit.0.write": torch.ones(2, WIDTH)}),
    "a bias of another rank": lambda t, o: t.update({"edit.0.bias": torch.ones(7)}),
    "a bound of two dimensions": lambda t, o: t.update({"edit.0.low": torch.ones(3, 1)}),
    "whole numbers": lambda t, o: t.update({"edit.0.read": torch.ones(3, WIDTH, dtype=torch.long)}),
    "a NaN": lambda t, o: t["edit.0.write"].fill_(torch.nan),
    "a bound above the other": lambda t, o: o.update(high=-1.0),
    "a missing tensor": lambda t, o: t.pop("edit.0.write"),
    "a missing setting": lambda t, o: o.pop("read"),
    "a direction as well": lambda t, o: o.update(direction="edit.0.bias"),
    "no tensor": lambda t, o: o.update(read="edit.0.read"),
    "half a norm too much": lambda t, o: o.update(keep_norm=1.5),
    "a norm in words": lambda t, o: o.update(keep_norm="half"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files(case: str, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    save(at(1, read_write(1, 3, low=0.0)), path)
    tensors, kept = load_file(path), {}  # type: ignore[var-annotated]
    header = steering_file._header(load(path), kept)
    HOSTILE[case](tensors, header["edits"][0]["operation"])
    header["digest"] = steering_file._digest(header, tensors)
    path.write_bytes(to_bytes(tensors, metadata={"trimtab": json.dumps(header)}))
    with pytest.raises(TrimtabError, match=r"s\.safetensors"):
        load(path)


def test_what_cant_carry_it_says_so(tmp_path: Path) -> None:
    steering = at(1, read_write(1, 3))
    for name in ("v.gguf", "v.pt"):
        with pytest.raises(UnsupportedError, match=r"can only add directions, and this steering has 1 \* read_write @"):
            export(steering, tmp_path / name)
    check_supported(steering, layers=4, widths={"residual": WIDTH})
    with pytest.raises(UnsupportedError, match=r"1 \* read_write .* captured graphs, .* more than additions"):
        check_supported(steering, layers=4, widths={"residual": WIDTH}, capacity=ADDITIONS)
    with pytest.raises(TrimtabError, match="width is 32, this model's is 64"):
        check_supported(steering, layers=4, widths={"residual": 64})
    with pytest.raises(TrimtabError, match="width is 5, this model's is 32"):
        tiny.tiny("llama").generate(PROMPTS[0], at(1, ReadWrite(torch.ones(1, 5), torch.ones(1, 5))))


def test_a_random_control_keeps_lengths_and_angles() -> None:
    old = read_write(1, 3, low=0.0)
    mean = some(1)[0]
    (edit,) = random_like(at(1, old), 3, {Site(1): mean}).edits
    new = edit.operation
    both = [torch.cat([operation.read, operation.write]) for operation in (old, new)]
    assert torch.allclose(*(rows @ rows.T for rows in both), atol=1e-12)
    assert float((both[0] @ both[1].T).abs().max()) < 0.5
    assert torch.allclose(*(operation.read @ mean + operation.bias for operation in (old, new)), atol=1e-12)
    (edit,) = random_like(at(1, RotateInPlane(U, direction(2), 0.5)), 3).edits
    assert float(edit.operation.direction @ edit.operation.second) == pytest.approx(float(U @ direction(2)))
    assert abs(float(edit.operation.direction @ U)) < 0.5
    nothing = at(1, ReadWrite(torch.zeros(0, WIDTH), torch.zeros(0, WIDTH)))
    assert random_like(nothing) == nothing
    assert random_like(at(1, old), 3) == random_like(at(1, old), 3) != random_like(at(1, old), 4)


# ---- a share of the norm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 1, True, False])
@pytest.mark.parametrize("make", [lambda **k: Add(3 * U, **k), lambda **k: SetProjection(U, 2.0, **k)])
def test_a_share_of_the_norm(share: float, make: Any) -> None:
    x = some()
    new, kept = done(make(), x), done(make(keep_norm=share), x)
    norms = (1 - share) * new.norm(dim=-1) + share * x.norm(dim=-1)
    assert torch.allclose(kept.norm(dim=-1), norms, atol=1e-12)
    assert torch.allclose(torch.nn.functional.cosine_similarity(new, kept), torch.ones(9, dtype=x.dtype))
    assert make(keep_norm=share).keep_norm is (bool(share) if share in (0, 1) else share)


def test_whole_shares_are_what_they_were() -> None:
    """True and 1 are one steering, with one file, and so are False and 0."""
    assert Add(U, keep_norm=1) == Add(U, keep_norm=True) != Add(U, keep_norm=0.5)
    assert steering_file.steering_to_bytes(at(1, Add(U, keep_norm=1.0))) == steering_file.steering_to_bytes(
        at(1, Add(U, keep_norm=True))
    )
    assert "keep_norm=0.5" in repr(Add(U, keep_norm=0.5))
