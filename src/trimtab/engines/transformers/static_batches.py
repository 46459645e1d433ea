"""Static batches: answers by transformers' own `generate`, for requests that continuous batching can't run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trimtab.engines.arguments import split_by_length
from trimtab.engines.images import PromptImages
from trimtab.engines.resolve import Resolved, resolve
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import position_handling
from trimtab.engines.transformers.attention import steered_request_scores
from trimtab.engines.transformers.generate import Generation, generate_batch
from trimtab.engines.transformers.images import images_reader, recording_positions
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.prefill import UNSUPPORTED_OPTIONS, Prefill, decides_at_prefill
from trimtab.engines.transformers.read import reader
from trimtab.engines.transformers.scores import activation_edits, edited_sites, score_edits
from trimtab.engines.transformers.session import Session, fixed_edits
from trimtab.steering import Steering


def split_batches(layout: Layout, order: Sequence[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Split requests into batches of this size, of equal length if the model would count padding as positions."""
    batches = [list(order[start : start + size]) for start in range(0, len(order), size)]
    if len({lengths[i] for i in order}) < 2 or position_handling(layout).ignores_pads:
        return batches
    return [alike for chosen in batches for alike in split_by_length(chosen, lengths)]


def answer_static_batch(
    model: Any,
    tokenizer: Any,
    layout: Layout,
    ids: list[list[int]],
    steerings: list[Steering | None],
    kwargs: dict[str, Any],
    images: PromptImages | None = None,
) -> list[Generation]:
    """The answers to one batch. With `images`, the batch has a single prompt, to which they belong."""

    def generate_steered(resolved: Resolved, **more: Any) -> list[Generation]:
        """The answers under edits that are known before generation."""
        session = Session(
            model, layout, fixed_edits([activation_edits(row) for row in resolved.edits]), tokenizer=tokenizer
        )
        sites = edited_sites([edit for row in resolved.edits for edit in row])
        with steered_request_scores(layout, [score_edits(row) for row in resolved.edits], lengths):
            return generate_batch(model, tokenizer, ids, session, sites, resolved.names, **kwargs, **more)

    lengths = [len(prompt) for prompt in ids]
    if images is not None:
        resolved = resolve(steerings, lengths, images_reader(model, layout, ids[0], images))
        with recording_positions(layout, None):
            return generate_steered(resolved, images=images)
    held = {
        name: compat.generation_option(model, kwargs["options"], name) for name in ("use_cache", *UNSUPPORTED_OPTIONS)
    }
    if not decides_at_prefill(layout, steerings, lengths, held):
        return generate_steered(resolve(steerings, lengths, reader(layout, ids)))
    prefill = Prefill(model, layout, steerings, lengths)
    session = Session(model, layout, prefill.decide, tokenizer=tokenizer)
    with prefill.hooked(session):
        return generate_batch(model, tokenizer, ids, session, prefill.sites, prefill.names, **kwargs)
