"""Prompts to token ids, through the model's own chat template if it has one."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from trimtab.errors import TrimtabError
from trimtab.keywords import caller_stacklevel
from trimtab.text.images import has_images
from trimtab.text.templates import CONTINUE, check_keywords, preset_keywords

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]
Template = Mapping[str, Any]
"""Keywords of the chat template, such as `{"enable_thinking": False}`, and optionally `continue_final_message`."""


class TemplateWarning(UserWarning):
    """A prompt is rendered by the chat template but seems to have been rendered already."""


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(
    tokenizer: Any,
    prompt: Prompt,
    *,
    system: str | None = None,
    chat: bool | None = None,
    template: Template | None = None,
) -> list[int]:
    """The token ids of a prompt, ending where the answer begins.

    A list of messages (`{"role": …, "content": …}`) is rendered by the chat template. A string is the user's message if
    there is a template, and plain text if there is none; `chat=True` or `chat=False` forces one or the other. `system`
    is prepended as a system message.

    If the last message is the assistant's, it is an unfinished answer, and the ids end where it continues. `template`
    holds keywords of the chat template; `continue_final_message=False` among them starts a new answer instead.

    Raises `TrimtabError` for messages, `chat=True`, `system` or `template` without a template, for malformed messages,
    for keywords that the template doesn't use, and if it can't leave an unfinished answer open. Warns with
    `TemplateWarning` about a string that contains the template's special tokens.
    """
    if tokenizer is None:
        raise TrimtabError("this LM has no tokenizer, so it can't read text; give one: LM(model, tokenizer)")
    if isinstance(prompt, str):
        _check_text(prompt)
        if not (has_template(tokenizer) if chat is None else chat):
            for name, value in (("a system message", system), ("a keyword of the template", template)):
                if value:
                    raise TrimtabError(f"{name} needs a chat template, but this prompt is plain text")
            return list(plain_tokens(tokenizer, prompt)["input_ids"])
        messages: list[Message] = [{"role": "user", "content": prompt}]
    else:
        if chat is False:
            raise TrimtabError("chat=False with a list of messages: give plain text")
        messages = checked_messages(prompt)
        if has_images(messages):
            raise TrimtabError(
                "these messages have images, but only text is supported here; lm.generate, stream and capture take"
                " images"
            )
    if not has_template(tokenizer):
        raise TrimtabError(
            "this tokenizer has no chat template; give plain text (chat=False), or set its chat_template"
        )
    if isinstance(prompt, str):
        warn_of_special_tokens(tokenizer, prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    if any(message["role"] == "system" for message in messages) and not keeps_system(tokenizer):
        raise TrimtabError("the chat template drops system prompts; put the text into the prompt")
    return list(_apply(tokenizer, messages, template, tokenize=True, return_dict=True)["input_ids"])


def _check_text(text: Any) -> None:
    """Raises `TrimtabError` for a lone surrogate, which isn't valid text and which tokenizers reject."""
    try:
        if isinstance(text, str):
            text.encode()
    except UnicodeEncodeError as error:
        raise TrimtabError(
            f"character {error.start + 1} of the prompt is half a surrogate pair, which isn't text"
        ) from None


def checked_messages(messages: Sequence[Message], system: str | None = None) -> list[Message]:
    """The messages as a list, preceded by a system message, if any. Raises `TrimtabError` for malformed ones."""
    if isinstance(messages, Mapping) or not isinstance(messages, Iterable):
        raise TrimtabError(f"a prompt is a text or a list of messages, got {type(messages).__name__}")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise TrimtabError(f"a message is {{'role': …, 'content': …}}, got {message!r}")
        _check_text(message["content"])
    return [*([] if system is None else [{"role": "system", "content": system}]), *messages]


def encode_conversation(tokenizer: Any, conversation: Prompt, template: Template | None = None) -> list[int]:
    """The token ids of a text as it is, or of messages rendered by the chat template.

    If the last message is the assistant's, the conversation is complete, and no new answer begins after it. `template`
    holds keywords of the chat template. Raises `TrimtabError` as `encode` does.
    """
    if isinstance(conversation, str):
        return encode(tokenizer, conversation, chat=False, template=template)
    messages = list(conversation)
    answered = bool(messages) and isinstance(messages[-1], Mapping) and messages[-1].get("role") == "assistant"
    keywords = dict(template or {})
    if not answered or CONTINUE in keywords:
        return encode(tokenizer, messages, template=template)
    encode(tokenizer, messages, template={**keywords, CONTINUE: False})  # for its checks
    options: dict[str, Any] = {"tokenize": True, "return_dict": True}
    encoded = _render(
        tokenizer, _contents(tokenizer, messages), {"add_generation_prompt": False, **keywords}, **options
    )
    return list(encoded["input_ids"])


def render_messages(tokenizer: Any, messages: Sequence[Message], template: Template | None = None) -> str:
    """Messages rendered as text, ending where the answer begins or continues. Raises as `encode` does."""
    return str(_apply(tokenizer, messages, template, tokenize=False))


def plain_tokens(tokenizer: Any, text: str, **options: Any) -> Any:
    """Tokenize plain text, without a second BOS token if the text already starts with one."""
    first = getattr(tokenizer, "bos_token", None)
    if first and text.startswith(first):
        doubled, single = (tokenizer(text, add_special_tokens=add, **options) for add in (True, False))
        ids = list(doubled["input_ids"])
        if ids[:2] == [tokenizer.bos_token_id] * 2 and ids[1:] == list(single["input_ids"]):
            return single
        return doubled
    return tokenizer(text, **options)


def template_digest(tokenizer: Any) -> str | None:
    """A digest of the chat template and of the keywords that are set for it; `None` if there is no template."""
    if not has_template(tokenizer):
        return None
    text = str(tokenizer.chat_template)
    if keywords := preset_keywords(tokenizer):
        text += json.dumps(keywords, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rendering_keywords(tokenizer: Any, messages: Sequence[Message], template: Template | None) -> dict[str, Any]:
    """The keywords for rendering messages so that an answer can begin or continue. Raises as `encode` does."""
    keywords = dict(template or {})
    continues = _continues(messages, keywords.pop(CONTINUE, None))
    check_keywords(tokenizer, keywords)
    ends = {CONTINUE: True, "add_generation_prompt": False} if continues else {"add_generation_prompt": True}
    return {**ends, **keywords}


def requires_parts(tokenizer: Any) -> bool:
    """Whether the chat template takes a message's content only as a list of parts, and would drop a plain text.

    This is the case for templates of image-text models.
    """
    return _cached_check(_PARTS, tokenizer, _loses_text)


def keeps_system(tokenizer: Any) -> bool:
    """Whether the chat template renders a system message, or rejects it with an error."""
    return _cached_check(_SYSTEM, tokenizer, _renders_system)


def _cached_check(
    cache: WeakKeyDictionary[Any, tuple[str, bool]], tokenizer: Any, check: Callable[[Any], bool]
) -> bool:
    """The cached result of a check on a chat template."""
    template = str(tokenizer.chat_template)
    try:
        known, result = cache.get(tokenizer, (None, False))
    except TypeError:  # it isn't hashable
        return check(tokenizer)
    if known != template:
        result = check(tokenizer)
        cache[tokenizer] = template, result
    return result


def _renders_system(tokenizer: Any) -> bool:
    messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "text"}]
    try:
        return _PROBE in render_messages(tokenizer, messages)
    except TrimtabError:  # the template itself raises an error
        return True


def _loses_text(tokenizer: Any) -> bool:
    options = {"add_generation_prompt": True, "tokenize": False}
    seen = []
    for content in (_PROBE, [{"type": "text", "text": _PROBE}]):
        try:
            seen.append(_PROBE in str(tokenizer.apply_chat_template([{"role": "user", "content": content}], **options)))
        except Exception:  # it needs other messages, or doesn't support this content
            seen.append(False)
    return seen == [False, True]


def _contents(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """The messages with contents in the form that the chat template takes: text, or parts if it takes only parts."""
    plain = all(isinstance(message["content"], str) for message in messages)
    if requires_parts(tokenizer):
        return [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in messages
        ]
    return list(messages) if plain else [{**message, "content": _joined(message["content"])} for message in messages]


def _joined(content: Any) -> Any:
    """Text parts joined into one text."""
    parts = content if isinstance(content, (list, tuple)) else ()
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type", "text") == "text"]
    return "\n".join(map(str, texts)) if parts and len(texts) == len(parts) and None not in texts else content


def _apply(tokenizer: Any, messages: Sequence[Message], template: Template | None, **options: Any) -> Any:
    keywords = rendering_keywords(tokenizer, messages, template)
    messages = _contents(tokenizer, messages)
    if CONTINUE not in keywords:
        return _render(tokenizer, messages, keywords, **options)
    try:
        return tokenizer.apply_chat_template(messages, **keywords, **options)
    except Exception as error:  # templates raise arbitrary exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TrimtabError(
            f"the chat template can't leave the assistant's last message open: {reason}; render it yourself, and"
            " give plain text (chat=False)"
        ) from error


def _render(tokenizer: Any, messages: Sequence[Message], keywords: Mapping[str, Any], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(list(messages), **keywords, **options)
    except Exception as error:  # templates raise arbitrary exceptions
        raise TrimtabError(f"the chat template refuses these messages: {error}") from error


def _continues(messages: Sequence[Message], wanted: bool | None) -> bool:
    """Whether the last message is an answer to continue. Raises `TrimtabError` if it can't be continued."""
    ends_with_answer = bool(messages) and messages[-1].get("role") == "assistant"
    if wanted is False or (wanted is None and not ends_with_answer):
        return False
    if not ends_with_answer:
        last = f"the last one is the {messages[-1].get('role')}'s" if messages else "there is none"
        raise TrimtabError(f"{CONTINUE} continues the assistant's last message, but {last}")
    if not str(messages[-1].get("content") or "").strip():
        raise TrimtabError("the assistant's last message is empty: there is nothing to continue; leave it out")
    return True


def warn_of_special_tokens(tokenizer: Any, text: str, *, answer: bool = False) -> None:
    """Warn if a prompt, or an answer, contains special tokens that the chat template writes itself."""
    if tokens := [token for token in _template_special_tokens(tokenizer) if token in text]:
        then = (
            "and is read together with them; remove them from the data"
            if answer
            else "and is still put into a user's message; if it is already rendered, pass it as plain text (chat=False,"
            " --plain)"
        )
        warnings.warn(
            f"the {'answer' if answer else 'prompt'} contains {', '.join(map(repr, tokens))}, which the chat template"
            f" writes itself, {then}",
            TemplateWarning,
            stacklevel=caller_stacklevel(),
        )


def _template_special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens in a user's message as rendered by the chat template."""
    template = str(tokenizer.chat_template)
    try:
        known, tokens = _SPECIAL_TOKENS.get(tokenizer, (None, ()))
    except TypeError:  # it isn't hashable
        return _special_tokens_of_template(tokenizer)
    if known != template:
        tokens = _special_tokens_of_template(tokenizer)
        _SPECIAL_TOKENS[tokenizer] = template, tokens
    return tokens


def _special_tokens_of_template(tokenizer: Any) -> tuple[str, ...]:
    try:
        text = render_messages(tokenizer, [{"role": "user", "content": "text"}])
    except TrimtabError:  # it needs other messages; errors in the prompt are reported elsewhere
        return ()
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = [str(token.content) for token in added.values() if token.special]
    every = dict.fromkeys((*special, *getattr(tokenizer, "all_special_tokens", ())))
    return tuple(token for token in every if token and token in text)


_PROBE = "trimtab\u2060reads\u2060this"
_PARTS: WeakKeyDictionary[Any, tuple[str, bool]] = WeakKeyDictionary()
_SYSTEM: WeakKeyDictionary[Any, tuple[str, bool]] = WeakKeyDictionary()
_SPECIAL_TOKENS: WeakKeyDictionary[Any, tuple[str, tuple[str, ...]]] = WeakKeyDictionary()
"""Caches by tokenizer: the template, and the special tokens that it writes. Some tokenizers have thousands of them."""
