"""A batch of answers whose rows leave as they end, so that what is left of the batch gets all the work.

In a batch that stays whole a row that has ended is computed until the last one ends. Here it isn't, and the cache is
written in place rather than copied at each token. Rows see other neighbours than in a whole batch, so a near-tie of
two tokens may fall the other way in float32, as it does between any two batch sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.engines.transformers.generate import Applied, Generation
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.stepping import Asked, Stepper, check_steps
from trimtab.errors import UnsupportedError
from trimtab.steering import Steering

PLAIN = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""The options of `lm.generate` under which rows may leave: greedy, and nothing else asked for."""


def can_leave(layout: Layout, options: Mapping[str, Any]) -> bool:
    """Whether rows may leave a batch of this model, decoded under these options of `generate`."""
    if dict(options) != PLAIN:
        return False
    try:
        check_steps(layout)
    except UnsupportedError:
        return False
    return True


def finish_batch(
    model: Any,
    tokenizer: Any,
    layout: Layout,
    prompts: Sequence[Sequence[int]],
    steerings: Sequence[Steering | None],
    *,
    max_new_tokens: int,
    logprobs: bool,
) -> list[Generation]:
    """Greedy answers to rendered prompts, each under its own steering, in the prompts' order."""
    batch = Stepper(model, tokenizer, layout, strict=False)
    place = {}
    for row, (ids, steering) in enumerate(zip(prompts, steerings, strict=True)):
        asked = Asked(tuple(ids), steering, max_new_tokens, alternatives=0 if logprobs else None)
        place[batch.join(asked)] = row
    tokens: list[list[int]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    ended: dict[int, tuple[str, Applied]] = {}
    while len(batch):
        for told in batch.step():
            row = place[told.key]
            if told.error is not None:
                raise told.error
            tokens[row].append(told.token)
            if told.logprob is not None:
                scores[row].append(told.logprob)
            if told.finish is not None:
                assert told.applied is not None
                ended[row] = told.finish, told.applied
    return [
        Generation(
            text=tokenizer.decode(tokens[row], skip_special_tokens=True),
            token_ids=tuple(tokens[row]),
            finish_reason=ended[row][0],
            prompt_tokens=len(prompts[row]),
            applied=ended[row][1],
            logprobs=tuple(scores[row]) if logprobs else None,
        )
        for row in range(len(prompts))
    ]
