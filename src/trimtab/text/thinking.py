"""The texts between which a model thinks, and whether a prompt ends in between."""

from __future__ import annotations

from typing import Any

PAIRS = (
    ("<think>", "</think>"),  # Qwen, DeepSeek, SmolLM3, GLM, …
    ("[THINK]", "[/THINK]"),  # Mistral
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Cohere
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),  # Kimi
)


def thinking_of(tokenizer: Any) -> tuple[str, str] | None:
    """What opens and closes thinking, by the chat template and the added tokens; `None` where nothing does."""
    template = getattr(tokenizer, "chat_template", None) or ""
    text = "".join(map(str, template.values())) if isinstance(template, dict) else str(template)
    tokens = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    return next((pair for pair in PAIRS if all(mark in text or mark in tokens for mark in pair)), None)


def is_thinking(tokenizer: Any, ids: list[int], thinking: tuple[str, str]) -> bool:
    """Whether a prompt ends with the mark that opens thinking, as some templates have it."""
    return str(tokenizer.decode(ids[-16:], skip_special_tokens=False)).rstrip().endswith(thinking[0])
