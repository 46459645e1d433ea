"""Report an answer's tokens as they are generated, to streams and transformers' streamers and stopping criteria."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Listener:
    """One answer's streamer and stopping criteria, called as transformers calls them, and its prompt's ids."""

    streamer: Any
    criteria: tuple[Any, ...]
    prompt: tuple[int, ...]

    def begin(self) -> None:
        """Pass the prompt to the streamer."""
        if self.streamer is not None:
            self.streamer.put(torch.tensor([self.prompt]))

    def token(self, tokens: list[int]) -> bool:
        """Report the last of these generated tokens, and return whether the answer should end with it."""
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens[-1:]))
        if not self.criteria:
            return False
        ids = torch.tensor([[*self.prompt, *tokens]])
        return any(bool(torch.as_tensor(done(ids, None)).any()) for done in self.criteria)

    def end(self) -> None:
        """Tell the streamer that the answer is complete."""
        if self.streamer is not None:
            self.streamer.end()
