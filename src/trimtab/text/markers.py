"""The markers between which a model thinks and calls tools, and where in a prompt its answer begins.

They are the tokenizer's: special tokens, or texts of the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from trimtab.errors import TrimtabError
from trimtab.text.chat import has_template
from trimtab.text.machine import Machine

THINKING, ANSWER, TOOL, OUTSIDE = "thinking", "answer", "tool", "outside"
"""Modes of machines. Each structured part has a mode of its own, whose name begins with `TOOL`."""

THINKING_PAIRS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, SmolLM3, GLM, …
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<thinking>", "</thinking>"),
)
END = ""
"""In place of a marker that closes: the one that ends the answer."""
TOOL_PAIRS = (
    ("<tool_call>", "</tool_call>"),  # Qwen, Hermes, SmolLM3
    ("[TOOL_CALLS]", END),  # Mistral
    ("<|python_tag|>", END),  # Llama 3
    ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),  # DeepSeek
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),  # Kimi
    ("<|START_ACTION|>", "<|END_ACTION|>"),  # Cohere
    ("<|tool_call|>", "<|/tool_call|>"),  # Phi 4
    ("<start_function_call>", "<end_function_call>"),  # Gemma
    ("<minimax:tool_call>", "</minimax:tool_call>"),
)
CHANNELS = Machine(
    {
        "header": {
            "<|channel|>analysis<|message|>": THINKING,
            "<|channel|>final<|message|>": ANSWER,
            "<|channel|>commentary<|message|>": ANSWER,
            " to=": TOOL,  # whom the message is for
        },
        THINKING: {"<|end|>": "header"},
        ANSWER: {"<|end|>": "header", "<|return|>": "header"},
        TOOL: {"<|call|>": "header", "<|end|>": "header"},
    },
    "header",
)
"""gpt-oss's messages, each on a channel; see OpenAI's "Harmony response format"."""
PROBE = "trimtab-probe"


def thinking_machine(tokenizer: Any, markers: Sequence[str], strict: bool) -> Machine:
    """In mode `THINKING` between the markers, in mode `ANSWER` outside of them.

    Args:
        tokenizer: Whose markers they are, unless some are given.
        markers: The marker that opens thinking and the one that closes it, or nothing.
        strict: Whether a model without markers is refused; otherwise all is the answer.

    Raises:
        TrimtabError: A model without markers, if that is refused.
    """
    if not markers and has_markers(tokenizer, "<|channel|>", "<|message|>"):
        return CHANNELS
    known = [pair for pair in THINKING_PAIRS if has_markers(tokenizer, *pair)]
    pair = tuple(markers) or next(iter(known), ())
    if not pair and strict:
        raise TrimtabError(
            "this model has no markers of thinking that are known, neither in its chat template nor among its special"
            ' tokens; give them: Positions.thinking("<think>", "</think>"), or thinking:<think>:</think>'
        )
    if not pair:
        return Machine({ANSWER: {}}, ANSWER)
    return Machine({ANSWER: {pair[0]: THINKING}, THINKING: {pair[1]: ANSWER}}, ANSWER)


def tools_machine(tokenizer: Any, markers: Sequence[str]) -> Machine:
    """In mode `OUTSIDE`, or another that isn't a `TOOL`, outside of tool calls.

    Args:
        tokenizer: Whose markers they are, unless some are given.
        markers: Markers that open and close such parts, in pairs, or nothing.

    Raises:
        TrimtabError: A model without markers.
    """
    if not markers and has_markers(tokenizer, "<|channel|>", "<|message|>"):
        return CHANNELS
    pairs = list(zip(markers[::2], markers[1::2], strict=True))
    pairs = pairs or [pair for pair in TOOL_PAIRS if has_markers(tokenizer, *filter(None, pair))]
    if not pairs:
        raise TrimtabError(
            "this model has no markers of tool calls that are known, neither in its chat template nor among its special"
            ' tokens; give them: Positions.outside_tools(("<tool_call>", "</tool_call>")), or'
            " outside-tools:<tool_call>:</tool_call>"
        )
    ends = [str(end) for end in (getattr(tokenizer, "eos_token", None),) if end]
    modes: dict[str, dict[str, str]] = {OUTSIDE: {opens: f"{TOOL} {i}" for i, (opens, _) in enumerate(pairs)}}
    for i, (_, closes) in enumerate(pairs):
        modes[f"{TOOL} {i}"] = dict.fromkeys([closes] if closes else ends, OUTSIDE)
    return Machine(modes, OUTSIDE)


def answer_header(tokenizer: Any) -> str | None:
    """What stands in a prompt between the last message and the answer, as far as it always does; `None`: not known."""
    template = str(getattr(tokenizer, "chat_template", None))
    known = _headers.get(tokenizer)
    if known is None or known[0] != template:
        known = _headers[tokenizer] = template, _header(tokenizer)
    return known[1]


_headers: WeakKeyDictionary[Any, tuple[str, str | None]] = WeakKeyDictionary()


def _header(tokenizer: Any) -> str | None:
    if not has_template(tokenizer):
        return None
    messages = [{"role": "user", "content": PROBE}]
    try:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception:  # whatever a template raises; where it is used, it says so
        return None
    header = text.rpartition(PROBE)[2]
    for opens, closes in THINKING_PAIRS:  # which some templates put there, and which are part of the answer
        for marker in (opens, closes):
            header = header.partition(marker)[0]
    return header.rstrip() or None


def has_markers(tokenizer: Any, *markers: str) -> bool:
    """Whether all of these stand in the chat template or among the added tokens."""
    template = getattr(tokenizer, "chat_template", None) or ""
    texts = "".join(map(str, template.values())) if isinstance(template, dict) else str(template)
    tokens = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    return all(marker in tokens or marker in texts for marker in markers)
