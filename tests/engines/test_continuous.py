"""Rows that leave their batch as they end get the answers of transformers' own loop, on models of many families."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import tiny
import torch
from test_decode import STEERINGS, STEPPED
from tiny import by_transformers, direction, prompt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab import LM, Add, Edit, Positions, Rejection, Site, Steering, TrimtabError
from trimtab.engines.transformers.decode import GenerationBatch
from trimtab.engines.transformers.generate import Generation
from trimtab.engines.transformers.read import can_share
from trimtab.lm import DoseWarning

COUNT = 9
PROMPTS = [prompt(seed, 3 + seed) for seed in range(len(STEERINGS))]
SPELLED = ["".join(map(chr, range(97 + i, 101 + 2 * i))) for i in range(len(STEERINGS))]


@pytest.fixture(params=STEPPED)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def answers(lm: LM, **more: Any) -> list[Generation]:
    return lm.generate(PROMPTS, STEERINGS, max_new_tokens=COUNT, chat=False, **{"batch_size": 6, **more})


def test_answers_that_end_at_different_lengths_are_those_of_a_whole_batch(
    lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_share(lm.layout):
        pytest.skip("this family doesn't support continuous batching")
    free = answers(lm)
    ends = sorted({free[1].token_ids[1], free[2].token_ids[4], free[7].token_ids[0]})
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", ends)
    whole = answers(lm, logprobs=True, **by_transformers())
    assert len({len(whole_answer.token_ids) for whole_answer in whole}) > 1
    answers_of_steps = answers(lm, logprobs=True)
    for answer, other in zip(answers_of_steps, whole, strict=True):
        assert answer.token_ids == other.token_ids
        assert answer.text == other.text
        assert (answer.finish_reason, answer.prompt_tokens) == (other.finish_reason, other.prompt_tokens)
        assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert answer.applied.edits == other.applied.edits
        doses, others = answer.applied.doses, other.applied.doses
        assert [(dose.layer, dose.kind) for dose in doses] == [(dose.layer, dose.kind) for dose in others]
        # how large they are differs: which tokens are measured depends on when the batch changes
        assert all(dose.ratio > 0 for dose in doses)


class TestStopStrings:
    """With a tokenizer of letters, pairs of letters and spaces, whose text transformers can search."""

    @pytest.fixture(scope="class")
    def lm(self) -> LM:
        alphabet = [*map(chr, range(97, 123)), "Ġ"]
        merges = [("Ġ", letter) for letter in alphabet[:26]] + list(pairwise(alphabet[:26]))
        words = ["<pad>", "<unk>", *alphabet, *map("".join, merges)]
        inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
        model = tiny.tiny("llama").model
        with torch.no_grad():
            model.get_output_embeddings().weight[0] = 0  # the pad, which transformers' answers are stripped of
        return LM(model, tokenizer, name="tiny-spelled")

    def ended(self, lm: LM, stop: Any, **more: Any) -> list[Generation]:
        options = {"stop_strings": stop, "logprobs": True, "batch_size": 6, "chat": False} | more
        return lm.generate(SPELLED, STEERINGS, max_new_tokens=COUNT, **options)

    def test_they_end_the_answers_that_they_end_in_transformers(self, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = [answer.text for answer in self.ended(lm, None)]
        stops = [texts[1][3:5], texts[2][2:7], texts[7][:1], SPELLED[4][-2:] + texts[4][:2], texts[5]]
        lengths = set()
        for stop in (stops[:1], stops[0], *([stop] for stop in stops[1:]), stops):
            theirs = self.ended(lm, stop, **by_transformers(), batch_size=1)
            with monkeypatch.context() as patched:
                patched.setattr("trimtab.lm.answer_static_batch", lambda *_: pytest.fail("short answers wait here"))
                ours = self.ended(lm, stop, tokenizer=lm.tokenizer)
            for answer, other in zip(ours, theirs, strict=True):
                assert (answer.token_ids, answer.text) == (other.token_ids, other.text)
                assert answer.finish_reason == other.finish_reason
                assert answer.logprobs == pytest.approx(other.logprobs, abs=1e-5)
                lengths.add(len(answer.token_ids))
        assert len(lengths) > 2

    def test_under_rejection_only_a_stop_string_is_a_stop(self, lm: LM) -> None:
        """A criterion of one's own that ends an answer isn't, even if there are stop strings."""
        steering = Steering((Edit(Site(1), Add(direction(1, 2.0)), Positions.generated()),))
        length = len(lm.encode(SPELLED[0], chat=False)) + 3

        def short(ids: torch.Tensor, _scores: Any) -> torch.Tensor:
            return torch.full((len(ids),), ids.shape[1] >= length)

        options: dict[str, Any] = {"rejection": Rejection(ladder="strength"), "max_new_tokens": COUNT, "chat": False}
        (free,) = lm.generate(SPELLED[0], steering, **options)
        (answer,) = lm.generate(
            SPELLED[0], steering, stop_strings=[SPELLED[0][::-1] * 2], stopping_criteria=[short], **options
        )
        assert (len(answer.token_ids), answer.finish_reason) == (3, "length")
        (stopped,) = lm.generate(SPELLED[0], steering, stop_strings=[free.text[1:3]], **options)
        assert stopped.finish_reason == "stop"
        assert stopped.token_ids == free.token_ids[: len(stopped.token_ids)]

    @pytest.mark.parametrize("stop", ["", [""], 5, [5], ["a", ""]])
    def test_what_is_no_stop_string_is_refused(self, lm: LM, stop: Any) -> None:
        with pytest.raises(TrimtabError, match="stop_strings"):
            lm.generate(SPELLED[0], stop_strings=stop, max_new_tokens=2, chat=False)

    def test_no_stop_strings_are_none(self, lm: LM) -> None:
        none, free = (lm.generate(SPELLED[0], stop_strings=stop, max_new_tokens=4, chat=False) for stop in ([], None))
        assert none[0].token_ids == free[0].token_ids

    def test_samples_are_those_without_them_up_to_their_end(self, lm: LM) -> None:
        options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "seed": 5, "num_return_sequences": 2}
        free = self.ended(lm, None, **options)
        ended = self.ended(lm, free[3].text[1:3], **options)
        assert ended[3].finish_reason == "stop"
        assert free[3].text[1:3] in ended[3].text
        for answer, whole in zip(ended, free, strict=True):
            assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
            assert answer.finish_reason == ("stop" if len(answer.token_ids) < COUNT else "length")


def test_the_batch_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of each pass are counted: a finished one isn't computed again."""
    lm = tiny.tiny("llama")
    free = answers(lm)
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [free[0].token_ids[0]])
    lengths = [len(answer.token_ids) for answer in answers(lm)]
    assert min(lengths) == 1
    rows: list[int] = []
    handle = lm.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    try:
        lm.generate(PROMPTS, STEERINGS, max_new_tokens=COUNT, chat=False)
    finally:
        handle.remove()
    decoding = rows[-(COUNT - 1) :]
    assert decoding == [sum(length > step for length in lengths) for step in range(1, COUNT)]


def test_other_options_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny.tiny("llama")
    monkeypatch.setattr(GenerationBatch, "step", lambda self: pytest.fail("rows must not leave here"))
    for options in ({"do_sample": True, "typical_p": 0.5}, {"no_repeat_ngram_size": 2}, {"num_beams": 2}):
        here, theirs = (
            lm.generate(PROMPTS[:2], max_new_tokens=3, chat=False, seed=1, **options, **more)
            for more in ({}, by_transformers())
        )
        assert here == theirs


def test_the_models_own_penalty_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a prompt alone: in a padded batch some versions of transformers penalize the pads' token, too."""
    lm = tiny.tiny("llama")
    plain = answers(lm)
    monkeypatch.setattr(lm.model.generation_config, "repetition_penalty", 5.0)
    alone = answers(lm, batch_size=1, **by_transformers())
    assert [answer.token_ids for answer in alone] != [answer.token_ids for answer in plain]
    assert [answer.token_ids for answer in answers(lm)] == [answer.token_ids for answer in alone]


def test_an_answer_steered_out_of_all_numbers_goes_on_as_in_a_whole_batch() -> None:
    lm = tiny.tiny("llama")
    steerings = [1e300 * STEERINGS[1], None]  # type: ignore[operator]
    with pytest.warns(DoseWarning):
        whole, plain = lm.generate(PROMPTS[:2], steerings, max_new_tokens=3, chat=False, **by_transformers())
    with pytest.warns(DoseWarning):
        generated = lm.generate(PROMPTS[:2], steerings, max_new_tokens=3, chat=False)
    assert [answer.token_ids for answer in generated] == [whole.token_ids, plain.token_ids]
