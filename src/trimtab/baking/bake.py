"""Baking: write a model folder whose weights do what a steering does, for programs that can't steer.

Arditi et al., Refusal Is Mediated by a Single Direction, 2406.11717, section 4.1, for ablations:

W <- W - r r^T W        for every W that writes to the residual stream, and its bias likewise

An addition at a block's output goes into the bias of the block's last projection: b <- b + v.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

import trimtab
from trimtab.baking.checkpoint import copy_rest, edit_config, find_shards, write_shards
from trimtab.baking.plan import FIRST, Plan, check_bakeable, plan
from trimtab.baking.structure import Structure, auto_class, structure_of
from trimtab.engines.transformers import default_model
from trimtab.engines.transformers.weights import best_device, quantization
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.page import baked_page
from trimtab.files.steering_file import steering_digest
from trimtab.keywords import keywords
from trimtab.lm import LM
from trimtab.steering import ModelId, Steering
from trimtab.steering.identity import check_learned_on, fingerprint, sampled_rows
from trimtab.text.chat import template_digest

CARD, PAGE = "trimtab.json", "README.md"
IGNORED = ("consolidated*", "original/*", "onnx/*", "openvino/*")  # copies of the same weights for other programs
FETCHED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""How much logits may differ from rounding alone, relative to their norm, by the dtype of the weights.

Most models compute norms in float32, even when the weights are float64.
"""
TOKENS = (2, 12)  # rows and tokens per row of the texts on which the two models are compared
SHARD = "4GB"  # shard size when a model in memory is saved first


@dataclass(frozen=True)
class Checked:
    """How far logits differ on random tokens, relative to the norm of the logits; the median over tokens.

    `difference` is between the baked and the steered model, `effect` between the steered and the unsteered one.
    """

    difference: float
    effect: float


@dataclass(frozen=True)
class Baked:
    """What `bake` wrote.

    `changed` counts the checkpoint tensors that were changed, `biases` those that are new. `config` holds the changes
    to `config.json`, `left` the names of files that were not copied, and `notes` remarks about anything unexpected.
    """

    folder: Path
    model: str
    changed: int
    biases: int
    config: Mapping[str, Any]
    left: tuple[str, ...]
    notes: tuple[str, ...]
    checked: Checked | None


@keywords
def bake(
    model: LM | PreTrainedModel | str | Path | None,
    steering: Steering,
    folder: str | Path,
    *,
    transfer: bool = False,
    check: bool = True,
    revision: str | None = None,
    device: str | torch.device | None = None,
    progress: Any = None,
) -> Baked:
    """Write a model whose weights do what the steering does, for any program that loads model folders.

    `Ablate` at a block's attention or MLP, or at the embeddings (`block_input[0]`), changes the weights that write
    there, including all experts of a mixture. `Add` at attention, at the MLP or at the residual stream becomes a bias,
    if the model's configuration has a setting for it. `directional_ablation` makes the steering that ablates at all of
    these sites. The new model's logits are those of the steered model, up to rounding of the weights to their dtype.

    Safetensors files are read and written one at a time, which needs memory for about twice the largest of them; the
    check needs memory for the model. The folder appears atomically.

    Args:
        model: An `LM`, a transformers model, a Hub id, a folder, or `None` for the default model. A model in memory is
            first saved next to the target folder.
        steering: The steering to bake in: additions and ablations, on all requests, at all positions.
        folder: The folder to write; it must be empty or not exist.
        transfer: Allow a steering that was learned on another model of the same width.
        check: Before the folder appears, load the new model and compare its logits with the steered model's.
        revision: A branch, tag or commit of a Hub model.
        device: Where the check runs. The default is CUDA, then MPS, then the CPU.
        progress: Called with the number of weight files written and their total.

    Returns:
        What was written, and how closely it matches the steered model.

    Raises:
        TrimtabError: The folder isn't empty or can't be written; the model doesn't exist, or the steering doesn't fit
            it; the check found a difference that rounding doesn't explain.
        UnsupportedError: Weights can't do what the steering does, and the message names the edit; the model is
            quantized, is an adapter, or has unknown parts.
    """
    target = Path(folder)
    check_bakeable(steering)
    with _atomic_folder(target) as work:
        if isinstance(model, (LM, PreTrainedModel)):
            lm = model if isinstance(model, LM) else LM(model, None)
            lm.check(steering, transfer=transfer)
            source, name, inner = work / "source", lm.name, lm.model
            _save(lm, source)
        else:
            source, name = _folder_of(model, revision)
            inner = None
        config = _config(source)
        structure = structure_of(config)
        weight_plan = plan(steering, structure)
        shards = find_shards(source)
        if inner is None:
            check_learned_on(steering, _identity(structure, shards, name, source), transfer=transfer)
        out = work / "baked"
        out.mkdir()
        counted = write_shards(shards, out, structure, weight_plan, progress)
        untied = structure.tied and FIRST in weight_plan.maps
        changes: dict[str, Any] = {**weight_plan.flags, **({"tie_word_embeddings": False} if untied else {})}
        edit_config(source, out, changes, structure.composite)
        skipped = copy_rest(source, out, shards)
        checked = (
            _compare_logits(structure, steering, source if inner is None else inner, out, device) if check else None
        )
        notes = _notes(structure, weight_plan, untied, skipped)
        baked = Baked(target, name, counted.changed, len(counted.new), changes, tuple(skipped), notes, checked)
        document = {
            "trimtab": trimtab.__version__,
            "base_model": name,
            "edits": [str(edit) for edit in steering.edits],
            "digest": steering_digest(steering),
            "card": asdict(steering.card),
            "config": changes,
            "notes": list(notes),
            "checked": None if checked is None else asdict(checked),
        }
        (out / CARD).write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (out / PAGE).write_text(baked_page(steering, target.name, name, notes), encoding="utf-8")
        _put(out, target)
    return baked


@contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """A working folder next to the target that is always removed at the end.

    Raises `TrimtabError` if the target exists and isn't an empty folder, or if nothing can be written there.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise TrimtabError(f"{target} already exists; name a new or empty folder")
    target = Path(os.path.abspath(target))  # noqa: PTH100 (`.` has no name, and symlinks must not be resolved)
    work = target.with_name(f".{target.name}.{secrets.token_hex(6)}")  # known before it exists, for the cleanup
    try:
        try:
            work.mkdir()
        except OSError as error:
            raise TrimtabError(
                f"can't write {target}: {error.strerror}; its folder must exist and be writable"
            ) from None
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put(made: Path, target: Path) -> None:
    try:
        if target.is_dir():
            target.rmdir()
        made.rename(target)
    except OSError as error:
        raise TrimtabError(f"can't write {target}: {error.strerror}; has something been put there meanwhile?") from None


def _save(lm: LM, folder: Path) -> None:
    """Save the model in memory as a folder. Raises `UnsupportedError` if it is adapted, quantized or offloaded."""
    model = lm.model
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedError(
            f"{type(model).__name__} isn't a plain transformers model; merge its adapters (merge_and_unload) first"
        )
    _check_unquantized(model.config, lm.name)
    if (method := quantization(model)) is not None:
        raise _quantized_error(lm.name, method)
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        raise UnsupportedError(f"a part of {lm.name} isn't in memory (offloaded); give its folder or Hub id instead")
    model.save_pretrained(folder, max_shard_size=SHARD)
    if lm.tokenizer is not None:
        lm.tokenizer.save_pretrained(folder)


def _check_unquantized(config: Any, name: str) -> None:
    quantization_config = getattr(config, "quantization_config", None)
    if quantization_config is not None:
        method = (
            quantization_config.get("quant_method")
            if isinstance(quantization_config, dict)
            else quantization_config.quant_method
        )
        raise _quantized_error(name, str(getattr(method, "value", method)))


def _quantized_error(name: str, method: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} is quantized ({method}), so its weights can't be changed; bake the unquantized model that it was made"
        " from, and quantize the result"
    )


def _folder_of(model: str | Path | None, revision: str | None) -> tuple[Path, str]:
    """The folder with the model's files, and the model's name as `LM.load` gives it."""
    if not isinstance(model, (str, Path, type(None))):
        raise TrimtabError(f"a {type(model).__name__} can't be baked; give an LM of transformers, a Hub id or a folder")
    if model is None:
        return default_model.default_folder(), default_model.NAME
    path = Path(model)
    if path.suffix.lower() == ".gguf":
        raise UnsupportedError(f"{path} is a GGUF file; bake the folder that it was made from, and convert the result")
    if path.is_dir():
        return path, path.resolve().name
    try:
        patterns: dict[str, Any] = {"allow_patterns": list(FETCHED), "ignore_patterns": list(IGNORED)}
        return Path(snapshot_download(str(model), revision=revision, **patterns)), str(model)
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrimtabError(f"can't get the model {str(model)!r}: {reason}. Give a Hub id or a model folder") from None


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise TrimtabError(
                f"{folder} contains an adapter; merge it into its model (merge_and_unload), save that, and bake it"
            )
        raise TrimtabError(f"{folder} has no config.json, so it isn't a model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TrimtabError(f"can't read {folder / 'config.json'}: {reason}") from None
    _check_unquantized(config, str(folder))
    return config


def _identity(structure: Structure, shards: Any, name: str, folder: Path) -> ModelId:
    """The identity of the model in a folder, without loading it."""
    family = str(structure.config.model_type)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError):
        tokenizer = None  # a model folder doesn't need one
    shape, rows = _sample(structure, shards)
    digest = fingerprint(family, shape, rows)
    return ModelId(name, None, family, structure.width, structure.layers, digest, template_digest(tokenizer))


def _sample(structure: Structure, shards: Any) -> tuple[list[int], Tensor]:
    """The shape of the embeddings, and the rows of them that go into a fingerprint."""
    for file in shards.names:
        with shards.opened(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                if structure.model_key(key) == structure.input_embeddings:
                    rows = opened.get_slice(key)
                    shape = list(rows.get_shape())
                    return shape, torch.cat([rows[i : i + 1] for i in sampled_rows(shape[0])])
    raise TrimtabError(f"{shards.folder} has no tensor {structure.input_embeddings}, so its embeddings can't be found")


def _notes(structure: Structure, weight_plan: Plan, untied: bool, skipped: list[str]) -> tuple[str, ...]:
    notes = []
    if untied:
        notes.append(
            "The embeddings were changed and the output layer wasn't; they were one matrix, and now are two"
            " (tie_word_embeddings is false)."
        )
    if structure.composite and FIRST in weight_plan.maps:
        notes.append("At the input, only the embeddings of text were ablated; those of images are unchanged.")
    if weight_plan.flags:
        notes.append(
            f"The additions are stored as biases, which {', '.join(weight_plan.flags)} in config.json turns on."
        )
    if (
        structure.not_plain_reason is not None
        and "norm" in structure.not_plain_reason
        and any(site_map.ablates for site_map in weight_plan.maps.values())
    ):
        notes.append(
            f"{structure.name} {structure.not_plain_reason}: the ablation acts on its input, and its weights bring"
            " some of the direction back."
        )
    if skipped:
        notes.append(f"Not copied from the model's folder: {', '.join(skipped)}.")
    return tuple(notes)


def _compare_logits(
    structure: Structure, steering: Steering, source: Any, baked: Path, device: str | torch.device | None
) -> Checked:
    """Compare the logits of the steered and the baked model; one of them is in memory at a time.

    Raises `TrimtabError` if rounding can't explain the difference, or if a plain load finds tensors missing.
    """
    size = structure.config.vocab_size
    ids = torch.randint(0, size, TOKENS, generator=torch.Generator().manual_seed(0))
    bare_model = _loaded(source, device) if isinstance(source, Path) else source
    dtype = bare_model.dtype
    bare = Steering(steering.edits)
    with LM(bare_model, None).steered(bare):
        steered = _logits(bare_model, ids)
    unsteered = _logits(bare_model, ids)
    del bare_model
    new = _loaded(baked, device)
    got = _logits(new, ids)
    checked = Checked(_relative_distance(got, steered), _relative_distance(unsteered, steered))
    if not checked.difference <= ROUNDING[dtype]:
        raise TrimtabError(
            f"the baked model doesn't match the steered one: its logits differ by {checked.difference:.2g} of their"
            f" norm, and rounding explains {ROUNDING[dtype]:.2g} (the steering itself changes them by"
            f" {checked.effect:.2g}); nothing was written. {structure.name} has a part that trimtab doesn't know; steer"
            " it while it runs instead"
        )
    return checked


def _loaded(folder: Path, device: str | torch.device | None) -> Any:
    loaded = auto_class(AutoConfig.from_pretrained(folder)).from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    model, loading_info = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, loading_info[kind])):
            raise TrimtabError(f"{folder.name} doesn't load correctly: {kind.replace('_', ' ')} {', '.join(names[:4])}")
    return model.to(device or best_device()).eval()


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids.to(model.device)).logits
    return logits.cpu().double()  # MPS has no float64


def _relative_distance(logits: Tensor, other: Tensor) -> float:
    """The distance between centered logits, relative to the norm of `other`; the median over tokens."""
    logits, other = (x - x.mean(-1, keepdim=True) for x in (logits, other))
    return float(((logits - other).norm(dim=-1) / other.norm(dim=-1)).median())
