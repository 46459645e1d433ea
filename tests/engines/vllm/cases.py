"""What the tests of the vLLM engine share: prompts, steerings, and engines in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.steering import Add, Edit, Positions, Site, Steering

WIDTH = 576
LAYERS = 30
TINY = {  # a pool of 24 blocks of 32 tokens, prompts in chunks of at most 48: everything that can go wrong happens
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 48,
    "enable_chunked_prefill": True,
    "block_size": 32,
    "num_gpu_blocks_override": 24,
    "disable_log_stats": False,
    "seed": 0,
}
PROMPTS = [
    "What does a trim tab do on a ship?",
    "Write a haiku about the sea.",
    "Explain to a child why the sky is blue.",
    "Name three rivers in Europe.",
    "How do I keep bread fresh for longer?",
    "Give me a short plan for a day in Rome, with two museums and a place for lunch.",
    "What is the difference between a list and a tuple in Python?",
    "Who wrote Don Quixote?",
    "Describe the taste of a lemon without using the word sour.",
    "Why do cats purr?",
    "Suggest a name for a bakery that only sells rye bread, and say why it fits.",
    "How far is the moon?",
    "Write one sentence that begins with every morning.",
    "What should I pack for a week of hiking in the rain in Scotland?",
    "What is a prime number?",
    "Tell me a fact about octopuses that few people know.",
    "Which is heavier, a kilogram of iron or of wool?",
    "Translate good night into French.",
    "List four colours.",
    "How do clocks work?",
]
LONG = "Here is a story. " + " ".join(f"On day {i} the ship sailed {7 * i} miles to the east." for i in range(1, 9))


def direction(seed: int, norm: float = 1.0) -> Tensor:
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return vector * (norm / vector.norm())


def added(
    seed: int = 0, norm: float = 12.0, layers: Any = (11, 12, 13), positions: Positions | None = None
) -> Steering:
    """Additions large enough to change what a small model says."""
    where = Positions.all() if positions is None else positions
    return Steering(tuple(Edit(Site(layer), Add(direction(seed + layer, norm)), where) for layer in layers))


def small_model(folder: Path, family: str = "Llama", **more: Any) -> str:
    """A random model with four blocks of four heads, whose width and tokens are the default model's."""
    import transformers
    from transformers import AutoTokenizer

    from trimtab.engines.transformers.default_model import default_folder

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    shape |= {"vocab_size": 49152, "num_key_value_heads": 2, "head_dim": 64, "initializer_range": 0.1}
    config = getattr(transformers, f"{family}{'Text' if family == 'Gemma3' else ''}Config")(**{**shape, **more})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    if config.tie_word_embeddings:  # else it repeats the last token, whatever else it reads
        model.get_input_embeddings().weight.data *= 0.3
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(default_folder()).save_pretrained(folder)
    return str(folder)


Said = tuple[list[int], list[float]]
"""An answer's tokens, and the log-probability of each."""


def without_plugin(options: dict[str, Any], ids: list[list[int]], tokens: int, folder: Path) -> list[Said]:
    """What vLLM says to these prompts where trimtab's plugin is left out."""
    (folder / "in.json").write_text(json.dumps({"options": options, "ids": ids, "tokens": tokens}))
    code = f"""
import json, os
os.environ.update(VLLM_PLUGINS="none", VLLM_ENABLE_V1_MULTIPROCESSING="0")
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from trimtab.engines.transformers.default_model import default_folder
    given = json.load(open({str(folder / "in.json")!r}))
    llm = LLM(**dict(model=str(default_folder())) | given["options"])
    params = SamplingParams(temperature=0, max_tokens=given["tokens"], logprobs=0)
    answers = llm.generate([dict(prompt_token_ids=i) for i in given["ids"]], params, use_tqdm=False)
    said = [answer.outputs[0] for answer in answers]
    rows = [(list(a.token_ids), [step[t].logprob for t, step in zip(a.token_ids, a.logprobs)]) for a in said]
    json.dump(rows, open({str(folder / "out.json")!r}, "w"))
"""
    script = folder / "plain.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return [(ids, logprobs) for ids, logprobs in json.loads((folder / "out.json").read_text())]
