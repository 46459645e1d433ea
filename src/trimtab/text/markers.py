"""The markers around a model's thinking and tool calls, and the header before its answer in a prompt.

They come from the tokenizer: special tokens, or texts of the chat template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from trimtab.errors import TrimtabError
from trimtab.text.chat import has_template
from trimtab.text.machine import Machine

THINKING, ANSWER, TOOL, OUTSIDE = "thinking", "answer", "tool", "outside"
"""Modes of the machines. Each kind of tool call has its own mode, whose name begins with `TOOL`."""

THINKING_PAIRS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, SmolLM3, GLM, …
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),  # Kimi
    ("<thinking>", "</thinking>"),
)
END = ""
"""Instead of a closing marker: the token that ends the answer."""
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
            " to=": TOOL,  # the message's recipient
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
    """A machine that is in mode `THINKING` between the markers, and in mode `ANSWER` outside them.

    Args:
        tokenizer: The tokenizer whose markers are used if `markers` is empty.
        markers: The opening and the closing marker of thinking, or nothing.
        strict: Whether to reject a model without markers; otherwise everything counts as the answer.

    Raises:
        TrimtabError: A model without markers, if `strict`.
    """
    if not markers and has_markers(tokenizer, "<|channel|>", "<|message|>"):
        return CHANNELS
    known = [pair for pair in THINKING_PAIRS if has_markers(tokenizer, *pair)]
    pair = tuple(markers) or next(iter(known), ())
    if not pair and strict:
        raise TrimtabError(
            "this model has no known markers of thinking, neither in its chat template nor among its special"
            ' tokens; give them: Positions.thinking("<think>", "</think>"), or thinking:<think>:</think>'
        )
    if not pair:
        return Machine({ANSWER: {}}, ANSWER)
    return Machine({ANSWER: {pair[0]: THINKING}, THINKING: {pair[1]: ANSWER}}, ANSWER)


def tools_machine(tokenizer: Any, markers: Sequence[str]) -> Machine:
    """A machine that is in a mode starting with `TOOL` inside tool calls, and in `OUTSIDE` or another mode elsewhere.

    Args:
        tokenizer: The tokenizer whose markers are used if `markers` is empty.
        markers: Opening and closing markers in pairs, or nothing.

    Raises:
        TrimtabError: A model without markers.
    """
    if not markers and has_markers(tokenizer, "<|channel|>", "<|message|>"):
        return CHANNELS
    pairs = list(zip(markers[::2], markers[1::2], strict=True))
    pairs = pairs or [pair for pair in TOOL_PAIRS if has_markers(tokenizer, *filter(None, pair))]
    if not pairs:
        raise TrimtabError(
            "this model has no known markers of tool calls, neither in its chat template nor among its special"
            ' tokens; give them: Positions.outside_tools(("<tool_call>", "</tool_call>")), or'
            " outside-tools:<tool_call>:</tool_call>"
        )
    ends = [str(end) for end in (getattr(tokenizer, "eos_token", None),) if end]
    modes: dict[str, dict[str, str]] = {OUTSIDE: {opens: f"{TOOL} {i}" for i, (opens, _) in enumerate(pairs)}}
    for i, (_, closes) in enumerate(pairs):
        modes[f"{TOOL} {i}"] = dict.fromkeys([closes] if closes else ends, OUTSIDE)
    return Machine(modes, OUTSIDE)


def answer_header(tokenizer: Any) -> str | None:
    """The constant part of the text between the last message of a prompt and the answer; `None` if it isn't known."""
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
    except Exception:  # any error of a template; it is reported where the template is used
        return None
    header = text.rpartition(PROBE)[2]
    for opens, closes in THINKING_PAIRS:  # some templates include these, but they are part of the answer
        for marker in (opens, closes):
            header = header.partition(marker)[0]
    return header.rstrip() or None


def has_markers(tokenizer: Any, *markers: str) -> bool:
    """Whether all of these are in the chat template or among the added tokens."""
    template = getattr(tokenizer, "chat_template", None) or ""
    texts = "".join(map(str, template.values())) if isinstance(template, dict) else str(template)
    tokens = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    return all(marker in tokens or marker in texts for marker in markers)
