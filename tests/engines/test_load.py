"""Where a quantized model is put: what `from_pretrained` is given, without the hardware that these models need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny
from transformers import AutoModelForCausalLM

from trimtab import LM, TrimtabError

QUANTIZED = {"quantization_config": {"quant_method": "awq", "bits": 4}}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A tiny model's folder, whose configuration says that it is quantized."""
    lm = tiny("llama")
    lm.model.save_pretrained(tmp_path / "m")
    lm.tokenizer.save_pretrained(tmp_path / "m")
    return tmp_path / "m"


@pytest.fixture
def load_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `from_pretrained` is given. Its model is quantized, and on the device that the map names, or the CPU."""
    calls: list[dict[str, Any]] = []

    def from_pretrained(_source: str, **options: Any) -> Any:
        calls.append(options)
        if "refuse" in options:
            raise ImportError("this quantization needs a GPU")
        model = tiny("llama").model
        model.is_quantized = True
        return model if "stays" in options else model.to(options["device_map"][""])

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", staticmethod(from_pretrained))
    return calls


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "cpu", None])
def test_a_quantized_model_is_loaded_where_it_is_asked_to_be(
    saved: Path, load_calls: list[dict[str, Any]], device: Any
) -> None:
    lm = LM.load(saved, device=device, **QUANTIZED)
    (options,) = load_calls
    wanted = torch.device(device or "cpu")
    assert options["device_map"] == {"": wanted}
    assert {p.device for p in lm.model.parameters()} == {wanted}


def test_the_best_device_unless_one_is_named(
    saved: Path, load_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trimtab.engines.transformers.load.best_device", lambda: "meta")
    LM.load(saved, **QUANTIZED)
    LM.load(saved, device="cpu", **QUANTIZED)
    LM.load(saved, device_map="auto", stays=True, **QUANTIZED)
    assert [call["device_map"] for call in load_calls] == [
        {"": torch.device("meta")}, {"": torch.device("cpu")}, "auto"
    ]  # fmt: skip


def test_a_checkpoint_that_is_quantized(
    saved: Path, load_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own configuration says so."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(saved)
    config.quantization_config = QUANTIZED["quantization_config"]
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    LM.load(saved, device="meta")
    assert load_calls[0]["device_map"] == {"": torch.device("meta")}


def test_a_plain_model_is_moved_afterwards(saved: Path) -> None:
    lm = LM.load(saved, device="cpu")
    assert {str(p.device) for p in lm.model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("stays", "was requested on meta, but parts of it were placed on cpu, where its quantization can't run"),
        ("refuse", "can't load the quantized model .* on meta: this quantization needs a GPU. Give another device"),
    ],
)
def test_where_it_cant_be_done(saved: Path, load_calls: list[dict[str, Any]], option: str, why: str) -> None:
    with pytest.raises(TrimtabError, match=why):
        LM.load(saved, device="meta", **{option: True}, **QUANTIZED)
