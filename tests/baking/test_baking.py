"""A baked model, loaded by plain transformers, is the steered model: over families, operations and kinds of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import LAYERS, MIXTURES, WIDTH, direction
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from trimtab import (
    LM,
    Ablate,
    Add,
    Card,
    Edit,
    Positions,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
    bake,
    directional_ablation,
)
from trimtab.baking import affine
from trimtab.baking.bake import Baked

SEEING = ("gemma3_multimodal", "qwen2_vl")
BEHIND = ("gemma2", "gemma3", "gemma3_multimodal", "olmo2")
"""Families with a norm behind attention and MLP."""
IDS = torch.tensor([[5, 17, 80, 3, 44, 9], [61, 7, 7, 20, 33, 71]])


def steering(*edits: tuple[str, int, Any, float]) -> Steering:
    return Steering(tuple(Edit(Site(layer, kind), op, Positions.all(), s) for kind, layer, op, s in edits))


def plain(folder: Path, family: str) -> Any:
    """The folder's model, as anybody would load it."""
    auto = AutoModelForImageTextToText if family in SEEING else AutoModelForCausalLM
    model, about = auto.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(about[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), about
    if family == "gemma2":
        model.set_attn_implementation("eager")
    if family in MIXTURES and model.dtype == torch.float64:
        model.set_experts_implementation("eager")
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def steered(lm: LM, edits: Steering) -> torch.Tensor:
    with lm.steered(edits):
        return logits(lm.model)


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """But for rounding: norms are computed in float32 in most families, whatever the dtype of the model."""
    return torch.allclose(got, expected, atol=1e-5 * float(expected.abs().max()))


def baked(lm: LM, edits: Steering, folder: Path, **more: Any) -> tuple[Baked, Any]:
    done = bake(lm, edits, folder, check=False, **more)
    return done, plain(folder, lm.name.removeprefix("tiny-"))


# ---- equal to the steered model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_direction_ablated_everywhere(family: str, tmp_path: Path) -> None:
    lm = tiny.tiny(family)
    ablation = directional_ablation(direction(1, 3.0), LAYERS)
    done, model = baked(lm, ablation, tmp_path / "out")
    assert same(logits(model), steered(lm, ablation))
    assert not torch.allclose(logits(model), logits(lm.model), rtol=0.1, atol=0.1)
    if family not in BEHIND:  # then nothing of it is left in the stream, wherever one looks
        with torch.no_grad():
            stream = model(input_ids=IDS, output_hidden_states=True).hidden_states[:-1]
        for x in stream:
            assert float((x.double() @ direction(1)).abs().max()) < 1e-6 * float(x.norm(dim=-1).max())
    assert any("norm after" in note for note in done.notes) == (family in BEHIND)
    assert any("images" in note for note in done.notes) == (family in SEEING)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "falcon"])
def test_additions_are_biases(family: str, tmp_path: Path) -> None:
    lm = tiny.tiny(family)
    adding = steering(
        ("residual", 1, Add(direction(1)), 0.7),
        ("residual", 1, Add(direction(2)), -0.4),
        ("block_input", 2, Add(direction(3)), 1.0),
        ("residual", LAYERS - 1, Add(direction(4)), 2.0),
        ("mlp", 0, Add(direction(5)), 1.0),
        ("attention", 2, Add(direction(6)), 1.5),
    )
    done, model = baked(lm, adding, tmp_path / "out")
    assert same(logits(model), steered(lm, adding))
    assert not same(logits(model), logits(lm.model))
    assert done.config == {"llama": {"mlp_bias": True, "attention_bias": True}, "falcon": {"bias": True}}.get(
        family, {}
    )
    assert json.loads((tmp_path / "out/config.json").read_text()).items() >= done.config.items()


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_multimodal"])
def test_an_attention_that_may_have_a_bias(family: str, tmp_path: Path) -> None:
    lm = tiny.tiny(family)
    adding = steering(("attention", 1, Add(direction(1)), 0.7))
    done, model = baked(lm, adding, tmp_path / "out")
    assert (done.config, done.changed, done.biases) == ({"attention_bias": True}, 0, 4 * LAYERS)
    assert same(logits(model), steered(lm, adding))
    assert not same(logits(model), logits(lm.model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_any_sequence_of_both(family: str, tmp_path: Path) -> None:
    """Shares, directions that aren't orthogonal, and additions before and after."""
    lm = tiny.tiny(family)
    both = steering(
        ("attention", 1, Add(direction(1)), 0.5),
        ("attention", 1, Ablate(direction(2)), 0.6),
        ("attention", 1, Ablate((direction(2) + direction(3)) / (direction(2) + direction(3)).norm()), 1.0),
        ("attention", 1, Add(direction(4)), -1.0),
        ("mlp", 2, Ablate(direction(5)), -1.0),
        ("mlp", 2, Add(direction(5)), 2.0),
        ("block_input", 0, Ablate(direction(6)), 0.3),
        ("residual", 2, Add(direction(7)), 0.8),
    )
    _, model = baked(lm, both, tmp_path / "out")
    assert same(logits(model), steered(lm, both))
    assert not same(logits(model), logits(lm.model))


def test_ablating_what_is_gone_already_needs_no_weights(tmp_path: Path) -> None:
    """People also ablate at the stream itself, where nothing of the direction is left: that is the same model."""
    lm, u = tiny.tiny("llama"), Ablate(direction(1))
    aside = direction(2) - (direction(2) @ direction(1)) * direction(1)
    stream = steering(*((kind, layer, u, 1.0) for layer in range(LAYERS) for kind in ("block_input", "residual")))
    everywhere = directional_ablation(direction(1), LAYERS) + stream
    both = everywhere + steering(("residual", 1, Add(aside), 1.0))
    for i, edits in enumerate((everywhere, both, steering(("residual", 2, Add(direction(3)), 1.0)) + everywhere)):
        _, model = baked(lm, edits, tmp_path / str(i))
        assert same(logits(model), steered(lm, edits))
    along = steering(("residual", 1, Add(direction(3)), 1.0), ("residual", 2, u, 1.0))
    with pytest.raises(UnsupportedError, match=r"ablates at residual\[2\]"):
        bake(lm, directional_ablation(direction(1), LAYERS) + along, tmp_path / "out")


@pytest.mark.parametrize("kind", ["residual", "block_input"])
def test_ablating_the_stream_alone_is_another_model(kind: str, tmp_path: Path) -> None:
    """What attention and MLP have read by then stays read, so that no weights do it."""
    lm = tiny.tiny("llama")
    alone = steering(*((kind, layer, Ablate(direction(1)), 1.0) for layer in range(LAYERS)))
    with pytest.raises(UnsupportedError, match="directional_ablation"):
        bake(lm, alone, tmp_path / "out")
    everywhere = directional_ablation(direction(1), LAYERS)
    assert not same(steered(lm, alone), steered(lm, everywhere))


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_tied_embeddings_are_untied(family: str, tmp_path: Path) -> None:
    lm = tiny.tiny(family)
    head = lm.model.get_output_embeddings().weight
    assert head is lm.model.get_input_embeddings().weight
    done, model = baked(lm, directional_ablation(direction(1), LAYERS), tmp_path / "out")
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert not torch.equal(model.get_input_embeddings().weight, head)
    assert done.config == {"tie_word_embeddings": False}
    assert "now are two" in done.notes[0]
    assert "now are two" in (tmp_path / "out/README.md").read_text()
    done, model = baked(lm, steering(("mlp", 1, Ablate(direction(1)), 1.0)), tmp_path / "tied")
    assert (done.config, done.notes[:0]) == ({}, ())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_stays_and_the_check_says_how_near_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    lm = tiny.tiny("llama", dtype=dtype)
    done = bake(lm, directional_ablation(direction(1), LAYERS), tmp_path / "out", device="cpu")
    assert done.checked is not None
    assert done.checked.difference < 0.1 * done.checked.effect
    assert plain(tmp_path / "out", "llama").dtype == dtype


def test_mixtures_are_checked_too(tmp_path: Path) -> None:
    lm = tiny.tiny("qwen3_moe", dtype=torch.float32)
    done = bake(lm, directional_ablation(direction(1), LAYERS), tmp_path / "out", device="cpu")
    assert done.checked is not None
    assert done.checked.difference < 1e-4 < done.checked.effect
    assert done.changed == 1 + LAYERS * (1 + 4)  # the embeddings, and in each block attention and four experts


# ---- files -------------------------------------------------------------------------------------------------------


def folder_of(lm: LM, folder: Path, **more: Any) -> Path:
    lm.model.save_pretrained(folder, **more)
    lm.tokenizer.save_pretrained(folder)
    return folder


def test_sharded_folders(tmp_path: Path) -> None:
    """A folder is read as it lies, shard by shard; new tensors are in the index."""
    lm = tiny.tiny("gpt2")
    source = folder_of(lm, tmp_path / "source", max_shard_size="40KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 3
    edits = directional_ablation(direction(1), LAYERS) + steering(("residual", 1, Add(direction(2)), 1.0))
    seen: list[tuple[int, int]] = []
    done = bake(source, edits, tmp_path / "out", device="cpu", progress=lambda *counts: seen.append(counts))
    assert seen == [(i + 1, len(shards)) for i in range(len(shards))]
    assert (done.model, done.left) == ("source", ())
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == shards
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = {name: load_file(tmp_path / "out" / name) for name in shards}
    assert index["weight_map"] == {key: name for name, held in tensors.items() for key in held}
    assert "lm_head.weight" in index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for held in tensors.values() for t in held.values())
    assert same(logits(plain(tmp_path / "out", "gpt2")), steered(lm, edits))


def test_names_without_the_base_model(tmp_path: Path) -> None:
    """GPT-2's own checkpoint says `h.0`, not `transformer.h.0`."""
    lm = tiny.tiny("gpt2")
    source = folder_of(lm, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    save_file(
        {k.removeprefix("transformer."): v for k, v in tensors.items()}, source / "model.safetensors", {"format": "pt"}
    )
    edits = directional_ablation(direction(1), LAYERS) + steering(("residual", 1, Add(direction(2)), 1.0))
    bake(source, edits, tmp_path / "out", check=False)
    assert same(logits(plain(tmp_path / "out", "gpt2")), steered(lm, edits))


def test_what_else_is_in_the_folder(tmp_path: Path) -> None:
    lm = tiny.tiny("llama")
    source = folder_of(lm, tmp_path / "source")
    (source / "LICENSE").write_text("free")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / "README.md").write_text("of the old model")
    edits = Steering(directional_ablation(direction(1), LAYERS).edits, Card("found", options={"where": "here"}))
    done = bake(source, edits, tmp_path / "out", check=False)
    assert done.left == ("pytorch_model.bin",)
    assert "pytorch_model.bin" in done.notes[-1]
    expected = {"LICENSE", "chat_template.jinja", "README.md", "trimtab.json", "config.json", "model.safetensors"}
    assert expected <= {path.name for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    card = json.loads((tmp_path / "out/trimtab.json").read_text())
    assert (card["base_model"], card["card"]["options"]) == ("source", {"where": "here"})
    assert card["edits"][0] == "1 * ablate @ block_input[0] all"
    page = (tmp_path / "out/README.md").read_text()
    assert "| 3 | mlp | ablate | all | 1 | 1 |" in page
    assert "of the old model" not in page
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")]
    assert configs[0] == configs[1]


def test_an_empty_folder_is_filled_and_another_is_left_alone(tmp_path: Path) -> None:
    lm = tiny.tiny("llama")
    (tmp_path / "out").mkdir()
    ablation = directional_ablation(direction(1), LAYERS)
    bake(lm, ablation, tmp_path / "out", check=False)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for edits in (ablation, -1.0 * ablation):
        with pytest.raises(TrimtabError, match="already exists"):
            bake(lm, edits, tmp_path / "out", check=False)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(TrimtabError, match="can't write"):
        bake(lm, ablation, tmp_path / "nowhere" / "out", check=False)


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    source = folder_of(tiny.tiny("llama"), tmp_path / "source", max_shard_size="40KB")

    def interrupt(done: int, total: int) -> None:
        assert any(path.name.startswith(".out") for path in tmp_path.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bake(source, directional_ablation(direction(1), LAYERS), tmp_path / "out", check=False, progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_difference_that_is_no_rounding_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.tiny("llama")
    affine_map = affine.Affine
    monkeypatch.setattr(affine_map, "apply_linear", lambda self, x: (x + affine_map.apply(self, x).to(x.dtype)) / 2)
    with pytest.raises(TrimtabError, match="doesn't match the steered one"):
        bake(lm, directional_ablation(direction(1), LAYERS), tmp_path / "out", device="cpu")
    assert list(tmp_path.iterdir()) == []


# ---- what is refused ---------------------------------------------------------------------------------------------


def refused(lm: Any, edits: Steering, folder: Path, words: str) -> None:
    with pytest.raises(TrimtabError) as error:
        bake(lm, edits, folder / "out", check=False)
    assert words in str(error.value)
    assert not (folder / "out").exists()


def test_edits_that_weights_cannot_do(tmp_path: Path) -> None:
    lm, add, v = tiny.tiny("llama"), Add(direction(1)), direction(1)
    gate = Threshold(Site(1), v, 0.0, "dot")
    for edits, words in (
        (Steering((Edit(Site(1), SetProjection(v, 1.0), Positions.all()),)), "set_projection @ residual[1]"),
        (Steering((Edit(Site(1), add),)), "--positions all"),
        (Steering((Edit(Site(1), add, Positions.all(), 1.0, gate),)), "has a gate"),
        (Steering((Edit(Site(1), Add(v, keep_norm=True), Positions.all()),)), "keep the activation's norm"),
        (Steering((Edit(Site(1, "heads"), add, Positions.all()),)), "1 * add @ heads[1] all"),
        (Steering((Edit(Site(0, "block_input"), add, Positions.all()),)), "embeddings have no bias"),
        (Steering((Edit(Site(9), add, Positions.all()),)), "layers 0 to 3"),
        (Steering((Edit(Site(1), Add(torch.ones(8)), Positions.all()),)), "width"),
        (Steering((Edit(Site(1), add, Positions.all(), 0.0),)), "nothing to bake"),
        (Steering(()), "nothing to bake"),
    ):
        refused(lm, edits, tmp_path, words)


@pytest.mark.parametrize(
    ("family", "kind", "words"),
    [
        ("qwen2", "residual", "no bias at model.layers.1.mlp.down_proj"),
        ("mistral", "attention", "no bias at model.layers.1.self_attn.o_proj"),
        ("gemma2", "residual", "norm after attention or MLP"),
        ("mixtral", "residual", "mixture of experts at mlp[1]"),
    ],
)
def test_models_without_a_place_for_an_addition(family: str, kind: str, words: str, tmp_path: Path) -> None:
    refused(tiny.tiny(family), steering((kind, 1, Add(direction(1)), 1.0)), tmp_path, words)


OTHERS = {
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "layer_types": ["full_attention"] * 2, "head_dim": 8}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}),
    "granite": ("Granite", {"residual_multiplier": 0.22, "embedding_multiplier": 3.0}),
}
"""Experts that are one turned tensor, with biases; an expert that all share; a stream that is scaled."""


def other(name: str) -> LM:
    import transformers

    kind, more = OTHERS[name]
    sizes = {**tiny.SIZES, "num_hidden_layers": 2, "num_experts_per_tok": 2, **more}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return LM(model.eval(), None, name=name)


@pytest.mark.parametrize("name", OTHERS)
def test_families_with_parts_of_their_own(name: str, tmp_path: Path) -> None:
    done = bake(other(name), directional_ablation(direction(1), 2), tmp_path / "out", device="cpu")
    assert done.checked is not None
    assert done.checked.difference < 1e-4 * done.checked.effect


def test_a_stream_that_is_scaled_has_no_plain_bias(tmp_path: Path) -> None:
    refused(other("granite"), steering(("residual", 1, Add(direction(1)), 1.0)), tmp_path, "residual_multiplier")


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("Bloom", {}, "word_embeddings_layernorm"),
        ("Mpt", {"d_model": WIDTH, "n_heads": 4, "n_layers": 2}, "adds the residual stream"),
        ("OPT", {"ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 16}, "project_"),
        ("Mamba", {}, "has no site attention"),
    ],
)
def test_parts_that_are_not_known(kind: str, more: dict[str, Any], words: str, tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=90, **{"hidden_size": WIDTH, "num_hidden_layers": 2, **more}
    )
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    refused(LM(model, None), directional_ablation(direction(1), 2), tmp_path, words)


def test_folders_that_cannot_be_baked(tmp_path: Path) -> None:
    lm = tiny.tiny("mixtral")
    source = folder_of(lm, tmp_path / "source", max_shard_size="40KB")
    ablation = directional_ablation(direction(1), LAYERS)

    def changed(name: str, change: Any) -> Path:
        copy = shutil.copytree(source, tmp_path / name)
        change(copy)
        return copy

    def quantize(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))

    def rename(folder: Path, old: str, new: str) -> None:
        for file in folder.glob("*.safetensors"):
            save_file({k.replace(old, new): v for k, v in load_file(file).items()}, file, {"format": "pt"})

    first = sorted(path.name for path in source.glob("*.safetensors"))[0]
    for name, change, words in (
        ("quantized", quantize, "quantized (gptq)"),
        ("lost", lambda f: (f / first).unlink(), f"no file '{first}'"),
        ("cut", lambda f: (f / first).write_bytes((f / first).read_bytes()[:-9]), "cut short or damaged"),
        ("pickles", lambda f: [path.unlink() for path in f.glob("model*")], "save_pretrained"),
        ("renamed", lambda f: rename(f, "experts.0.w2", "experts.0.w9"), "experts.0.w9.weight"),
        ("fewer", lambda f: rename(f, "layers.1.self_attn.o_proj", "layers.1.self_attn.oh_proj"), "attention[1]"),
        ("empty", lambda f: [path.unlink() for path in f.iterdir()], "no config.json"),
    ):
        refused(changed(name, change), ablation, tmp_path, words)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = "../elsewhere.safetensors"
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, ablation, tmp_path, "elsewhere.safetensors")
    refused(tmp_path / "model.gguf", ablation, tmp_path, "GGUF")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", ablation, tmp_path, "merge_and_unload")


def test_adapters_in_memory(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    lm = tiny.tiny("llama", dtype=torch.float32)
    adapted = get_peft_model(lm.model, LoraConfig(target_modules=["q_proj"]))
    ablation = directional_ablation(direction(1), LAYERS)
    refused(LM(adapted, lm.tokenizer), ablation, tmp_path, "merge_and_unload")
    merged = LM(adapted.merge_and_unload(), lm.tokenizer)
    assert bake(merged, ablation, tmp_path / "merged", check=False).changed


def test_numbers_that_the_dtype_cannot_hold(tmp_path: Path) -> None:
    lm = tiny.tiny("llama", dtype=torch.float16)
    refused(lm, steering(("residual", 1, Add(direction(1)), 1e7)), tmp_path, "infinite or NaN in float16")


def test_another_model_is_refused_unless_it_may_be(tmp_path: Path) -> None:
    """A folder says whose it is without being loaded."""
    lm, other = tiny.tiny("llama"), tiny.tiny("llama", seed=1)
    other.name = "another"
    learned = Steering(directional_ablation(direction(1), LAYERS).edits, Card(model=lm.identity))
    mine, source = folder_of(lm, tmp_path / "mine"), folder_of(other, tmp_path / "other")
    assert bake(mine, learned, tmp_path / "a", check=False).changed
    for model in (other, source):
        refused(model, learned, tmp_path, "learned on tiny-llama")
    assert bake(source, learned, tmp_path / "b", check=False, transfer=True).changed


# ---- the recipe --------------------------------------------------------------------------------------------------


def test_directional_ablation() -> None:
    made = directional_ablation(direction(1, 5.0).float(), 2)
    sites = [Site(0, "block_input"), *(Site(i, kind) for i in range(2) for kind in ("attention", "mlp"))]
    assert [edit.site for edit in made.edits] == sites
    assert all(edit.positions == Positions.all() and edit.strength == 1 for edit in made.edits)
    assert torch.allclose(made.edits[0].operation.direction, direction(1).float())
    for wrong, layers, words in (
        (torch.zeros(WIDTH), 2, "all zeros"),
        (torch.ones(2, WIDTH), 2, r"\[width\]"),
        (direction(1), 0, "number of blocks"),
        (direction(1), True, "number of blocks"),
    ):
        with pytest.raises(TrimtabError, match=words):
            directional_ablation(wrong, layers)
