"""Errors for unknown keyword arguments that suggest the intended name, or the call that takes the argument.

Python raises a bare `TypeError`, without a hint. But users write arguments where other libraries take them:
`enable_thinking` belongs to the chat template, a strength multiplies a steering, a device is for loading a model.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from trimtab.errors import TrimtabError

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)

TEMPLATE_HINT = (
    "it is about the chat template: pass it as LM.load(…, template={{{name!r}: …}}) for all prompts, including those"
    " of learn functions, or as template={{{name!r}: …}} to lm.generate or lm.encode for one call"
)
LOAD_HINT = "it is an option of loading a model: LM.load(…, {name}=…)"
STRENGTH_HINT = "a strength multiplies the steering: 2 * steering"
HINTS = {
    "enable_thinking": TEMPLATE_HINT,
    "thinking": TEMPLATE_HINT,
    "reasoning_effort": TEMPLATE_HINT,
    "add_generation_prompt": "prompts always end where the answer begins, and a final assistant message is continued",
    "chat_template_kwargs": "it is template={{…}} of LM.load, lm.generate or lm.encode",
    "chat_template": "set it on the tokenizer: tokenizer.chat_template = …",
    "apply_chat_template": "it is chat=True of lm.generate and lm.encode",
    "system": "a system message is part of a pair: Pair(…, positive_system=…, negative_system=…), or messages",
    "system_prompt": "it is system=… of lm.generate and lm.encode; a pair has positive_system and negative_system",
    "strength": STRENGTH_HINT,
    "multiplier": STRENGTH_HINT,
    "coefficient": STRENGTH_HINT,
    "coeff": STRENGTH_HINT,
    "scale": STRENGTH_HINT,
    "steerings": "it is steering, one for all prompts or a list with one for each",
    "max_tokens": "it is max_new_tokens of lm.generate",
    "max_new_tokens": "lm.generate takes it",
    "temperature": "lm.generate takes it, with do_sample=True",
    "do_sample": "lm.generate takes it",
    "device": LOAD_HINT,
    "dtype": LOAD_HINT,
    "device_map": LOAD_HINT,
    "torch_dtype": "it is dtype of LM.load(…)",
    "revision": LOAD_HINT,
    "adapter": LOAD_HINT,
    "quantization_config": LOAD_HINT,
    "load_in_4bit": "it is quantization_config=BitsAndBytesConfig(load_in_4bit=True) of LM.load(…)",
    "load_in_8bit": "it is quantization_config=BitsAndBytesConfig(load_in_8bit=True) of LM.load(…)",
    "positions": "a steering says where it acts: steering.at(Positions.generated())",
    "gate": "a steering says when it acts: steering.when(gate)",
    "layer": "a steering says where it acts: steering[14] is what it does at layer 14",
    "layers": "a steering says where it acts: steering.only([12, 14]) are two of its layers",
    "model": "pass the model first, by position: LM.load('…'), learn_caa(lm, pairs)",
    "tokenizer": "LM(model, tokenizer) takes it; LM.load finds the model's own",
    "question": "the context of a pair is prompt=…",
    "aggregator": "it is estimator='pca', 'median', 'probe' or a function",
    "normalize": "it is norm='unit'",
    "chosen": "the two sides of a pair are positive=… and negative=…",
    "rejected": "the two sides of a pair are positive=… and negative=…",
}
"""Hints for keywords that are often passed to functions that don't take them."""
MAX_SHOWN = 12


class KeywordError(TrimtabError, TypeError):
    """A function was called with arguments that it doesn't take, or without one that it needs."""


def keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to raise `KeywordError` for unknown keywords, in addition to the checks of
    `check_arguments`.
    """
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise TypeError(f"{function.__qualname__} takes any keyword")
    known = tuple(parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY)
    names = frozenset(known)
    count_checked = check_arguments(function)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                raise unknown_keyword_error(_display_name(function), name, known, args)
        return count_checked(*args, **kwargs)

    return checked


def check_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function to raise `KeywordError` for too many positional arguments or a missing argument.

    It also checks that `progress` is callable.
    """
    parameters = inspect.signature(function).parameters.values()
    positional = [parameter for parameter in parameters if parameter.kind <= parameter.POSITIONAL_OR_KEYWORD]
    required = [parameter.name for parameter in positional if parameter.default is parameter.empty]
    names = [parameter.name for parameter in positional if parameter.name not in ("self", "cls")]
    has_varargs = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > len(positional) and not has_varargs:
            raise _too_many_error(_display_name(function), names, args[len(positional)])
        for name in required[len(args) :]:
            if name not in kwargs:
                raise _missing_error(_display_name(function), name, names, kwargs)
        if not callable(kwargs.get("progress") or print):
            raise KeywordError(f"progress is called as progress(done, total), got {kwargs['progress']!r}")
        return function(*args, **kwargs)

    return checked


def _too_many_error(what: str, names: list[str], extra: Any) -> KeywordError:
    number = isinstance(extra, (int, float)) and not isinstance(extra, bool)
    hint = "pass everything else by keyword"
    hint = f"{STRENGTH_HINT}; {hint}" if number and "steering" in names else hint
    return KeywordError(f"{what} takes {' and '.join(names) or 'nothing'} by position, and also got {extra!r}: {hint}")


def _missing_error(what: str, name: str, names: list[str], kwargs: Mapping[str, Any]) -> KeywordError:
    near = get_close_matches(name, kwargs, 1, 0.75)
    instead = f"did you mean {name} instead of {near[0]}?" if near else f"it takes {', '.join(names)}"
    return KeywordError(f"{what} is missing {name!r}: {instead}")


def class_keywords(kind: Class) -> Class:
    """Decorate a class to raise `KeywordError` for unknown keywords of its constructor. Goes above `@dataclass`."""
    kind.__init__ = keywords(kind.__init__)  # type: ignore[misc]
    return kind


def method_keywords(*names: str) -> Callable[[Class], Class]:
    """A class decorator that applies `keywords` to the methods of these names."""

    def checked(kind: Class) -> Class:
        for name in names:
            setattr(kind, name, keywords(getattr(kind, name)))
        return kind

    return checked


def check_fields(kind: Any, kwargs: Mapping[str, Any]) -> None:
    """Raise `KeywordError` for a keyword that isn't a field of the dataclass's constructor."""
    known = [name for name, field in kind.__dataclass_fields__.items() if field.init]
    for name in kwargs:
        if name not in known:
            raise unknown_keyword_error(kind.__name__, name, known, ())


def unknown_keyword_error(what: str, name: str, known: Iterable[str], args: tuple[Any, ...] = ()) -> KeywordError:
    """The error for an unknown keyword.

    Args:
        what: The name of the function that was called.
        name: The unknown keyword.
        known: The keywords that the function takes.
        args: The positional arguments of the call. If one has a tokenizer whose chat template uses `name`, the error
            points to `template`.
    """
    listed = [known_name for known_name in known if known_name not in ("self", "cls")]
    near = get_close_matches(name, listed, 1, 0.75)
    if name in ("layer", "layers", "site") and "sites" in listed:
        instead = "it is sites: 14, or [10, 14], or Site(14, 'heads')"
    elif near:
        instead = f"did you mean {near[0]}?"
    elif name in HINTS:
        instead = HINTS[name].format(name=name)
    elif any(_in_template(arg, name) for arg in args):
        instead = TEMPLATE_HINT.format(name=name)
    else:
        more = ", …" if len(listed) > MAX_SHOWN else ""
        instead = f"it has {', '.join(listed[:MAX_SHOWN])}{more}" if listed else "it has none"
    return KeywordError(f"{what} has no option {name!r}: {instead}")


def unknown_keyword_error_from(
    error: TypeError, what: str, names: Iterable[str], known: Iterable[str]
) -> KeywordError | None:
    """The error for a keyword that another package rejected with this `TypeError`.

    Returns:
        `None` if the error isn't about one of the keywords `names`.
    """
    name = next((keyword for keyword in names if f"unexpected keyword argument '{keyword}'" in str(error)), None)
    return None if name is None else unknown_keyword_error(what, name, known)


def caller_stacklevel() -> int:
    """The `stacklevel` with which a warning of the caller points to the line outside of trimtab that called it."""
    frame: Any = sys._getframe(1)
    level = 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith("trimtab."):
        frame, level = frame.f_back, level + 1
    return level


def _display_name(function: Any) -> str:
    """A function's name as users call it: `lm.name` for a method of `LM`, the class's name for a constructor."""
    owner, _, name = function.__qualname__.rpartition(".")
    if name == "__init__":
        return str(owner)
    return f"lm.{name}" if owner in ("LM", "LanguageModel") else function.__qualname__


def _in_template(thing: Any, name: str) -> bool:
    """Whether `thing` has a tokenizer whose chat template mentions this name."""
    template = getattr(getattr(thing, "tokenizer", None), "chat_template", None)
    return re.search(rf"\b{re.escape(name)}\b", str(template or "")) is not None
