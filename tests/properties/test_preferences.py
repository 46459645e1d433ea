"""Learning from pairs of answers by gradient: RePS, BiPO and LoReFT against their formulas, text by text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import WIDTH, prompt
from torch import Tensor

from trimtab import (
    LM,
    Add,
    Edit,
    Pair,
    ReadWrite,
    Site,
    Steering,
    TrimtabError,
    learn_bipo,
    learn_loreft,
    learn_reps,
    save,
)
from trimtab.engines.transformers.forced import PromptAnswer, teacher_forcing
from trimtab.learn.descent import Descent
from trimtab.learn.parameters import LowRankParameters
from trimtab.learn.preferences import NoGainWarning, Preference, hold_out, preferences
from trimtab.methods.bipo import bipo_loss
from trimtab.methods.loreft import RotationParameterSet, loreft_loss, orthonormal
from trimtab.methods.reps import nulled, reps_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore::trimtab.learn.preferences.NoGainWarning"),
    pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning"),
]

FAMILIES = ("llama", "gemma3", "gpt2")
PAIRS = [Pair(prompt(3 * i, 3 + i % 3), prompt(3 * i + 1, 2 + i % 2), prompt(200 + i, 5), "answers") for i in range(9)]
FEW = PAIRS[:4]  # so few that none is held out, and each step sees all of them
LAYER = 1
FACTORS = [0.6, -1.0, 1.4, 0.2]
LEARNERS: dict[str, Callable[..., Steering]] = {"reps": learn_reps, "bipo": learn_bipo, "loreft": learn_loreft}
Formula = Callable[[Tensor], Tensor]
"""What is added to one activation `[width]`."""


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> LM:
    return tiny.tiny("llama")


# ---- the naive forms -----------------------------------------------------------------------------------------


@contextmanager
def weights_frozen(lm: LM) -> Iterator[None]:
    for parameter in lm.model.parameters():
        parameter.requires_grad_(False)
    yield
    for parameter in lm.model.parameters():
        parameter.requires_grad_(True)


def naive_logprob(lm: LM, text: PromptAnswer, formula: Formula | None) -> Tensor:
    """log p(answer | prompt), one whole text without a cache; the formula acts from the last prompt token on."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        if formula is not None:
            first = len(text.prompt) - 1
            new = [x[0, t] + formula(x[0, t]) if t >= first else x[0, t] for t in range(x.shape[1])]
            x = torch.stack(new)[None]
        return x if isinstance(output, Tensor) else (x, *output[1:])

    handle = lm.layout.blocks[LAYER].register_forward_hook(hook)
    try:
        logits = lm.model(input_ids=torch.tensor([[*text.prompt, *text.answer]]), use_cache=False).logits[0].double()
    finally:
        handle.remove()
    total = torch.zeros((), dtype=torch.float64)
    for i, token in enumerate(text.answer):
        row = logits[len(text.prompt) - 1 + i]
        total = total + row[token] - torch.logsumexp(row, 0)
    return total


def naive_texts(lm: LM, pair: Pair) -> tuple[PromptAnswer, PromptAnswer]:
    assert isinstance(pair.prompt, str)
    start = tuple(lm.encode(pair.prompt))
    positive, negative = (
        PromptAnswer(start, tuple(lm.tokenizer(str(answer), add_special_tokens=False)["input_ids"]))
        for answer in (pair.positive, pair.negative)
    )
    return positive, negative


def sigmoid_loss(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(-x)) if x > 0 else -x + torch.log1p(torch.exp(x))


def naive_bipo(lm: LM, v: Tensor, pair: Pair, sign: float, beta: float = 0.1) -> Tensor:
    yes, no = naive_texts(lm, pair)

    def ratio(text: PromptAnswer) -> Tensor:
        return naive_logprob(lm, text, lambda _: sign * v) - naive_logprob(lm, text, None)

    return sigmoid_loss(sign * beta * (ratio(yes) - ratio(no)))


def naive_reps(lm: LM, v: Tensor, pair: Pair, factor: float) -> Tensor:
    yes, no = naive_texts(lm, pair)

    def null(h: Tensor) -> Tensor:
        along = torch.dot(h, v)
        return -along / torch.dot(v, v) * v if along > 0 else 0 * v

    def mean(text: PromptAnswer, formula: Formula) -> Tensor:
        return naive_logprob(lm, text, formula) / len(text.answer)

    gap = float(naive_logprob(lm, no, None) - naive_logprob(lm, yes, None))
    plus = max(gap, 1.0) * mean(yes, lambda _: factor * v) - mean(no, lambda _: factor * v)
    minus = max(-gap, 1.0) * mean(no, null) - mean(yes, null)
    return sigmoid_loss(plus) + sigmoid_loss(minus)


def naive_loreft(lm: LM, rotation: Tensor, source: Tensor, bias: Tensor, pair: Pair) -> Tensor:
    yes, _ = naive_texts(lm, pair)

    def formula(h: Tensor) -> Tensor:
        return rotation.T @ (source @ h + bias - rotation @ h)

    return -naive_logprob(lm, yes, formula) / len(yes.answer)


def naive_adam(start: Sequence[Tensor], gradients: Callable[..., Any], how: Descent, after: Any = None) -> list[Tensor]:
    """The descent, written out: betas 0.9 and 0.98, a warm-up of 5 steps under half a cosine down to a tenth."""
    now = [parameter.clone() for parameter in start]
    first, second = ([torch.zeros_like(parameter) for parameter in now] for _ in range(2))
    for step in range(how.steps):
        rate = how.rate * min(1.0, (step + 1) / 5) * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / how.steps)))
        for i, g in enumerate(gradients(step, *now)):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.98 * second[i] + 0.02 * g * g
            there = first[i] / (1 - 0.9 ** (step + 1))
            size = (second[i] / (1 - 0.98 ** (step + 1))).sqrt() + 1e-8
            now[i] = now[i] - rate * there / size
        if after is not None:
            now = after(now)
    return now


def scale_of(lm: LM, pairs: Sequence[Pair]) -> float:
    """The median root mean square of activations where positive answers are written."""
    norms: list[float] = []
    for pair in pairs:
        text, _ = naive_texts(lm, pair)
        naive_logprob(lm, text, lambda h: norms.append(float(h.detach().pow(2).mean().sqrt())) or torch.zeros_like(h))
    # the formula acts at the last answer token too, from which nothing is drawn
    kept, at = [], 0
    for pair in pairs:
        text, _ = naive_texts(lm, pair)
        kept += norms[at : at + len(text.answer)]
        at += len(text.answer) + 1
    return float(torch.tensor(kept).median())


# ---- losses and gradients ------------------------------------------------------------------------------------


def referred(lm: LM, pairs: Sequence[Pair]) -> list[Preference]:
    with torch.no_grad():
        return [
            Preference(a, b, (float(naive_logprob(lm, a, None)), float(naive_logprob(lm, b, None))))
            for a, b in ((pair.positive, pair.negative) for pair in preferences(lm, pairs))
        ]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("name", ["reps", "bipo"])
def test_a_vectors_loss_and_gradient(lm: LM, name: str, together: bool) -> None:
    pairs = referred(lm, FEW)
    part = LowRankParameters.initial({Site(LAYER): 1.7}, {Site(LAYER): WIDTH}, 0, 0, torch.device("cpu"))
    vector = part.by_site[Site(LAYER)].vector
    with torch.no_grad():
        vector.copy_(tiny.direction(3, 1.5))
    with teacher_forcing(lm.model, lm.layout, [Site(LAYER)]) as run:
        run.shares = run.shares and together
        loss = reps_loss(run, part, pairs, FACTORS) if name == "reps" else bipo_loss(run, part, pairs, FACTORS, 0.1)
        loss.backward()
    v = (1.7 * vector.detach().double()).requires_grad_()
    naive = naive_reps if name == "reps" else naive_bipo
    with weights_frozen(lm):
        wanted = torch.stack([naive(lm, v, pair, factor) for pair, factor in zip(FEW, FACTORS, strict=True)]).sum()
        wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=2e-5)
    torch.testing.assert_close(vector.grad.double() / 1.7, v.grad, rtol=2e-3, atol=2e-5 * float(v.grad.abs().max()))


def test_lorefts_loss_and_gradient(lm: LM) -> None:
    pairs = referred(lm, FEW)
    trained = RotationParameterSet.initial({Site(LAYER): 1.7}, {Site(LAYER): WIDTH}, 3, 0, torch.device("cpu"))
    part = trained.by_site[Site(LAYER)]
    with torch.no_grad():
        part.source.add_(0.3 * torch.randn(part.source.shape, generator=torch.Generator().manual_seed(1)))
        part.bias.add_(0.2)
    with teacher_forcing(lm.model, lm.layout, [Site(LAYER)]) as run:
        loss = loreft_loss(run, trained, pairs, [1.0] * len(pairs))
        loss.backward()
    root = math.sqrt(WIDTH)
    rotation, source = (
        (parameter.detach().double() / root).requires_grad_() for parameter in (part.rotation, part.source)
    )
    bias = (part.bias.detach().double() * 1.7 * root).requires_grad_()
    with weights_frozen(lm):
        wanted = torch.stack([naive_loreft(lm, rotation, source, bias, pair) for pair in FEW]).sum()
        wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=2e-5)
    for mine, other in (
        (part.rotation.grad * root, rotation.grad),
        (part.source.grad * root, source.grad),
        (part.bias.grad / (1.7 * root), bias.grad),
    ):
        torch.testing.assert_close(mine.double(), other, rtol=2e-3, atol=2e-5 * float(other.abs().max()))


# ---- whole descents ------------------------------------------------------------------------------------------

HOW = Descent(steps=3, rate=0.01)


def orders(count: int, steps: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(count, generator=generator).tolist() for _ in range(steps)]


@pytest.mark.parametrize("name", ["reps", "bipo"])
def test_a_vector_is_learned_as_by_hand(llama: LM, name: str) -> None:
    lm = llama
    if name == "reps":
        learned = learn_reps(lm, FEW, LAYER, steps=3, rate=0.01)
        values, naive = [round(0.2 * k, 1) for k in range(1, 11)], naive_reps
        start = 0.05 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0)).double()
    else:
        learned = learn_bipo(lm, FEW, LAYER, steps=3, rate=0.01)
        values, naive = [1.0, -1.0], naive_bipo
        start = torch.zeros(WIDTH, dtype=torch.float64)
    scale = scale_of(lm, FEW)
    draws = torch.Generator().manual_seed(0)
    factors = [[values[int(torch.randint(len(values), (1,), generator=draws))] for _ in FEW] for _ in range(3)]

    def gradients(step: int, vector: Tensor) -> list[Tensor]:
        v = vector.clone().requires_grad_()
        batch = zip(orders(len(FEW), 3)[step], factors[step], strict=True)
        torch.stack([naive(lm, scale * v, FEW[i], factor) for i, factor in batch]).mean().backward()
        assert v.grad is not None
        return [v.grad]

    with weights_frozen(lm):
        (wanted,) = naive_adam([start], gradients, HOW)
    (edit,) = learned.edits
    torch.testing.assert_close(edit.operation.direction.double(), scale * wanted, rtol=1e-3, atol=1e-4 * scale)
    assert (edit.site, str(edit.positions), edit.strength) == (Site(LAYER), "from-last-prompt-token", 1.0)


def test_loreft_is_learned_as_by_hand(llama: LM) -> None:
    lm = llama
    learned = learn_loreft(lm, FEW, LAYER, rank=3, steps=3, rate=0.01)
    scale, root = scale_of(lm, FEW), math.sqrt(WIDTH)
    first = orthonormal(torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))) * root

    def gradients(step: int, *parameters: Tensor) -> list[Tensor]:
        rotation, source, bias = (parameter.clone().requires_grad_() for parameter in parameters)
        losses = [naive_loreft(lm, rotation / root, source / root, scale * root * bias, pair) for pair in FEW]
        torch.stack(losses).mean().backward()
        return [parameter.grad for parameter in (rotation, source, bias) if parameter.grad is not None]

    def project(parameters: list[Tensor]) -> list[Tensor]:
        """Gram and Schmidt."""
        rows: list[Tensor] = []
        for row in parameters[0]:
            for before in rows:
                row = row - torch.dot(row, before) * before
            rows.append(row / row.norm())
        return [root * torch.stack(rows), *parameters[1:]]

    with weights_frozen(lm):
        begin = [first, first.clone(), torch.zeros(3, dtype=torch.float64)]
        rotation, source, bias = naive_adam(begin, gradients, HOW, project)
    operation = learned.edits[0].operation
    assert isinstance(operation, ReadWrite)
    close = {"rtol": 1e-3, "atol": 2e-4}
    torch.testing.assert_close(operation.write.double(), rotation / root, **close)
    torch.testing.assert_close(operation.read.double(), (source - rotation) / root, **close)
    torch.testing.assert_close(operation.bias.double(), scale * root * bias, rtol=1e-3, atol=2e-4 * scale * root)


# ---- what LoReFT holds ---------------------------------------------------------------------------------------


def test_rows_stay_orthonormal_and_the_edit_is_the_formula(lm: LM) -> None:
    learned = learn_loreft(lm, PAIRS[:3], [0, 2], rank=5, steps=12, rate=0.05)
    assert learned.card.measured["loss_after"] < learned.card.measured["loss_before"]
    x = 2 * torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for edit in learned.edits:
        operation = edit.operation
        assert isinstance(operation, ReadWrite)
        rows = operation.write.double()
        torch.testing.assert_close(rows @ rows.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
        source, bias = operation.read.double() + rows, operation.bias.double()
        assert float((source - rows).abs().max()) > 1e-3
        for h in x:
            mine = tiny.naive_read_write(operation, h, 1.0)
            torch.testing.assert_close(mine, h + rows.T @ (source @ h + bias - rows @ h), rtol=1e-12, atol=1e-12)
            # in the subspace, it is where the map says
            torch.testing.assert_close(rows @ mine, source @ h + bias, rtol=1e-5, atol=1e-5)


def test_orthonormal_keeps_what_is_orthonormal_already() -> None:
    rows = orthonormal(torch.randn(4, 9, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(orthonormal(rows), rows)
    scaled = orthonormal(rows * torch.tensor([[2.0], [0.5], [3.0], [1.0]]))
    torch.testing.assert_close(scaled, rows)


@pytest.mark.parametrize("name", LEARNERS)
def test_what_runs_is_what_was_trained(lm: LM, name: str) -> None:
    """The measured log-probabilities are those of the edits, run over whole texts."""
    learned = LEARNERS[name](lm, PAIRS, [1, 2], steps=10, rate=0.02)
    _, aside = hold_out(preferences(lm, PAIRS))
    (pair,) = aside
    logprobs = learned.card.measured["logprob_after"]
    for side, text in (("positive", pair.positive), ("negative", pair.negative)):
        ids = [*text.prompt, *text.answer]
        logits = tiny.naive_logits(lm, ids, len(text.prompt), learned.edits).double().log_softmax(-1)
        at = len(text.prompt) - 1
        mean = sum(float(logits[at + i, token]) for i, token in enumerate(text.answer)) / len(text.answer)
        assert logprobs[side] == pytest.approx(mean, abs=2e-4)


def test_nulled_is_the_formula(llama: LM) -> None:
    learned = learn_reps(llama, FEW, LAYER, steps=3)
    (edit,) = nulled(learned).edits
    v = learned.edits[0].operation.direction.double()
    for h in 2 * torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        wanted = h - max(0.0, float(h @ v)) * v / (v @ v)
        torch.testing.assert_close(tiny.naive_edit(edit, h), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(TrimtabError, match="the vector of an addition"):
        nulled(nulled(learned))
    zero = Steering((Edit(Site(LAYER), Add(torch.zeros(WIDTH)), edit.positions),), learned.card)
    with pytest.raises(TrimtabError, match="no direction to null"):
        nulled(zero)


# ---- what holds of all three ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEARNERS)
def test_the_same_seed_gives_the_same_bytes(llama: LM, name: str, tmp_path: Path) -> None:
    learn, files = LEARNERS[name], []
    for i, seed in enumerate((0, 0, 1)):
        files.append(tmp_path / f"{i}.safetensors")
        save(learn(llama, PAIRS, LAYER, steps=6, rate=0.02, seed=seed), files[-1])
    same, again, other = (file.read_bytes() for file in files)
    assert same == again
    assert same != other


@pytest.mark.parametrize("name", LEARNERS)
def test_the_loss_falls_and_progress_ends(llama: LM, name: str) -> None:
    seen: list[tuple[int, int]] = []
    learned = LEARNERS[name](llama, FEW, LAYER, steps=20, rate=0.02, progress=lambda *now: seen.append(now))
    measured = learned.card.measured
    assert measured["loss_after"] < measured["loss_before"]
    assert measured["logprob_after"]["positive"] > measured["logprob_before"]["positive"]
    assert (measured["pairs"], measured["held_out"], measured["steps"]) == (4, 0, 20)
    assert seen[-1] == (24, 24)
    assert seen == sorted(seen)
    assert (learned.card.method, learned.card.options["layers"]) == (name, [LAYER])


@pytest.mark.parametrize("name", LEARNERS)
def test_an_interruption_keeps_the_best(llama: LM, name: str) -> None:
    def stop(done: int, _total: int) -> None:
        if done == len(PAIRS) + 2 + 13:
            raise KeyboardInterrupt

    kept = LEARNERS[name](llama, PAIRS, LAYER, steps=30, rate=0.02, held_out=PAIRS[:2], progress=stop)
    measured = kept.card.measured
    assert measured["interrupted"] is True
    assert (measured["steps"], measured["pairs"], measured["held_out"]) == (13, 9, 2)
    assert measured["best_step"] in (0, 10)
    assert measured["loss_after"] <= measured["loss_before"]
    assert all(parameter.requires_grad for parameter in llama.model.parameters())  # the model is as it was
    whole = LEARNERS[name](llama, FEW, LAYER, steps=2, rate=0.02, held_out=PAIRS[:2])
    assert "interrupted" not in whole.card.measured


def test_held_out_pairs_decide() -> None:
    lm = tiny.tiny("llama")
    twice = [*PAIRS, *(Pair(pair.negative, pair.positive, pair.prompt, "answers") for pair in PAIRS)]
    learned, aside = hold_out(preferences(lm, twice))
    assert (len(learned), len(aside)) == (16, 2)
    assert not {pair.positive.prompt for pair in learned} & {pair.positive.prompt for pair in aside}
    swapped = [Pair(pair.negative, pair.positive, pair.prompt, "answers") for pair in FEW]
    with pytest.warns(NoGainWarning, match="4 held-out pairs"):
        nothing = learn_bipo(lm, FEW, LAYER, steps=40, rate=0.02, held_out=swapped)
    assert (nothing.card.measured["best_step"], nothing.card.measured["steps"]) == (0, 30)
    assert float(nothing.edits[0].operation.direction.norm()) == 0


LETTERS = [Pair("(A)", "(B)", "which?", "letters")]
WRONG: dict[str, tuple[str, list[Pair], dict[str, Any], str]] = {
    "none": ("bipo", [], {}, "there is no pair to learn from"),
    "shape": ("reps", LETTERS, {}, "pair 1: .*not from pairs of letters; give prompt"),
    "held out": ("loreft", FEW, {"held_out": LETTERS}, "held-out pair 1: .*pairs of letters"),
    "beta": ("bipo", FEW, {"beta": 0.0}, "above 0, got 0.0"),
    "factors": ("reps", FEW, {"factors": (1.0, -1.0)}, r"factors are strengths above 0.*-1\.0"),
    "rank": ("loreft", FEW, {"rank": 0}, "whole number, 1 or more, got 0"),
    "high rank": ("loreft", FEW, {"rank": 33}, "rank is 33, .* only 32 wide"),
    "steps": ("reps", FEW, {"steps": 0}, "steps of a descent is above 0"),
    "long": ("bipo", [Pair(prompt(0, 130), "w5", "w4", "answers")], {}, "pair 1: a prompt with its answer has"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cant_be(llama: LM, case: str) -> None:
    name, pairs, more, words = WRONG[case]
    with pytest.raises(TrimtabError, match=words):
        LEARNERS[name](llama, pairs, LAYER, **more)


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}w70{% elif m.role == 'user' %}w71{% else %}w72{% endif %}"
    " {{ m.content }} {% endfor %}{% if add_generation_prompt %}w72{% endif %}"
)


@pytest.mark.parametrize("name", LEARNERS)
def test_system_prompts_and_messages(name: str) -> None:
    lm = tiny.tiny("llama")
    lm.tokenizer.chat_template = TEMPLATE
    talk = [{"role": "user", "content": "w9 w8"}, {"role": "assistant", "content": "w7"}]
    ends = [[{"role": "user", "content": "w6"}, {"role": "assistant", "content": answer}] for answer in ("w5 w4", "w3")]
    pairs = [
        Pair("w11 w12", "w13", "w10", "answers", positive_system="w20 w21", negative_system="w22"),
        Pair(ends[0], ends[1], talk, "answers"),  # type: ignore[arg-type]
    ]
    fresh, continued = preferences(lm, pairs)
    assert fresh.positive == PromptAnswer((70, 20, 21, 71, 10, 72), (11, 12))
    assert fresh.negative == PromptAnswer((70, 22, 71, 10, 72), (13,))
    assert continued.positive == PromptAnswer((71, 9, 8, 72, 7, 71, 6, 72), (5, 4))
    assert continued.negative == PromptAnswer((71, 9, 8, 72, 7, 71, 6, 72), (3,))
    learned = LEARNERS[name](lm, pairs, LAYER, steps=10, rate=0.02)
    assert learned.card.measured["loss_after"] < learned.card.measured["loss_before"]


def test_factors_are_one_a_text(llama: LM) -> None:
    texts = [pair.positive for pair in preferences(llama, FEW)]
    with (
        teacher_forcing(llama.model, llama.layout, [Site(LAYER)]) as run,
        pytest.raises(TrimtabError, match="one factor"),
    ):
        run.logits(texts, {}, [1.0])
