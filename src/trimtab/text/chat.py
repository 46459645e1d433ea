"""Prompts to token ids, through the model's own chat template where it has one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import TrimtabError

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, prompt: Prompt, *, system: str | None = None, chat: bool | None = None) -> list[int]:
    """The token ids of a prompt, ending where the answer begins.

    A list of messages (`{"role": …, "content": …}`) is rendered by the chat template. A string is taken for
    the user's message where there is a template, and for plain text where there is none; `chat=True` or
    `False` insists on the one or the other. `system` is put before as a system message.

    Raises `TrimtabError` for messages, `chat=True` or `system` without a template, and for malformed messages.
    """
    if isinstance(prompt, str):
        if not (has_template(tokenizer) if chat is None else chat):
            if system is not None:
                raise TrimtabError("a system message needs a chat template, and this prompt is plain text")
            return list(tokenizer(prompt)["input_ids"])
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        messages = list(prompt)
        if chat is False:
            raise TrimtabError("chat=False with a list of messages: give plain text")
        for message in messages:
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise TrimtabError(f"a message is {{'role': …, 'content': …}}, got {message!r}")
    if not has_template(tokenizer):
        raise TrimtabError(
            "this tokenizer has no chat template; give plain text (chat=False), or set its chat_template"
        )
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    return _rendered(tokenizer, messages, opening=True)


def encode_talk(tokenizer: Any, talk: Prompt) -> list[int]:
    """The token ids of a text as it stands, or of messages as the chat template has them.

    Messages that end with the assistant's are a conversation that has been answered: no new answer begins behind them.
    Raises `TrimtabError` as `encode` does.
    """
    if isinstance(talk, str):
        return encode(tokenizer, talk, chat=False)
    messages = list(talk)
    ids = encode(tokenizer, messages)  # its checks, too
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    return _rendered(tokenizer, messages, opening=False) if answered else ids


def _rendered(tokenizer: Any, messages: Sequence[Message], *, opening: bool) -> list[int]:
    """The ids of messages, with the opening of the assistant's next one or without."""
    try:
        rendered = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=opening, tokenize=True, return_dict=True
        )
    except Exception as error:  # templates raise whatever their authors chose
        raise TrimtabError(f"the chat template refuses these messages: {error}") from error
    return list(rendered["input_ids"])


def render_messages(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Messages as the chat template's text, ending where the answer begins. Raises `TrimtabError` if it refuses."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except Exception as error:  # templates raise whatever their authors chose
        raise TrimtabError(f"the chat template refuses these messages: {error}") from error


def template_digest(tokenizer: Any) -> str | None:
    """A digest of the chat template, `None` where there is none."""
    if not has_template(tokenizer):
        return None
    return hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16]
