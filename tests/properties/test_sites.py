"""Sites inside the blocks, over all families: read and steered as explicit hooks on named modules do it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive_sites as naive
import pytest
import tiny
import torch
from tiny import FAMILIES, LAYERS, MIXTURES, prompt, read_write

from trimtab import (
    LM,
    Add,
    Edit,
    Positions,
    Rejection,
    SetProjection,
    Site,
    Steering,
    TrimtabError,
    UnsupportedError,
    save,
)
from trimtab import load as load_file
from trimtab.engines.transformers.places import output_weight, place
from trimtab.steering import AddScaled, HoldElements, MaskNeurons, ScaleElements

PROMPTS = [prompt(seed, length) for seed, length in enumerate((4, 9, 6, 12))]
NEW = 5


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def family(lm: LM) -> str:
    return lm.name.removeprefix("tiny-")


def tolerance(lm: LM) -> float:
    return 2e-3 if lm.model.dtype == torch.float32 else 1e-4


def vector(size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * drawn / drawn.norm()


def mask(size: int, seed: int) -> torch.Tensor:
    return (torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) < 0.3).double()


def mixed(lm: LM) -> list[Steering | None]:
    """A steering a request: every site, additions, scalings, masks and sequences of them at one site."""
    rules = (Positions.all(), Positions.generated(), Positions.from_last_prompt_token(), Positions.last_prompt_token())
    edits: list[Edit] = []
    for i, kind in enumerate(naive.kinds(family(lm))):
        size = naive.size_of(lm, kind)
        edits.append(Edit(Site(1 + i % 2, kind), Add(vector(size, i, 0.7)), rules[i % 4], 0.8))
        edits.append(Edit(Site(1 + i % 2, kind), ScaleElements(mask(size, i)), rules[(i + 1) % 4], 1.5))
        edits.append(Edit(Site(3, kind), ScaleElements(mask(size, 9 + i)), rules[(i + 2) % 4], -0.6))
        by = ("opposed", "norm", "sign")[i % 3]
        edits.append(Edit(Site(2, kind), AddScaled(vector(size, 5 + i), by=by, keep_norm=i < 3), rules[i % 4], 0.7))
    half = [edit for edit in edits if edit.site.layer == 3]
    masks = [edit for edit in edits if isinstance(edit.operation, ScaleElements) and edit.site.kind != "neurons"]
    last = (Edit(Site(2, "heads"), ScaleElements(mask(naive.size_of(lm, "heads"), 3), keep_norm=True), rules[2]),)
    held = HoldElements(mask(naive.size_of(lm, "heads"), 4))
    last += (Edit(Site(1, "heads"), held, Positions.last_prompt_token(), 1.5),)
    if family(lm) not in MIXTURES:
        size = naive.size_of(lm, "neurons")
        limits = vector(size, 4).abs() * 5
        last += (Edit(Site(2, "neurons"), MaskNeurons(limits, statistic="any"), Positions.generated()),)
        last += (Edit(Site(1, "neurons"), MaskNeurons(limits, statistic="rms"), Positions.generated()),)
    for i, kind in enumerate(naive.kinds(family(lm))):
        low_rank = read_write(i, 1 + 2 * i, naive.size_of(lm, kind), low=0.0 if i % 2 else None, keep_norm=i == 4)
        last += (Edit(Site(i % 4, kind), low_rank, rules[i % 4], 0.8),)
    return [Steering(tuple(edits)), None, Steering((*half, *masks)), Steering(last)]


class TestReading:
    def test_what_is_read_is_what_the_modules_have(self, lm: LM) -> None:
        sites = [Site(layer, kind) for layer in range(LAYERS) for kind in naive.kinds(family(lm))]
        captured = lm.capture(PROMPTS, sites, Positions.all())
        for text, activations in zip(PROMPTS, captured, strict=True):
            values = naive.activations_at(lm, lm.encode(text), [(site.kind, site.layer) for site in sites])
            for site, expected in zip(sites, values, strict=True):
                assert activations[site].shape == expected.shape
                assert torch.allclose(activations[site], expected, atol=tolerance(lm))

    def test_heads_and_neurons_go_into_the_outputs(self, lm: LM) -> None:
        """The output of attention is the projection of the heads, that of the MLP the projection of the neurons."""
        pairs = [("heads", "attention"), ("neurons", "mlp")]
        for inner, outer in pairs[: 1 if family(lm) in MIXTURES else 2]:
            (x,) = lm.capture(PROMPTS[1], [Site(2, inner), Site(2, outer)], Positions.all())
            bias: Any = getattr(naive.module_of(lm, inner, 2), "bias", None)
            expected = x[Site(2, inner)] @ output_weight(lm.layout, Site(2, inner)).T
            expected = expected if bias is None else expected + bias
            assert torch.allclose(x[Site(2, outer)], expected, atol=tolerance(lm))

    def test_a_block_begins_where_the_one_before_ends(self, lm: LM) -> None:
        (x,) = lm.capture(PROMPTS[1], [Site(1), Site(2, "block_input")], Positions.all())
        assert torch.equal(x[Site(1)], x[Site(2, "block_input")])

    def test_query_heads_of_their_own_size(self, lm: LM) -> None:
        text: Any = lm.model.config.get_text_config()
        expected = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        assert (lm.layout.heads, place(lm.layout, Site(1, "heads")).size) == (4, 4 * expected)

    def test_mixtures_have_no_one_row_of_neurons(self, lm: LM) -> None:
        if family(lm) in MIXTURES:
            with pytest.raises(UnsupportedError, match=r"no site neurons\[1\]"):
                lm.capture(PROMPTS[0], [Site(1, "neurons")])
        else:
            assert place(lm.layout, Site(1, "neurons")).size == naive.size_of(lm, "neurons")


class TestSteering:
    def test_every_row_is_what_the_naive_loop_gives(self, lm: LM) -> None:
        steerings = mixed(lm)
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}, {"batch_size": 1}]
        runs = [lm.generate(PROMPTS, steerings, max_new_tokens=NEW, logprobs=True, **way) for way in ways]
        for i, (text, acting) in enumerate(zip(PROMPTS, steerings, strict=True)):
            tokens, logprobs = naive.generate(lm, text, acting, NEW)
            for run in runs:
                assert list(run[i].token_ids) == tokens
                assert run[i].logprobs == pytest.approx(logprobs, abs=tolerance(lm))

    def test_nothing_is_nothing_to_the_bit(self, lm: LM) -> None:
        """Strength 0, an empty mask, and rows beside steered ones: the very same numbers as unsteered."""
        plain = lm.generate(PROMPTS, None, max_new_tokens=NEW, logprobs=True)
        steerings = mixed(lm)
        size = naive.size_of(lm, "heads")
        empty = Steering((Edit(Site(1, "heads"), ScaleElements(torch.zeros(size)), Positions.all()),))
        for others in ([0 * steerings[0]] * 4, [empty] * 4):  # type: ignore[operator]
            answers = lm.generate(PROMPTS, others, max_new_tokens=NEW, logprobs=True)
            assert [(a.token_ids, a.logprobs) for a in answers] == [(a.token_ids, a.logprobs) for a in plain]
        beside = lm.generate(PROMPTS, steerings, max_new_tokens=NEW, logprobs=True)[1]
        assert (beside.token_ids, beside.logprobs) == (plain[1].token_ids, plain[1].logprobs)

    def test_generate_inside_steered(self, lm: LM) -> None:
        steerings = mixed(lm)
        for text, acting in zip(PROMPTS, steerings, strict=True):
            if acting is None:
                continue
            expected = lm.generate(text, acting, max_new_tokens=NEW)[0].token_ids
            ids = torch.tensor([lm.encode(text)])
            with lm.steered(acting):
                output = lm.model.generate(ids, max_new_tokens=NEW, do_sample=False)
            assert tuple(output[0, ids.shape[1] :].tolist()) == expected

    def test_activations_differ_by_the_operation(self, lm: LM) -> None:
        for kind in naive.kinds(family(lm)):
            size = naive.size_of(lm, kind)
            low_rank = read_write(3, 4, size, low=0.0)
            site = Site(2, kind)
            (before,) = lm.capture(PROMPTS[1], [site, Site(1)], Positions.all())
            directed = (Add(vector(size, 1)), ScaleElements(mask(size, 1)), SetProjection(vector(size, 2), 1.0))
            for operation in (*directed, low_rank):
                edit = Edit(site, operation, Positions.span(2, 5), 0.75)
                with lm.steered(Steering((edit,))):
                    (after,) = lm.capture(PROMPTS[1], [site, Site(1)], Positions.all())
                assert torch.equal(before[Site(1)], after[Site(1)])
                for t, (x, y) in enumerate(zip(before[site], after[site], strict=True)):
                    if not 2 <= t < 5:
                        assert torch.equal(x, y)
                    elif isinstance(operation, SetProjection):
                        u = operation.direction.to(x.dtype)
                        assert torch.allclose(y, x + 0.75 * (1 - x @ u) * u, atol=1e-5)
                    else:
                        assert torch.allclose(y, naive.formula(edit, x), atol=1e-5)

    def test_the_dose_is_the_ratio_of_norms(self, lm: LM) -> None:
        site = Site(1, "heads")
        operation = ScaleElements(mask(naive.size_of(lm, "heads"), 1))
        (x,) = lm.capture(PROMPTS[0], [site], Positions.all())
        edits = (Edit(site, operation, Positions.prompt(), 2.0),)
        (answer,) = lm.generate(PROMPTS[0], Steering(edits), max_new_tokens=2)
        (dose,) = answer.applied.doses
        expected = ((2 * x[site] * operation.direction).norm(dim=-1) / x[site].norm(dim=-1)).mean()
        assert (dose.layer, dose.kind) == (1, "heads")
        assert dose.ratio == pytest.approx(float(expected), rel=1e-3)

    def test_files_and_back(self, lm: LM, tmp_path: Path) -> None:
        for i, steering in enumerate(mixed(lm)):
            if steering is not None:
                save(steering, tmp_path / f"{i}.safetensors")
                assert load_file(tmp_path / f"{i}.safetensors") == steering

    def test_a_width_that_is_not_the_sites(self, lm: LM) -> None:
        wrong = Steering((Edit(Site(1, "heads"), Add(torch.ones(5))),))
        with pytest.raises(TrimtabError, match=r"width at heads\[1\] is 5, this model's is"):
            lm.generate(PROMPTS[0], wrong)

    def test_layers_that_are_not_there(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="layers 0 to 3"):
            lm.capture(PROMPTS[0], [Site(7, "heads")])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "mistral", "olmo2", "phi3"])
def test_rejection_takes_such_edits(name: str) -> None:
    """What is never rejected equals steering at every decoded token; what always is equals not steering."""
    lm = tiny.tiny(name)
    steering = mixed(lm)[0]
    assert steering is not None
    steering = steering.at(Positions.from_last_prompt_token())
    (raw,) = lm.generate(PROMPTS[1], None, max_new_tokens=NEW)
    for schedule in ("optimistic", "fused"):
        never = Rejection(beta=0.0, schedule=schedule)
        (free,) = lm.generate(PROMPTS[1], steering, max_new_tokens=1, rejection=never)
        assert list(free.token_ids) == naive.generate(lm, PROMPTS[1], steering, 1)[0]
        always = Rejection(beta=1.0, schedule=schedule)
        (same,) = lm.generate(PROMPTS[1], steering, max_new_tokens=NEW, rejection=always)
        assert same.token_ids == raw.token_ids
