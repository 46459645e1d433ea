"""LoRA adapters beside steering, request by request: as a model says with the adapter merged into its weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import LONG, PROMPTS, Said, added
from safetensors.torch import save_file
from torch import Tensor

from trimtab import LM, Steering

OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "block_size": 32,
    "num_gpu_blocks_override": 128,
    "enable_lora": True,
    "max_loras": 2,  # for one adapter: on a CPU vLLM lends what is in the last slot to requests that ask for none
    "max_lora_rank": 8,
}
RANK, SCALE, NEW = 8, 2, 12
ASKED = [*PROMPTS[:4], LONG]
KINDS = [(adapted, steered) for adapted in (False, True) for steered in (False, True)]
STEERING = added(1, 8.0)


def write_adapter(model: Any, folder: Path) -> dict[str, Tensor]:
    """A random adapter of some projections in all blocks, as PEFT keeps one; what it adds to the model's weights."""
    generator = torch.Generator().manual_seed(0)
    tensors, changes = {}, {}
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            b, a = (0.08 * torch.randn(n, generator=generator) for n in ((len(weight), RANK), (RANK, weight.shape[1])))
            part = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{part}.lora_A.weight": a, f"{part}.lora_B.weight": b}
            changes[name] = SCALE * b @ a
    targets = ["q_proj", "down_proj"]
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": SCALE * RANK, "bias": "none"}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**said, "target_modules": targets}))
    return changes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters") / "adapter"


@pytest.fixture(scope="module")
def wanted(folder: Path) -> dict[tuple[bool, bool], list[Said]]:
    """What transformers says to the prompts, by kind."""
    plain = LM.load(dtype="float32")
    changes = write_adapter(plain.model, folder)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "logprobs": True}

    def says(steering: Steering | None) -> list[Said]:
        answers = plain.generate(ASKED, steering, **options)
        return [(list(a.token_ids), list(a.logprobs or ())) for a in answers]

    outcomes = {(False, steered): says(STEERING if steered else None) for steered in (False, True)}
    with torch.no_grad():
        for name, change in changes.items():
            plain.model.get_parameter(name).add_(change)
    return outcomes | {(True, steered): says(STEERING if steered else None) for steered in (False, True)}


@pytest.fixture(scope="module")
def vllm(wanted: Any) -> Iterator[Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    made = LM.load(engine="vllm", **OPTIONS)
    made.register("one", STEERING)
    yield made
    made.close()


def distance(answer: Any, said: Said) -> float:
    """How far an answer is from that one: in log-probabilities, up to where it goes on with another token."""
    far = 0.0
    for token, step, other, logprob in zip(answer.token_ids, answer.logprobs, *said, strict=True):
        if other not in step:
            return float("inf")
        far = max(far, abs(step[other].logprob - logprob))
        if token != other:
            return max(far, step[token].logprob - step[other].logprob)
    return far


def test_each_is_as_if_alone(vllm: Any, wanted: dict[tuple[bool, bool], list[Said]], folder: Path) -> None:
    """Each prompt plain, steered, with the adapter and with both, in one batch; then again, out of the prefix cache."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    options = {"temperature": 0, "max_tokens": NEW, "min_tokens": NEW, "logprobs": 2}
    rows = [(i, kind) for i in range(len(ASKED)) for kind in KINDS]
    prompts = [{"prompt_token_ids": vllm.encode(ASKED[i])} for i, _ in rows]
    params = [SamplingParams(**options, extra_args={"steering": "one"} if kind[1] else None) for _, kind in rows]
    adapters = [LoRARequest("adapter", 1, str(folder)) if kind[0] else None for _, kind in rows]
    cached = []
    for _ in range(2):
        outputs = vllm.llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)
        for (i, kind), output in zip(rows, outputs, strict=True):
            for other in KINDS:
                far = distance(output.outputs[0], wanted[other][i])
                assert far < 0.002 if other == kind else far > 0.02, (i, kind, other, far)
        cached.append([output.num_cached_tokens for output in outputs[-len(KINDS) :]])
    assert cached[0] == [0] * len(KINDS)
    assert min(cached[1]) >= 96
