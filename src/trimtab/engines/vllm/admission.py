"""What this engine can honour. All else is refused before the request is taken, with the reason; nothing is dropped."""

from __future__ import annotations

from typing import Any

from trimtab.engines.folding import check_together
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import MaskNeurons, Operation, ScoreOperation, Steering
from trimtab.steering.gates import thresholds
from trimtab.steering.operations import add

INSTEAD = "the transformers engine can (leave out engine=)"
INSIDE = ("neurons", "act_fn", "heads", "mlp", "attention", "router")
"""Sites inside of a block."""


def check_supported(steering: Steering, *, layers: int, width: int, static: bool = False) -> None:
    """Raises `TrimtabError` for a steering that doesn't fit a model of these sizes, or that this engine can't run.

    `static`: the engine replays captured graphs, in which there are additions alone.
    """
    for edit in steering.edits:
        operation = edit.operation
        if isinstance(operation, ScoreOperation):
            raise UnsupportedError(
                f"the vllm engine's attention kernels don't give out scores, to steer them; {INSTEAD}"
            )
        if isinstance(operation, MaskNeurons) or edit.site.kind in INSIDE:
            raise UnsupportedError(
                f"the vllm engine steers the residual stream, and {edit.site} is inside a block; {INSTEAD}"
            )
        if edit.site.kind != "residual":
            raise UnsupportedError(
                f"the vllm engine steers what blocks put out, not {edit.site.kind}: use the output of the block before"
            )
        if not isinstance(operation, Operation) or hasattr(operation, "settled"):
            raise UnsupportedError(f"the vllm engine can't run {type(operation).__name__}; {INSTEAD}")
        if edit.site.layer >= layers:
            raise TrimtabError(f"the steering acts at layer {edit.site.layer}; this model has layers 0 to {layers - 1}")
        if operation.width != width:
            raise TrimtabError(f"the steering's width is {operation.width}, this model's is {width}")
        _check_gate(edit, layers, width)
        if static and (operation.kernel is not add or operation.keep_norm or edit.gate.token_sites):
            raise UnsupportedError(
                f"this engine replays captured graphs, which hold additions alone, and this is {edit}; start it with"
                " enforce_eager=True, or with compilation_config={'cudagraph_mode': 'NONE'}"
            )
    check_together(steering)


def _check_gate(edit: Any, layers: int, width: int) -> None:
    for test in thresholds(edit.gate):
        if test.site.kind != "residual":
            raise UnsupportedError(f"the vllm engine's gates read the residual stream, not {test.site}; {INSTEAD}")
        if test.site.layer >= layers:
            raise TrimtabError(f"a gate reads layer {test.site.layer}; this model has layers 0 to {layers - 1}")
        if test.direction.shape[0] != width:
            raise TrimtabError(f"a gate's width at {test.site} is {test.direction.shape[0]}, this model's is {width}")
        if test.each_token and test.site != edit.site:
            raise TrimtabError(
                f"a condition on each token is about the activation that the edit finds: this one is about {test.site},"
                f" its edit is at {edit.site}"
            )
