"""The tensors of a checkpoint that write to the model's residual stream, found by name, without loading the weights."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from trimtab.engines.transformers import compat
from trimtab.engines.transformers.layout import Layout, find_layout
from trimtab.engines.transformers.places import DOWN_PROJECTIONS, MLPS, place
from trimtab.errors import UnsupportedError
from trimtab.steering import Site

EMBEDDINGS, ATTENTION, MLP = "block_input", "attention", "mlp"
"""The kinds of site whose outputs are written to the stream."""
INNER = (
    *("gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "fc1", "fc_in", "c_fc", "dense_h_to_4h"),
    *("gate", "router", "shared_expert_gate"),
)
"""Names, across model families, of the parts of an MLP that don't write to the stream."""
BEHIND = re.compile(r"post_(feedforward|ffn?|mlp|self_attn)_(layer)?norm")
"""Names, across model families, of a norm between an MLP and the stream."""
SCALES = ("residual_multiplier", "scale_depth")
"""Configuration fields with a factor for everything that is written to the stream."""
UNUSUAL = {"do_layer_norm_before": False}  # OPT-350m normalizes the stream itself
FLAGS = ("attention_bias", "mlp_bias", "bias", "use_bias", "enable_bias")
"""Configuration fields that say whether projections have biases."""


@dataclass(frozen=True)
class Writer:
    """A checkpoint tensor that writes to the stream: the site it writes to, and whether it is a bias.

    `transposed` says that the stream is the last dimension of a weight instead of the one before it. `None` means that
    only the shape can tell.
    """

    site: Site
    bias: bool
    transposed: bool | None


@dataclass(frozen=True)
class Structure:
    """A causal language model without its weights.

    `not_plain_reason` is the reason why an MLP's output isn't added to the stream unchanged, or `None` if it is.
    """

    model: Any  # on the meta device: shapes and names, no values
    layout: Layout
    decoder: str
    embeddings: tuple[str, ...]
    input_embeddings: str
    head: str
    tied: bool
    not_plain_reason: str | None
    keys: frozenset[str]

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def layers(self) -> int:
        return self.layout.layers

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def config(self) -> Any:
        """The language model's configuration, which may be a section of the whole one."""
        return self.model.config.get_text_config(decoder=True)

    @property
    def composite(self) -> bool:
        """Whether the language model is part of another model, such as an image-text model."""
        return self.config is not self.model.config

    def model_key(self, key: str) -> str:
        """The model's name for a checkpoint key; the prefix before the decoder differs between releases."""
        if self._known(key):
            return key
        parts = key.split(".")
        while True:
            if self._known(name := ".".join([self.decoder, *parts])):
                return name
            if parts[0] not in (self.model.base_model_prefix, "model", "language_model") or len(parts) == 1:
                return key
            del parts[0]

    def _known(self, key: str) -> bool:
        return key in self.keys or key.startswith(f"{self.layout.path}.")

    def writer(self, key: str, dimensions: int) -> Writer | None:
        """The site that this checkpoint tensor writes to, or `None` if it doesn't write to the stream.

        Raises:
            UnsupportedError: The role of the tensor is unknown.
        """
        name = self.model_key(key)
        if name in self.embeddings:
            return Writer(Site(0, EMBEDDINGS), False, True)
        match = re.fullmatch(rf"{re.escape(self.layout.path)}\.(\d+)\.(.+)", name)
        if not match:
            return None
        layer, rest = int(match[1]), match[2]
        if layer >= self.layers:  # multi-token prediction layers
            return None
        block = self.layout.blocks[layer]
        for site in (Site(layer, ATTENTION), Site(layer, MLP)):
            module = self._projection(site)
            path = next((n for n, m in block.named_modules() if m is module), "")
            if module is not None and rest in (f"{path}.weight", f"{path}.bias"):
                return Writer(site, rest.endswith(".bias"), type(module).__name__ == "Conv1D")
        parts = rest.split(".")
        if parts[0] not in MLPS or self._projection(Site(layer, MLP)) is not None:
            return None
        last = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
        bias = parts[-1] == "bias" or last.endswith("_bias")
        last = last.removesuffix("_bias")
        if last in DOWN_PROJECTIONS:
            return Writer(Site(layer, MLP), bias, self._experts_transposed(layer) if dimensions == 3 else False)
        if dimensions > 1 and last not in INNER:
            raise UnsupportedError(
                f"trimtab doesn't know what {key} of {self.name} does, so nothing can be baked into it; steer the model"
                " while it runs instead"
            )
        return None

    def _projection(self, site: Site) -> nn.Module | None:
        """The one projection that writes at this site; `None` for a mixture of experts, which has many."""
        if site.kind == ATTENTION:
            return place(self.layout, Site(site.layer, "heads")).module
        if len(self._last_projections(site.layer)) > 1:
            return None
        try:
            return place(self.layout, Site(site.layer, "neurons")).module
        except UnsupportedError:
            return None

    def _last_projections(self, layer: int) -> set[str]:
        """The names of all down projections in the block's MLP: each expert's, and the shared expert's."""
        parts = (name.split(".") for name, _ in self.layout.blocks[layer].named_parameters())
        return {
            ".".join(part[:-1] if part[-1] in ("weight", "bias") else part)
            for part in parts
            if part[0] in MLPS and {*part[-2:]} & {*DOWN_PROJECTIONS}
        }

    def _experts_transposed(self, layer: int) -> bool | None:
        for module in self.layout.blocks[layer].modules():
            if isinstance(getattr(module, "down_proj", None), nn.Parameter):
                return getattr(module, "is_transposed", None)
        return None

    def mixes(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self._projection(Site(layer, MLP)) is None

    def element_count(self, site: Site) -> int:
        """The number of elements in the weights that write at this site."""
        if site.kind == EMBEDDINGS:
            return sum(self.model.state_dict()[name].numel() for name in self.embeddings)
        if (module := self._projection(site)) is not None:
            return int(module.weight.numel())  # type: ignore[operator]
        names = ((name.split("."), tensor) for name, tensor in self.layout.blocks[site.layer].named_parameters())
        return sum(
            tensor.numel()
            for parts, tensor in names
            if parts[0] in MLPS and parts[-1] != "bias" and {*parts[-2:]} & {*DOWN_PROJECTIONS}
        )

    def has_bias(self, site: Site) -> bool:
        """Whether the weights that write at this site have a bias."""
        return getattr(self._projection(site), "bias", None) is not None

    def bias_flags(self, sites: Iterable[Site]) -> tuple[dict[str, bool], frozenset[str]]:
        """The configuration flags that give all these sites a bias, and the names of all biases that they create.

        Raises:
            UnsupportedError: No flag of the configuration does this.
        """
        flags: dict[str, bool] = {}
        current = self
        for site in sites:
            if not current.has_bias(site):
                flags |= {current._flag(site): True}
                current = structure_of(_config_with_flags(self, flags))
        return flags, current.keys - self.keys

    def _flag(self, site: Site) -> str:
        if self.mixes(site.layer) and site.kind == MLP:
            raise UnsupportedError(
                f"{self.name} has a mixture of experts at {site}, which weights the experts' outputs, so their biases"
                f" don't add a constant; {ELSEWHERE}"
            )
        for flag in FLAGS:
            if getattr(self.config, flag, None) is not False:
                continue
            other = structure_of(_config_with_flags(self, {flag: True}))
            if other.has_bias(site) and all(key.endswith(".bias") for key in other.keys - self.keys):
                return flag
        module = self._projection(site)
        path = next(name for name, m in self.model.named_modules() if m is module)
        raise UnsupportedError(
            f"{self.name} has no bias at {path}, and nothing in its configuration gives it one, so an addition at"
            f" {site} can't be stored in its weights; {ELSEWHERE}"
        )


ELSEWHERE = (
    "ablations can be baked into it, and additions steer it while it runs (trimtab generate, trimtab serve, or in"
    " llama.cpp as a control vector: trimtab convert FILE OUT.gguf)"
)


def _config_with_flags(structure: Structure, flags: dict[str, bool]) -> Any:
    config = deepcopy(structure.model.config)
    for name, value in flags.items():
        setattr(config.get_text_config(decoder=True), name, value)
    return config


def auto_class(config: Any) -> Any:
    """The transformers class that loads such a model: causal, or image-text if the language model is part of one."""
    return AutoModelForCausalLM if compat.is_causal_lm(config) else AutoModelForImageTextToText


def structure_of(config: Any) -> Structure:
    """The structure of the model that a configuration describes.

    Raises:
        UnsupportedError: A part may write to the stream in an unknown way.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    layout = find_layout(model)
    names = {id(module): name for name, module in model.named_modules()}
    blocks = layout.path.removeprefix(f"{names[id(layout.decoder)]}.").split(".")[0]
    embeddings = []
    for name, part in layout.decoder.named_children():
        where = names[id(part)]
        if name == blocks or not _has_numbers(part):
            continue
        if isinstance(part, nn.Embedding):
            embeddings.append(f"{where}.weight")
        elif max(p.dim() for p in part.parameters()) > 1 or _is_norm(name) is False:
            raise _unknown(model, where)
    norms = [name for name, part in layout.decoder.named_children() if _is_norm(name) and _has_numbers(part)]
    if len(norms) > 1:
        raise _unknown(model, ", ".join(norms))
    for layer in range(layout.layers):
        _check_block(model, layout, layer)
    return Structure(
        model=model,
        layout=layout,
        decoder=names[id(layout.decoder)],
        embeddings=tuple(embeddings),
        input_embeddings=f"{names[id(model.get_input_embeddings())]}.weight",
        head=f"{names[id(model.get_output_embeddings())]}.weight",
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        not_plain_reason=_not_plain_reason(config.get_text_config(decoder=True), layout),
        keys=frozenset(model.state_dict()),
    )


def _has_numbers(part: nn.Module) -> bool:
    return next(part.parameters(), None) is not None


def _is_norm(name: str) -> bool:
    return "norm" in name.lower() or name.startswith("ln")


def _check_block(model: Any, layout: Layout, layer: int) -> None:
    """Raise `UnsupportedError` for a block that has more in it than norms, one attention and one MLP."""
    attention, block = place(layout, Site(layer, ATTENTION)).module, layout.blocks[layer]
    place(layout, Site(layer, "heads"))
    mlp = place(layout, Site(layer, MLP)).module
    for part in block.children():
        if "residual" in inspect.signature(part.forward).parameters:
            raise UnsupportedError(
                f"{type(part).__name__} of {type(model).__name__} adds the residual stream to its output itself, so its"
                " weights alone can't do what an edit there does; steer the model while it runs instead"
            )
    for name, part in block.named_children():
        if part is attention or part is mlp or name in ("fc1", "fc2"):
            continue
        if any(p.dim() > 1 for p in part.parameters()):
            raise _unknown(model, f"{layout.path}.{layer}.{name}")


def _unknown(model: Any, where: str) -> UnsupportedError:
    return UnsupportedError(
        f"trimtab doesn't know what {where} of {type(model).__name__} does to the residual stream, so nothing can be"
        " baked; steer the model while it runs instead"
    )


def _not_plain_reason(config: Any, layout: Layout) -> str | None:
    """Why an MLP's output isn't added to the stream unchanged; `None` if it is."""
    for name in SCALES:
        if getattr(config, name, 1) not in (1, None):
            return f"multiplies what it writes by {name}"
    for name, value in UNUSUAL.items():
        if getattr(config, name, not value) == value:
            return "has norms on the residual stream itself"
    for block in layout.blocks:
        children = [name for name, _ in block.named_children()]
        if behind := next((name for name in children if BEHIND.fullmatch(name)), None):
            return f"has a norm after attention or MLP ({behind})"
        if sum(map(_is_norm, children)) > 2:
            return "has more norms in a block than the ones before attention and MLP"
        if own := [*block._parameters, *block._buffers]:
            return f"has {own[0]} in a block"
    return None
