"""Limits on how much unauthenticated clients may write into logs."""

from __future__ import annotations

import logging
import time


class RateLimiter:
    """A rate limit: `rate` per second, with bursts of up to ten seconds' worth."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._permits = 10 * rate
        self._at = time.monotonic()
        self._left_out = 0

    def acquire(self) -> int | None:
        """The number omitted before this one; `None` if this one is to be omitted."""
        now = time.monotonic()
        self._permits = min(10 * self.rate, self._permits + (now - self._at) * self.rate)
        self._at = now
        if self._permits < 1:
            self._left_out += 1
            return None
        self._permits -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out


class RateLimitFilter(logging.Filter):
    """Limits the rate of log records with this message and lets all others through; counts the omitted ones."""

    def __init__(self, message: str, rate: float) -> None:
        super().__init__()
        self.message = message
        self._limiter = RateLimiter(rate)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.msg != self.message:
            return True
        left_out = self._limiter.acquire()
        if left_out:
            record.msg = f"{self.message} ({left_out} more were left out)"
        return left_out is not None
