"""Gates: what they read, decided by request inside a batch or at each token; shut ones change nothing."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import direction, naive_generate, prompt, read_write

from trimtab import (
    LM,
    Add,
    Edit,
    Positions,
    Rejection,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    load,
    save,
)
from trimtab.engines.transformers import read as reading_module
from trimtab.steering.gates import ALWAYS, MEASURES, NEVER, Reading

PROMPTS = [prompt(seed, length) for seed, length in enumerate((4, 9, 6, 13, 5))]
FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "falcon", "opt", "gpt_neox")
READ_ON = ("llama", "gpt2")
NEW = 5
EDIT = Edit(Site(2), Add(direction(1, 4.0)), Positions.from_last_prompt_token())


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def naive_reading(lm: LM, text: str, reading: Reading) -> torch.Tensor:
    """One whole prompt alone, every activation by transformers' own `hidden_states`."""
    ids = lm.encode(text)
    with torch.no_grad():
        states = lm.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    x = states[reading.site.layer + 1][0]
    rows = []
    for start, stop in reading.positions.resolve(len(ids)):
        rows += list(x[start : len(ids) if stop is None else min(stop, len(ids))])
    if reading.pool == "unit-mean":
        rows = [row / row.norm() for row in rows]
    return sum(rows) / len(rows)  # type: ignore[return-value]


def naive_measure(gate: Threshold, x: torch.Tensor) -> float:
    v = gate.direction.to(x.dtype)
    if gate.measure == "dot":
        return float(torch.dot(x, v))
    if gate.measure == "probability":
        return float(1 / (1 + torch.exp(-(torch.dot(x, v) + gate.bias))))
    if gate.measure == "cast":
        c = v / v.norm()
        v = torch.tanh(torch.dot(c, x) * c)
    cosine = float(torch.dot(x, v) / (x.norm() * v.norm()))
    return abs(cosine) if gate.measure == "ratio" else cosine


def middle(values: torch.Tensor) -> float:
    """Half-way between two of these values, about as many of which are above as below."""
    ordered = values.double().sort().values
    return float(ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean())


READINGS = [
    (Positions.last_prompt_token(), "mean"),
    (Positions.span(1, 4), "mean"),
    (Positions.all(), "mean"),
    (Positions.all_but_first(), "unit-mean"),
]


class TestMeasures:
    @pytest.mark.parametrize("measure", MEASURES)
    def test_each_is_its_formula(self, measure: str) -> None:
        """Which side of a threshold an activation is on, just below and just above what the formula gives."""
        x = torch.randn(20, tiny.WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for bias in (0.0, -0.3) if measure == "probability" else (0.0,):
            for row in x:
                value = naive_measure(Threshold(Site(1), direction(3, 2.0), 0.0, measure, bias=bias), row)
                for threshold, opened in ((value - 1e-5, True), (value + 1e-5, False)):
                    gate = Threshold(Site(1), direction(3, 2.0), threshold, measure, bias=bias)
                    assert gate.is_open({gate.reading: row}) is opened
                    assert (~gate).is_open({gate.reading: row}) is not opened


@cache
def steered_naively(lm: LM, text: str) -> tuple[list[int], list[float]]:
    """Where the gate is open, whichever it is."""
    return naive_generate(lm, text, Steering((EDIT,)), NEW)


@cache
def unsteered(lm: LM) -> Any:
    return lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)


class TestDecidedByThePrompt:
    @pytest.mark.long_unless(lambda lm, measure: measure == "dot" or lm == "llama")
    @pytest.mark.long_unless(lambda lm, positions: lm in READ_ON or positions == Positions.all_but_first())
    @pytest.mark.parametrize("measure", MEASURES)
    @pytest.mark.parametrize(("positions", "pool"), READINGS, ids=str)
    def test_each_request_is_decided_as_alone(self, lm: LM, measure: str, positions: Positions, pool: str) -> None:
        more: dict[str, Any] = {"positions": positions, "pool": pool, "bias": 0.1 * (measure == "probability")}
        probe = Threshold(Site(1), direction(3, 2.0), 0.0, measure, **more)
        values = sorted(naive_measure(probe, naive_reading(lm, p, probe.reading)) for p in PROMPTS)
        middle = (values[1] + values[2]) / 2  # shut for two, open for three
        gate = Threshold(Site(1), direction(3, 2.0), middle, measure, **more)
        opened = [naive_measure(gate, naive_reading(lm, p, gate.reading)) > middle for p in PROMPTS]
        assert sum(opened) == 3
        plain = unsteered(lm)
        steered = lm.generate(PROMPTS, Steering((EDIT,)).when(gate), max_new_tokens=NEW, logprobs=True)
        negated = lm.generate(PROMPTS, Steering((EDIT,)).when(~gate), max_new_tokens=NEW, logprobs=True)
        for i, text in enumerate(PROMPTS):
            for answer, acts in ((steered[i], opened[i]), (negated[i], not opened[i])):
                assert bool(answer.applied.edits) == acts
                if acts:
                    tokens, logprobs = steered_naively(lm, text)
                    assert list(answer.token_ids) == tokens
                    assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
                else:
                    assert answer.token_ids == plain[i].token_ids
                    assert answer.logprobs == plain[i].logprobs

    def test_other_ways_into_the_model_decide_alike(self, lm: LM) -> None:
        reading = Reading(Site(1), Positions.all_but_first(), "unit-mean")
        height = middle(torch.stack([naive_reading(lm, p, reading) @ direction(3) for p in PROMPTS]))
        gate = Threshold(Site(1), direction(3), height, positions=reading.positions, pool=reading.pool)
        rows = [Steering((EDIT,)).when(gate)] * len(PROMPTS)
        ids = [lm.encode(p) for p in PROMPTS]
        width = max(map(len, ids))
        padded = torch.tensor([[0] * (width - len(i)) + i for i in ids])
        mask = torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in ids])
        answers = lm.generate(PROMPTS, rows, max_new_tokens=NEW)
        with lm.steered(rows):
            inside = lm.model.generate(
                input_ids=padded, attention_mask=mask, pad_token_id=0, max_new_tokens=NEW, do_sample=False
            )
        assert inside[:, width:].tolist() == [list(a.token_ids) for a in answers]
        assert len({bool(a.applied.edits) for a in answers}) == 2, "the gate is open for some of the prompts only"

    def test_reading_is_done_in_batches(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = tiny.tiny("llama")
        passes = []
        original = reading_module.run_decoder
        monkeypatch.setattr(
            reading_module, "run_decoder", lambda *a, **k: passes.append(len(a[1]["input_ids"])) or original(*a, **k)
        )
        everywhere = Steering((EDIT,)).at(Positions.all())
        gated = everywhere.when(Threshold(EDIT.site, direction(3), 0.0))  # shallower, the generating pass would tell
        lm.generate(PROMPTS, [gated, None, gated, gated, gated], max_new_tokens=1)
        assert passes == [4]

    def test_truth_table(self) -> None:
        x = {Reading(Site(0)): torch.tensor([3.0, 4.0])}
        yes, no = Threshold(Site(0), torch.tensor([1.0, 0]), 2.0), Threshold(Site(0), torch.tensor([1.0, 0]), 4.0)
        for a, p in ((yes, True), (no, False)):
            assert (~a).is_open(x) is not p
            for b, q in ((yes, True), (no, False)):
                assert (a & b).is_open(x) is (p and q)
                assert (a | b).is_open(x) is (p or q)
        each = Threshold(Site(0), torch.tensor([1.0, 0]), 2.0, each_token=True)
        assert (yes & each).settled(x) == each == (no | each).settled(x)
        assert (no & each).settled(x) == NEVER
        assert (yes | each).settled(x) == ALWAYS
        assert (~(no | each)).settled(x) == ~each
        with pytest.raises(ValueError, match="decided at each token"):
            each.is_open(x)


class TestDecidedAtEachToken:
    @pytest.mark.parametrize(
        "operation",
        [Add(direction(1, 3.0)), SetProjection(direction(2), 2.0, keep_norm=True), read_write(3, 2, low=-0.3)],
    )
    def test_it_acts_where_the_condition_holds(self, lm: LM, operation: Any) -> None:
        (x,) = lm.capture(PROMPTS[3], [2], Positions.all())
        test = Threshold(Site(2), direction(3), middle(x[Site(2)] @ direction(3)), each_token=True)
        cosines = (x[Site(2)] @ direction(4)) / x[Site(2)].norm(dim=-1)
        other = Threshold(Site(2), direction(4), middle(cosines), "cosine", each_token=True)
        edit = Edit(Site(2), operation, Positions.all(), 1.0)
        for gate in (test, ~test, test & ~other, test | other):
            (before,) = lm.capture(PROMPTS[3], [2], Positions.all())
            with lm.steered(Steering((edit,)).when(gate)):
                (after,) = lm.capture(PROMPTS[3], [2], Positions.all())
            acted = 0
            for x, y in zip(before[Site(2)], after[Site(2)], strict=True):
                a = naive_measure(test, x) > test.threshold
                b = naive_measure(other, x) > other.threshold
                holds = {str(test): a, str(~test): not a, str(test & ~other): a and not b, str(test | other): a or b}
                if holds[str(gate)]:
                    acted += 1
                    assert torch.allclose(y, tiny.naive_edit(edit, x), atol=1e-5)
                else:
                    assert torch.equal(y, x)
            assert 0 < acted < len(before[Site(2)])

    def test_a_mixed_batch_with_a_cache_is_the_text_alone(self, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        (x,) = lm.capture(PROMPTS[3], [2], Positions.all())
        height = middle(x[Site(2)] @ direction(3))
        test = Threshold(Site(2), direction(3), height, each_token=True)
        by_prompt = Threshold(Site(1), direction(5), -1e9)
        edit = Edit(Site(2), Add(direction(1, 3.0)), Positions.all())
        gated = Steering((edit,)).when(test & by_prompt)
        shut = Steering((edit,)).when(test & ~by_prompt)
        rows = [gated, None, gated, shut, 0.5 * gated]
        answers = lm.generate(PROMPTS, rows, max_new_tokens=NEW, logprobs=True)
        plain = lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
        assert answers[3].logprobs == plain[3].logprobs
        assert "each token" in answers[0].applied.edits[0]
        original = tiny.naive_edit
        monkeypatch.setattr(
            tiny, "naive_edit", lambda e, x: original(e, x) if float(x @ direction(3).to(x)) > height else x
        )
        for i in (0, 2, 4):
            tokens, logprobs = naive_generate(lm, PROMPTS[i], rows[i], NEW)
            assert list(answers[i].token_ids) == tokens
            assert answers[i].logprobs == pytest.approx(logprobs, abs=1e-4)

    def test_rejection_composes(self) -> None:
        lm = tiny.tiny("llama")
        for gate in (Threshold(Site(1), direction(3), 1e9), Threshold(Site(2), direction(3), 1e9, each_token=True)):
            gated = Steering((EDIT,)).when(gate)
            gated_answers = lm.generate(PROMPTS, gated, max_new_tokens=NEW, rejection=Rejection(ladder="strength"))
            plain = lm.generate(PROMPTS, max_new_tokens=NEW)
            assert [a.token_ids for a in gated_answers] == [a.token_ids for a in plain]
        opened = Threshold(Site(2), direction(3), -1e9, each_token=True)
        ungated_answers = lm.generate(
            PROMPTS, Steering((EDIT,)).when(opened), max_new_tokens=NEW, rejection=Rejection(ladder="strength")
        )
        two = lm.generate(PROMPTS, Steering((EDIT,)), max_new_tokens=NEW, rejection=Rejection(ladder="strength"))
        assert [a.token_ids for a in ungated_answers] == [a.token_ids for a in two]


def test_files(tmp_path: Path) -> None:
    last = Threshold(Site(1), direction(3), 0.5)
    pooled = Threshold(
        Site(1), direction(3), 0.5, "probability", bias=-2.0, positions=Positions.all(), pool="unit-mean"
    )
    each = Threshold(Site(2), direction(3), 0.5, "cast", each_token=True)
    steering = Steering((EDIT,)).when((last | ~pooled) & each)
    save(steering, tmp_path / "gated.safetensors")
    assert load(tmp_path / "gated.safetensors") == steering


def test_bad_input() -> None:
    lm = tiny.tiny("llama")
    elsewhere = Steering((EDIT,)).when(Threshold(Site(1), direction(3), 0.0, each_token=True))
    with pytest.raises(TrimtabError, match=r"reads residual\[1\], and its edit is at residual\[2\]"):
        lm.generate(PROMPTS, elsewhere)
    narrow = Steering((EDIT,)).when(Threshold(Site(1), torch.ones(3), 0.0))
    with pytest.raises(TrimtabError, match=r"width at residual\[1\] is 3, this model's is 32"):
        lm.generate(PROMPTS, narrow)
    beyond = Threshold(Site(1), direction(3), 0.0, positions=Positions.span(7, 9))
    with pytest.raises(TrimtabError, match="span 7:9 is not in the prompt, which has 4 tokens"):
        lm.generate(PROMPTS, Steering((EDIT,)).when(beyond), max_new_tokens=NEW)
    late = Threshold(Site(1), direction(3), 0.0, positions=Positions.generated())
    with pytest.raises(TrimtabError, match="but a prompt of 4 tokens has no such tokens"):
        lm.generate(PROMPTS, Steering((EDIT,)).when(late), max_new_tokens=NEW)
    for more in ({"bias": 1.0}, {"pool": "max"}, {"each_token": True, "pool": "unit-mean"}, {"bias": float("nan")}):
        with pytest.raises(ValueError, match=r"bias|pool"):
            Threshold(Site(1), direction(3), 0.0, **more)  # type: ignore[arg-type]
