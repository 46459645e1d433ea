"""What newcomers type says what to type instead: each mistake is an error that names the fix, before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from tiny import LAYERS, direction, prompt

import trimtab
from trimtab import LM, Add, Edit, Pair, Positions, Site, Steering, TrimtabError, read_pairs

TEXT = prompt(1, 5)
V = direction(1)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


PUSHES = Steering(tuple(Edit(Site(i), Add(direction(i, 0.1))) for i in range(LAYERS)))
MISTAKES: dict[str, tuple[Callable[[LM], Any], str]] = {
    "a strength": (lambda lm: lm.generate(TEXT, PUSHES, strength=2), "'strength': multiply the steering: 2 * steering"),
    "no strength either": (lambda lm: lm.stream(TEXT, PUSHES, strength=2), "multiply the steering: 2 * steering"),
    "a layer": (lambda lm: lm.generate(TEXT, PUSHES, layer=2), "steering[14] is what it does at layer 14"),
    "max_tokens": (lambda lm: lm.generate(TEXT, max_tokens=2), "it is max_new_tokens"),
    "max_length": (lambda lm: lm.generate(TEXT, max_length=2), "which counts only the answer's tokens"),
    "a slip": (lambda lm: lm.generate(TEXT, repetition_penality=2.0), "did you mean repetition_penalty?"),
    "an unknown option": (
        lambda lm: lm.generate(TEXT, zzz=2),
        "option 'zzz': transformers' generate doesn't have it",
    ),
    "the other way round": (lambda lm: lm.generate(PUSHES, TEXT), "lm.generate(prompts, steering)"),
    "a number": (lambda lm: lm.generate(5), "prompts are texts or lists of messages, got int"),
    "nothing": (lambda lm: lm.generate(None), "got NoneType; give a string"),
    "bytes": (lambda lm: lm.generate(b"w3"), "got bytes; give a string"),
    "ids": (lambda lm: lm.generate([3, 4]), "got int; for token ids, use model.generate inside lm.steered"),
    "a tensor": (lambda lm: lm.generate(torch.tensor([[3]])), "got Tensor; for token ids, use model.generate"),
    "a message": (lambda lm: lm.generate({"role": "user", "content": TEXT}), "got one message; put it in a list"),
    "a direction": (lambda lm: lm.generate(TEXT, V), "Steering((Edit(Site(layer), Add(direction)),))"),
    "directions": (lambda lm: lm.generate([TEXT, TEXT], [V, V]), "a steering was expected, got a Tensor"),
    "an edit": (lambda lm: lm.generate(TEXT, PUSHES.edits[0]), "got an Edit; write Steering((edit,))"),
    "a multiple of nothing": (lambda lm: lm.generate(TEXT, 2.0), "got 2.0; a strength multiplies the steering"),
    "a dictionary": (lambda lm: lm.generate(TEXT, {1: V}), "a steering was expected, got a dict"),
    "a path": (lambda lm: lm.check("x.safetensors"), "trimtab.load(…) reads one from a file"),
    "no rows": (
        lambda lm: lm.generate(TEXT, max_new_tokens=1, batch_size=0),
        "batch_size is a whole number from 1 up, got 0",
    ),
    "rejection": (lambda lm: lm.generate(TEXT, PUSHES, rejection="on"), "a Rejection, True or False, got 'on'"),
    "emphasis": (lambda lm: lm.generate(TEXT, emphasize=3), "takes a phrase of the prompt, got int"),
    "where it reads": (lambda lm: lm.capture(TEXT, [1], "all"), "write Positions.parse('all')"),  # type: ignore[arg-type]
    "what is steered": (lambda lm: lm.steered(V).__enter__(), "a steering was expected, got a Tensor"),
    "a name": (lambda lm: LM("gpt2"), "LM.load('gpt2') loads one"),
    "no tokenizer": (lambda lm: LM(lm.model), "needs the model's tokenizer as well"),
    "an LM": (lambda lm: LM(lm, lm.tokenizer), "this is already an LM"),
    "a model": (lambda lm: LM.load(lm.model), "LM(model, tokenizer) wraps a"),
    "a sum": (lambda lm: PUSHES + 2, "got 2; 2 * steering doubles its strength"),
    "a sum with a direction": (lambda lm: PUSHES + V, "only a steering can be added to a steering, got a Tensor"),
    "a product": (lambda lm: PUSHES * "2", "a strength is a finite number, got '2'"),
    "positions": (lambda lm: PUSHES.at("generated"), "write Positions.parse('generated')"),  # type: ignore[arg-type]
    "a gate": (lambda lm: PUSHES.when(True), "a Gate such as Threshold(…) is open, got True"),  # type: ignore[arg-type]
    "one edit": (lambda lm: Steering(PUSHES.edits[0]), "Steering((edit, …)), got an Edit"),  # type: ignore[arg-type]
    "a site": (lambda lm: Edit(1, Add(V)), "got 1; write Site(1)"),  # type: ignore[arg-type]
    "an operation": (lambda lm: Edit(Site(1), V), "got a Tensor; write Add(direction)"),
    "an edit's positions": (lambda lm: Edit(Site(1), Add(V), "all"), "write Positions.parse('all')"),  # type: ignore[arg-type]
    "an edit's gate": (lambda lm: Edit(Site(1), Add(V), gate=0.5), "is a Gate such as"),  # type: ignore[arg-type]
    "what is loaded": (lambda lm: trimtab.load(PUSHES), "from a path, got Steering"),  # type: ignore[arg-type]
    "what is saved": (lambda lm: trimtab.save("x.safetensors", PUSHES), "'x.safetensors' isn't a steering"),  # type: ignore[arg-type]
    "pairs": (lambda lm: read_pairs([Pair("a", "b")]), "read_pairs reads a file, got list"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_is_typed_wrong_says_what_to_type(lm: LM, mistake: str) -> None:
    make, why = MISTAKES[mistake]
    lm.generate(TEXT, PUSHES, max_new_tokens=1)  # how the model counts positions is looked at once, by running it
    passes: list[int] = []
    handle = lm.layout.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    try:
        with pytest.raises(TrimtabError, match=re.escape(why)):
            make(lm)
    finally:
        handle.remove()
    assert passes == []


def test_what_is_meant_is_taken(lm: LM) -> None:
    """Where there is one thing that can be meant, it is done."""
    assert Steering(list(PUSHES.edits)) == PUSHES  # type: ignore[arg-type]
    assert PUSHES.only(1) == PUSHES[1]
    numpy = pytest.importorskip("numpy")
    assert PUSHES * numpy.float32(2.0) == 2 * PUSHES
    (read,) = lm.capture(TEXT, 1, Positions.all())
    assert read.keys() == {Site(1)}
    assert len(lm.generate([TEXT, TEXT], (PUSHES, None), max_new_tokens=1)) == 2


@pytest.mark.parametrize(
    "option",
    [
        {"repetition_penalty": 1.2},
        {"prefix_allowed_tokens_fn": lambda *_: [5, 6]},
        {"logits_processor": None},
        {"use_cache": False},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_of_transformers_are_taken(lm: LM, option: dict[str, Any]) -> None:
    (answer,) = lm.generate(TEXT, max_new_tokens=2, **option)
    assert answer.token_ids


def test_a_model_whose_settings_are_its_own() -> None:
    """What a model's class adds to the settings of `generate` is an option as well."""
    from trimtab.engines.transformers.compat import is_generate_option

    made = tiny.tiny("llama").model
    assert not is_generate_option(made, "warmth")
    made.generation_config = SimpleNamespace(**vars(made.generation_config), warmth=1)
    assert is_generate_option(made, "warmth")
