"""Checks of requests with a clean cache or monitors, which need continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.engines.request import Decoding, Request
from trimtab.engines.resolve import active_edits, check_prompt
from trimtab.engines.transformers.clean import check_clean_edits
from trimtab.engines.transformers.continuous import BatchingSettings
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.monitoring import check_monitors_fit
from trimtab.errors import UnsupportedError


def check_batching(model: Any, tokenizer: Any, layout: Layout, requests: Sequence[Request], decoding: Decoding) -> None:
    """Raises `TrimtabError` for requests whose clean cache or monitors can't be supported."""
    steered = [
        request for request in requests if request.rejection is None and active_edits(request.steering)
    ]  # with rejection the cache is clean anyway
    if decoding.clean_cache and steered:
        _check_continuous(model, tokenizer, layout, "clean_cache=True needs", decoding)
        for request in steered:
            check_clean_edits(active_edits(request.steering), len(request.ids))
    if not decoding.monitors:
        return
    if any(request.rejection is not None for request in requests):
        raise UnsupportedError("monitors can't be combined with rejection; leave one of them out")
    _check_continuous(model, tokenizer, layout, "monitors need", decoding)
    for request in requests:
        check_monitors_fit(decoding.monitors, request.steering, layout)
        for each in decoding.monitors:
            check_prompt(each.steering, len(request.ids))


def _check_continuous(model: Any, tokenizer: Any, layout: Layout, what: str, decoding: Decoding) -> None:
    if BatchingSettings.of(model, tokenizer, layout, decoding.options) is None:
        known = ", ".join(sorted(name for name, value in decoding.options.items() if value is not None))
        raise UnsupportedError(
            f"{what} continuous batching, which this model or these options don't support ({known}): beams, processors"
            " and criteria of your own, and other caches go through transformers' generate; leave them out"
        )
