"""What monitors read while a batch decodes, and what they do, compared with readings of the final text."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import tiny
import torch
from batches import drain, long_llama
from tiny import direction, prompt

from trimtab import (
    LM,
    Add,
    Edit,
    Monitor,
    Positions,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
)
from trimtab.engines.request import Text
from trimtab.engines.transformers.batch_row import GenerationRequest, GenerationResponse
from trimtab.engines.transformers.chunked_prefill import CHUNK
from trimtab.engines.transformers.clean import CleanBatch
from trimtab.steering.monitors import ACTIONS

FAMILIES = ["llama", "gemma3", "qwen3_moe", "gpt2", "opt"]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(scope="module")
def llama() -> LM:
    return tiny.tiny("llama")


def added(layer: int, seed: int, scale: float, positions: Positions | None = None) -> Steering:
    return Steering((Edit(Site(layer), Add(direction(seed, scale)), positions or Positions.all()),))


STEERINGS = [None, added(1, 1, 3.0), added(2, 2, 2.0, Positions.generated()), added(0, 3, 2.0).when(
    Threshold(Site(0), direction(9), 0.0)
), added(1, 4, 2.0, Positions.from_last_prompt_token()).when(~Threshold(Site(2), direction(9), 0.0))]  # fmt: skip

MONITORS = (
    Monitor.of("projection", added(2, 5, 7.0)),
    Monitor("probability", Threshold(Site(2), direction(6, 0.3), 0.5, "probability", bias=0.2), 0.5),
    Monitor("cosine", Threshold(Site(1), direction(7), 0.0, "cosine")),
    Monitor("before", Threshold(Site(3, "block_input"), direction(8), 0.0)),
    Monitor.of("early", added(0, 8, 1.0)),
)


def read_again(lm: LM, ids: Sequence[int], start: int, steering: Steering | None, monitor: Monitor) -> list[float]:
    """What the monitor's condition says of the final text, read in one pass, under the steering that acted."""
    text = Text(list(ids), range(len(ids)))
    with lm.steered(steering, prompt_lengths=[start]) if steering is not None else nullcontext():
        (batch,) = lm.read([[text]], [monitor.site])
    values = batch.values[monitor.site][0][0]
    return [monitor.condition.value(x) for x in values[start - 1 :]]


class TestValues:
    @pytest.mark.parametrize("steering", range(len(STEERINGS)))
    def test_they_are_those_of_the_final_text(self, lm: LM, steering: int) -> None:
        """For several prompts in one batch, gates decided on the way and elsewhere, several measures and sites."""
        acting = STEERINGS[steering]
        texts = [prompt(10 * steering + n, length) for n, length in enumerate((6, 3, 9))]
        answers = lm.generate(texts, acting, max_new_tokens=5, monitors=MONITORS, chat=False)
        for text, answer in zip(texts, answers, strict=True):
            ids = lm.encode(text, chat=False)
            read = [*ids, *answer.token_ids[:-1]]
            acted = acting if answer.applied.edits else None
            acted = acted and Steering(tuple(Edit(e.site, e.operation, e.positions, e.strength) for e in acted.edits))
            assert answer.monitors is not None
            assert list(answer.monitors) == [monitor.name for monitor in MONITORS]
            for monitor in MONITORS:
                wanted = read_again(lm, read, len(ids), acted, monitor)
                assert answer.monitors[monitor.name].values == pytest.approx(wanted, rel=1e-4, abs=1e-5)

    def test_they_are_what_capture_reads(self, llama: LM) -> None:
        (answer,) = llama.generate(prompt(3, 6), monitors=MONITORS[0], max_new_tokens=4)
        text = llama.tokenizer.decode([*llama.encode(prompt(3, 6)), *answer.token_ids[:-1]])
        (activations,) = llama.capture(text, 2, Positions.all(), chat=False)
        wanted = (activations[Site(2)][-4:] @ direction(5)).tolist()
        assert answer.monitors["projection"].values == pytest.approx(wanted, rel=1e-5)

    def test_a_long_prompt_and_a_clean_cache(self) -> None:
        lm = long_llama()
        for length in (CHUNK + 9, 8):
            ids = tuple(lm.encode(prompt(1, length)))
            for clean in (False, True):
                batch = CleanBatch(lm.model, lm.tokenizer, lm.layout)
                key = batch.insert(GenerationRequest(ids, None, 3, monitors=MONITORS[:1], clean_cache=clean))
                responses = drain(batch)[key]
                read = [*ids, *(response.token for response in responses[:-1])]
                wanted = read_again(lm, read, len(ids), None, MONITORS[0])
                assert [response.monitored[0] for response in responses] == pytest.approx(wanted, rel=1e-4)

    def test_of_a_clean_cache_the_steered_reading_is_read(self, llama: LM) -> None:
        steering = added(2, 5, 4.0)
        options: dict[str, Any] = {"monitors": MONITORS[0], "max_new_tokens": 1, "clean_cache": True}
        raw = llama.generate(prompt(1, 5), **options)[0].monitors["projection"].values[0]
        steered = llama.generate(prompt(1, 5), steering, **options)[0].monitors["projection"].values[0]
        assert steered - raw == pytest.approx(4.0, rel=1e-5)


class TestActions:
    def values(self, lm: LM, text: str, count: int = 8) -> tuple[float, ...]:
        return lm.generate(text, max_new_tokens=count, monitors=MONITORS[0])[0].monitors["projection"].values

    def line(self, values: Sequence[float], at: int) -> float:
        """A threshold that value `at` is the first to exceed."""
        assert values[at] > max(values[:at], default=-1e9)
        return (values[at] + max(values[:at], default=values[at] - 1)) / 2

    def rising(self, lm: LM) -> tuple[str, tuple[float, ...], int]:
        """A text, its values, and the first place beyond the second at which they exceed all before."""
        for seed in range(50):
            values = self.values(lm, prompt(seed, 6))
            for at in range(2, len(values) - 2):
                if values[at] > max(values[:at]) + 1e-3:
                    return prompt(seed, 6), values, at
        raise AssertionError

    def test_logging_changes_nothing(self, llama: LM) -> None:
        text, values, at = self.rising(llama)
        plain = llama.generate(text, max_new_tokens=8, logprobs=True)[0]
        (logged,) = llama.generate(
            text, max_new_tokens=8, logprobs=True, monitors=MONITORS[0].at(self.line(values, at))
        )
        assert logged.monitors["projection"].fired == at
        assert (logged.token_ids, logged.logprobs) == (plain.token_ids, plain.logprobs)

    def test_stopping_ends_the_answer_before_that_token(self, llama: LM) -> None:
        text, values, at = self.rising(llama)
        plain = llama.generate(text, max_new_tokens=8)[0]
        stop = Monitor("m", MONITORS[0].condition, self.line(values, at), "stop")
        others = [prompt(100 + n, 5) for n in range(3)]
        answers = llama.generate([others[0], text, *others[1:]], max_new_tokens=8, monitors=[stop], logprobs=True)
        assert answers[1].token_ids == plain.token_ids[:at]
        assert answers[1].finish_reason == "content_filter"
        assert len(answers[1].logprobs) == at
        assert answers[1].monitors["m"].fired == at
        assert answers[1].monitors["m"].values == pytest.approx(values[: at + 1], rel=1e-5)
        for other, answer in zip(others, [answers[0], *answers[2:]], strict=True):
            if answer.monitors["m"].fired is None:
                assert answer.token_ids == llama.generate(other, max_new_tokens=8)[0].token_ids

    def test_stopping_at_the_prompt_gives_an_empty_answer(self, llama: LM) -> None:
        stop = Monitor("m", MONITORS[0].condition, -1e6, "stop")
        stream = llama.stream(prompt(1, 5), max_new_tokens=8, monitors=stop, chat=False)
        assert "".join(stream) == ""
        assert stream.result.token_ids == ()
        assert (stream.result.finish_reason, stream.result.monitors["m"].fired) == ("content_filter", 0)

    @pytest.mark.parametrize("clean", [False, True])
    @pytest.mark.parametrize("base", [None, added(0, 12, 1.0)])
    def test_steering_is_switched_on_from_the_next_token(self, llama: LM, clean: bool, base: Steering | None) -> None:
        """As if, from the trigger on, the positions of the steering had begun just there."""
        text = prompt(4, 6)
        options: dict[str, Any] = {"max_new_tokens": 8, "logprobs": True, "clean_cache": clean}
        values = llama.generate(text, base, monitors=MONITORS[0], **options)[0].monitors["projection"].values
        at = max(range(1, 6), key=lambda i: values[i] - max(values[:i]))
        line = (values[at] + max(values[:at])) / 2
        fires = next(i for i, value in enumerate(values) if value > line)
        towards = added(1, 11, 6.0)
        (answer,) = llama.generate(
            text, base, monitors=Monitor("m", MONITORS[0].condition, line, "steer", towards), **options
        )
        edits = tuple(Edit(e.site, e.operation, Positions.window(fires, 10_000)) for e in towards.edits)
        later = Steering((*(base.edits if base else ()), *edits))
        (wanted,) = llama.generate(text, later, **options)
        assert answer.monitors["m"].fired == fires
        assert answer.token_ids == wanted.token_ids
        assert answer.logprobs == pytest.approx(wanted.logprobs, abs=1e-6)
        assert [str(e).split(" @ ")[0] for e in answer.applied.edits] == [
            str(e).split(" @ ")[0] for e in wanted.applied.edits
        ]
        assert {d.layer: d.tokens for d in answer.applied.doses} == {d.layer: d.tokens for d in wanted.applied.doses}

    def test_neighbours_are_untouched(self, llama: LM) -> None:
        """Rows without a monitor, with another, and with one that steers, in one batch."""
        batch = CleanBatch(llama.model, llama.tokenizer, llama.layout)
        steer = Monitor("m", MONITORS[0].condition, -1e6, "steer", added(1, 11, 6.0))
        monitors_of_rows: list[tuple[Any, ...]] = [(), (MONITORS[2],), (steer,), (), MONITORS[:2], (steer, MONITORS[0])]
        keys, texts = [], [prompt(20 + n, 4 + n) for n in range(6)]
        responses: dict[int, list[GenerationResponse]] = {}
        for text, monitors in zip(texts, monitors_of_rows, strict=True):
            ids = tuple(llama.encode(text))
            keys.append(batch.insert(GenerationRequest(ids, STEERINGS[1], 6, alternatives=0, monitors=monitors)))
            for early in batch.step():
                responses.setdefault(early.key, []).append(early)
        for key, rest in drain(batch).items():
            responses.setdefault(key, []).extend(rest)
        assert not batch._rows
        for key, text, monitors in zip(keys, texts, monitors_of_rows, strict=True):
            (alone,) = llama.generate(text, STEERINGS[1], max_new_tokens=6, monitors=monitors)
            assert [response.token for response in responses[key]] == list(alone.token_ids)
            for i, monitor in enumerate(monitors):
                values = [response.monitored[i] for response in responses[key]]
                assert values == pytest.approx(alone.monitors[monitor.name].values, rel=1e-5)

    def test_a_steering_that_cannot_be_in_the_batch_fails_its_row_alone(self, llama: LM) -> None:
        clamp = Steering((Edit(Site(1), SetProjection(direction(1), target=1.0), Positions.all()),))
        steer = Monitor("m", MONITORS[0].condition, -1e6, "steer", clamp)
        (answer,) = llama.generate(prompt(1, 5), added(1, 2, 1.0), max_new_tokens=4, monitors=steer)
        assert len(answer.applied.edits) == 2


class TestWhatIsRefused:
    def test_what_a_monitor_is(self) -> None:
        condition = MONITORS[1].condition
        for arguments, message in [
            (("", condition), "has a name"),
            (("m", condition, 0.5, "shout"), "an action is one of"),
            (("m", condition, None, "stop"), "no threshold"),
            (("m", condition, 0.5, "steer"), "steer needs a steering"),
            (("m", condition, float("nan")), "finite"),
            (("m", condition, 0.5, "steer", STEERINGS[3]), "it is decided by the prompt"),
        ]:
            with pytest.raises(TrimtabError, match=message):
                Monitor(*arguments)  # type: ignore[arg-type]
        assert ACTIONS == ("log", "stop", "steer")

    def test_of_a_steering(self) -> None:
        two = Steering((*added(1, 1, 1.0).edits, *added(2, 2, 1.0).edits))
        with pytest.raises(TrimtabError, match="choose one"):
            Monitor.of("m", two)
        assert torch.allclose(Monitor.of("m", two, 2).condition.direction.double(), direction(2))
        gated = two.when(MONITORS[1].condition)
        assert Monitor.of("m", gated).threshold == 0.5
        with pytest.raises(TrimtabError, match="several conditions"):
            Monitor.of("m", gated.when(MONITORS[0].condition))

    def test_what_does_not_fit(self, llama: LM) -> None:
        ask: dict[str, Any] = {"max_new_tokens": 3}
        with pytest.raises(TrimtabError, match="no layer 7"):
            llama.generate(prompt(1, 4), monitors=Monitor("m", Threshold(Site(7), direction(1), 0.0)), **ask)
        with pytest.raises(TrimtabError, match="another model"):
            llama.generate(prompt(1, 4), monitors=Monitor("m", Threshold(Site(1), torch.ones(5), 0.0)), **ask)
        with pytest.raises(TrimtabError, match="two monitors"):
            llama.generate(prompt(1, 4), monitors=[MONITORS[0], MONITORS[0]], **ask)
        with pytest.raises(TrimtabError, match="is a Monitor"):
            llama.generate(prompt(1, 4), monitors=[STEERINGS[1]], **ask)  # type: ignore[list-item]
        with pytest.raises(UnsupportedError, match="continuous batching"):
            llama.generate(prompt(1, 4), monitors=MONITORS[0], num_beams=2, **ask)
        with pytest.raises(UnsupportedError, match="rejection"):
            llama.generate(prompt(1, 4), STEERINGS[1], monitors=MONITORS[0], rejection=True, **ask)
