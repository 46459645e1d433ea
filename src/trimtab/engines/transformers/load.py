"""Loading a model and its tokenizer: from the Hub, a folder, a GGUF file, or the default model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trimtab.engines.transformers import compat, default_model
from trimtab.engines.transformers.weights import best_device
from trimtab.errors import TrimtabError
from trimtab.keywords import unknown_keyword_error, unknown_keyword_error_from

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
COMMON_OPTIONS = (
    "device",
    "dtype",
    "revision",
    "adapter",
    "layers",
    "engine",
    "template",
    "device_map",
    "quantization_config",
)
"""The most common options of `LM.load`, for error messages; others are those of `from_pretrained`."""
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
"""The files of an adapter saved by `peft`."""
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def load(
    name: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    **options: Any,
) -> tuple[Any, Any, str]:
    """Load a model. Returns the model, its tokenizer and its name.

    Args:
        name: A Hub id, a model folder or a GGUF file; `None` loads the default model.
        device: `None` uses CUDA if available, then MPS, then the CPU. `device_map` in the options overrides it. A
            quantized model is placed on the device while it is loaded, as it can't be moved afterwards.
        dtype: The dtype of the weights; `"auto"`: as stored.
        revision: The revision on the Hub.
        adapter: The folder or Hub id of a LoRA or another adapter of `peft` to load into the model.
        options: Passed to `from_pretrained` (quantization and so on).

    Raises:
        TrimtabError: There is no such model, it isn't a language model, or the device can't run its quantization.
    """
    if "torch_dtype" in options:
        raise unknown_keyword_error("LM.load", "torch_dtype", ())
    dtype = _dtype(dtype)
    if device is not None:
        _device(device)
    path = Path(name) if name is not None else None
    label = str(name) if name is not None else default_model.NAME
    if path is not None and path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise TrimtabError(f"there is no file {path}")
        model, tokenizer = read_gguf(path, dtype=dtype, **options)
        label = path.stem
    else:
        source = str(default_model.default_folder() if name is None else name)
        if path is not None and path.is_dir():
            label = path.resolve().name
            if not (path / "config.json").is_file():
                raise TrimtabError(f"{path} has no config.json, so it isn't a model folder")
        model, tokenizer = _read(source, dtype, revision, options, device)
    if "device_map" not in options and not getattr(model, "is_quantized", False):
        model.to(_device(device))
    if adapter is not None:
        _load_adapter(model, adapter)
    return model.eval(), tokenizer, label


def _load_adapter(model: Any, adapter: str | Path) -> None:
    """Load an adapter into a model. Raises `TrimtabError` if it can't be loaded or doesn't fit the model."""
    if find_spec("peft") is None:
        raise TrimtabError(f"the adapter {adapter} needs peft: pip install 'trimtab[finetune]'")
    folder = Path(adapter)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(adapter), allow_patterns=list(ADAPTER_FILES)))
        except (OSError, ValueError) as error:
            raise TrimtabError(
                f"can't load the adapter {str(adapter)!r}: {_first_line(error)}. Give a Hub id or an adapter's folder"
            ) from error
    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise TrimtabError(f"{adapter} has no {name}, so no adapter can be loaded from it")
    try:
        loaded = model.load_adapter(str(folder), adapter_name=folder.name.replace(".", "_"), low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise TrimtabError(f"the adapter in {folder} doesn't fit this model: {_first_line(error)}") from error
    if unfit := [*loaded.missing_keys, *loaded.unexpected_keys]:
        raise TrimtabError(f"the adapter in {folder} doesn't fit this model: {sorted(unfit)[0]} isn't in both")


def read_gguf(path: Path, dtype: Any = torch.float32, **options: Any) -> tuple[Any, Any]:
    """The dequantized model in a GGUF file, and its tokenizer."""
    gguf_config = getattr(transformers, "GgufConfig", None)  # older versions always dequantize
    if gguf_config is not None:
        options.setdefault("quantization_config", gguf_config(dequantize=True))
    where, file = str(path.parent), path.name
    try:
        dtype = torch.float32 if dtype == "auto" else dtype
        model: Any = AutoModelForCausalLM.from_pretrained(where, gguf_file=file, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    except (ValueError, OSError, KeyError) as error:
        raise TrimtabError(f"can't read the GGUF file {path}: {_first_line(error)}") from error
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # dense now
    model.is_quantized = False
    return model, tokenizer


def _read(
    source: str, dtype: Any, revision: str | None, options: dict[str, Any], device: str | torch.device | None
) -> tuple[Any, Any]:
    placed: torch.device | None = None
    known = {key: options[key] for key in ("trust_remote_code", "token", "cache_dir") if key in options}
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, **known)
        kind: Any = AutoModelForCausalLM
        if not compat.is_causal_lm(config) and "trust_remote_code" not in options:
            kind = transformers.AutoModelForImageTextToText  # `find_layout` finds the language model in it
        quantized = getattr(config, "quantization_config", None) or options.get("quantization_config")
        if quantized is not None and "device_map" not in options:
            placed = _device(device)
            options = {**options, "device_map": {"": placed}}
        try:
            model = kind.from_pretrained(source, dtype=dtype, revision=revision, **options)
        except TypeError as error:
            raise unknown_keyword_error_from(error, "LM.load", options, COMMON_OPTIONS) or error from None
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, **known)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        if placed is not None:
            raise TrimtabError(
                f"can't load the quantized model {source!r} on {placed}: {_first_line(error)}. Give another device, or"
                " a device_map of your own"
            ) from error
        if not isinstance(error, (OSError, ValueError, KeyError)):
            raise
        raise TrimtabError(
            f"can't load the model {source!r}: {_first_line(error)}."
            " Give a Hub id, a model folder, a .gguf file, or nothing for the default model"
        ) from error
    if placed is not None and (elsewhere := {p.device for p in model.parameters()} - _device_aliases(placed)):
        raise TrimtabError(
            f"the quantized model {source!r} was requested on {placed}, but parts of it were placed on"
            f" {', '.join(sorted(map(str, elsewhere)))}, where its quantization can't run. Give another device, or a"
            " device_map of your own"
        )
    return model, tokenizer


def _device_aliases(device: torch.device) -> set[torch.device]:
    """The device as given and with its index: a device without an index is the current one of its type."""
    return {device, torch.empty(0, device=device).device}


def _dtype(dtype: str | torch.dtype) -> Any:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    try:
        return DTYPES[SHORT.get(dtype, dtype)]
    except KeyError:
        raise TrimtabError(f"unknown dtype {dtype!r}; use auto, {', '.join([*DTYPES, *SHORT])}") from None


def _device(device: str | torch.device | None) -> torch.device:
    try:
        chosen = torch.device(device or best_device())
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise TrimtabError(f"can't use the device {device!r}: {_first_line(error)}") from None
    return chosen


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
