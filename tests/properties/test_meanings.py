"""Positions by meaning: what they are of a text, and that every way to decode steers exactly there."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import naive_meanings
import naive_rejection
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_meanings import holding_in, means
from tiny import LAYERS, by_transformers, direction

from trimtab import LM, Add, Edit, Positions, SetProjection, Site, Steering, Threshold, TrimtabError
from trimtab.decoding.rejection import Rejection
from trimtab.engines.meanings import Follower
from trimtab.engines.request import Choice
from trimtab.errors import UnsupportedError
from trimtab.steering.meanings import Meaning

THINKING = Positions.thinking("<", "b>")
ANSWER = Positions.answer("<", "b>")
RULES = [
    THINKING,
    ANSWER,
    Positions.after("b>"),
    Positions.at("a"),
    ~Positions.at("<a"),
    THINKING | Positions.prompt(),
    ANSWER & ~Positions.first_generated(3) | Positions.last_prompt_token(),
    Positions.outside_tools(("ab", "")) & ~Positions.after("<>"),
]
FAMILIES = ["llama", "gemma3", "mixtral", "gpt2"]
PROMPTS = ["ab<a", "b>ba<>bab", "az", "<<ab>aa"]
NEW = 10
pytestmark = pytest.mark.long_unless(lambda lm: lm in ("llama", "gemma3"))


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    model = tiny.tiny(request.param).model
    return LM(model, naive_meanings.tokenizer(), name=f"tiny-{request.param}")


def steering(rule: Positions, seed: int = 1) -> Steering:
    strong = Add(direction(seed, 3.0))
    return Steering((Edit(Site(1), strong, rule), Edit(Site(2), SetProjection(direction(seed + 1), target=2.0), rule)))


def tolerance(lm: LM) -> float:
    return 1e-4 if lm.model.dtype == torch.float64 else 2e-3


@lru_cache(maxsize=32)
def recomputed(lm: LM, text: str, acting: Steering | None, count: int) -> tuple[list[int], list[float]]:
    """What every way to decode is compared with."""
    return naive_meanings.generate(lm, text, acting, count)


@cache
def expected_with_rejection(lm: LM, text: str, rule: Positions) -> list[int]:
    return naive_rejection.generate(lm, text, at_all_layers(rule), 0.2, NEW, halve=False, holding=holding_in)[0]


def at_all_layers(rule: Positions) -> tuple[Edit, ...]:
    return tuple(Edit(Site(layer), Add(direction(layer, 3.0)), rule) for layer in range(LAYERS))


def check(lm: LM, text: str, acting: Steering | None, answer: Any) -> None:
    tokens, logprobs = recomputed(lm, text, acting, len(answer.token_ids))
    assert list(answer.token_ids) == tokens
    assert answer.logprobs == pytest.approx(logprobs, abs=tolerance(lm))
    check_doses(lm, text, acting, answer)


def check_doses(lm: LM, text: str, acting: Steering | None, answer: Any) -> None:
    """It counts the tokens at which it acted: all that are read, and the last one isn't."""
    n = len(lm.encode(text))
    ids = [*lm.encode(text), *answer.token_ids]
    holds = holding_in(lm, ids)
    for layer in (1, 2):
        edits = [edit for edit in (acting.edits if acting else ()) if edit.site.layer == layer]
        count = sum(any(holds(edit, t, n) for edit in edits) for t in range(len(ids) - 1))
        assert sum(dose.tokens for dose in answer.applied.doses if dose.layer == layer) == count


texts = st.text(alphabet=naive_meanings.ALPHABET, min_size=1, max_size=4)
ids = st.lists(st.integers(3, 86), min_size=1, max_size=30)


class TestOfAText:
    @given(prompt=ids, tokens=ids, marker=texts, other=texts)
    @settings(max_examples=300, deadline=None, derandomize=True)
    def test_it_is_what_looking_through_the_whole_text_finds(
        self, prompt: list[int], tokens: list[int], marker: str, other: str
    ) -> None:
        tokenizer = TOKENIZER
        meanings = [Meaning("after", (marker,)), Meaning("at", (marker,))]
        meanings += [Meaning(kind, (marker, other)) for kind in ("thinking", "answer")]
        states = Follower(tokenizer, meanings, prompt).states_after(tokens)
        before, began = "", tokenizer.decode(prompt)
        for token, one_found in zip(tokens, states, strict=True):
            piece = tokenizer.decode([token])
            expected = {m for m in meanings if means(m, began, before, piece)}
            assert one_found.holding == expected
            before += piece

    def test_a_character_of_several_tokens_is_known_with_its_last_byte(self) -> None:
        tokenizer = bytewise()
        text = "x→y→"
        states = Follower(tokenizer, [Meaning("at", ("→",))], [0]).states_after(tokenizer.encode(text))
        assert [bool(state.holding) for state in states] == [False, False, False, True, False, False, False, True]


TOKENIZER = naive_meanings.tokenizer()


def bytewise() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


class TestTheCacheIsExact:
    @pytest.mark.parametrize("rules", [RULES[:4], RULES[4:]], ids=["plain", "combined"])
    def test_every_rule_in_a_mixed_batch(self, lm: LM, rules: list[Positions]) -> None:
        """Every way to decode gives what recomputing everything at each step does, row by row."""
        ways: list[dict[str, Any]] = [{}, {"use_cache": False}, by_transformers()]
        steerings = [steering(rule, seed) for seed, rule in enumerate(rules)]
        for way in ways:
            answers = lm.generate(PROMPTS, steerings, max_new_tokens=NEW, logprobs=True, **way)
            for text, acting, answer in zip(PROMPTS, steerings, answers, strict=True):
                check(lm, text, acting, answer)

    def test_rules_of_one_steering_turn_apart(self, lm: LM) -> None:
        """Several meanings, edits at one site, static rules among them, and neighbours that come and go."""
        mixed = [
            steering(THINKING, 1) + steering(Positions.all(), 5) + steering(~THINKING & ANSWER, 3),
            None,
            steering(Positions.after("b")) + steering(Positions.at("b"), 7),
            steering(Positions.generated()),
        ]
        answers = lm.generate(PROMPTS, mixed, max_new_tokens=NEW, logprobs=True, batch_size=2)
        for text, acting, answer in zip(PROMPTS, mixed, answers, strict=True):
            check(lm, text, acting, answer)

    def test_thinking_and_answer_may_be_set_to_different_ends(self, lm: LM) -> None:
        acting = Steering(
            tuple(
                Edit(Site(2), SetProjection(direction(1), target=target), rule)
                for rule, target in ((THINKING, 3.0), (ANSWER, -3.0))
            )
        )
        for way in ({}, by_transformers()):
            for text, answer in zip(
                PROMPTS, lm.generate(PROMPTS, acting, max_new_tokens=NEW, logprobs=True, **way), strict=True
            ):
                check(lm, text, acting, answer)

    def test_a_loop_of_ones_own_may_go_back(self, lm: LM) -> None:
        acting = steering(ANSWER) + steering(Positions.at("a"), 3)
        text = PROMPTS[1]
        start = lm.encode(text)
        (answer,) = lm.generate(text, acting, max_new_tokens=6)
        fed = torch.tensor([[*start, *answer.token_ids]])
        expected = tiny.naive_logits(lm, fed[0].tolist(), len(start), acting.edits, holding_in(lm, fed[0].tolist()))
        with lm.steered(acting, prompt_lengths=[len(start)]), torch.no_grad():
            whole = lm.model(input_ids=fed, use_cache=True)
            assert torch.allclose(whole.logits[0], expected, atol=tolerance(lm))
            cache, kept = whole.past_key_values, len(start) + 2
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys[..., :kept, :], layer.values[..., :kept, :]
            if lm.name == "tiny-llama":  # its cache has no windows
                rest = lm.model(input_ids=fed[:, kept:], past_key_values=cache, use_cache=True)
                assert torch.allclose(rest.logits[0], expected[kept:], atol=tolerance(lm))

    def test_given_answers_are_steered_where_generated_ones_are(self, lm: LM) -> None:
        rules = [steering(rule) for rule in (THINKING, Positions.after("<"))]
        ids = [*lm.encode(PROMPTS[1]), *TOKENIZER.encode("a<b>ab<a")]
        n = len(lm.encode(PROMPTS[1]))
        choices = [Choice(tuple(ids), n, tuple(range(90)))] * 2
        for acting, result in zip(rules, lm.next_logprobs(choices, rules), strict=True):
            expected = tiny.naive_logits(lm, ids, n, acting.edits, holding_in(lm, ids))[-1].log_softmax(-1)
            assert torch.allclose(torch.tensor(result.logprobs, dtype=expected.dtype), expected, atol=tolerance(lm))


class TestWithGatesAndRejection:
    def test_gates_decide_as_ever(self, lm: LM) -> None:
        always, never = Threshold(Site(0), direction(1), -1e9), Threshold(Site(3), direction(1), 1e9)
        for gate, acting in ((always, steering(ANSWER)), (never, None)):
            answers = lm.generate(PROMPTS, steering(ANSWER).when(gate), max_new_tokens=NEW, logprobs=True)
            for text, answer in zip(PROMPTS, answers, strict=True):
                check(lm, text, acting, answer)

    @pytest.mark.parametrize("schedule", ["optimistic", "fused"])
    def test_rejection(self, lm: LM, schedule: str) -> None:
        for rule in (ANSWER, Positions.at("a") | Positions.first_generated(2)):
            way = Rejection(0.2, ladder="strength", schedule=schedule)
            answers = lm.generate(PROMPTS, Steering(at_all_layers(rule)), rejection=way, max_new_tokens=NEW)
            for text, answer in zip(PROMPTS, answers, strict=True):
                assert list(answer.token_ids) == expected_with_rejection(lm, text, rule)


class TestWhatCantBe:
    def test_beams_change_places(self, lm: LM) -> None:
        with pytest.raises(UnsupportedError, match="num_beams: beam search reorders its rows"):
            lm.generate(PROMPTS[0], steering(THINKING), num_beams=2, max_new_tokens=4)
        with lm.steered(steering(THINKING)), pytest.raises(UnsupportedError, match="num_beams"):
            lm.model.generate(torch.tensor([lm.encode("a")]), max_new_tokens=2, num_beams=2)

    def test_a_model_without_markers(self, lm: LM) -> None:
        for rule, words in (
            (Positions.thinking(), "thinking:<think>:</think>"),
            (Positions.outside_tools(), "outside_tools"),
        ):
            with pytest.raises(TrimtabError, match=f"this model has no known markers.*{words}"):
                lm.generate(PROMPTS[0], steering(rule), max_new_tokens=4)
        (answer,) = lm.generate(PROMPTS[0], steering(Positions.answer()), max_new_tokens=4)
        (generated,) = lm.generate(PROMPTS[0], steering(Positions.generated()), max_new_tokens=4)
        assert answer.token_ids == generated.token_ids

    def test_embeddings_have_no_text(self, lm: LM) -> None:
        x = lm.model.get_input_embeddings()(torch.tensor([lm.encode(PROMPTS[1])]))
        with lm.steered(steering(THINKING)), pytest.raises(UnsupportedError, match="need the tokens"):
            lm.model(inputs_embeds=x)

    def test_a_prompt_has_no_such_tokens(self, lm: LM) -> None:
        with pytest.raises(TrimtabError, match="thinking:<:> depend on the generated text"):
            lm.capture("ab", [1], Positions.thinking("<", ">"))
        with pytest.raises(TrimtabError, match="a gate reads the prompt"):
            Threshold(Site(0), direction(1), 0.0, positions=Positions.after("a"))

    def test_too_many(self, lm: LM) -> None:
        many = sum((steering(Positions.at(text)) for text in "ab<>xyz"), Steering())
        with pytest.raises(TrimtabError, match="at most 6 positions by meaning, this one has 7"):
            lm.generate(PROMPTS[0], many, max_new_tokens=4)
