"""torchao waits until a model is quantized by it, and works then as it does where it was imported at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys, tempfile
import trimtab.lm
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig
from transformers.quantizers.quantizer_torchao import is_torchao_available

sizes = dict(vocab_size=90, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
with tempfile.TemporaryDirectory() as folder:
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder)
    print("torchao" in sys.modules, is_torchao_available())
    from torchao.quantization import Int8WeightOnlyConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    LlamaForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(folder + "/small")
    weight = LlamaForCausalLM.from_pretrained(folder + "/small").model.layers[0].mlp.up_proj.weight
    print(type(weight).__module__.partition(".")[0])
"""


@pytest.mark.long
def test_it_is_imported_when_it_is_needed() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "False True\ntorchao\n"), ran.stderr
