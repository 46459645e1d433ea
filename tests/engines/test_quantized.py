"""Quantized models: everything that works on a dense one works there, but for what changes or reads their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tokenizer
from torch import nn
from torchao.quantization import (
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig

from trimtab import LM, learn_caa
from trimtab.baking.bake import bake
from trimtab.doctor import check_model
from trimtab.engines.transformers.places import output_weight
from trimtab.engines.transformers.weights import quantization
from trimtab.errors import UnsupportedError
from trimtab.steering import Ablate, Edit, Positions, Site, Steering
from trimtab.text.pairs import Pair

WIDTH = 64  # a block of bitsandbytes' 4 bits
SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ABLATION = Steering(tuple(Edit(Site(i), Ablate(torch.ones(WIDTH) / 8), Positions.all()) for i in range(3)))


def dense(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def bits_and_bytes(**more: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(bnb_4bit_compute_dtype=torch.float32, **more)


LOADED: dict[str, Callable[[], Any]] = {
    "bitsandbytes, 8 bits": lambda: bits_and_bytes(load_in_8bit=True),
    "bitsandbytes, nf4": lambda: bits_and_bytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "torchao, 8 bits": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao, activations too": lambda: TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    "torchao, 4 bits": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    dense().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def loaded(kind: str, folder: Path) -> LM:
    lm = LM.load(folder, device="cpu", quantization_config=LOADED[kind]())
    lm.name = f"tiny {kind}"  # the doctor has prompts of such words for it
    return lm


def check(lm: LM) -> None:
    """All that works on the dense model works, compared with plain hooks on the quantized one."""
    report = check_model(lm)
    states = {finding.name: (finding.state, finding.reason) for finding in report.findings}
    quantized = states.pop("quantized")
    assert quantized[0] in ("works", "partly")
    assert str(quantization(lm.model)) in quantized[1]
    states.pop("router", None)
    assert {name: state for name, state in states.items() if state[0] != "works"} == {}


@pytest.mark.long_unless(lambda kind: kind in ("bitsandbytes, nf4", "torchao, 8 bits"))
@pytest.mark.parametrize("kind", LOADED)
def test_what_works_on_a_dense_model_works(kind: str, folder: Path) -> None:
    check(loaded(kind, folder))


@pytest.mark.parametrize("kind", LOADED)
def test_a_model_is_the_same_one_quantized_and_its_weights_stay(kind: str, folder: Path, tmp_path: Path) -> None:
    lm, whole = loaded(kind, folder), LM.load(folder, device="cpu")
    assert lm.identity.fingerprint == whole.identity.fingerprint
    assert lm.identity.blocks is None
    assert whole.identity.blocks is not None
    lm.name = whole.name
    learned = learn_caa(lm, [Pair("w5 w6", "w7 w8"), Pair("w9 w10", "w11 w12")], layers=1)
    whole.check(learned)
    with pytest.raises(UnsupportedError, match="quantized"):
        bake(lm, ABLATION, tmp_path / "baked")
    with pytest.raises(UnsupportedError, match="unquantized"):
        output_weight(lm.layout, Site(1, "neurons"))


def test_a_model_that_was_quantized_in_place(tmp_path: Path) -> None:
    model = dense()
    quantize_(model, Int8WeightOnlyConfig())
    lm = LM(model, tokenizer(), name="tiny in place")
    assert quantization(model) == "torchao"
    check(lm)
    with pytest.raises(UnsupportedError, match=r"quantized \(torchao\)"):
        bake(lm, ABLATION, tmp_path / "baked")


def packed(linear: nn.Linear, kind: type, group: int = 32) -> nn.Module:
    """A linear map in four bits, by the package that runs GPTQ and AWQ models for transformers."""
    weight = linear.weight.data.view(linear.out_features, -1, group)
    scales = (weight.abs().amax(-1) / 7).half().float()
    zeros = torch.full_like(scales, 8)
    made = kind(
        bits=4,
        group_size=group,
        sym=True,
        desc_act=False,
        in_features=linear.in_features,
        out_features=linear.out_features,
        register_buffers=True,
    )
    made.pack(linear, scales.t().contiguous().t(), zeros, torch.arange(linear.in_features) // group)
    made.post_init()
    return made.eval()


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq(kind: str) -> None:
    pytest.importorskip("gptqmodel")
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    model = dense()
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(part, name, packed(child, {"gptq": TorchLinear, "awq": AwqTorchLinear}[kind]))
    lm = LM(model, tokenizer(), name=f"tiny {kind}")
    assert quantization(model) is not None
    assert lm.identity.blocks is None
    check(lm)
    with pytest.raises(UnsupportedError, match="unquantized"):
        output_weight(lm.layout, Site(1, "neurons"))
