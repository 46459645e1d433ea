"""Steering is a state of the model, whichever `LM` asks: a second `LM`, learners inside, threads that stay behind."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny
import torch
from tiny import prompt
from transformers import StoppingCriteria, StoppingCriteriaList

from trimtab import LM, Add, Edit, Positions, Site, Steering, TrimtabError, learn_caa
from trimtab.methods.inferaligner import learn_inferaligner
from trimtab.methods.sadi import learn_sadi
from trimtab.methods.tda import learn_tda
from trimtab.text.pairs import Pair

STEERING = Steering((Edit(Site(1), Add(tiny.direction(1, 6.0)), Positions.all()),))
PAIRS = [Pair(prompt(2 * i, 4), prompt(2 * i + 1, 4), prompt(50 + i, 3), "answers") for i in range(3)]
TEXT = prompt(90, 6)


@pytest.fixture
def lm() -> LM:
    return tiny.tiny("llama")


def test_a_second_lm_over_the_model_doesnt_run_inside_the_firsts_context(lm: LM) -> None:
    second = LM(lm.model, lm.tokenizer, name="second")
    plain = second.generate(TEXT, None, max_new_tokens=4)[0].token_ids
    with lm.steered(STEERING):
        for steering in (None, STEERING):
            with pytest.raises(TrimtabError, match=r"being steered already; leave lm\.steered"):
                second.generate(TEXT, steering, max_new_tokens=4)
        with pytest.raises(TrimtabError, match="being steered already"), second.steered(STEERING):
            pass
        lm.model(torch.tensor([lm.encode(TEXT)]))
    assert second.generate(TEXT, None, max_new_tokens=4)[0].token_ids == plain
    assert second.generate(TEXT, STEERING, max_new_tokens=4)[0].token_ids == (
        lm.generate(TEXT, STEERING, max_new_tokens=4)[0].token_ids
    )


def test_nothing_is_learned_from_a_steered_model(lm: LM) -> None:
    """Through the `LM` that steers, or another over the same model."""
    second = LM(lm.model, lm.tokenizer, name="second")
    before = learn_caa(lm, PAIRS, layers=2)
    with lm.steered(STEERING):
        for which in (lm, second):
            for learn in (
                lambda learner: learn_caa(learner, PAIRS, layers=2),
                lambda learner: learn_sadi(learner, PAIRS),
                lambda learner: learn_tda(learner, [TEXT]),
                lambda learner: learn_inferaligner(learner, [TEXT], harmless=[prompt(3, 4)]),
            ):
                with pytest.raises(TrimtabError, match=r"steered activations; leave lm\.steered"):
                    learn(which)
        lm.model(torch.tensor([lm.encode(TEXT)]))
    assert learn_caa(lm, PAIRS, layers=2).edits == before.edits


class Gate(StoppingCriteria):
    """Holds a thread that generates after its second token, until it is let on."""

    def __init__(self) -> None:
        self.reached, self.on = threading.Event(), threading.Event()
        self.steps = 0

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.steps += 1
        if self.steps == 2:
            self.reached.set()
            self.on.wait()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def generating(lm: LM, gate: Gate, results: list[Any]) -> threading.Thread:
    def work() -> None:
        ids = torch.tensor([lm.encode(TEXT)])
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
        try:
            results.append(lm.model.generate(ids, stopping_criteria=StoppingCriteriaList([gate]), **options))
        except TrimtabError as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    gate.reached.wait()
    return thread


def test_a_thread_that_outlives_the_context(lm: LM) -> None:
    """Both are told: who leaves, and who would have got a text that is steered at its beginning alone."""
    gate, results = Gate(), []  # type: ignore[var-annotated]
    with pytest.raises(TrimtabError, match="a thread is still generating in it; join the thread"):
        with lm.steered(STEERING):
            thread = generating(lm, gate, results)
    gate.on.set()
    thread.join()
    assert "was left while this text was being generated" in str(results[0])
    assert "generate" not in vars(lm.model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_an_error_inside_isnt_hidden_by_a_thread_that_stays_behind(lm: LM) -> None:
    gate, results = Gate(), []  # type: ignore[var-annotated]
    threads: list[threading.Thread] = []

    def failing() -> None:
        with lm.steered(STEERING):
            threads.append(generating(lm, gate, results))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    (thread,) = threads
    gate.on.set()
    thread.join()
    assert isinstance(results[0], TrimtabError)


def test_two_threads_in_one_context(lm: LM) -> None:
    """The second is refused, and the first one's text is what it is alone."""
    (alone,) = lm.generate(TEXT, STEERING, max_new_tokens=5)
    gate, results = Gate(), []  # type: ignore[var-annotated]
    with lm.steered(STEERING):
        thread = generating(lm, gate, results)
        with pytest.raises(TrimtabError, match=r"another thread is generating inside this lm\.steered"):
            lm.model.generate(torch.tensor([lm.encode(TEXT)]), max_new_tokens=2)
        gate.on.set()
        thread.join()
        again = lm.model.generate(torch.tensor([lm.encode(TEXT)]), max_new_tokens=5, do_sample=False)
    assert tuple(results[0][0, -5:].tolist()) == alone.token_ids
    assert tuple(again[0, -5:].tolist()) == alone.token_ids
