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
from trimtab.engines.transformers.session import Session
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError
from trimtab.keywords import MEANT, KeywordError
from trimtab.steering import Site

REFUSED = {
    "inputs": "give prompts",
    "input_ids": "give prompts, or use lm.steered(…) around model.generate",
    "inputs_embeds": "use lm.steered(…) around model.generate",
    "attention_mask": "trimtab pads and masks by itself",
    "return_dict_in_generate": "use logprobs=True, or lm.steered(…) around model.generate",
    "guidance_scale": "its second, unconditional pass would be steered as well",
    "assistant_model": "a draft model isn't steered, so its drafts would be rejected",
}


STRAY = {
    **dict.fromkeys(("strength", "multiplier", "coefficient", "scale"), "multiply the steering: 2 * steering"),
    "layer": "a steering says where it acts: steering[14] is what it does at layer 14",
    "layers": "a steering says where it acts: steering.only([12, 14]) are two of its layers",
    "positions": "a steering says where it acts: steering.at(Positions.generated())",
    "gate": "a steering says when it acts: steering.when(gate)",
    "max_tokens": "it is max_new_tokens",
    "max_length": "it is max_new_tokens, which counts the answer's tokens alone",
    "steerings": "it is steering, one for all prompts or a list with one for each",
}
"""What is meant by options that `generate` doesn't have, beside `MEANT`."""
NEITHER = "transformers' generate has none either"


def check_options(model: Any, options: dict[str, Any]) -> None:
    """Raises `TrimtabError` for an option that neither `lm.generate` has nor transformers'."""
    for name in options:
        if compat.is_generate_option(model, name) and name != "max_length":
            continue
        near = get_close_matches(name, ("max_new_tokens", *vars(model.generation_config)), 1)
        instead = STRAY.get(name) or (f"did you mean {near[0]}?" if near else None) or MEANT.get(name, NEITHER)
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

    `images` are those of the one prompt, where it has any.
    """
    width = max(len(ids) for ids in prompts)
    pad = _pad_id(model, tokenizer)
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    device = input_device(model)
    if sites:
        options = {"disable_compile": True, **options}
    if options.get("stop_strings") is not None:
        options = {"tokenizer": tokenizer, **options}
    ends = _end_ids(model, options)
    session.expect([len(prompt) for prompt in prompts], width, sorted({*ends, pad}), prompts=prompts)
    with torch.no_grad(), session.hooked(sites):
        output = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
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
    """Raises `TrimtabError` for what can't run: too long a prompt, or an option that can't be honoured."""
    for name, instead in REFUSED.items():
        if options.get(name) is not None:
            raise TrimtabError(f"generate can't take {name}: {instead}")
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
