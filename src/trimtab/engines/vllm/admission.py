"""What this engine can run. Anything else is refused with a reason before the request is accepted, never dropped."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from trimtab.engines.folding import check_joint_edits
from trimtab.engines.vllm.attach import INSIDE
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.forms import check_edit
from trimtab.engines.vllm.shards import splits
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, MaskNeurons, Operation, ScoreOperation, Site, Steering
from trimtab.steering.attention import SCORE_NAMES
from trimtab.steering.gates import thresholds

USE_TRANSFORMERS = "the transformers engine can (leave out engine=)"
SITES = "start the engine with TRIMTAB_SITES={} in its environment, or leave out engine="
BLOCK = (*INSIDE, "act_fn", "router")
"""Sites inside a block."""


def check_supported(
    steering: Steering,
    *,
    layers: int,
    widths: Mapping[str, int],
    split: Collection[str] = (),
    capacity: Capacity | None = None,
) -> None:
    """Raises `TrimtabError` for a steering that doesn't fit a model of these sizes, or that this engine can't run.

    Args:
        steering: The steering.
        layers: The model's number of layers.
        widths: The kinds of sites that the engine can steer, with the width of the activations there.
        split: The kinds whose activations are split over tensor-parallel workers.
        capacity: What the operators of captured graphs can do, if the engine replays captured graphs. Each edit is
            checked separately here; whether edits that act together fit is checked per request.
    """
    for edit in steering.edits:
        operation = edit.operation
        if isinstance(operation, ScoreOperation):
            raise UnsupportedError(
                f"the vllm engine can't run {SCORE_NAMES[type(operation)]}: its attention kernels don't expose scores."
                f" It can run only ScaleScores, by scaling keys; {USE_TRANSFORMERS}"
            )
        if isinstance(operation, MaskNeurons):
            raise UnsupportedError(f"the vllm engine can't run {edit}; {USE_TRANSFORMERS}")
        _check_site(edit.site, widths, "steers")
        if not isinstance(operation, Operation) or hasattr(operation, "settled"):
            raise UnsupportedError(f"the vllm engine can't run {type(operation).__name__}; {USE_TRANSFORMERS}")
        if edit.site.kind in split and not splits(edit):
            raise UnsupportedError(
                f"{edit}: {edit.site.kind} are split over tensor-parallel workers, which support additions and scales"
                " only; start the engine with tensor_parallel_size=1"
            )
        if edit.site.layer >= layers:
            raise TrimtabError(f"the steering acts at layer {edit.site.layer}; this model has layers 0 to {layers - 1}")
        width = widths[edit.site.kind]
        if operation.width not in (0, width):
            where = "" if edit.site.kind == "residual" else f" at {edit.site}"
            raise TrimtabError(f"the steering's width is {operation.width}, this model's is {width}{where}")
        _check_gate(edit, layers, widths)
        if capacity is not None and edit.strength != 0:
            _check_graphs(edit, capacity)
    check_joint_edits(steering)


def _check_graphs(edit: Edit, capacity: Capacity) -> None:
    if edit.gate.readings and not capacity.reads:
        raise UnsupportedError(
            f"{edit}: its gate reads the prompt, and this engine replays captured graphs, which keep no activations;"
            " start it with TRIMTAB_KERNEL=all, or with enforce_eager=True"
        )
    if not (edit.gate.readings and edit.gate.token_sites):  # otherwise it is checked once the prompt has been read
        check_edit(edit, capacity)


def _check_site(site: Site, widths: Mapping[str, int], does: str) -> None:
    if site.kind in widths:
        return
    if site.kind in BLOCK:
        fix = SITES.format(site.kind) if site.kind in INSIDE else USE_TRANSFORMERS
        raise UnsupportedError(f"the vllm engine {does} the residual stream, and {site} is inside a block; {fix}")
    raise UnsupportedError(
        f"the vllm engine {does} the outputs of blocks, not {site.kind}: use the output of the previous block"
    )


def _check_gate(edit: Edit, layers: int, widths: Mapping[str, int]) -> None:
    for test in thresholds(edit.gate):
        _check_site(test.site, widths, "has gates on")
        if test.site.layer >= layers:
            raise TrimtabError(f"a gate reads layer {test.site.layer}; this model has layers 0 to {layers - 1}")
        width = widths[test.site.kind]
        if test.direction.shape[0] != width:
            raise TrimtabError(f"a gate's width at {test.site} is {test.direction.shape[0]}, this model's is {width}")
        if test.each_token and test.site != edit.site:
            raise TrimtabError(
                f"a condition on each token must read the site of its edit: this one reads {test.site}, and its edit is"
                f" at {edit.site}"
            )
