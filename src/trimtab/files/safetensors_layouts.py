"""safetensors files of other programs: steerkit's probes, and files of tensors named after layers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trimtab.errors import TrimtabError
from trimtab.files.foreign import Imported, check_vector, layer_number
from trimtab.files.named_layout import NamedTensors, named_layout
from trimtab.files.tensor_layout import Selection
from trimtab.steering import Add

PREFIX = "direction."


def read_safetensors_layout(path: Path, selection: Selection) -> Imported:
    """The directions in a safetensors file that isn't trimtab's: tensors named after layers, or a single tensor.

    Raises `TrimtabError` for other tensors, and for a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about: Mapping[str, str] = file.metadata() or {}
            every = list(file.keys())
            if "hook_site" in about and "default_method" in about:
                selection.check_unused()
                probes = [name for name in every if name.startswith(PREFIX)]
                return _steerkit(about, {name.removeprefix(PREFIX): file.get_tensor(name) for name in probes})
            shapes = {name: file.get_slice(name).get_shape() for name in every}
            return named_layout(NamedTensors(shapes, file.get_tensor, about), path, selection)
    except TrimtabError:
        raise
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise TrimtabError(f"it is cut short or damaged: {error}") from None


def _steerkit(about: Mapping[str, str], tensors: Mapping[str, Any]) -> Imported:
    """A probe: one unit direction per method; its strength is `auto_alpha`, if that was measured."""
    if about["hook_site"] != "resid_post":
        raise TrimtabError(
            f"its direction is for the hook site {about['hook_site']!r}, and only resid_post can be read"
        )
    method = about["default_method"]
    if method not in tensors:
        raise TrimtabError(f"it has no direction for its method {method!r}")
    layer = -1 if about.get("layer") == "-1" else layer_number(about.get("layer"), "its header")
    if str(layer) == about.get("n_total_layers"):
        raise TrimtabError("its direction is for the final norm, which isn't the output of a block")
    vector = check_vector(tensors[method], f"the direction {method}")
    metadata: dict[str, Any] = {
        name: about[name] for name in ("model_id", "hook_name", "auto_alpha") if about.get(name)
    }
    try:
        metrics = json.loads(about.get("metrics_json") or "{}")
    except (ValueError, RecursionError):
        metrics = {}
    if isinstance(metrics, dict):
        metadata["metrics"] = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)}
    return Imported("steerkit", ((layer, Add(vector)),), {"probe_method": method, **metadata})
