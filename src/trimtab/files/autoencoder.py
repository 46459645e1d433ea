"""Features of a sparse autoencoder, added or clamped: SAELens folders, and Gemma Scope's `params.npz`.

    f_i = relu(w_i . (x - b_dec) + b_i)            w_i a column of W_enc; with JumpReLU 0 unless above theta_i
    add:    x <- x + value_i d_i                     d_i a row of W_dec
    clamp:  x <- x + (value_i - f_i) d_i             all f_i read before any is changed

A clamp is a `ReadWrite`. It replaces the step of a JumpReLU by a ramp, of width `RAMP` times the threshold, above it.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.foreign import Imported, check_vector, steering_of
from trimtab.files.named_layout import block_named
from trimtab.files.torch_file import ARCHIVE_ERRORS
from trimtab.keywords import keywords
from trimtab.steering import Add, Card, Edit, Operation, Positions, ReadWrite, Steering

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LARGEST = 1 << 33  # bytes of an archive's uncompressed arrays
RAMP = 1e-3
HOW = ("add", "clamp")


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder's description in its file; weights are read row by row.

    `layer` is the block whose output it reads (-1: the embeddings), and `rows(name, i)` returns the numbers of feature
    i in the tensor with that name. `problem` says why its features can only be added, if their activations can't be
    computed.
    """

    rows: Callable[[str, int], Tensor]
    width: int
    features: int
    names: frozenset[str]
    layer: int | None
    about: Mapping[str, Any]
    subtracts: bool
    centred: bool
    problem: str | None


@keywords
def load_features(
    path: str | Path,
    features: Mapping[int, float],
    *,
    how: Literal["add", "clamp"] = "add",
    layer: int | None = None,
    positions: Positions | None = None,
) -> Steering:
    """A steering from features of a sparse autoencoder that was trained on the residual stream.

    Args:
        path: A folder as SAELens saves it (`cfg.json`, `sae_weights.safetensors`), or Gemma Scope's `params.npz`.
        features: The value for each feature number: how many of its decoder vectors to add, or the activation to set it
            to. Both are in the units of the feature's activations, of which Neuronpedia shows the largest.
        how: `"add"`, or `"clamp"`, which sets the feature's activation to the value, whatever it was.
        layer: The block whose output the autoencoder reads, if the file doesn't say (`params.npz` doesn't).
        positions: The tokens at which it acts; default: all.

    Returns:
        The steering: an `Add` per feature, or one `ReadWrite` for all.

    Raises:
        TrimtabError: There is no such file or feature, or it is damaged, or its layer isn't known.
        UnsupportedError: It wasn't trained on the residual stream, or its features can't be clamped, since they can't
            be computed one by one (top-k, gated, activations that are scaled first).
    """
    path = Path(path)
    if how not in HOW:
        raise TrimtabError(f"how must be {' or '.join(HOW)}, got {how!r}")
    if not isinstance(features, Mapping):
        raise TrimtabError(f"features must be a dict of numbers and values such as {{1234: 40.0}}, got {features!r}")
    if not features:
        raise TrimtabError("no feature was given; pass {number: value}, on the command line --feature NUMBER:VALUE")
    for value in features.values():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise TrimtabError(f"a feature's value is a finite number, got {value!r}")
    try:
        autoencoder = _folder(path) if path.is_dir() else _archive(path)
        steering = _steering(autoencoder, features, how, layer, positions)
    except UnsupportedError as error:
        raise UnsupportedError(f"{path}: {error}") from None
    except TrimtabError as error:
        raise TrimtabError(f"{path}: {error}") from None
    return steering


def _steering(
    autoencoder: Autoencoder, features: Mapping[int, float], how: str, layer: int | None, positions: Positions | None
) -> Steering:
    for number in features:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < autoencoder.features:
            raise TrimtabError(
                f"there is no feature {number}; features are numbered from 0 to {autoencoder.features - 1}"
            )
    if layer is not None and autoencoder.layer not in (None, layer):
        raise TrimtabError(
            f"the file says that it reads the output of block {autoencoder.layer}; leave layer {layer} out"
        )
    at = autoencoder.layer if layer is None else layer
    if at is None:
        raise TrimtabError("it doesn't say which block's output it reads; pass --layer N (layer=N)")
    decoder = {i: check_vector(autoencoder.rows("W_dec", i), f"W_dec[{i}]") for i in features}
    operations: list[tuple[int, Operation]]
    if how == "add":
        operations = [(at, Add(vector)) for vector in decoder.values()]
    else:
        if autoencoder.problem is not None:
            raise UnsupportedError(f"{autoencoder.problem}; add its features (--as add, how='add')")
        operations = [(at, _clamp(autoencoder, features, decoder))]
    about = {**autoencoder.about, "features": {str(i): value for i, value in features.items()}, "how": how}
    imported = steering_of(Imported("sparse autoencoder", tuple(operations), about), positions=positions)
    strengths: Sequence[float] = list(features.values()) if how == "add" else [1.0]
    edits = [Edit(e.site, e.operation, e.positions, s) for e, s in zip(imported.edits, strengths, strict=True)]
    return Steering(tuple(edits), Card("features", options=imported.card.options))


def _clamp(autoencoder: Autoencoder, features: Mapping[int, float], decoder: Mapping[int, Tensor]) -> ReadWrite:
    """`x + sum of (value - f) d`: one row with a constant for the values, and one or two rows per feature for `f`."""
    b_dec = autoencoder.rows("b_dec", -1).double() if autoencoder.subtracts else None
    constant = sum(
        (value * decoder[i].double() for i, value in features.items()), torch.zeros(autoencoder.width).double()
    )
    read, bias, write, high = [torch.zeros(autoencoder.width).double()], [1.0], [constant], [math.inf]
    for i in features:
        w = check_vector(autoencoder.rows("W_enc", i), f"W_enc[:, {i}]").double()
        b = float(autoencoder.rows("b_enc", i)) if "b_enc" in autoencoder.names else 0.0
        if b_dec is not None:
            b -= float(b_dec @ w)
        if autoencoder.centred:  # it reads x minus the mean of x's numbers
            w = w - w.mean()
        theta = max(0.0, float(autoencoder.rows("threshold", i))) if "threshold" in autoencoder.names else 0.0
        d = decoder[i].double()
        read, bias, write, high = [*read, w], [*bias, b - theta], [*write, -d], [*high, math.inf]
        if theta > 0:
            steep = 1 / (RAMP * theta)
            read, bias, write, high = (
                [*read, w * steep],
                [*bias, (b - theta) * steep],
                [*write, -theta * d],
                [*high, 1.0],
            )
    return ReadWrite(
        torch.stack(read).float(),
        torch.stack(write).float(),
        torch.tensor(bias, dtype=torch.float64).float(),
        low=0.0,
        high=torch.tensor(high),
    )


def _folder(path: Path) -> Autoencoder:
    """SAELens: a configuration, whose keys moved into `metadata` with version 6, and weights as safetensors."""
    try:
        config = json.loads((path / CONFIG).read_bytes())
    except OSError as error:
        raise TrimtabError(f"it has no {CONFIG}, which SAELens folders have ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise TrimtabError(f"its {CONFIG} isn't valid JSON") from None
    if not isinstance(config, dict):
        raise TrimtabError(f"its {CONFIG} isn't a dictionary")
    settings = {**config, **(config["metadata"] if isinstance(config.get("metadata"), dict) else {})}
    weights = path / WEIGHTS
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TrimtabError(f"its {WEIGHTS} can't be read: {error}") from None

    def rows(name: str, i: int) -> Tensor:
        with safe_open(weights, framework="pt") as file:
            part = file.get_slice(name)
            return part[:] if i < 0 else part[:, i] if name == "W_enc" else part[i]

    kwargs = settings.get("model_from_pretrained_kwargs")
    known = ("model_name", "hook_name", "architecture", "sae_lens_version", "neuronpedia_id")
    return Autoencoder(
        rows,
        *_sizes(shapes),
        frozenset(shapes),
        _layer(settings.get("hook_name", settings.get("hook_point"))),
        {key: settings[key] for key in known if isinstance(settings.get(key), str)},
        subtracts=bool(settings.get("apply_b_dec_to_input", True)),
        centred=isinstance(kwargs, dict) and kwargs.get("center_writing_weights") is True,
        problem=_problem(settings, shapes),
    )


def _layer(hook: Any) -> int | None:
    if not isinstance(hook, str):
        return None
    try:
        layer = block_named(hook)
    except TrimtabError as error:
        raise UnsupportedError(str(error)) from None
    if layer is None:
        raise UnsupportedError(f"it was trained at {hook[:80]!r}, which isn't the output of a block")
    return layer


def _problem(settings: Mapping[str, Any], shapes: Mapping[str, Any]) -> str | None:
    """Why a feature's activation can't be computed on its own, or isn't given by these formulas."""
    kind = settings.get("architecture", "standard")
    activation = settings.get("activation_fn", settings.get("activation_fn_str", "relu"))
    if kind not in ("standard", "jumprelu") or activation != "relu":
        what = kind if kind not in ("standard", "jumprelu") else activation
        return f"its features ({str(what)[:40]}) depend on each other, so they can't be clamped one by one"
    if kind == "jumprelu" and "threshold" not in shapes:
        return "it has no thresholds, which JumpReLU needs"
    if settings.get("normalize_activations", "none") not in ("none", None, False):
        return f"it scales activations before it reads them ({str(settings['normalize_activations'])[:40]})"
    if settings.get("finetuning_scaling_factor"):
        return "it has a factor from finetuning for each feature"
    return None


def _sizes(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """The width and the number of features."""
    decoder, encoder = shapes.get("W_dec"), shapes.get("W_enc")
    if decoder is None or encoder is None or len(decoder) != 2 or list(encoder) != list(decoder)[::-1]:
        listing = ", ".join(f"{name[:40]} {list(shape)}" for name, shape in list(shapes.items())[:6])
        raise TrimtabError(f"it has no W_enc [width, features] and W_dec [features, width]; it has {listing}")
    return decoder[1], decoder[0]


def _archive(path: Path) -> Autoencoder:
    """Gemma Scope: JumpReLU on unscaled activations; the file doesn't say of which layer."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > LARGEST:
                raise TrimtabError("its arrays are too large for an autoencoder")
        with np.load(path, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except TrimtabError:
        raise
    except (*ARCHIVE_ERRORS, TypeError) as error:
        raise TrimtabError(f"it is neither a SAELens folder nor Gemma Scope's params.npz: {str(error)[:200]}") from None
    sizes = _sizes({name: list(value.shape) for name, value in tensors.items()})
    missing = None if "threshold" in tensors else "it has no thresholds, which Gemma Scope's autoencoders have"
    return Autoencoder(
        lambda name, i: tensors[name] if i < 0 else tensors[name][:, i] if name == "W_enc" else tensors[name][i],
        *sizes,
        frozenset(tensors),
        None,
        {},
        subtracts=False,
        centred=False,
        problem=missing,
    )
