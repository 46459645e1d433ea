"""Edits in random directions, with the same norms as the edits that they replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.steering.elements import HoldElements, MaskNeurons, ScaleElements
from trimtab.steering.operations import Directed, Operation, SetProjection
from trimtab.steering.read_write import ReadWrite
from trimtab.steering.rotations import RotateInPlane
from trimtab.steering.site import Site
from trimtab.steering.steering import Edit, Steering
from trimtab.steering.tensors import to_float64


def random_edits(steering: Steering, seed: int = 0, means: Mapping[Site, Tensor] | None = None) -> tuple[Edit, ...]:
    """The steering's edits in random directions of the same norms; masks and thresholds of elements are permuted.

    `means` are mean activations, for operations that set projections; see `trimtab.evaluate.controls.random_like`.
    Raises `TrimtabError` for an operation without a direction, or a mean that is missing or has another width.
    """
    generator = torch.Generator().manual_seed(seed)
    replacements: dict[bytes, Tensor] = {}
    return tuple(replace(edit, operation=_randomized(edit, replacements, generator, means)) for edit in steering.edits)


def random_unit(width: int, generator: torch.Generator) -> Tensor:
    """A unit vector `[width]`, uniform on the sphere, float64."""
    vector = torch.randn(width, generator=generator, dtype=torch.float64)
    return vector / vector.norm()


def _randomized(
    edit: Edit, replacements: dict[bytes, Tensor], generator: torch.Generator, means: Mapping[Site, Tensor] | None
) -> Operation:
    operation = edit.operation
    if isinstance(operation, ReadWrite):
        return _rotate_read_write(operation, edit.site, replacements, generator, means)
    if isinstance(operation, RotateInPlane):
        first, second = _rotate_rows([operation.direction[None], operation.second[None]], replacements, generator)
        dtypes = operation.direction.dtype, operation.second.dtype
        return replace(operation, direction=first.to(dtypes[0]), second=second.to(dtypes[1]))
    if not isinstance(operation, Directed):
        raise TrimtabError(f"a {type(operation).__name__} has no direction that could be replaced by a random one")
    old = operation.direction.double()
    key = operation.direction.numpy().tobytes()
    if isinstance(operation, (ScaleElements, HoldElements, MaskNeurons)):
        if key not in replacements:
            replacements[key] = old[torch.randperm(len(old), generator=generator)]
        return replace(operation, direction=replacements[key].to(operation.direction.dtype))
    if key not in replacements:
        replacements[key] = random_unit(operation.width, generator)
    new = replacements[key] * (1.0 if isinstance(operation, SetProjection) else float(old.norm()))
    if not isinstance(operation, SetProjection):
        return replace(operation, direction=new.to(operation.direction.dtype))
    target = operation.target
    if means is not None:
        mean = _mean(means, edit.site, operation.width)
        target = float(mean @ new) + target - float(mean @ old)
    return replace(operation, direction=new.to(operation.direction.dtype), target=target)


def _rotate_read_write(
    operation: ReadWrite,
    site: Site,
    replacements: dict[bytes, Tensor],
    generator: torch.Generator,
    means: Mapping[Site, Tensor] | None,
) -> ReadWrite:
    """Rotate all read and write rows together. Given a mean, the biases change so that it reads the same as before."""
    rank, read = operation.rank, operation.read.double()
    new = _rotate_rows([operation.read, operation.write], replacements, generator)
    bias = operation.bias.double()  # type: ignore[union-attr]
    if means is not None:
        bias = bias + (read - new[:rank]) @ _mean(means, site, operation.width)
    dtype = operation.read.dtype
    return replace(
        operation, read=new[:rank].to(dtype), write=new[rank:].to(operation.write.dtype), bias=bias.to(dtype)
    )


def _rotate_rows(rows: list[Tensor], replacements: dict[bytes, Tensor], generator: torch.Generator) -> Tensor:
    """These rows `[…, width]` rotated together at random, float64. Their norms and the angles between them stay."""
    key = b"".join(row.numpy().tobytes() for row in rows)
    if key not in replacements:
        basis, coordinates = torch.linalg.qr(torch.cat([row.double() for row in rows]).T)  # [width, n], [n, rows]
        frame, _ = torch.linalg.qr(torch.randn(basis.shape, generator=generator, dtype=torch.float64))
        replacements[key] = (frame @ coordinates).T
    return replacements[key]


def _mean(means: Mapping[Site, Tensor], site: Site, width: int) -> Tensor:
    if site not in means:
        raise TrimtabError(f"there is no mean activation of {site}, where the steering sets a projection")
    mean = to_float64(means[site])
    if mean.shape != (width,):
        raise TrimtabError(f"the mean at {site} has shape {list(mean.shape)}, the direction {[width]}")
    return mean
