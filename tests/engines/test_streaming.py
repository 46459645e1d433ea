"""An answer in pieces: the same as the whole one, and when it is left early nothing of it goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS, direction, prompt

from trimtab import LM, Add, Edit, Positions, Rejection, Site, Steering, TrimtabError, UnsupportedError
from trimtab.steering import Ablate, Threshold

TEXT = prompt(1, 6)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def pushes(scale: float = 0.3) -> Steering:
    return Steering(tuple(Edit(Site(i), Add(direction(i, scale))) for i in range(LAYERS)))


def hooks(lm: LM) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in lm.model.modules())


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "trimtab-stream"]


@pytest.fixture(autouse=True)
def nothing_left(lm: LM) -> Iterator[None]:
    yield
    assert running() == []
    assert hooks(lm) == 0
    lm.capture(TEXT, [0])  # nobody has kept the model


CASES: dict[str, tuple[Steering | None, dict[str, Any]]] = {
    "plain": (None, {}),
    "steered": (pushes(), {"logprobs": True}),
    "gated": (pushes().when(Threshold(Site(1), direction(3), -9.0)), {}),
    "generated only": (pushes().at(Positions.generated()), {}),
    "projected": (Steering((Edit(Site(2), Ablate(direction(2))),)), {}),
    "sampled": (pushes(), {"do_sample": True, "temperature": 1.3, "seed": 5}),
    "rejecting": (pushes(1.0), {"rejection": Rejection(beta=0.3)}),
    "emphasis": (None, {"emphasize": TEXT.split()[2]}),
    "two phrases": (None, {"emphasize": TEXT.split()[2:5:2], "rejection": False}),
    "penalised": (None, {"repetition_penalty": 1.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_pieces_are_the_answer(lm: LM, case: str) -> None:
    steering, options = CASES[case]
    stream = lm.stream(TEXT, steering, max_new_tokens=7, **options)
    pieces = list(stream)
    if isinstance(options.get("emphasize"), list):
        options = {**options, "emphasize": [options["emphasize"]]}
    (whole,) = lm.generate(TEXT, steering, max_new_tokens=7, **options)
    assert "".join(pieces) == whole.text
    assert len(pieces) == sum(token not in lm.tokenizer.all_special_ids for token in whole.token_ids) > 1
    trace = stream.result.trace
    if trace is not None and whole.trace is not None:  # but for how long it took
        assert trace.steps == whole.trace.steps
        assert stream.result.token_ids == whole.token_ids
    else:
        assert stream.result == whole
    assert repr(stream) == "Stream(complete)"
    assert list(stream) == []


def test_messages_are_one_prompt(lm: LM) -> None:
    with pytest.raises(TrimtabError, match="no chat template"):
        lm.stream([{"role": "user", "content": TEXT}])


def test_pieces_come_while_the_model_runs(lm: LM) -> None:
    """The second piece isn't computed before the first one is there to be read."""
    gate, block = threading.Event(), lm.layout.blocks[0]
    passes = 0

    def hold(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            assert gate.wait(30)

    handle = block.register_forward_pre_hook(hold)
    try:
        stream = lm.stream(TEXT, max_new_tokens=3)
        first = next(stream)
        assert repr(stream) == "Stream(running)"
        with pytest.raises(TrimtabError, match="hasn't ended yet"):
            _ = stream.result
        gate.set()
        assert first + "".join(stream) == stream.result.text
    finally:
        gate.set()
        handle.remove()


@pytest.mark.parametrize("way", ["break", "close", "with", "forget", "error", "thrown away"])
def test_leaving_early_stops_it(lm: LM, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = 0
    original = lm.model.prepare_inputs_for_generation
    slow = threading.Event()

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted += 1
        if counted > 3:
            slow.wait(0.05)  # so that a hundred tokens take longer than what stops them
        return original(*args, **kwargs)

    monkeypatch.setattr(lm.model, "prepare_inputs_for_generation", count)
    stream: Any = lm.stream(TEXT, pushes(), max_new_tokens=100)
    if way == "break":
        for _ in stream:
            break
    elif way == "close":
        next(stream)
        stream.close()
        stream.close()
    elif way == "with":
        with stream:
            next(stream)
    elif way == "error":
        with pytest.raises(ZeroDivisionError):
            [len(piece) / 0 for piece in stream]
    elif way == "thrown away":
        next(stream)
        stream = None
    else:
        stream = iter(stream)
        next(stream)
        stream = None
    assert running() == []
    assert hooks(lm) == 0
    assert counted < 10
    if stream is not None:
        assert repr(stream) == "Stream(stopped)"
        assert list(stream) == []
        while not stream._queue.empty():
            assert isinstance(stream._queue.get(), list)  # tokens, and no error whose frames hold the cache
        with pytest.raises(TrimtabError, match="was stopped before its end"):
            _ = stream.result
    monkeypatch.undo()
    (after,) = lm.generate(TEXT, max_new_tokens=3)
    assert after == lm.generate(TEXT, max_new_tokens=3)[0]


def test_what_does_not_fit_is_said_before_anything_runs(lm: LM) -> None:
    for arguments, options, why in (
        ((TEXT,), {"max_new_tokens": 0}, "max_new_tokens is a whole number from 1"),
        (([TEXT, TEXT],), {}, "answers one prompt, got 2"),
        ((TEXT, [pushes()]), {}, "one steering, got a list of 1"),
        ((TEXT, pushes()), {"rejection": [True]}, "one rejection, got a list of 1"),
        ((TEXT,), {"num_beams": 2}, "can't take num_beams"),
        ((TEXT,), {"num_return_sequences": 2}, "can't take num_return_sequences"),
        ((TEXT,), {"batch_size": 4}, "can't take batch_size: there is one prompt"),
        ((TEXT,), {"streamer": object()}, "can't take streamer"),
        ((TEXT, Steering((Edit(Site(9), Add(direction(1))),))), {}, "9"),
    ):
        with pytest.raises(TrimtabError, match=why):
            lm.stream(*arguments, **options)


def test_a_steered_model_is_not_waited_for(lm: LM) -> None:
    with lm.steered(pushes()):
        with pytest.raises(TrimtabError, match="being steered already"):
            lm.stream(TEXT)
        with torch.no_grad():
            lm.model(input_ids=torch.tensor([[3, 4]]))


def test_an_error_on_the_way_reaches_the_reader(lm: LM) -> None:
    def fail(_module: Any, args: Any, _output: Any) -> None:
        if args[0].shape[1] == 1:
            raise RuntimeError("the disk is on fire")

    handle = lm.layout.blocks[1].register_forward_hook(fail)
    try:
        stream = lm.stream(TEXT, max_new_tokens=5)
        assert next(stream)
        with pytest.raises(RuntimeError, match="on fire"):
            next(stream)
    finally:
        handle.remove()
    assert repr(stream) == "Stream(stopped)"


def test_an_interrupt_while_it_waits_stops_it(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = lm.stream(TEXT, max_new_tokens=100)

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stream, "_queue", type("Queue", (), {"get": staticmethod(interrupt)}))
    stream._ready.clear()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert running() == []


def test_an_engine_that_cannot_stream_says_what_can() -> None:
    from trimtab.engines.vllm.lm import VllmLM

    with pytest.raises(UnsupportedError, match=r"returns whole answers here; use lm.generate\(…\)"):
        VllmLM.__new__(VllmLM).stream(TEXT)
