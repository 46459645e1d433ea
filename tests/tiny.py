"""Tiny random models of many families, a tokenizer for them, and a naive reference for steered generation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trimtab.lm import LM
from trimtab.steering import Ablate, Add, Edit, ReadWrite, Rotate, RotateInPlane, SetProjection, Steering

VOCABULARY = 90
WIDTH = 32
LAYERS = 4
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}


def by_transformers() -> dict[str, Any]:
    """An option of `lm.generate` that does nothing, and that only transformers' own loop has."""
    return {"stopping_criteria": [lambda ids, _scores, **_: torch.zeros(len(ids), dtype=torch.bool)]}


def _llama_like(name: str, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def _gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=128,
        eos_token_id=None,
        bos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config)


def _opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=128,
        word_embed_proj_dim=WIDTH,
        eos_token_id=None,
        bos_token_id=1,
    )
    return transformers.OPTForCausalLM(config)


def _falcon() -> Any:
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
        eos_token_id=None,
        bos_token_id=1,
        max_position_embeddings=128,
    )
    return transformers.FalconForCausalLM(config)


def _neox() -> Any:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))


def _gemma3() -> Any:
    config = transformers.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)
    return transformers.Gemma3ForCausalLM(config)


VISION = {"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 16}


def _gemma3_multimodal() -> Any:
    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 8, "sliding_window": 8, "model_type": "gemma3_text"},
        vision_config={**VISION, "image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=88,
        boi_token_index=86,
        eoi_token_index=87,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = transformers.Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": rope},
        vision_config={"depth": LAYERS, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 8},
        image_token_id=88,
        video_token_id=87,
        vision_start_token_id=86,
        vision_end_token_id=85,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _llama_like("Llama"),
    "qwen2": _llama_like("Qwen2"),
    "qwen3": _llama_like("Qwen3", head_dim=16),
    "gemma2": _llama_like("Gemma2", head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
    "gemma3": _gemma3,
    "mistral": _llama_like("Mistral", sliding_window=6),
    "phi3": _llama_like("Phi3"),
    "gpt2": _gpt2,
    "gpt_neox": _neox,
    "opt": _opt,
    "falcon": _falcon,
    "olmo2": _llama_like("Olmo2"),
    "mixtral": _llama_like("Mixtral", num_local_experts=4, **EXPERTS),
    "qwen3_moe": _llama_like("Qwen3Moe", num_experts=4, moe_intermediate_size=24, head_dim=8, **EXPERTS),
    "gemma3_multimodal": _gemma3_multimodal,
    "qwen2_vl": _qwen2_vl,
}
MIXTURES = {"mixtral", "qwen3_moe"}
# Gemma 2's eager attention casts its mask, float64's minimum, to float32: -inf, and NaN where all is masked.
SINGLE = {"gemma2": torch.float32}


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose words are `w3` … `w89`; it has no chat template."""
    special = {0: "<pad>", 2: "<unk>"}
    inner = Tokenizer(models.WordLevel({special.get(i, f"w{i}"): i for i in range(VOCABULARY)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")


def tiny(family: str, seed: int = 0, dtype: torch.dtype | None = None) -> LM:
    """A random model of the family, in float64 where it can, with weights large enough that tokens differ."""
    dtype = dtype or SINGLE.get(family, torch.float64)
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    model.generation_config.eos_token_id = None
    if family == "gemma2":
        model.set_attn_implementation("eager")  # as newer transformers load it: sdpa would leave out its soft cap
    if family in MIXTURES and dtype == torch.float64:  # the grouped kernel has no float64
        model.set_experts_implementation("eager")
    return LM(model.to(dtype).eval(), tokenizer(), name=f"tiny-{family}")


def prompt(seed: int, length: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, 80, (length,), generator=generator).tolist())


def direction(seed: int, scale: float = 1.0) -> Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scale * vector / vector.norm()


def naive_together(edits: Sequence[Edit], x: Tensor) -> Tensor:
    """The textbook formula for edits in order, for one activation `[width]`; neighbouring projections as one system."""
    i = 0
    while i < len(edits):
        run = [edits[i]]
        while _is_clamp(run[-1]) and i + len(run) < len(edits) and _is_clamp(edits[i + len(run)]):
            run.append(edits[i + len(run)])
        x = naive_edit(run[0], x) if len(run) == 1 else naive_projections(run, x)
        i += len(run)
    return x


def _is_clamp(edit: Edit) -> bool:
    return isinstance(edit.operation, (SetProjection, Ablate)) and not edit.operation.keep_norm


def naive_projections(edits: Sequence[Edit], x: Tensor) -> Tensor:
    """The nearest activation at which every projection has changed by what its edit asks for (least squares)."""
    u = torch.stack([edit.operation.direction.to(x.dtype) for edit in edits])
    return x + torch.linalg.pinv(u) @ torch.stack([_operation_of(edit, x) for edit in edits])


def _operation_of(edit: Edit, x: Tensor) -> Tensor:
    operation = edit.operation
    gap = getattr(operation, "target", 0.0) - torch.dot(x, operation.direction.to(x.dtype))
    if getattr(operation, "one_sided", False) and gap < 0:
        gap = torch.zeros_like(gap)
    return edit.strength * gap


def naive_edit(edit: Edit, x: Tensor) -> Tensor:
    """The textbook formula, for one activation `[width]`."""
    s, operation = edit.strength, edit.operation
    v = operation.direction.to(x.dtype) if hasattr(operation, "direction") else torch.zeros_like(x)
    if isinstance(operation, ReadWrite):
        new = naive_read_write(operation, x, s)
    elif isinstance(operation, RotateInPlane):
        new = naive_turn(operation, x, s)
    elif isinstance(operation, Add):
        new = x + s * v
    elif isinstance(operation, SetProjection):
        new = x + _operation_of(edit, x) * v
    elif isinstance(operation, Ablate):
        new = x - s * torch.dot(x, v) * v
    elif isinstance(operation, Rotate) and operation.angle is None and not operation.one_sided:
        phi = torch.arcsin(-torch.dot(x, v) / x.norm())  # the reflection turns by 2 phi
        rest = x - torch.dot(x, v) * v
        new = x.norm() * (torch.sin((2 * s - 1) * phi) * v + torch.cos((2 * s - 1) * phi) * rest / rest.norm())
    else:
        raise AssertionError(operation)
    share = float(operation.keep_norm)
    return new * (((1 - share) * new.norm() + share * x.norm()) / new.norm()) if share else new


def naive_read_write(operation: ReadWrite, x: Tensor, strength: float) -> Tensor:
    """One row and one number after the other, in float64."""
    old = [float(number) for number in x]
    new = list(old)
    for i in range(operation.rank):
        read = sum(float(a) * b for a, b in zip(operation.read[i], old, strict=True)) + float(operation.bias[i])
        if operation.low is not None:
            read = max(read, float(operation.low[i]))
        if operation.high is not None:
            read = min(read, float(operation.high[i]))
        new = [a + strength * read * float(b) for a, b in zip(new, operation.write[i], strict=True)]
    return torch.tensor(new, dtype=x.dtype)


def naive_turn(operation: RotateInPlane, x: Tensor, strength: float) -> Tensor:
    """By the rotation's matrix, in an orthonormal basis whose first two vectors span the plane."""
    u, v = operation.direction.double(), operation.second.double()
    w = v - (u @ v) * u
    e = torch.stack([u, w / w.norm()])
    a, b = (e @ x.double()).tolist()
    angle = operation.angle
    if angle is None:
        angle = math.atan2(float(v @ e[1]), float(v @ e[0])) - math.atan2(b, a)
        angle += 2 * math.pi * ((angle <= -math.pi) - (angle > math.pi))
    c, s = math.cos(strength * angle), math.sin(strength * angle)
    turn = torch.tensor([[c - 1, -s], [s, c - 1]], dtype=torch.float64)
    return ((torch.eye(len(x), dtype=torch.float64) + e.T @ turn @ e) @ x.double()).to(x.dtype)


def read_write(seed: int, rank: int, width: int = WIDTH, scale: float = 0.4, **more: Any) -> ReadWrite:
    """A random one, float64; each row writes about so much of what it reads."""
    generator = torch.Generator().manual_seed(seed)
    read, write = torch.randn(2, rank, width, generator=generator, dtype=torch.float64) / width**0.5
    bias = torch.randn(rank, generator=generator, dtype=torch.float64)
    return ReadWrite(read, scale * write, bias, **more)


def naive_holds(edit: Edit, t: int, n: int) -> bool:
    """Whether an edit acts at position t of a text whose prompt has n tokens, by the rule's name."""
    name = str(edit.positions)
    if name.startswith("opening:"):
        return n - 1 <= t < n - 1 + int(name.split(":")[1])
    if name.startswith("tokens:"):
        return t in {int(i) % n for i in name.split(":")[1].split(",")}
    if ":" in name:
        kind, a, b = name.split(":")
        return int(a) + (n if kind == "window" else 0) <= t < int(b) + (n if kind == "window" else 0)
    return {
        "all": True,
        "all-but-first": t > 0,
        "prompt": t < n,
        "generated": t >= n,
        "from-last-prompt-token": t >= n - 1,
        "last-prompt-token": t == n - 1,
    }[name]


@torch.no_grad()
def naive_logits(
    lm: LM, ids: Sequence[int], prompt_length: int, edits: Sequence[Edit], holds: Callable[..., bool] = naive_holds
) -> Tensor:
    """One whole text alone, no cache: every edit, in order, at every position, in explicit loops. `[tokens, vocab]`."""
    handles = []
    for layer, block in enumerate(lm.layout.blocks):

        def hook(_module: Any, _args: Any, output: Any, layer: int = layer) -> Any:
            x = (output if isinstance(output, Tensor) else output[0]).clone()
            for t in range(len(ids)):
                holding = [e for e in edits if e.site.layer == layer and holds(e, t, prompt_length)]
                x[0, t] = naive_together(holding, x[0, t])
            return x if isinstance(output, Tensor) else (x, *output[1:])

        handles.append(block.register_forward_hook(hook))
    try:
        return lm.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


def naive_generate(lm: LM, text: str, steering: Steering | None, count: int) -> tuple[list[int], list[float]]:
    """Greedy decoding that recomputes everything at each step; the ids and their log-probabilities."""
    ids = lm.encode(text)
    start, logprobs = len(ids), []
    for _ in range(count):
        logits = naive_logits(lm, ids, start, steering.edits if steering else ())[-1]
        ids.append(int(logits.argmax()))
        logprobs.append(float(logits.log_softmax(-1)[ids[-1]]))
    return ids[start:], logprobs
