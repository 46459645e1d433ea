"""The LoRA that steering is compared with: what it learns, that it leaves no trace, and steering on top of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lettered import CLOSING, OPENING, A, B, letters_lm
from tiny import VOCABULARY, naive_generate, prompt, tiny

from trimtab import LM, Add, Edit, Pair, Positions, Site, Steering, TrimtabError

pytest.importorskip("peft", reason="needs trimtab[finetune]")

from trimtab.evaluate.ab import ABItem, ab_requests, score_ab
from trimtab.evaluate.lora import Lora, Target, finetuned, load_adapter, loss, target

pytestmark = pytest.mark.slow

QUICK = Lora(learning_rate=5e-3, epochs=4, batch_size=4)


def questions(count: int, start: int = 0) -> list[Pair]:
    """The matching letter is A where the question begins with w5, else B: not learned from the letters alone."""
    texts = []
    for i in range(start, start + count):
        letters = ("(A)", "(B)") if i % 2 else ("(B)", "(A)")
        texts.append(Pair(*letters, f"{'w5' if i % 2 else 'w6'} {prompt(i, 6 + i % 3)}", "letters"))
    return texts


def matching(lm: LM, pairs: list[Pair]) -> float:
    items = [ABItem(str(i), p.prompt, p.positive[1], p.negative[1]) for i, p in enumerate(pairs)]
    records = score_ab(lm, ab_requests(lm, items, {"": None}), items)
    return sum(record.scores["matching"] for record in records) / len(records)


def weights(lm: LM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.model.state_dict().items()}


@pytest.fixture
def lm() -> LM:
    return letters_lm(dtype=torch.float32)


def test_it_learns_the_side_that_it_is_trained_on(lm: LM) -> None:
    pairs = questions(24)
    before = matching(lm, pairs)
    after = {}
    for side in ("positive", "negative"):
        with finetuned(lm, pairs, side, QUICK) as tuned:  # type: ignore[arg-type]
            after[side] = matching(tuned, pairs)
    assert after["positive"] > before + 0.1
    assert after["negative"] < before - 0.1


def test_afterwards_the_model_is_as_it_was(lm: LM) -> None:
    before, answer = weights(lm), lm.generate(prompt(1, 5), max_new_tokens=6)[0]
    required = [parameter.requires_grad for parameter in lm.model.parameters()]
    for _ in range(2):
        with finetuned(lm, questions(4), lora=QUICK) as tuned:
            assert tuned.name == "tiny-letters, finetuned positive"
            assert tuned.layout.layers == lm.layout.layers
        now = weights(lm)
        assert set(now) == set(before)
        assert all(torch.equal(now[name], before[name]) for name in before)
        assert lm.generate(prompt(1, 5), max_new_tokens=6)[0] == answer
        assert [parameter.requires_grad for parameter in lm.model.parameters()] == required
        assert lm.layout.path == type(lm)(lm.model, lm.tokenizer).layout.path


def test_the_model_is_as_it_was_after_an_error(lm: LM) -> None:
    before = weights(lm)
    with pytest.raises(KeyError):
        with finetuned(lm, questions(4), lora=QUICK):
            raise KeyError("in the block")

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with finetuned(lm, questions(4), lora=QUICK, progress=stop):
            raise AssertionError("training should have been interrupted")
    assert set(weights(lm)) == set(before)


def test_the_seed_decides(lm: LM) -> None:
    drawn: list[torch.Tensor] = []

    def trained(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(len(drawn))  # whatever was drawn before
        drawn.append(torch.get_rng_state())
        with finetuned(lm, questions(8), lora=Lora(seed=seed)) as tuned:
            assert torch.equal(torch.get_rng_state(), drawn[-1])
            return {name: value for name, value in weights(tuned).items() if "lora_" in name}

    first, again, other = trained(0), trained(0), trained(1)
    assert first
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_loss_is_the_textbook_s(lm: LM) -> None:
    batch = [Target((5, 6, 7, A), 1), Target((9, 10, 11, 12, 13, 14), 3), Target((20, 21), 1)]
    expected = []
    for example in batch:
        logprobs = lm.model(torch.tensor([example.ids])).logits[0].detach().log_softmax(-1)
        places = range(len(example.ids) - example.count, len(example.ids))
        expected.append(-sum(float(logprobs[i - 1, example.ids[i]]) for i in places) / example.count)
    with finetuned(lm, questions(2), lora=Lora(learning_rate=1e-12)) as tuned:
        result = loss(tuned, batch)
    assert float(result.detach()) == pytest.approx(sum(expected) / 3, abs=1e-4)


def test_what_is_trained_of_a_pair(lm: LM) -> None:
    letters = target(lm, Pair("(A)", "(B)", "w5 w6", "letters"), "negative")
    assert (letters.ids[-2:], letters.count) == ((OPENING, B), 1)
    assert CLOSING not in letters.ids
    answers = target(lm, Pair("w7 w8 w9", "w10", "w5 w6", "answers"), "positive")
    assert (answers.ids, answers.count) == ((*lm.encode("w5 w6"), 7, 8, 9), 3)
    texts = target(lm, Pair("w7 w8 w9", "w10 w11"), "negative")
    assert (texts.ids, texts.count) == ((10, 11), 1)
    with pytest.raises(TrimtabError, match="pairs of prompts"):
        target(lm, Pair("w7", "w8", "", "prompts"), "positive")
    with pytest.raises(TrimtabError, match="single token"):
        target(lm, Pair("w7", "w8 w9"), "positive")


def test_steering_on_top_of_it_is_the_textbook_s() -> None:
    lm = tiny("llama")
    vector = torch.randn(lm.layout.width, generator=torch.Generator().manual_seed(3))
    steering = Steering((Edit(Site(1), Add(3 * vector), Positions.from_last_prompt_token()),))
    pairs = [Pair(prompt(i, 3), prompt(i + 50, 3), prompt(i + 90, 5), "answers") for i in range(8)]
    plain = lm.generate(prompt(7, 6), steering, max_new_tokens=8)[0]
    with finetuned(lm, pairs, lora=Lora(learning_rate=2e-2, epochs=3)) as tuned:
        for acting in (None, steering):
            answer = tuned.generate(prompt(7, 6), acting, max_new_tokens=8, logprobs=True)[0]
            ids, logprobs = naive_generate(tuned, prompt(7, 6), acting, 8)
            assert list(answer.token_ids) == ids
            assert answer.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert answer.token_ids != plain.token_ids  # the adapter acts, too
        assert max(ids) < VOCABULARY


def test_an_adapter_is_kept_and_taken_again(lm: LM, tmp_path: Path) -> None:
    folder = tmp_path / "lora"
    pairs = questions(8)
    with finetuned(lm, pairs, lora=QUICK, folder=folder) as tuned:
        first = matching(tuned, pairs)
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "adapter_model.safetensors" in kept
    assert not any(name.endswith((".bin", ".pt")) for name in kept)

    def trains(done: int, total: int) -> None:
        raise AssertionError("it was trained again")

    with finetuned(lm, pairs, lora=QUICK, folder=folder, progress=trains) as tuned:
        assert matching(tuned, pairs) == pytest.approx(first, abs=1e-7)
    with load_adapter(letters_lm(dtype=torch.float32), folder) as tuned:
        assert matching(tuned, pairs) == pytest.approx(first, abs=1e-7)
    with pytest.raises(TrimtabError, match=r"another training run \(seed differ\)"):
        with finetuned(lm, pairs, lora=replace(QUICK, seed=1), folder=folder):
            raise AssertionError("it was opened")
    with pytest.raises(TrimtabError, match="side"):
        with finetuned(lm, pairs, "negative", QUICK, folder=folder):
            raise AssertionError("it was opened")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == kept


def test_folders_that_hold_none(lm: LM, tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match=r"no adapter_model\.safetensors"):
        with load_adapter(lm, tmp_path):
            raise AssertionError("it was opened")
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(TrimtabError, match=r"no adapter_model\.safetensors"):
        with load_adapter(lm, tmp_path):
            raise AssertionError("it was opened")


def test_progress_and_bad_input(lm: LM) -> None:
    seen: list[tuple[int, int]] = []
    with finetuned(lm, questions(5), lora=Lora(epochs=2, batch_size=2), progress=lambda *of: seen.append(of)):
        pass
    assert seen == [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]
    for options in ({"rank": 0}, {"epochs": 0}, {"learning_rate": -1.0}):
        with pytest.raises(TrimtabError, match="above 0"):
            Lora(**options)  # type: ignore[arg-type]
    with pytest.raises(TrimtabError, match="no pairs"):
        with finetuned(lm, []):
            raise AssertionError("it was opened")
    with pytest.raises(TrimtabError, match="positive or negative"):
        with finetuned(lm, questions(2), "both"):  # type: ignore[arg-type]
            raise AssertionError("it was opened")
