"""A keyword that isn't there says which one is meant, or where what it says belongs: everywhere that users pass any."""

from __future__ import annotations

import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from tiny import direction, prompt

import trimtab
from trimtab import LM, Add, Edit, Pair, Positions, Rejection, ScaleScores, Site, Steering, TrimtabError
from trimtab.keywords import KeywordError, caller_stacklevel, keywords, unknown_keyword_error

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}{% if enable_thinking is defined %}w9{% endif %}"
PAIRS = [Pair("w5 w6", "w7 w8"), Pair("w9 w10", "w11 w12")]
STEERING = Steering((Edit(Site(1), Add(direction(1))),))
PUBLIC = [getattr(trimtab, name) for name in trimtab.__all__]


def takes_any(function: Any) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(function).parameters.values())


FUNCTIONS = [function for function in PUBLIC if inspect.isfunction(function) and not takes_any(function)]
MADE = [Pair, Edit, Steering, Rejection, ScaleScores, trimtab.Threshold, trimtab.Phrase, LM]
OPERATIONS = [
    operation for operation in PUBLIC if inspect.isclass(operation) and issubclass(operation, trimtab.Operation)
]
METHODS = ("encode", "spans", "next_logprobs", "project", "capture", "read", "check", "steered")


@pytest.fixture(scope="module")
def lm() -> LM:
    lm = tiny.tiny("llama")
    lm.tokenizer.chat_template = TEMPLATE
    return lm


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda public: public.__name__)
def test_every_public_function_says_so(function: Any) -> None:
    with pytest.raises(KeywordError, match=f"{function.__name__} has no option 'enable_thinking': it is about"):
        function(enable_thinking=False)
    with pytest.raises(KeywordError, match=r"has no option 'zzzz': it has \w+"):
        function(zzzz=1)
    assert not inspect.signature(function).parameters.keys() & {"args", "kwargs"}


@pytest.mark.parametrize("kind", [*MADE, *OPERATIONS], ids=lambda public: public.__name__)
def test_every_public_class_says_so(kind: Any) -> None:
    with pytest.raises(KeywordError, match=f"{kind.__name__} has no option 'zzzz'"):
        kind(zzzz=1)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_a_model_says_so(lm: LM, name: str) -> None:
    with pytest.raises(KeywordError, match=rf"lm\.{name} has no option 'enable_thinking': .*template="):
        getattr(lm, name)(enable_thinking=False)


CASES: dict[str, tuple[Callable[[LM], Any], str]] = {
    "generate": (lambda lm: lm.generate("w5", enable_thinking=False), "template={'enable_thinking': …}"),
    "generate, without a template": (
        lambda lm: tiny.tiny("llama").generate("w5", enable_thinking=False),
        "lm.generate has no option 'enable_thinking': it is about the chat template",
    ),
    "stream": (lambda lm: lm.stream("w5", enable_thinking=False), "template={'enable_thinking': …}"),
    "LM": (lambda lm: LM(lm.model, lm.tokenizer, chat_template_kwargs={}), "it is template={…}"),  # type: ignore[call-arg]
    "learn, thinking": (
        lambda lm: trimtab.learn_instruct(lm, PAIRS, enable_thinking=False),  # type: ignore[call-arg]
        "including those of learn functions",
    ),
    "learn, system": (lambda lm: trimtab.learn_caa(lm, PAIRS, system="x"), "positive_system=…"),  # type: ignore[call-arg]
    "learn, a slip": (lambda lm: trimtab.learn_caa(lm, PAIRS, layer=1), "did you mean layers?"),  # type: ignore[call-arg]
    "learn, a strength": (lambda lm: trimtab.learn_caa(lm, PAIRS, multiplier=2), "2 * steering"),  # type: ignore[call-arg]
    "learn, a device": (lambda lm: trimtab.learn_caa(lm, PAIRS, device="cpu"), "LM.load(…, device=…)"),  # type: ignore[call-arg]
    "a pair": (lambda lm: Pair("a", "b", question="c"), "the context of a pair is prompt=…"),  # type: ignore[call-arg]
    "an operation": (lambda lm: Add(direction(1), strength=2.0), "a strength multiplies"),  # type: ignore[call-arg]
    "an edit": (lambda lm: Edit(Site(1), Add(direction(1)), position=None), "did you mean positions?"),  # type: ignore[call-arg]
    "divergence": (lambda lm: lm.divergence(STEERING, "w5", token=3), "did you mean tokens?"),
    "load, 4 bits": (lambda lm: LM.load(load_in_4bit=True), "BitsAndBytesConfig(load_in_4bit=True)"),
    "load, thinking": (lambda lm: LM.load(enable_thinking=False), "template={'enable_thinking': …}"),
    "load, dtype": (lambda lm: LM.load(torch_dtype="float32"), "it is dtype"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_says_where_it_belongs(lm: LM, case: str) -> None:
    make, words = CASES[case]
    with pytest.raises(TrimtabError, match=re.escape(words)):
        make(lm)


def test_a_keyword_of_this_model_s_template_is_known_by_its_template(lm: LM) -> None:
    lm.tokenizer.chat_template = TEMPLATE.replace("enable_thinking", "tone_of_voice")
    try:
        with pytest.raises(KeywordError, match=r"template=\{'tone_of_voice': …\}"):
            trimtab.learn_caa(lm, PAIRS, tone_of_voice="dry")  # type: ignore[call-arg]
    finally:
        lm.tokenizer.chat_template = TEMPLATE


def test_it_is_a_type_error_too_and_other_type_errors_stay(lm: LM) -> None:
    assert issubclass(KeywordError, TypeError)
    with pytest.raises(TypeError, match="missing"):
        trimtab.learn_caa()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes any keyword"):
        keywords(lambda **options: options)
    assert "it has none" in str(unknown_keyword_error("f", "x", ()))


def test_what_is_checked_is_otherwise_as_it_was() -> None:
    assert pickle.loads(pickle.dumps(Add(direction(1)))) == Add(direction(1))
    assert trimtab.learn_caa.__doc__
    assert "layers" in inspect.signature(trimtab.learn_caa).parameters
    edit = Edit(site=Site(1), operation=Add(direction=direction(1)), positions=Positions.all(), strength=2.0)
    assert 2 * Steering((edit,)) == Steering(edits=(Edit(Site(1), Add(direction(1)), Positions.all(), 4.0),))


def test_a_warning_is_about_the_line_that_called() -> None:
    code = "def warn(): warnings.warn('x', UserWarning, stacklevel=outside())\ndef outer(): warn()"
    inside: dict[str, Any] = {"__name__": "trimtab.inside", "warnings": warnings, "outside": caller_stacklevel}
    exec(compile(code, "inside.py", "exec"), inside)
    with pytest.warns(UserWarning, match="x") as caught:
        inside["outer"]()
    assert [warning.filename for warning in caught] == [__file__]


def test_learning_still_learns(lm: LM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learned = trimtab.learn_caa(lm, pairs=PAIRS, layers=[1])
    assert learned.edits[0].site == Site(1)
    assert torch.isfinite(learned.edits[0].operation.direction).all()  # type: ignore[union-attr]
    assert lm.encode(prompt=prompt(0, 3), chat=False)
