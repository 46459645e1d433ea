"""Batched, steered generation through transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch

from trimtab.engines.answer import Applied, Generation
from trimtab.engines.contract import check_answers
from trimtab.engines.images import PromptImages
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.read import padded
from trimtab.engines.transformers.session import Session
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.keywords import HINTS, KeywordError
from trimtab.steering import Site

REFUSED = {
    "inputs": "give prompts",
    "input_ids": "give prompts, or use lm.steered(…) around model.generate",
    "inputs_embeds": "use lm.steered(…) around model.generate",
    "attention_mask": "trimtab pads and masks by itself",
    "return_dict_in_generate": "use logprobs=True, or lm.steered(…) around model.generate",
    "guidance_scale": "its second, unconditional pass would be steered as well",
    "assistant_model": "a draft model isn't steered, so its drafts would be rejected",
    "assistant_early_exit": "drafts of the first layers aren't steered like the whole model",
    "generation_config": "give its settings as options, such as do_sample=True; lm.steered(…) around model.generate"
    " takes it",
}


STRAY = {
    **dict.fromkeys(("strength", "multiplier", "coefficient", "scale"), "multiply the steering: 2 * steering"),
    "layer": "a steering says where it acts: steering[14] is what it does at layer 14",
    "layers": "a steering says where it acts: steering.only([12, 14]) are two of its layers",
    "positions": "a steering says where it acts: steering.at(Positions.generated())",
    "gate": "a steering says when it acts: steering.when(gate)",
    "max_tokens": "it is max_new_tokens",
    "max_length": "it is max_new_tokens, which counts only the answer's tokens",
    "steerings": "it is steering, one for all prompts or a list with one for each",
    **dict.fromkeys(("stop", "stop_sequences", "stop_words", "until"), "it is stop_strings=[…]"),
    "stop_token_ids": "it is eos_token_id=[…]",
    "n": "it is num_return_sequences, with do_sample=True",
    "stream": "lm.stream(prompt, …) gives an answer piece by piece",
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), "transformers has repetition_penalty"),
    "logit_bias": "transformers has sequence_bias={{(token,): bias}}",
    "response_format": "it is json_schema=…",
    "guided_json": "it is json_schema=…",
    "tools": "tools are a keyword of the chat template, where it has one: template={{'tools': […]}}",
    "messages": "prompts is the first argument, and a list of messages is one prompt",
    "ignore_eos": "answers end at the end-of-text token unless min_new_tokens says otherwise",
    "use_tqdm": "progress(done, total) is called as prompts are answered",
    "skip_special_tokens": "an answer's token_ids have them all: lm.tokenizer.decode(answer.token_ids)",
    **dict.fromkeys(("return_full_text", "echo"), "an answer's text is only what was generated"),
    **dict.fromkeys(
        ("prefix", "prefill", "response_prefix"),
        "end the messages with an assistant message, which the model continues",
    ),
}
"""Hints for options that `generate` doesn't have, in addition to `HINTS`."""
NEITHER = "transformers' generate doesn't have it either"


def check_stop_strings(stop_strings: Any) -> list[str]:
    """The stop strings as a list, empty for `None`. Raises `TrimtabError` for anything but texts that aren't empty."""
    listed = [stop_strings] if isinstance(stop_strings, str) else [] if stop_strings is None else stop_strings
    if not (isinstance(listed, (list, tuple)) and all(isinstance(stop, str) for stop in listed)):
        raise TrimtabError(f"stop_strings is a text or a list of texts, got {stop_strings!r}")
    if "" in listed:
        raise TrimtabError("stop_strings has an empty text, which every answer contains; leave it out")
    return list(listed)


def check_options(model: Any, options: dict[str, Any]) -> None:
    """Raises `TrimtabError` for an option that neither `lm.generate` nor transformers' `generate` has.

    Raises `UnsupportedError` for a model that can't generate.
    """
    if not hasattr(model, "generation_config") or not callable(getattr(model, "generate", None)):
        raise UnsupportedError(
            f"{type(model).__name__} can't generate text: it has no language-model head; load it as transformers'"
            " AutoModelForCausalLM does (lm.capture and learning need no head)"
        )
    for name in options:
        if compat.is_generate_option(model, name) and name != "max_length":
            continue
        near = get_close_matches(name, ("max_new_tokens", *vars(model.generation_config)), 1)
        instead = STRAY.get(name) or (f"did you mean {near[0]}?" if near else None) or HINTS.get(name, NEITHER)
        raise KeywordError(f"lm.generate has no option {name!r}: {instead.format(name=name)}")


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    session: Session,
    sites: Sequence[Site],
    edits: Sequence[tuple[str, ...]],
    *,
    max_new_tokens: int,
    logprobs: bool,
    options: dict[str, Any],
    images: PromptImages | None = None,
) -> list[Generation]:
    """The answers to one batch of rendered prompts (`num_return_sequences` each), steered by `session`.

    `images` are the prompt's images, if any; a batch with images has one prompt.
    """
    width = max(len(ids) for ids in prompts)
    pad = _pad_id(model, tokenizer)
    ids, mask = padded(prompts, left=True, device=input_device(model), pad=pad)
    if sites:
        options = {"disable_compile": True, **options}
    if options.get("stop_strings") is not None:
        options = {"tokenizer": tokenizer, **options}
    ends = _end_ids(model, options)
    session.expect([len(prompt) for prompt in prompts], width, sorted({*ends, pad}), prompts=prompts)
    with torch.no_grad(), session.hooked(sites):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            return_dict_in_generate=True,
            output_logits=logprobs,
            **({} if images is None else images.inputs),
            **options,
        )
    session.check_reached(output.sequences.shape[1] - 1)  # the last token isn't fed to the model
    sequences = output.sequences[:, width:]
    scores = _token_logprobs(model, output) if logprobs else None
    answers = []
    repeat = len(sequences) // len(prompts)
    for row, tokens in enumerate(sequences.tolist()):
        length = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
        stopped = bool(length and tokens[length - 1] in ends)
        if not stopped and options.get("stop_strings") is not None:
            while length and tokens[length - 1] == pad:
                length -= 1
            stopped = length < max_new_tokens
        request = row // repeat
        answers.append(
            Generation(
                text=tokenizer.decode(tokens[:length], skip_special_tokens=True),
                token_ids=tuple(tokens[:length]),
                finish_reason="stop" if stopped else "length",
                prompt_tokens=len(prompts[request]),
                applied=Applied(
                    edits[request], session.doses(request, len(prompts[request]) + length - 1) if sites else ()
                ),
                logprobs=None if scores is None else tuple(scores[row, :length].tolist()),
            )
        )
    return answers


def check_request(layout: Any, lengths: Sequence[int], max_new_tokens: int, options: dict[str, Any]) -> None:
    """Raises `TrimtabError` for a request that can't run: a prompt that is too long, or an unsupported option."""
    for name, instead in REFUSED.items():
        if options.get(name) is not None:
            raise TrimtabError(f"generate can't take {name}: {instead}")
    for name in ("logits_processor", "stopping_criteria"):
        if callable(options.get(name)) and not isinstance(options[name], Sequence):
            raise TrimtabError(f"{name} is a list of functions, got one: {name}=[…]")
    if isinstance(options.get("eos_token_id"), str):
        raise TrimtabError(
            f"eos_token_id is one token id or several, got {options['eos_token_id']!r}; to end answers at a text, use"
            " stop_strings=[…]"
        )
    if options.get("streamer") is not None and len(lengths) > 1:
        raise TrimtabError("a streamer takes one prompt at a time; give one, or leave the streamer out")
    check_answers(layout, lengths, max_new_tokens)


def _token_logprobs(model: Any, output: Any) -> torch.Tensor:
    return model.compute_transition_scores(
        output.sequences, output.logits, getattr(output, "beam_indices", None), normalize_logits=True
    )


def _pad_id(model: Any, tokenizer: Any) -> int:
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, *sorted(_end_ids(model, {}))):
        if candidate is not None:
            return int(candidate)
    return 0


def _end_ids(model: Any, options: dict[str, Any]) -> set[int]:
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    if ends is None:
        return set()
    return {int(end) for end in (ends if isinstance(ends, (list, tuple)) else [ends])}
