"""What a teacher says at each token, and how far a student is from it."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import WIDTH, direction, prompt
from torch import Tensor

from trimtab import LM, Add, Edit, Positions, Site, Steering
from trimtab.engines.transformers.forced import PromptAnswer, teacher_forcing
from trimtab.learn import soft_targets as module
from trimtab.learn.own_answers import OPENING, Lesson, helped_token_count
from trimtab.learn.soft_targets import Targets, divergence, soft_targets

VOCABULARY = 300
HELP = 0.6 * Steering((Edit(Site(2), Add(direction(5, 8.0)), Positions.opening(OPENING)),))


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


@pytest.fixture(params=[1.0, 0.25], ids=["as it is", "sharpened"])
def temperature(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(module, "TEMPERATURE", request.param)
    return float(request.param)


def distributions(seed: int, spread: float, tokens: int = 6) -> tuple[Tensor, Tensor]:
    """Logits `[tokens, VOCABULARY]` of a teacher and of a student."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, tokens, VOCABULARY, generator=generator, dtype=torch.float64) * spread
    return teacher, student


def exact(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student), one token after the other."""
    values = []
    for t, s in zip(teacher.double(), student.double(), strict=True):
        p, q = t.softmax(-1), s.softmax(-1)
        values.append(sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True) if a > 0))
    return torch.tensor(values, dtype=torch.float64)


def targets(teacher: Tensor, monkeypatch: pytest.MonkeyPatch, top: int) -> Targets:
    monkeypatch.setattr(module, "TOP", top)
    monkeypatch.setattr(module, "TEMPERATURE", 1.0)
    return module._likeliest(teacher)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_exact_where_the_likeliest_are_all(
    monkeypatch: pytest.MonkeyPatch, spread: float, dtype: torch.dtype
) -> None:
    teacher, student = distributions(0, spread)
    result = divergence(student.to(dtype), targets(teacher.to(dtype), monkeypatch, VOCABULARY + 7))
    assert result.double() == pytest.approx(exact(teacher, student).numpy(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("top", [1, 4, 64, 299])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 30.0])
def test_it_is_never_above_the_exact_one(monkeypatch: pytest.MonkeyPatch, spread: float, top: int) -> None:
    for seed in range(4):
        teacher, student = distributions(seed, spread)
        result = divergence(student.float(), targets(teacher.float(), monkeypatch, top)).double()
        whole = exact(teacher, student)
        assert torch.all(result <= whole + 1e-4 * (1 + whole))
        assert torch.all(result >= -1e-4)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 30.0])
def test_the_teacher_itself_is_no_way_off(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    teacher, _ = distributions(0, spread)
    for top in (4, 64, VOCABULARY):
        result = divergence(teacher.float(), targets(teacher.float(), monkeypatch, top))
        assert result.abs().max() < 1e-4


def test_its_gradient_is_finite_and_leads_to_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    for spread in (0.1, 5.0, 60.0):
        teacher, student = distributions(1, spread)
        soft = targets(teacher.float(), monkeypatch, 64)
        moved = student.float().requires_grad_()
        before = divergence(moved, soft).mean()
        before.backward()
        assert moved.grad is not None
        assert torch.isfinite(moved.grad).all()
        assert divergence((moved - 0.1 * moved.grad).detach(), soft).mean() < before


# ---- the teacher's -------------------------------------------------------------------------------------------


def lesson(lm: LM, seed: int, help_: Steering | None = None) -> Lesson:
    question, plain = prompt(seed, 4 + seed), prompt(seed, 3)
    (answer,) = lm.generate(question, help_, max_new_tokens=9 + seed % 3)
    ids = tuple(answer.token_ids)
    return Lesson(plain, 0, tuple(lm.encode(question)), tuple(lm.encode(plain)), ids, answer.text, help_)


def test_they_are_the_likeliest_tokens_under_the_teachers_prompt(lm: LM, temperature: float) -> None:
    lessons = [lesson(lm, seed) for seed in range(5)]
    calls: list[tuple[int, int]] = []
    with teacher_forcing(lm.model, lm.layout, []) as run:
        soft = soft_targets(run, lessons, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (5, 5)
    for taught, target in zip(lessons, soft, strict=True):
        ids = torch.tensor([[*taught.instructed, *taught.answer[:-1]]])
        with torch.no_grad():
            logits = lm.model(input_ids=ids).logits[0, len(taught.instructed) - 1 :]
        logprobs = (logits / temperature).log_softmax(-1)
        assert target.ids.shape == target.logprobs.shape == (len(taught.answer), module.TOP)
        assert torch.allclose(target.logprobs, logprobs.gather(-1, target.ids), atol=1e-5)
        assert torch.allclose(target.logprobs, logprobs.sort(-1, descending=True).values[:, : module.TOP], atol=1e-5)
        assert target.ids[:, 0].tolist() == list(taught.answer)  # which it wrote greedily
        assert not target.logprobs.requires_grad


def test_a_helped_opening_is_what_the_helped_model_says(lm: LM, temperature: float) -> None:
    """And what comes after it is what the model says by itself."""
    lessons = [lesson(lm, 0), lesson(lm, 1, HELP), lesson(lm, 2, HELP), lesson(lm, 3)]
    with teacher_forcing(lm.model, lm.layout, [Site(2)]) as run:
        soft = soft_targets(run, lessons)
    for taught, target in zip(lessons, soft, strict=True):
        prompt_ids, ids = taught.instructed, torch.tensor([[*taught.instructed, *taught.answer[:-1]]])
        with torch.no_grad():
            bare = (lm.model(input_ids=ids).logits[0, len(prompt_ids) - 1 :] / temperature).log_softmax(-1)
        steered = bare
        if taught.help is not None:
            with lm.steered(taught.help, prompt_lengths=[len(prompt_ids)]), torch.no_grad():
                logits = lm.model(input_ids=ids, use_cache=False).logits[0, len(prompt_ids) - 1 :]
            steered = (logits / temperature).log_softmax(-1)
            assert not torch.allclose(steered[:OPENING], bare[:OPENING], atol=0.1)
        opening = target.logprobs[: helped_token_count(taught)]
        assert torch.allclose(opening, steered.gather(-1, target.ids)[: helped_token_count(taught)], atol=1e-5)
        assert torch.allclose(
            target.logprobs[helped_token_count(taught) :],
            bare.gather(-1, target.ids)[helped_token_count(taught) :],
            atol=1e-5,
        )
        assert (
            target.ids[:, 0].tolist()[: helped_token_count(taught)] == list(taught.answer)[: helped_token_count(taught)]
        )
        assert target.ids.shape == (len(taught.answer), module.TOP)


def test_an_answer_that_is_all_opening(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TEMPERATURE", 1.0)
    short = lesson(lm, 1, HELP)
    short = Lesson(short.query, 0, short.instructed, short.plain, short.answer[:3], short.text, HELP)
    with teacher_forcing(lm.model, lm.layout, [Site(2)]) as run:
        (target,) = soft_targets(run, [short])
        (logits,) = run.logits(
            [PromptAnswer(short.instructed, short.answer)],
            {Site(2): lambda x: 0.6 * direction(5, 8.0).expand(len(x), WIDTH)},
        )
    assert torch.allclose(target.logprobs, logits.log_softmax(-1).gather(-1, target.ids), atol=1e-6)
    assert divergence(logits, target).abs().max() < 1e-5
