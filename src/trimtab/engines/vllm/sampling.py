"""Translate transformers' generation options to vLLM's sampling parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trimtab.engines.request import Choice
from trimtab.engines.transformers.sampling import seed_of
from trimtab.errors import TrimtabError, UnsupportedError

SAME = ("temperature", "top_p", "min_p", "repetition_penalty")
Translator = Callable[[Any], dict[str, Any]]


def _same(name: str) -> Translator:
    return lambda value: {name: float(value)}


TRANSLATIONS: dict[str, Translator] = {
    **{name: _same(name) for name in SAME},
    "top_k": lambda value: {"top_k": int(value)},
    "min_new_tokens": lambda value: {"min_tokens": int(value)},
    "num_return_sequences": lambda value: {"n": int(value)},
    "stop_strings": lambda value: {"stop": value, "include_stop_str_in_output": True},
    "eos_token_id": lambda value: {
        "stop_token_ids": [int(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
    },
}
SAMPLES = ("temperature", "top_p", "min_p", "top_k")


def sampling_of(max_new_tokens: int, logprobs: bool, seed: int | None, options: Mapping[str, Any]) -> Any:
    """The `SamplingParams` for transformers' `options`: greedy unless `do_sample` is true.

    Raises `TrimtabError` for an option that vLLM doesn't have.
    """
    from vllm import SamplingParams

    rest = {name: value for name, value in options.items() if value is not None and name != "do_sample"}
    if unknown := sorted(set(rest) - set(TRANSLATIONS)):
        raise TrimtabError(f"the vllm engine can't take {unknown[0]}; it takes do_sample, {', '.join(TRANSLATIONS)}")
    arguments: dict[str, Any] = {}
    for name, value in rest.items():
        arguments |= TRANSLATIONS[name](value)
    if not options.get("do_sample"):
        arguments = {name: value for name, value in arguments.items() if name not in SAMPLES} | {"temperature": 0.0}
    try:
        return SamplingParams(
            max_tokens=max_new_tokens,
            logprobs=0 if logprobs else None,
            seed=seed,
            skip_special_tokens=True,
            **arguments,
        )
    except ValueError as error:
        raise TrimtabError(f"vLLM refuses these options: {error}") from error


def seed_at(seed: int, index: int) -> int:
    """The seed for the request at an index of a list that is sampled with one seed; the first one's is the seed itself.

    vLLM's samplers store seeds as signed 64-bit numbers.
    """
    return seed if index == 0 else seed_of(seed, index) >> 1


def check_candidates(choices: Sequence[Choice]) -> None:
    """Raises `UnsupportedError` for more candidate tokens than vLLM scores, or for a vLLM that can't score any."""
    from vllm import sampling_params

    if not hasattr(sampling_params.SamplingParams, "logprob_token_ids"):
        raise UnsupportedError("this vLLM can't score chosen tokens; install vLLM 0.32, or leave out engine=")
    most = getattr(sampling_params, "MAX_LOGPROB_TOKEN_IDS", 128)
    for i, choice in enumerate(choices):
        if len(set(choice.candidates)) > most:
            raise UnsupportedError(
                f"text {i + 1}: {len(set(choice.candidates))} candidates; vLLM scores {most} at most, the transformers"
                " engine any number (leave out engine=)"
            )
