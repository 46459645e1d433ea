"""What this engine can honour. All else is refused before the request is taken, with the reason; nothing is dropped."""

from __future__ import annotations

from typing import Any

from trimtab.engines.folding import check_together
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.forms import check_edit
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import MaskNeurons, Operation, ScoreOperation, Steering
from trimtab.steering.gates import thresholds

INSTEAD = "the transformers engine can (leave out engine=)"
INSIDE = ("neurons", "act_fn", "heads", "mlp", "attention")
"""Sites inside of a block."""


def check_supported(steering: Steering, *, layers: int, width: int, capacity: Capacity | None = None) -> None:
    """Raises `TrimtabError` for a steering that doesn't fit a model of these sizes, or that this engine can't run.

    `capacity`: the engine replays captured graphs, and that is what they can do. Each edit is looked at alone here;
    whether those that act together fit is known when a request comes.
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
        if capacity is not None and edit.strength != 0:
            _check_graphs(edit, capacity)
    check_together(steering)


def _check_graphs(edit: Any, capacity: Capacity) -> None:
    if edit.gate.readings and not capacity.reads:
        raise UnsupportedError(
            f"{edit}: its gate reads the prompt, and this engine replays captured graphs, which keep no activations;"
            " start it with TRIMTAB_KERNEL=all, or with enforce_eager=True"
        )
    if not (edit.gate.readings and edit.gate.token_sites):  # what is left of it is known once the prompt was read
        check_edit(edit, capacity)


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
