"""Converts chat messages in the usual layouts to a list of `{"role": …, "content": …}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from trimtab.errors import TrimtabError

Conversation = tuple[tuple[str, str], ...]
"""Chat messages, each as its role and its content."""

SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Roles for the values of `from`, in messages of the form `{"from": …, "value": …}`."""
WRITTEN = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
"""How a text begins that contains messages, as in the cells of a table."""
TURN = re.compile(r"\n\n(Human|Assistant):")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def conversation(messages: Any, name: str = "messages") -> Conversation:
    """Chat messages as tuples of role and content.

    Args:
        messages: A list of `{"role": …, "content": …}`, or of such tuples.
        name: What the error calls it.

    Raises:
        TrimtabError: There are no messages, or one isn't just a role and a text.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise TrimtabError(f"{name!r} is a text or a list of messages, got {messages!r}")
    turns = tuple(_message(message, name) for message in messages)
    if not any(content.strip() for _, content in turns):
        raise TrimtabError(f"{name!r} is empty: no message has content")
    return turns


def _message(message: Any, name: str) -> tuple[str, str]:
    if isinstance(message, tuple) and len(message) == 2:
        message = {"role": message[0], "content": message[1]}
    if not isinstance(message, Mapping) or not all(is_text(message.get(key)) for key in ("role", "content")):
        raise TrimtabError(f"a message of {name!r} is {{'role': …, 'content': …}}, both texts, got {message!r}")
    if more := [key for key, value in message.items() if key not in ("role", "content") and value is not None]:
        raise TrimtabError(f"a message of {name!r} has {more[0]!r}, but only its role and content can be learned from")
    return message["role"], message["content"]


def as_messages(value: Any) -> Any:
    """Messages in one of the usual layouts as a list of `{"role": …, "content": …}`; anything else as it is.

    Besides such a list, the layouts are: `{"messages": […]}` without other content, ShareGPT's `{"from": "human",
    "value": …}`, and contents that are a list of text parts.
    """
    if isinstance(value, Mapping) and "messages" in value:
        rest = [more for key, more in value.items() if key != "messages"]
        return value if any(more and more is not True for more in rest) else as_messages(value["messages"])
    if not isinstance(value, list) or not value or not all(map(is_turn, value)):
        return value
    return [_turn(message) for message in value]


def is_turn(message: Any) -> bool:
    """Whether it is one message, in either layout."""
    return isinstance(message, Mapping) and ({"role", "content"} <= set(message) or {"from", "value"} <= set(message))


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    turn = {key: value for key, value in message.items() if value is not None}
    if "role" not in turn and turn.get("from") in SHAREGPT:
        turn = {"role": SHAREGPT[turn.pop("from")], "content": turn.pop("value", None), **turn}
    content = turn.get("content")
    if isinstance(content, list) and content and all(map(_is_text_part, content)):
        turn["content"] = "\n".join(part["text"] for part in content)
    return turn


def _is_text_part(part: Any) -> bool:
    """Whether it is a text part. In Parquet, every part has all keys, such as an image that is `None`."""
    if not isinstance(part, Mapping) or part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
        return False
    return not any(value for key, value in part.items() if key not in ("type", "text"))


def messages_from_json(text: str) -> Any:
    """The messages in a text that holds them as JSON, as in the cells of a table; any other text as it is.

    Raises:
        TrimtabError: The text holds messages, but not as JSON.
    """
    if not WRITTEN.match(text):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise TrimtabError("it is a string of messages that aren't JSON; save the rows as JSONL or Parquet") from None


def messages_from_transcript(text: str) -> Any:
    r"""The messages of a transcript in the format of Anthropic's preference data: `\n\nHuman: …\n\nAssistant: …`.

    An empty last turn of the assistant's marks the start of the answer, and is left out. Other texts are returned as
    they are.
    """
    if not text.startswith("\n\nHuman:"):
        return text
    _, *pieces = TURN.split(text)
    turns = [
        {"role": SPEAKERS[speaker], "content": words.strip()}
        for speaker, words in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def is_text(value: Any) -> bool:
    """Whether it is a string that can be encoded as UTF-8; JSON can hold lone surrogates, which can't."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def includes_prompt(side: Any, prompt: Any) -> bool:
    """Whether a side's messages include the prompt, as in preference data that also has it in a column."""
    if not isinstance(side, list) or not prompt:
        return False
    before = [_role_and_content(message) for message in side[:-1]]
    if isinstance(prompt, str):
        return ("user", prompt.strip()) in before
    prompt_messages = [_role_and_content(message) for message in prompt]
    return prompt_messages in (before[: len(prompt_messages)], before[-len(prompt_messages) :])


def starts_conversation(side: Any, prompt: Any) -> bool:
    """Whether a side's messages start a conversation, instead of continuing where the prompt ends."""
    if not isinstance(side, list) or len(side) < 2 or not is_turn(side[0]):
        return False
    (begins, _), ends = (
        _role_and_content(side[0]),
        "user" if isinstance(prompt, str) else _role_and_content(prompt[-1])[0],
    )
    return begins == "system" or begins == ends == "user"


def _role_and_content(message: Any) -> tuple[Any, str]:
    return (message.get("role"), str(message.get("content")).strip()) if isinstance(message, Mapping) else (None, "")
