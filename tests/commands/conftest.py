"""Tiny random models, in folders with a small real tokenizer, and files of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WORDS = "The sea is wide and blue. Write in capitals! A question, an answer; (A) yes (B) no. user system assistant"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_model(
    folder: Path,
    seed: int = 0,
    width: int = 32,
    template: str | None = TEMPLATE,
    context: int = 128,
    special: tuple[str, ...] = (),
) -> Path:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|user|>", "<|system|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([WORDS] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shape, other weights."""
    return save_model(tmp_path_factory.mktemp("models") / "stranger", seed=1)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "wide", width=48)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template."""
    return save_model(tmp_path_factory.mktemp("models") / "base", template=None)


ASKED = ["What is the sea?", "Who are you?", "Why?", "Is it blue or wide?"]


@pytest.fixture
def prompt_pairs(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{ask} Write in capitals!", "prompt_without_instruction": ask} for ask in ASKED]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def answer_pairs(tmp_path: Path) -> Path:
    path = tmp_path / "answers.csv"
    path.write_text("prompt,positive,negative\n" + "".join(f"{ask},yes yes,no no\n" for ask in ASKED))
    return path


@pytest.fixture(scope="session")
def steering(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file learned on `model`, at layers 1 and 2."""
    from trimtab import LM, learn_instruct, save
    from trimtab.text.pairs import Pair

    path = tmp_path_factory.mktemp("steerings") / "s.safetensors"
    pairs = [Pair(f"{ask} Write in capitals!", ask, "", "prompts") for ask in ASKED]
    save(learn_instruct(LM.load(model, device="cpu"), pairs, [1, 2]), path)
    return path
