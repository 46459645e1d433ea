"""Adapters are part of the model: those that act are seen, and what was learned without them isn't used with them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny import direction, tiny, tokenizer
from torch import Tensor

from trimtab import LM, MismatchWarning, load
from trimtab.commands.model import load_model
from trimtab.engines.transformers.adapters import active_adapters
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering

FAMILY = "llama"
PROMPT = "w5 w6 w7 w8"


def lora(seed: int = 0, **more: object) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], **more)


def filled(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Adapters begin as nothing; these do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "ia3" in name:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(drawn * 0.3 + ("ia3" in name))
    return model.double().eval()


def learned_on(lm: LM) -> Steering:
    return Steering((Edit(Site(1), Add(direction(1, 3.0)), Positions.all()),), Card("planted", model=lm.identity))


def switch(model: torch.nn.Module, on: bool) -> None:
    """As transformers' `enable_adapters` and `disable_adapters`, which ask for a peft that isn't out yet."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)


def refusal(lm: LM, steering: Steering) -> str:
    with pytest.raises(TrimtabError) as caught:
        lm.generate(PROMPT, steering, max_new_tokens=2)
    return str(caught.value)


def accepted(lm: LM, steering: Steering) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", MismatchWarning)
        lm.check(steering)


def test_what_was_learned_without_an_adapter_is_not_used_with_it_nor_the_reverse() -> None:
    base = tiny(FAMILY)
    plain = learned_on(base)
    assert base.identity.adapters == ()
    adapted = LM(filled(get_peft_model(tiny(FAMILY).model, lora()), 1), tokenizer(), name=base.name)
    within = learned_on(adapted)
    assert adapted.identity.fingerprint == base.identity.fingerprint
    assert adapted.identity.blocks == base.identity.blocks
    (adapter,) = adapted.identity.adapters
    assert adapter.name == "default"
    assert f"with the adapter default ({adapter.digest[:8]})" in refusal(adapted, plain)
    assert "without an adapter" in refusal(adapted, plain)
    assert "allow transfer" in refusal(base, within)
    accepted(adapted, within)
    accepted(base, plain)
    adapted.check(plain, transfer=True)
    base.check(within, transfer=True)
    assert adapted.generate(PROMPT, plain, max_new_tokens=2, transfer=True)


@pytest.mark.parametrize(
    "config", [lora(), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])]
)
def test_a_digest_follows_the_weights_and_not_the_name_or_the_wrapper(tmp_path: Path, config: object) -> None:
    wrapped = filled(get_peft_model(tiny(FAMILY).model, config), 1)
    wrapped.save_pretrained(tmp_path / "one")
    (first,) = active_adapters(wrapped)
    inside = tiny(FAMILY).model
    inside.load_adapter(str(tmp_path / "one"), adapter_name="other")
    (again,) = active_adapters(inside)
    assert (first.name, again.name) == ("default", "other")
    assert first.digest == again.digest
    assert active_adapters(wrapped.to(torch.bfloat16)) != ()
    wrapped.double()
    name, weight = next((n, p) for n, p in wrapped.named_parameters() if "lora_B" in n or "ia3" in n)
    weight.data.flatten()[0] += 1.0
    assert active_adapters(wrapped)[0].digest != first.digest, name


def test_adapters_that_are_switched_are_noticed(tmp_path: Path) -> None:
    model = get_peft_model(tiny(FAMILY).model, lora())
    model.add_adapter("second", lora())
    lm = LM(filled(model, 1), tokenizer())
    with_first = learned_on(lm)
    model.set_adapter("second")
    with_second = learned_on(lm)
    assert with_first.card.model != with_second.card.model
    assert "'" not in refusal(lm, with_first) or "default" in refusal(lm, with_first)
    accepted(lm, with_second)
    with model.disable_adapter():
        without = learned_on(lm)
        assert lm.identity.adapters == ()
        refusal(lm, with_second)
    refusal(lm, without)
    model.set_adapter("default")
    accepted(lm, with_first)
    ids = torch.tensor([[5, 6, 7]])
    with lm.steered(with_first):
        model(ids)
    with pytest.raises(TrimtabError, match="without an adapter"), lm.steered(with_first), model.disable_adapter():
        model(ids)
    with lm.steered(with_first, transfer=True), model.disable_adapter():
        model(ids)


def test_an_adapter_that_is_put_into_the_model_after_it_was_wrapped_is_noticed(tmp_path: Path) -> None:
    filled(get_peft_model(tiny(FAMILY).model, lora()), 1).save_pretrained(tmp_path / "one")
    lm = tiny(FAMILY)
    plain = learned_on(lm)
    before = lm.generate(PROMPT, plain, max_new_tokens=3)[0].token_ids
    lm.model.load_adapter(str(tmp_path / "one"))
    assert "with the adapter" in refusal(lm, plain)
    switch(lm.model, False)
    assert lm.generate(PROMPT, plain, max_new_tokens=3)[0].token_ids == before
    switch(lm.model, True)
    assert "with the adapter" in refusal(lm, plain)


def test_merged_adapters_are_told_by_what_can_be_seen() -> None:
    base = tiny(FAMILY)
    plain = learned_on(base)
    model = filled(get_peft_model(tiny(FAMILY).model, lora()), 1)
    lm = LM(model, tokenizer(), name=base.name)
    within = learned_on(lm)
    model.merge_adapter()
    accepted(lm, within)  # still the same model
    refusal(lm, plain)
    model.unmerge_adapter()
    merged = LM(model.merge_and_unload(), tokenizer(), name=base.name)
    with pytest.warns(MismatchWarning, match="merged"):
        merged.check(plain)
    refusal(merged, within)
    with pytest.warns(MismatchWarning, match="merged"):
        base.check(learned_on(merged))


def test_a_file_says_with_which_adapter_it_was_learned(tmp_path: Path) -> None:
    lm = LM(filled(get_peft_model(tiny(FAMILY).model, lora()), 1), tokenizer())
    steering = learned_on(lm)
    steering.save(tmp_path / "s.safetensors")
    again = load(tmp_path / "s.safetensors")
    assert again.card.model == lm.identity
    assert again.card.model is not None
    assert again.card.model.blocks == lm.identity.blocks
    again.save(tmp_path / "t.safetensors")
    assert (tmp_path / "s.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()
    from trimtab.report.described import card_rows

    assert re.search(r"with the adapter default \([0-9a-f]{8}\)", dict(card_rows(again.card))["learned"])


def test_steering_acts_inside_adapters_as_a_plain_hook_does() -> None:
    lm = LM(filled(get_peft_model(tiny(FAMILY).model, lora()), 1), tokenizer())
    for site, size in ((Site(1), 32), (Site(2, "heads"), 32), (Site(2, "neurons"), 48), (Site(0, "mlp"), 32)):
        v = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        steering = Steering((Edit(site, Add(v), Positions.all()),))
        ids = torch.tensor([lm.encode(PROMPT, chat=False)])
        with lm.steered(steering):
            got = lm.model(input_ids=ids).logits
        block = lm.layout.blocks[site.layer]
        module = {
            "residual": block,
            "mlp": block.mlp,
            "heads": block.self_attn.o_proj,
            "neurons": block.mlp.down_proj,
        }[site.kind]
        if site.kind in ("heads", "neurons"):
            handle = module.register_forward_pre_hook(lambda _m, args, v=v: (args[0] + v,))
        else:

            def after(_m: object, _args: object, out: Tensor, v: Tensor = v) -> Tensor:
                return out + v

            handle = module.register_forward_hook(after)
        expected = lm.model(input_ids=ids).logits
        handle.remove()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_loading_with_an_adapter(tmp_path: Path) -> None:
    base = tiny(FAMILY, dtype=torch.float32)
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    adapted = filled(get_peft_model(tiny(FAMILY).model, lora()), 1).float()
    adapted.save_pretrained(tmp_path / "v1.0-lora")
    lm = LM.load(tmp_path / "model", device="cpu", adapter=tmp_path / "v1.0-lora")
    assert [adapter.name for adapter in lm.identity.adapters] == ["v1_0-lora"]
    assert lm.identity.adapters[0].digest == active_adapters(adapted)[0].digest
    assert isinstance(adapted, PeftModel)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(lm.model(ids).logits, adapted(ids).logits)
    typed = load_model(
        str(tmp_path / "model"),
        device="cpu",
        dtype="auto",
        revision=None,
        layers_path=None,
        adapter=str(tmp_path / "v1.0-lora"),
        quiet=True,
    )
    assert typed.identity == lm.identity
    with pytest.raises(TrimtabError, match=r"adapter_config\.json"):
        LM.load(tmp_path / "model", device="cpu", adapter=tmp_path / "model")
    with pytest.raises(UnsupportedError, match="merge_and_unload"):
        LM.load(tmp_path / "model", engine="llamacpp", adapter=tmp_path / "v1.0-lora")


def test_an_adapter_that_puts_tokens_before_the_text_is_refused() -> None:
    model = get_peft_model(tiny(FAMILY).model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedError, match="PROMPT_TUNING"):
        LM(model, tokenizer())
