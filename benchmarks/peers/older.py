"""A model folder that transformers 4 reads: the same weights, and a configuration in its words."""

from __future__ import annotations

import json
from pathlib import Path


def older_folder(source: Path, folder: Path) -> Path:
    """Make `folder` from a folder that transformers 5 saved; the weights and the vocabulary are linked."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, change in (("config.json", older_config), ("tokenizer_config.json", older_tokenizer)):
        data = json.loads((source / name).read_text())
        (folder / name).write_text(json.dumps(change(data), indent=2))
    for name in ("model.safetensors", "tokenizer.json"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to((source / name).resolve())
    return folder


def older_config(config: dict) -> dict:
    """`rope_parameters` and `dtype` under the names they had before transformers 5."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    return config


def older_tokenizer(config: dict) -> dict:
    """The class of a fast tokenizer by the name that transformers 4 knows."""
    kept = {key: value for key, value in config.items() if key.endswith("_token")}
    return {**kept, "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right"}
