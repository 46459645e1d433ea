"""One turn of `trimtab chat`: the answer is shown while it is generated, and can be interrupted."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from trimtab.commands.chat_commands import ChatSetup
from trimtab.commands.chat_state import ChatAnswer, Conversation, Turn, steering_record
from trimtab.commands.terminal import signal_handler
from trimtab.errors import TrimtabError
from trimtab.text.detokenizer import Detokenizer

STREAMING = {"transformers", "llamacpp"}
"""Engines that stream tokens. Others return an answer when it is complete, and it can't be interrupted."""

OnPiece = Callable[[str, str], None]
"""Called with `"unsteered"` or `"steered"`, and a piece of that answer."""


class Stream:
    """A streamer and stopping criterion for `lm.generate`: passes on pieces of text, and stops after `stop()`."""

    def __init__(self, tokenizer: Any, on_piece: Callable[[str], None]) -> None:
        self.stopped: bool = False
        self._text = Detokenizer(tokenizer)
        self._on_piece = on_piece
        self._began = False

    def stop(self) -> None:
        """Stop after the current token."""
        self.stopped = True

    def put(self, ids: Any) -> None:
        """Receive the prompt, which is skipped, then one token at a time, like other streamers of transformers."""
        if not self._began:
            self._began = True
            return
        for token in ids.flatten().tolist():
            self._emit(self._text.add(int(token)))

    def end(self) -> None:
        self._emit(self._text.finish())

    def __call__(self, ids: Any, _scores: Any, **_: Any) -> Any:
        """The stopping criterion: whether each row of `ids` `[rows, tokens]` is done."""
        import torch

        return torch.full((len(ids),), self.stopped, dtype=torch.bool, device=ids.device)

    def _emit(self, piece: str) -> None:
        if piece:
            self._on_piece(piece)


@contextmanager
def interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """While open, Ctrl-C calls `stop`; a second one raises `KeyboardInterrupt`, in case the model is slow to stop."""
    pressed = False

    def handle(_signal: int, _frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        stop()

    with signal_handler(signal.SIGINT, handle):
        yield


def token_limit(setup: ChatSetup, conversation: Conversation, question: str) -> int:
    """The number of tokens that still fit for the answer. Raises `TrimtabError` if the model's context is full."""
    length = len(setup.lm.encode_with_images(conversation.messages(question), system=conversation.system)[0])
    size = setup.lm.layout.context
    if size is not None and length >= size:
        raise TrimtabError(
            f"the conversation has {length} tokens with this question, and the model's context is {size}; /undo removes"
            " the last turn, /reset all of them"
        )
    return conversation.max_tokens if size is None else min(conversation.max_tokens, size - length)


def ask(
    setup: ChatSetup, conversation: Conversation, question: str, on_piece: OnPiece, *, interrupt: bool = False
) -> Turn:
    """Ask the model. With `/compare`, the unsteered answer comes first if a steering or an emphasis is on.

    Args:
        setup: The model and its engine.
        conversation: The history, the steering and the settings.
        question: The user's message.
        on_piece: Called with the pieces of the answers.
        interrupt: Whether Ctrl-C ends the current answer. The part generated so far is kept.

    Raises:
        TrimtabError: The request can't be run. Nothing has been shown then, or only a part.
    """
    max_new_tokens = token_limit(setup, conversation, question)
    steering = conversation.steering()
    emphasis_options: dict[str, Any] = {}
    if conversation.emphasized:
        phrases = list(conversation.emphasized)
        _check_phrases(setup, conversation, question)
        emphasis_options = {"emphasize": [phrases]}
    unsteered = None
    if conversation.compare and (steering is not None or emphasis_options):
        unsteered = _answer(setup, conversation, question, max_new_tokens, on_piece, "unsteered", interrupt)
    steering_options = {"steering": steering, "transfer": setup.transfer, **emphasis_options}
    answer = _answer(setup, conversation, question, max_new_tokens, on_piece, "steered", interrupt, **steering_options)
    return Turn(
        question,
        answer,
        conversation.system,
        tuple(steering_record(steered) for steered in conversation.active_steerings),
        conversation.emphasized,
        conversation.next_seed,
        unsteered,
        conversation.images,
    )


def _answer(
    setup: ChatSetup,
    conversation: Conversation,
    question: str,
    max_new_tokens: int,
    on_piece: OnPiece,
    side: str,
    interrupt: bool,
    **steering: Any,
) -> ChatAnswer:
    stream = Stream(setup.lm.tokenizer, lambda piece: on_piece(side, piece))
    options: dict[str, Any] = {"seed": conversation.next_seed}
    if conversation.temperature is not None:
        options |= {"do_sample": True, "temperature": conversation.temperature}
    if setup.engine in STREAMING:
        options |= {"streamer": stream, "stopping_criteria": [stream]}
    messages = conversation.messages(question)
    with interruptible(stream.stop) if interrupt else nullcontext():
        (generation,) = setup.lm.generate(
            [messages], max_new_tokens=max_new_tokens, system=conversation.system, **options, **steering
        )
    if setup.engine not in STREAMING:
        on_piece(side, generation.text)
    cut = (
        stream.stopped
        and setup.engine in STREAMING
        and generation.finish_reason != "stop"
        and len(generation.token_ids) < max_new_tokens
    )
    return ChatAnswer(
        generation.text,
        "interrupted" if cut else generation.finish_reason,
        generation.prompt_tokens,
        generation.token_ids,
        generation.applied.edits,
        generation.applied.doses if generation.applied.doses or not generation.applied.edits else None,
    )


def _check_phrases(setup: ChatSetup, conversation: Conversation, question: str) -> None:
    """If a phrase isn't in the conversation, say how to drop it, since phrases are set for all questions."""
    try:
        setup.lm.spans(conversation.messages(question), list(conversation.emphasized), system=conversation.system)
    except TrimtabError as error:
        raise type(error)(f"{error}; /emphasize off drops the phrases") from None
