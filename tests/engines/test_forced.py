"""Teacher-forced passes: what they compute, their gradients, and a model that is afterwards as it was."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import tiny
import torch
import transformers
from tiny import FAMILIES, LAYERS, WIDTH, direction, prompt
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab import LM, Add, Edit, Positions, Site, Steering, TrimtabError
from trimtab.engines.transformers import forced as module
from trimtab.engines.transformers.forced import Change, PromptAnswer, group_by_pass, teacher_forcing

SITES = [Site(0), Site(2)]


def mamba() -> LM:
    """A model that keeps a state and no keys and values."""
    return _not_plain(
        transformers.MambaForCausalLM,
        transformers.MambaConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=8, pad_token_id=0
        ),
    )


def hybrid() -> LM:
    """A model of which some layers keep keys and values, and the others a state."""
    config = transformers.Lfm2Config(**tiny.SIZES, full_attn_idxs=[1, 3], block_ff_dim=48)
    return _not_plain(transformers.Lfm2ForCausalLM, config)


def _not_plain(kind: Any, config: Any) -> LM:
    torch.manual_seed(0)
    model = kind(config).double().eval()
    model.generation_config.eos_token_id = None
    return LM(model, tiny.tokenizer(), name=kind.__name__)


OTHERS: dict[str, Callable[[], LM]] = {"mamba": mamba, "hybrid": hybrid}
MODELS = [*FAMILIES, *OTHERS]


def model_of(name: str) -> LM:
    return OTHERS[name]() if name in OTHERS else tiny.tiny(name)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def text(seed: int, prompt_length: int, answered: int) -> PromptAnswer:
    """Random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (prompt_length + answered,), generator=generator).tolist()
    return PromptAnswer(tuple(ids[:prompt_length]), tuple(ids[prompt_length:]))


TEXTS = [text(i, *lengths) for i, lengths in enumerate([(9, 4), (1, 6), (14, 1), (3, 9), (8, 8)])]
TEXTS += [
    PromptAnswer(TEXTS[i].prompt, text(9 + i, 1, length).answer) for i, length in ((0, 7), (1, 2))
]  # as prompts above


def adding(seed: int, dose: float = 2.0) -> Change:
    vector = direction(seed, dose)
    return lambda x: vector.to(x.dtype).expand_as(x)


CHANGES: dict[Site, Change] = {site: adding(site.layer) for site in SITES}
EDITS = tuple(Edit(site, Add(direction(site.layer, 2.0)), Positions.from_last_prompt_token()) for site in SITES)


@torch.no_grad()
def alone(lm: LM, forced: PromptAnswer) -> Tensor:
    """The model's own logits where the answer's tokens are drawn, in one pass over the whole text."""
    ids = torch.tensor([[*forced.prompt, *forced.answer[:-1]]])
    return lm.model(input_ids=ids, use_cache=False).logits[0, len(forced.prompt) - 1 :]


def steered_alone(lm: LM, forced: PromptAnswer, edits: Sequence[Edit]) -> Tensor:
    with lm.steered(Steering(tuple(edits)), prompt_lengths=[len(forced.prompt)]):
        return alone(lm, forced)


def logits(lm: LM, texts: Sequence[PromptAnswer], changes: Mapping[Site, Change]) -> list[Tensor]:
    with teacher_forcing(lm.model, lm.layout, sorted(changes)) as run:
        return [row.detach() for row in run.logits(texts, changes)]


def close(lm: LM, result: Tensor, expected: Tensor) -> bool:
    loose = lm.model.dtype == torch.float32
    return torch.allclose(result, expected.to(result.dtype), rtol=1e-4, atol=1e-3 if loose else 1e-5)


# ---- what is computed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
class TestEveryModel:
    def test_logits_are_the_models_own(self, name: str) -> None:
        lm = model_of(name)
        for forced, result in zip(TEXTS, logits(lm, TEXTS, {}), strict=True):
            assert result.shape == (len(forced.answer), tiny.VOCABULARY)
            assert close(lm, result, alone(lm, forced))

    def test_changes_are_what_edits_are(self, name: str) -> None:
        lm = model_of(name)
        for forced, result in zip(TEXTS, logits(lm, TEXTS, CHANGES), strict=True):
            expected = steered_alone(lm, forced, EDITS)
            assert close(lm, result, expected)
            assert not close(lm, result, alone(lm, forced))

    def test_states_are_the_activations_at_the_answer(self, name: str) -> None:
        """Before what is changed at the site itself, after what is changed before it."""
        lm = model_of(name)
        sites = [Site(0), Site(1), Site(2)]
        with teacher_forcing(lm.model, lm.layout, sites) as run:
            bare = run.states(TEXTS, {}, sites)
            states = run.states(TEXTS, CHANGES, [Site(2)])
        for i, forced in enumerate(TEXTS):
            ids = [*forced.prompt, *forced.answer[:-1]]
            words = " ".join(f"w{n}" for n in ids)
            (expected,) = lm.capture(words, sites, Positions.span(len(forced.prompt) - 1, len(ids)), chat=False)
            for site in sites:
                assert bare[site][i].shape == (len(forced.answer), WIDTH)
                assert close(lm, bare[site][i], expected[site])
            with lm.steered(Steering(EDITS[:1]), prompt_lengths=[len(forced.prompt)]):
                kept: list[Tensor] = []
                handle = lm.layout.blocks[2].register_forward_hook(
                    lambda _m, _a, o, kept=kept: kept.append(o if isinstance(o, Tensor) else o[0])
                )
                alone(lm, forced)
                handle.remove()
            assert close(lm, states[Site(2)][i], kept[0][0, len(forced.prompt) - 1 :])

    def test_gradients_are_finite_differences(self, name: str) -> None:
        lm = model_of(name)
        weights = torch.randn(tiny.VOCABULARY, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        vectors = {site: direction(site.layer, 0.5).to(lm.model.dtype).requires_grad_() for site in SITES}
        along = {site: direction(10 + site.layer).to(lm.model.dtype) for site in SITES}

        def loss(run: module.TeacherForcing, step: float) -> Tensor:
            changes = {
                site: lambda x, v=vectors[site], a=along[site]: (v + step * a) * (1 + x[:, :1].tanh()) for site in SITES
            }
            rows = run.logits(TEXTS[:3], changes)
            return torch.stack([(row.double().log_softmax(-1) @ weights).mean() for row in rows]).sum()

        step = 2e-3  # most families norm in float32 whatever they are loaded in, so that smaller steps drown
        with teacher_forcing(lm.model, lm.layout, SITES) as run:
            loss(run, 0.0).backward()
            with torch.no_grad():
                slope = float(loss(run, step) - loss(run, -step)) / (2 * step)
        directional = sum(float(vectors[site].grad @ along[site]) for site in SITES)  # type: ignore[operator]
        assert directional == pytest.approx(slope, rel=0.01, abs=1e-3)
        assert all(parameter.grad is None for parameter in lm.model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt"])
def test_neighbours_dont_matter(name: str) -> None:
    lm = tiny.tiny(name)
    order = [3, 0, 4, 1, 2]
    together, shuffled = logits(lm, TEXTS, CHANGES), logits(lm, [TEXTS[i] for i in order], CHANGES)
    for n, i in enumerate(order):
        (single,) = logits(lm, [TEXTS[i]], CHANGES)
        assert torch.allclose(together[i], single, rtol=1e-9, atol=1e-9)
        assert torch.allclose(shuffled[n], single, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["block_input", "attention", "heads", "mlp", "neurons"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_other_sites(name: str, kind: str) -> None:
    lm = tiny.tiny(name)
    site = Site(1, kind)
    size = module.place(lm.layout, site).size
    vector = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for forced, result in zip(TEXTS, logits(lm, TEXTS, {site: lambda x: vector.expand_as(x)}), strict=True):
        assert close(lm, result, steered_alone(lm, forced, [Edit(site, Add(vector))]))


def test_a_change_without_effect_is_none_to_the_bit(lm: LM) -> None:
    bare, with_zeros = logits(lm, TEXTS, {}), logits(lm, TEXTS, {Site(1): torch.zeros_like})
    assert all(torch.equal(a, b) for a, b in zip(bare, with_zeros, strict=True))


def test_a_small_model_type_is_changed_in_its_own_type_and_told_in_float32() -> None:
    lm = tiny.tiny("llama", dtype=torch.bfloat16)
    seen: list[torch.dtype] = []

    def change(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return torch.ones(x.shape)

    (result,) = logits(lm, TEXTS[:1], {Site(1): change})
    assert (result.dtype, seen) == (torch.float32, [torch.bfloat16])
    steered = steered_alone(lm, TEXTS[0], [Edit(Site(1), Add(torch.ones(WIDTH)))])
    assert torch.allclose(result, steered.float(), rtol=0.05, atol=0.1)


def test_passes_hold_all_in_order_and_no_more_than_they_may(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOKENS_PER_PASS", 12)
    groups = group_by_pass(lm.model, TEXTS)
    assert [i for group in groups for i in group] == list(range(len(TEXTS)))
    assert all(len(g) == 1 or max(len(TEXTS[i].answer) for i in g) * len(g) <= 12 for g in groups)
    assert groups == [[0, 1], [2], [3], [4], [5], [6]]
    monkeypatch.setattr(module, "LOGITS_PER_PASS", 1)
    assert group_by_pass(lm.model, TEXTS) == [[i] for i in range(len(TEXTS))]
    assert group_by_pass(lm.model, []) == []


def test_a_graph_is_freed_with_its_loss(lm: LM) -> None:
    """Nothing of a pass is kept by the run."""
    vector = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    with teacher_forcing(lm.model, lm.layout, [Site(1)]) as run:
        rows = run.logits(TEXTS[:2], {Site(1): lambda x: vector.expand_as(x)})
        kept = [weakref.ref(row) for row in rows]
        torch.cat(rows).sum().backward()
        rows.clear()
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        assert run._changes == {}
        run.states(TEXTS[:2], {}, [Site(1)])
        assert run._states is None


def test_what_comes_before_the_last_prompt_token_has_no_graph(lm: LM) -> None:
    logits(lm, TEXTS[:1], {Site(0): adding(0)})  # the first call also probes positions and the blocks' outputs
    passes_with: list[tuple[int, bool]] = []
    handle = lm.layout.blocks[1].register_forward_pre_hook(
        lambda _m, args: passes_with.append((args[0].shape[1], torch.is_grad_enabled()))
    )
    logits(lm, TEXTS[:1], {Site(0): adding(0)})
    handle.remove()
    assert passes_with == [(len(TEXTS[0].prompt) - 1, False), (len(TEXTS[0].answer), True)]


# ---- a model that is as it was -------------------------------------------------------------------------------


def test_all_is_as_it_was_however_it_ends(lm: LM) -> None:
    lm.model.train()
    lm.layout.blocks[1].eval()
    frozen = next(iter(lm.model.parameters()))
    frozen.requires_grad_(False)
    modes = [part.training for part in lm.model.modules()]
    required = [parameter.requires_grad for parameter in lm.model.parameters()]
    weights = {name: weight.clone() for name, weight in lm.model.state_dict().items()}

    def broken(error: BaseException) -> Change:
        def change(x: Tensor) -> Tensor:
            raise error

        return change

    try:
        for error in (None, ValueError("no"), KeyboardInterrupt()):
            with pytest.raises(type(error)) if error else torch.enable_grad():
                with teacher_forcing(lm.model, lm.layout, SITES) as run:
                    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
                    assert not any(part.training for part in lm.model.modules())
                    run.logits(TEXTS[:2], {Site(2): adding(1) if error is None else broken(error)})
            assert [part.training for part in lm.model.modules()] == modes
            assert [parameter.requires_grad for parameter in lm.model.parameters()] == required
            assert not any(block._forward_hooks for block in lm.layout.blocks)
            assert all(torch.equal(weight, weights[name]) for name, weight in lm.model.state_dict().items())
    finally:
        frozen.requires_grad_(True)
        lm.model.eval()
    lm.generate(prompt(1, 3), Steering(EDITS), max_new_tokens=2)  # it may be steered again


def test_after_an_interrupted_pass_the_next_is_right(lm: LM) -> None:
    def interrupted(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with teacher_forcing(lm.model, lm.layout, SITES) as run:
        with pytest.raises(KeyboardInterrupt):
            run.logits(TEXTS, {Site(0): interrupted})
        with pytest.raises(KeyboardInterrupt):
            run.states(TEXTS, {Site(0): interrupted}, [Site(2)])
        result = run.logits(TEXTS, CHANGES)
    for a, b in zip(result, logits(lm, TEXTS, CHANGES), strict=True):
        assert torch.equal(a, b)


def test_a_hook_that_does_not_fire_is_an_error(lm: LM) -> None:
    block: Any = lm.layout.blocks[2]
    with teacher_forcing(lm.model, lm.layout, SITES) as run:
        hooks, block._forward_hooks = block._forward_hooks, type(block._forward_hooks)()
        try:
            with pytest.raises(TrimtabError, match=r"at residual\[2\] ran 0 times in one pass"):
                run.logits(TEXTS[:2], CHANGES)
            with pytest.raises(TrimtabError, match=r"residual\[2\]"):
                run.states(TEXTS[:2], {}, [Site(2)])
        finally:
            block._forward_hooks = hooks


def test_a_block_that_runs_twice_is_an_error(lm: LM) -> None:
    block: Any = lm.layout.blocks[0]

    def again(_module: Any, args: Any, kwargs: Any, _output: Any) -> Any:
        handle.remove()
        return block(*args, **{**kwargs, **{name: None for name in kwargs if "cache" in name or "past" in name}})

    with teacher_forcing(lm.model, lm.layout, SITES) as run:
        short = [text(1, 1, 3)]
        handle = block.register_forward_hook(again, with_kwargs=True)
        with pytest.raises(TrimtabError, match="ran 2 times in one pass"):
            run.logits(short, CHANGES)


def test_other_threads_are_left_alone(lm: LM) -> None:
    expected = alone(lm, TEXTS[0])
    results: list[Tensor] = []
    with teacher_forcing(lm.model, lm.layout, SITES) as run:

        def change(x: Tensor) -> Tensor:
            other = threading.Thread(target=lambda: results.append(alone(lm, TEXTS[0])))
            other.start()
            other.join()
            return torch.ones_like(x)

        changed = run.logits(TEXTS[1:2], {Site(2): change})
    assert torch.equal(results[0], expected)
    assert torch.equal(changed[0], logits(lm, TEXTS[1:2], {Site(2): torch.ones_like})[0])


def test_it_is_steered_once_at_a_time(lm: LM) -> None:
    with lm.steered(Steering(EDITS)):
        with pytest.raises(TrimtabError, match="being steered already"), teacher_forcing(lm.model, lm.layout, SITES):
            pass
        alone(lm, TEXTS[0])
    with teacher_forcing(lm.model, lm.layout, SITES):
        with pytest.raises(TrimtabError, match="being steered already"):
            lm.generate(prompt(1, 3), Steering(EDITS), max_new_tokens=1)


def test_errors(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="at least one token each"):
        PromptAnswer((), (1,))
    with pytest.raises(TrimtabError, match="at least one token each"):
        PromptAnswer((1,), ())
    with pytest.raises(TrimtabError, match="layers 0 to 3"), teacher_forcing(lm.model, lm.layout, [Site(LAYERS)]):
        pass
    with teacher_forcing(lm.model, lm.layout, SITES) as run:
        for ask in (
            lambda: run.logits(TEXTS, {Site(1): adding(1)}),
            lambda: run.states(TEXTS, {Site(1): adding(1)}, [Site(0)]),
            lambda: run.states(TEXTS, {}, [Site(3)]),
        ):
            with pytest.raises(TrimtabError, match="there is no hook at residual"):
                ask()


class Counting(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_sites_are_changed_without_waiting_for_the_device(lm: LM) -> None:
    """No mask is turned into indices: that would be a sync at every site, forwards and backwards."""
    vector = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    counts = []
    for sites in ([Site(0)], [Site(layer) for layer in range(LAYERS)]):
        with teacher_forcing(lm.model, lm.layout, sites) as run, Counting() as counting:
            rows = run.logits(TEXTS, {site: lambda x: vector.expand_as(x) for site in sites})
            torch.cat(rows).sum().backward()
        waits = ("nonzero", "_local_scalar_dense", "index.Tensor", "index_put", "masked")
        counts.append(sum(any(wait in name for wait in waits) for name in counting.names))
    assert counts[0] == counts[1]
