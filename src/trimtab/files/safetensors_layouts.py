"""safetensors files of other programs: steerkit's probes, and files with tensors `direction.<N>`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trimtab.errors import TrimtabError
from trimtab.files.foreign import Found, additions, check_vector, layer_number
from trimtab.files.tensor_layout import Wanted, tensor_layout
from trimtab.steering import Add

PREFIX = "direction."


def read_safetensors_layout(path: Path, wanted: Wanted) -> Found:
    """The directions in a safetensors file that isn't trimtab's: tensors `direction.<N>`, or a single tensor.

    Raises `TrimtabError` for other tensors, and for a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, str] = file.metadata() or {}
            every = list(file.keys())
            names = [name for name in every if name.startswith(PREFIX)]
            alone = file.get_tensor(every[0]) if len(every) == 1 and not names else None
            shapes = [f"{name[:60]} {list(file.get_slice(name).get_shape())}" for name in every[:4]]
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TrimtabError(f"it is cut short or damaged: {error}") from None
    if alone is not None:
        return tensor_layout(alone, path, wanted)
    if not tensors:
        held = (", ".join(shapes) or "none") + (f", … {len(every) - 4} more" if len(every) > 4 else "")
        raise TrimtabError(
            f"it is a safetensors file, but no steering of trimtab's; its tensors are {held}."
            " Directions are read from tensors direction.N (added at the output of block N, from 0), or from a file"
            " with one tensor; `trimtab learn` writes steerings"
        )
    wanted.not_needed()
    if "hook_site" in about and "default_method" in about:
        return _steerkit(about, tensors)
    directions = {layer_number(number, f"the tensor {PREFIX}{number}"): value for number, value in tensors.items()}
    return Found("safetensors", additions(directions), dict(about))


def _steerkit(about: Mapping[str, str], tensors: Mapping[str, Any]) -> Found:
    """A probe has one unit direction a method; its strength is `auto_alpha`, where it was measured."""
    if about["hook_site"] != "resid_post":
        raise TrimtabError(
            f"its direction is for the hook site {about['hook_site']!r}, and only resid_post can be read"
        )
    method = about["default_method"]
    if method not in tensors:
        raise TrimtabError(f"it has no direction for its method {method!r}")
    layer = -1 if about.get("layer") == "-1" else layer_number(about.get("layer"), "its header")
    if str(layer) == about.get("n_total_layers"):
        raise TrimtabError("its direction is for the final norm, which is no block's output")
    vector = check_vector(tensors[method], f"the direction {method}")
    kept: dict[str, Any] = {name: about[name] for name in ("model_id", "hook_name", "auto_alpha") if about.get(name)}
    try:
        metrics = json.loads(about.get("metrics_json") or "{}")
    except (ValueError, RecursionError):
        metrics = {}
    if isinstance(metrics, dict):
        kept["metrics"] = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    return Found("steerkit", ((layer, Add(vector)),), {"probe_method": method, **kept})
