"""A streamed answer: pieces of text from a generation that runs in its own thread.

The thread never waits for the reader. It continues to the end, or to the token at which it is stopped, so an unread
stream blocks others for no longer than its answer takes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from trimtab.engines.answer import Generation
from trimtab.engines.arguments import as_list
from trimtab.errors import TrimtabError
from trimtab.steering import Steering
from trimtab.text.chat import Prompt
from trimtab.text.detokenizer import Detokenizer

REFUSED = {
    "batch_size": "there is one prompt",
    "progress": "the pieces show the progress",
    "streamer": "the stream already yields the tokens",
    "num_return_sequences": "it returns one answer",
    "num_beams": "beam search has no text before it ends",
}

ReportTokens = Callable[[Sequence[int]], None]
"""Called with tokens as they are generated; an empty list means that all checks have passed."""


class _Stopped(BaseException):
    """The rest of the answer is no longer needed."""


class Stream:
    """The text of one answer, piece by piece: `for piece in lm.stream(…): print(piece, end="", flush=True)`.

    Joined, the pieces are the answer's text; a piece has several tokens if a character needs them. After the last
    piece, `result` is the `Generation`. Leaving the loop early stops the generation at the current token, and so do
    `close()` and leaving the stream's `with` block.
    """

    def __init__(self, tokenizer: Any, generate: Callable[[ReportTokens], Generation]) -> None:
        """Start `generate`, which reports tokens as they are generated. Raises what it raises before the first one."""
        self._unfolding = Detokenizer(tokenizer)
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._stop = threading.Event()
        self._over = False
        self._result: Generation | None = None
        self._text = ""
        arguments = generate, self._queue, self._stop
        self._thread = threading.Thread(target=_run, args=arguments, name="trimtab-stream", daemon=True)
        self._end = weakref.finalize(self, _end, self._stop, self._thread)
        self._thread.start()
        self._ready: list[Any] = [self._next_item()]
        if isinstance(self._ready[0], BaseException):
            self._finish()
            raise self._ready[0]

    @property
    def result(self) -> Generation:
        """The whole answer, with its doses. Raises `TrimtabError` before the end, and for a stopped stream."""
        if self._result is None:
            why = "was stopped before its end" if self._over else "hasn't ended yet; read all of its pieces first"
            raise TrimtabError(f"this stream has no result: it {why}")
        return self._result

    def __next__(self) -> str:
        while not self._over:
            item = self._ready.pop() if self._ready else self._next_item()
            if isinstance(item, BaseException):
                self._finish()
                raise item
            if isinstance(item, Generation):
                self._finish()
                self._result = item
                if rest := self._unfolding.finish():
                    self._text += rest
                    return rest
                break
            piece = "".join(self._unfolding.add(token) for token in item)
            if piece:
                self._text += piece
                return piece
        raise StopIteration

    def __iter__(self) -> Iterator[str]:
        """The pieces. If the consumer leaves the loop early, the generation is stopped."""
        try:
            while True:
                try:
                    piece = next(self)
                except StopIteration:
                    return
                yield piece
        finally:
            self.close()

    def close(self) -> None:
        """Stop the generation and wait for it, one more token at most. The model is then as it was before."""
        if not self._over:
            self._finish()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Stream({self._state})"

    def _repr_html_(self) -> str:
        """The whole answer; before its end, and for a stopped stream, the pieces taken so far."""
        from trimtab.report.notebook import stream_html

        if self._result is not None:
            return self._result._repr_html_()
        return stream_html(self._text, self._state)

    @property
    def _state(self) -> str:
        return "running" if not self._over else "complete" if self._result is not None else "stopped"

    def _next_item(self) -> Any:
        try:
            return self._queue.get()
        except BaseException:  # such as an interrupt while waiting
            self._finish()
            raise

    def _finish(self) -> None:
        self._over = True
        self._end()


def stream_prompt(prompt: Prompt, steering: Steering | None, rejection: Any, options: Mapping[str, Any]) -> Prompt:
    """The prompt of a stream. Raises `TrimtabError` for several, and for options that one answer can't have."""
    prompts = as_list(prompt)
    if len(prompts) != 1:
        raise TrimtabError(f"a stream answers one prompt, got {len(prompts)}; make one for each, or use lm.generate(…)")
    for name, value in (("steering", steering), ("rejection", rejection)):
        if isinstance(value, (list, tuple)):
            raise TrimtabError(f"a stream has one {name}, got a list of {len(value)}; give the {name} itself")
    for name, why in REFUSED.items():
        if options.get(name) not in (None, 1, False):
            raise TrimtabError(f"a stream can't take {name}: {why}")
    return prompts[0]


class TokenReporter:
    """A streamer in the sense of transformers: it receives the prompt first, and then each token."""

    def __init__(self, tell: ReportTokens) -> None:
        self._report = tell
        self._begun = False

    def put(self, value: Any) -> None:
        """Takes the prompt's ids `[1, tokens]`, then the ids of new tokens `[1]`."""
        self._report(value.flatten().tolist() if self._begun else [])
        self._begun = True

    def end(self) -> None:
        """Does nothing; the `Generation` marks the end."""


def _run(generate: Callable[[ReportTokens], Generation], queue: SimpleQueue[Any], stop: threading.Event) -> None:
    def report(tokens: Sequence[int]) -> None:
        if stop.is_set():
            raise _Stopped
        queue.put(tokens)

    try:
        queue.put(generate(report))
    except _Stopped:  # nobody reads it, and a stored exception would keep the KV cache alive
        return
    except BaseException as error:  # raised again in the reader's thread
        queue.put(error)


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
