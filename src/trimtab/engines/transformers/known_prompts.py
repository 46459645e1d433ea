"""Calls of `model.generate` by whoever steers around them: the session learns how long their prompts are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from trimtab.engines.transformers.exclusive import Generating
from trimtab.engines.transformers.following import check_rows_stay
from trimtab.engines.transformers.session import Session
from trimtab.errors import TrimtabError


@contextmanager
def known_prompts(model: Any, session: Session, steers: bool, stays: bool = False) -> Iterator[None]:
    """While open, `model.generate` tells the session how long its prompts are.

    With `stays` it refuses options under which rows change places.
    """
    if not steers:
        yield
        return
    original = model.generate
    outside = session.prompt_lengths
    generating = Generating()

    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        session.ran = True  # or it raises here, or finds at its end that the passes weren't seen
        tokens = next(
            (t for t in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None
        )
        mask = kwargs.get("attention_mask")
        if stays:
            check_rows_stay(model, {**_settings(kwargs), **kwargs})
        if tokens is None:
            raise TrimtabError("model.generate inside lm.steered(…) needs input_ids or inputs_embeds")
        if mask is None and tokens.dim() == 2 and len(tokens) > 1:
            raise TrimtabError("model.generate with several rows needs its attention_mask, to tell pads from text")
        lengths = [tokens.shape[1]] * tokens.shape[0] if mask is None else mask.sum(-1).tolist()
        left = mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all())
        with generating():
            session.expect([int(n) for n in lengths], tokens.shape[1] if left else None)
            try:
                output = original(inputs, *args, **{"disable_compile": True, **kwargs})
                sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
                if isinstance(sequences, Tensor):  # the last token isn't fed to the model
                    before = 0 if tokens.dim() == 2 else tokens.shape[1]
                    session.check_reached(before + sequences.shape[1] - 1)
                return output
            finally:
                session.expect(outside)

    own = vars(model).get("generate")  # somebody may have put one there before
    model.generate = generate
    try:
        with generating.until_left():
            yield
    finally:
        del model.generate
        if own is not None:
            model.generate = own


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    config = kwargs.get("generation_config")
    return {} if config is None else dict(vars(config))
