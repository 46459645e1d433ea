"""A wrapper of `model.generate` that passes the prompts' lengths to the session inside `lm.steered(…)`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from trimtab.engines.transformers.exclusive import GenerationGuard
from trimtab.engines.transformers.following import check_rows_stay
from trimtab.engines.transformers.generate import REFUSED
from trimtab.engines.transformers.session import Session
from trimtab.errors import TrimtabError, UnsupportedError


@contextmanager
def wrapped_generate(model: Any, session: Session, steers: bool, stays: bool = False) -> Iterator[None]:
    """Within the context, `model.generate` passes the lengths of its prompts to the session.

    Args:
        model: The model.
        session: The session that steers it.
        steers: Whether the session has anything to steer; if not, `model.generate` isn't wrapped.
        stays: Reject options under which rows are reordered.
    """
    if not steers:
        yield
        return
    original = model.generate
    outside = session.prompt_lengths
    generating = GenerationGuard()

    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        session.ran = True  # if no pass is seen, `check_reached` raises below
        tokens = next(
            (t for t in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None
        )
        mask = kwargs.get("attention_mask")
        settings = {**_settings(kwargs), **kwargs}
        for name in ("assistant_early_exit", "guidance_scale"):  # before transformers modifies the model for it
            if settings.get(name) not in (None, 1):
                raise TrimtabError(f"model.generate inside lm.steered(…) can't take {name}: {REFUSED[name]}")
        if stays:
            check_rows_stay(model, settings)
        if tokens is None:
            raise TrimtabError("model.generate inside lm.steered(…) needs input_ids or inputs_embeds")
        if not isinstance(tokens, Tensor):
            fix = "write model.generate(**inputs)" if isinstance(tokens, Mapping) else "lm.generate takes texts"
            raise TrimtabError(f"model.generate takes a tensor of tokens, got {type(tokens).__name__}; {fix}")
        if mask is None and tokens.dim() == 2 and len(tokens) > 1:
            raise TrimtabError("model.generate with several rows needs its attention_mask, to tell padding from text")
        lengths = [tokens.shape[1]] * tokens.shape[0] if mask is None else mask.sum(-1).tolist()
        left = mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all())
        with generating():
            session.expect([int(n) for n in lengths], tokens.shape[1] if left else None)
            try:
                output = original(inputs, *args, **{"disable_compile": True, **kwargs})
                sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
                if isinstance(sequences, Tensor):  # no pass runs over the last token
                    before = 0 if tokens.dim() == 2 else tokens.shape[1]
                    session.check_reached(before + sequences.shape[1] - 1)
                return output
            finally:
                session.expect(outside)

    def generate_batch(*_: Any, **__: Any) -> Any:
        raise UnsupportedError(
            "model.generate_batch keeps a cache in pages, in which no token's position can be determined; inside"
            " lm.steered(…) use model.generate, or give lm.generate(…) all prompts"
        )

    with generating.guard_context(), _replaced_method(model, "generate", generate):
        with _replaced_method(model, "generate_batch", generate_batch):
            yield


@contextmanager
def _replaced_method(model: Any, name: str, function: Any) -> Iterator[None]:
    """Replace the model's method of this name within the context."""
    own = vars(model).get(name)  # it may have been replaced before
    setattr(model, name, function)
    try:
        yield
    finally:
        delattr(model, name)
        if own is not None:
            setattr(model, name, own)


def _settings(kwargs: dict[str, Any]) -> dict[str, Any]:
    config = kwargs.get("generation_config")
    return {} if config is None else dict(vars(config))
