"""Tokens chosen for a whole batch are those that transformers' own processors would allow each row, and as likely."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tiny import prompt
from torch import Tensor

from trimtab import LM, TrimtabError
from trimtab.engines.transformers import compat, drawing
from trimtab.engines.transformers.drawing import SamplingLimits, draw
from trimtab.engines.transformers.sampling import (
    NUMBERS_ON_DEVICE,
    BatchSampler,
    RowSampler,
    Sampling,
    Settings,
    seed_of,
)

CPU = torch.device("cpu")
GRID = {
    "temperature": (0.5, 1.0, 1.7),
    "top_p": (0.0, 0.3, 0.9, 1.0),
    "top_k": (0, 1, 5, 40),
    "min_p": (0.0, 0.05, 0.5),
    "repetition_penalty": (None, 1.3, 0.7),
}
EVERY = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def logits_of(seed: int, rows: int, size: int) -> Tensor:
    """From nearly flat to nearly certain ones."""
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(rows, size, generator=chance) * torch.logspace(-1, 1.3, rows)[:, None]


def settings_of(lm: LM, sampling: Sampling) -> Settings:
    return Settings.of(lm.model, sampling.options, 4, CPU)


def by_transformers(lm: LM, sampling: Sampling, ids: list[int], logits: Tensor) -> Tensor:
    """The probabilities of one row's tokens, naively."""
    processors = compat.logits_processors(lm.model, sampling.options, 4, CPU)
    return processors(torch.tensor([ids]), logits[None].clone()).softmax(-1)[0]


class Numbers(RowSampler):
    """A row whose random numbers are these."""

    def __init__(self, settings: Settings, numbers: Tensor) -> None:
        super().__init__(settings, 0, len(numbers))
        self.numbers = numbers


def drawn_at(settings: list[Settings], prompts: list[list[int]], logits: Tensor, numbers: Tensor) -> Tensor:
    """The tokens `[rows, numbers]` of rows with these settings, at these random numbers."""
    drawn = []
    for number in numbers.tolist():
        rows = [Numbers(setting, torch.tensor([number])) for setting in settings]
        batch = BatchSampler(rows, prompts, [[] for _ in rows], CPU)
        drawn.append(batch.choose(logits))
    return torch.stack(drawn, 1)


class TestTheDistribution:
    @pytest.mark.parametrize("seed", range(4))
    def test_rows_of_all_settings_in_one_batch(self, lm: LM, seed: int) -> None:
        """Each row's token at a number is where the cumulative probabilities pass it, by transformers' processors."""
        chance = random.Random(seed)
        chosen = [Sampling(seed=1, **chances) for chances in chance.sample(EVERY, 48)]
        logits = logits_of(seed, len(chosen), 90)
        prompts = [[chance.randrange(90) for _ in range(4)] for _ in chosen]
        numbers = torch.tensor([0.0, 0.2, 0.5, 0.77, 0.93, 0.999])
        drawn_tokens = drawn_at([settings_of(lm, way) for way in chosen], prompts, logits, numbers)
        for row, sampling in enumerate(chosen):
            expected = by_transformers(lm, sampling, prompts[row], logits[row]).double()
            sums = expected.cumsum(-1)
            for number, token in zip(numbers.double(), drawn_tokens[row].tolist(), strict=True):
                assert expected[token] > 0, sampling
                assert sums[token] >= number - 1e-5
                assert sums[token] - expected[token] <= number + 1e-5

    @pytest.mark.parametrize("size", [300, 5000])
    @pytest.mark.parametrize("most", [8, 64, drawing.MOST])
    def test_what_is_kept(self, lm: LM, monkeypatch: pytest.MonkeyPatch, size: int, most: int) -> None:
        """However many of the likeliest tokens are looked at first; and as on a GPU, where all are sorted."""
        monkeypatch.setattr(drawing, "MOST", most)
        chance = random.Random(size)
        every = [options for options in EVERY if options["repetition_penalty"] is None]
        chosen = [Sampling(seed=1, **{**options, "temperature": 1.0}) for options in chance.sample(every, 40)]
        logits = logits_of(7, len(chosen), size)
        probabilities = logits.softmax(-1)
        limits = [(way.top_k or size, way.top_p, way.min_p) for way in chosen]
        kept = SamplingLimits.of(limits, CPU)
        least = kept.min_kept_probability(probabilities)
        on_device = kept._min_kept(probabilities.sort(-1, descending=True).values)[0]
        assert torch.equal(least, on_device)
        for row, sampling in enumerate(chosen):
            expected = by_transformers(lm, sampling, [0], logits[row]) > 0
            kept_here = probabilities[row] >= least[row]
            differ = (expected != kept_here).sum()
            assert differ <= 1  # where the sum meets top_p to the last digit, rounding decides
            if differ:
                assert abs(float(probabilities[row][kept_here].sum()) - sampling.top_p) < 1e-4 + float(least[row])

    def test_the_shares_are_those_of_the_probabilities(self) -> None:
        probabilities = logits_of(3, 6, 20).softmax(-1)
        numbers = torch.rand(6, 20000, generator=torch.Generator().manual_seed(0))
        best = probabilities.argmax(-1, keepdim=True)
        tokens = torch.cat([draw(probabilities, numbers[:, i, None], best) for i in range(numbers.shape[1])], 1)
        shares = torch.stack([(tokens == token).float().mean(-1) for token in range(20)], 1)
        assert (shares - probabilities).abs().max() < 0.015

    def test_tokens_that_cant_come_never_do(self) -> None:
        weights = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
        best = weights.argmax(-1, keepdim=True)
        for number in (0.0, 0.3, 0.5, 1 - 2**-24, 1.0):
            tokens = draw(weights, torch.full((2, 1), number), best)
            assert (weights.gather(1, tokens) > 0).all()

    def test_equally_likely_tokens_are_kept_together(self) -> None:
        probabilities = torch.tensor([[0.4, 0.2, 0.2, 0.2]])
        assert SamplingLimits.of([(4, 0.5, 0.0)], CPU).min_kept_probability(probabilities) == np.float32(0.2)


class TestGreedyRows:
    def test_the_best_after_penalties(self, lm: LM) -> None:
        logits = logits_of(5, 6, 90)
        ids = [[int(logits[row].argmax()), 3, 4, 5] for row in range(6)]
        penalties = (1.0, 1.5, 4.0, 0.5, 1.0, 2.0)
        chosen = [Sampling(repetition_penalty=penalty) for penalty in penalties]
        rows = [RowSampler(settings_of(lm, way), None, 5) for way in chosen]
        answers: list[list[int]] = [[] for _ in rows]
        batch = BatchSampler(rows, ids, answers, CPU)
        kept = logits.clone()
        for _ in range(5):
            tokens = batch.choose(logits).tolist()
            for row, (sampling, token) in enumerate(zip(chosen, tokens, strict=True)):
                assert token == by_transformers(lm, sampling, [*ids[row], *answers[row]], logits[row]).argmax()
                answers[row].append(token)
        assert torch.equal(logits, kept)
        assert len({tuple(answer) for answer in answers}) > 3

    def test_ends_are_kept_away_until_there_are_enough_tokens(self, lm: LM) -> None:
        logits = torch.zeros(3, 90)
        logits[:, 7], logits[:, 8], logits[:, 9] = 3, 2, 1
        options: dict[str, Any] = {"do_sample": False, "eos_token_id": [7, 8]}
        settings = [Settings.of(lm.model, {**options, "min_new_tokens": n}, 4, CPU) for n in (None, 1, 3)]
        rows = [RowSampler(setting, None, 9) for setting in settings]
        answers: list[list[int]] = [[], [], [5]]
        batch = BatchSampler(rows, [[1]] * 3, answers, CPU)
        drawn = []
        for _ in range(4):
            drawn.append(batch.choose(logits).tolist())
            for answer, token in zip(answers, drawn[-1], strict=True):
                answer.append(token)
        assert [list(column) for column in zip(*drawn, strict=True)] == [[7] * 4, [9, 7, 7, 7], [9, 9, 7, 7]]


class TestWhatTransformersDoes:
    def test_other_processors_are_run_row_by_row(self, lm: LM) -> None:
        options: dict[str, Any] = {"do_sample": True, "top_k": 0, "no_repeat_ngram_size": 2, "temperature": 0.7}
        settings = Settings.of(lm.model, options, 4, CPU)
        assert settings.fallback_processors
        logits = torch.zeros(2, 90)
        logits[:, 3] = 90
        rows = [Numbers(setting, torch.full((3,), 0.5)) for setting in (settings, Settings(True))]
        tokens = BatchSampler(rows, [[5, 3, 5]] * 2, [[], []], CPU).choose(logits)
        assert tokens[0] != 3  # 5 3 would come twice
        assert tokens[1] == 3

    def test_settings_are_read_off_the_processors(self, lm: LM) -> None:
        assert settings_of(lm, Sampling(0.7, 0.9, 1, 5, 0.1, 1.2)) == Settings(
            True, repetition_penalty=1.2, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1
        )
        assert settings_of(lm, Sampling(1.0)) == Settings(True)
        assert not settings_of(lm, Sampling(1.0)).filters


class TestSeeds:
    def test_a_rows_numbers_are_its_own(self) -> None:
        """Whatever is drawn beside it, wherever it stands, however long it may become."""
        sampler = RowSampler(Settings(True), 5, 10)
        longer = RowSampler(Settings(True), 5, 300)
        assert sampler.numbers is not None
        assert longer.numbers is not None
        assert torch.equal(sampler.numbers, longer.numbers[:10])
        logits = logits_of(1, 3, 50)
        answers: list[list[int]] = [[], [], []]
        rows = [RowSampler(Settings(True), seed, 200) for seed in (4, 5, 6)]
        batch = BatchSampler(rows, [[1]] * 3, answers, CPU)
        for _ in range(2 * NUMBERS_ON_DEVICE + 5):
            for answer, token in zip(answers, batch.choose(logits).tolist(), strict=True):
                answer.append(token)
        alone: list[int] = []
        for _ in range(2 * NUMBERS_ON_DEVICE + 5):  # made anew before each token, as when the batch changes
            batch = BatchSampler([longer], [[1]], [alone], CPU)
            alone.append(int(batch.choose(logits[1:2])))
        assert alone == answers[1]

    def test_seeds_of_several_answers_differ(self) -> None:
        assert seed_of(7, 0) == 7
        assert len({seed_of(seed, n) for seed in range(30) for n in range(30)}) > 870

    def test_without_a_seed_they_differ_from_run_to_run(self) -> None:
        numbers, other_numbers = (RowSampler(Settings(True), None, 20).numbers for _ in range(2))
        assert numbers is not None
        assert other_numbers is not None
        assert not torch.equal(numbers, other_numbers)


@pytest.mark.parametrize("sample", [{}, {"top_k": 4}, {"top_p": 0.8, "min_p": 0.02}, {"repetition_penalty": 1.5}])
def test_answers_to_a_list_are_those_of_its_places(lm: LM, sample: dict[str, Any]) -> None:
    """Not of batches: one prompt's samples are the same whatever is answered beside it, and as many times as asked."""
    prompts = [prompt(n, 4 + n) for n in (1, 2, 3, 1, 1)]
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "chat": False, "seed": 3, **sample}
    together = [answer.token_ids for answer in lm.generate(prompts, **options)]
    assert together == [answer.token_ids for answer in lm.generate(prompts, batch_size=2, **options)]
    assert together[0] == lm.generate(prompts[0], **options)[0].token_ids
    assert together[1] == lm.generate(["a b", prompts[1]], **options)[1].token_ids
    assert len({together[0], together[3], together[4]}) == 3
    several = [answer.token_ids for answer in lm.generate(prompts[:2], num_return_sequences=3, **options)]
    assert len(several) == 6
    assert several[0] == together[0]
    assert len(set(several)) == 6


def test_torchs_own_seed_makes_samples_repeatable(lm: LM) -> None:
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 8, "chat": False}

    def sampled() -> tuple[int, ...]:
        torch.manual_seed(11)
        return lm.generate(prompt(1, 5), **options)[0].token_ids

    assert sampled() == sampled()
    state = torch.get_rng_state()
    lm.generate(prompt(1, 5), seed=1, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_sampled_answer_without_numbers_is_an_error(lm: LM) -> None:
    from trimtab import Add, Edit, Positions, Site, Steering

    wild = Steering((Edit(Site(1), Add(1e300 * tiny.direction(1)), Positions.generated()),))
    with pytest.raises(TrimtabError, match="lower the strength"):
        lm.generate(prompt(1, 5), wild, do_sample=True, max_new_tokens=5, chat=False, seed=1)
