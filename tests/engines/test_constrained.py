"""Answers that keep to a grammar: the tokens are those of a naive form, neighbours don't matter, and JSON is JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_gpu import move, pretending
from tiny import by_transformers

pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trimtab import LM, Add, Edit, Rejection, Site, Steering
from trimtab.decoding.grammar import json_grammar
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest
from trimtab.engines.transformers.grammar import GrammarCompiler, GrammarProcessor, Masks
from trimtab.engines.transformers.sampling import Sampling
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.lm import DoseWarning

pytestmark = pytest.mark.filterwarnings(f"ignore::{DoseWarning.__module__}.{DoseWarning.__name__}")

PROMPT = "The sea is wide and blue."
CHOICES = ["red", "reddish", "blue", "The sea", "question, an answer", "é"]
FREE = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 5}}, "required": ["a"]}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    from commands.conftest import save_model

    model = LM.load(save_model(tmp_path_factory.mktemp("constrained") / "tiny"), device="cpu", dtype="float64")
    return model


def push(seed: int, strength: float, layer: int = 1) -> Steering:
    v = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return Steering((Edit(Site(layer), Add(strength * v)),))


def naive(lm: LM, sentences: list[str], numbers: torch.Tensor | None = None) -> str:
    """One of the sentences, token by token, each from the start: those that can't go on to any have no probability.

    Of those that may come the likeliest; or, by uniform numbers, the one that a number falls on.
    """
    ids, text, step = lm.encode(PROMPT, chat=False), "", 0
    length = len(ids)
    while text not in sentences or any(sentence != text and sentence.startswith(text) for sentence in sentences):
        logits = lm.model(torch.tensor([ids])).logits[0, -1].double()
        for token in range(len(logits)):
            may = lm.tokenizer.decode([*ids[length:], token])
            end = token in lm.tokenizer.all_special_ids
            if (
                (text not in sentences)
                if end
                else not any(sentence.startswith(may) and may != text for sentence in sentences)
            ):
                logits[token] = -torch.inf
        if numbers is None:
            token = int(logits.argmax())
        else:
            sums = logits.softmax(-1).cumsum(-1)
            token = int((sums > numbers[step] * sums[-1]).nonzero()[0])
        if token in lm.tokenizer.all_special_ids:
            break
        ids.append(token)
        text, step = lm.tokenizer.decode(ids[length:]), step + 1
    return text


def texts(lm: LM, *arguments: Any, **options: Any) -> list[str]:
    return [answer.text for answer in lm.generate(*arguments, chat=False, **{"max_new_tokens": 40, **options})]


WRITTEN = [choice for choice in CHOICES if choice.isascii()]  # a part of a character has no text
SENTENCES = [json.dumps(text) for text in WRITTEN]
CHOICE = {"enum": WRITTEN}


class TestChoices:
    """Of a language so small that it can be written down."""

    def test_the_likeliest(self, lm: LM) -> None:
        (text,) = texts(lm, [PROMPT], json_schema=CHOICE)
        assert text == naive(lm, SENTENCES)
        assert [text] == texts(lm, [PROMPT], json_schema=CHOICE, **by_transformers())

    def test_a_sampled_one(self, lm: LM) -> None:
        texts_drawn = []
        for seed in range(12):
            numbers = torch.rand(40, generator=torch.Generator().manual_seed(seed))
            options = {"do_sample": True, "top_k": 0, "seed": seed}
            texts_drawn += texts(lm, [PROMPT], json_schema=CHOICE, **options)
            assert texts_drawn[-1] == naive(lm, SENTENCES, numbers)
        assert len(set(texts_drawn)) > 1

    @pytest.mark.parametrize("strength", [-30.0, 3.0, 1000.0])
    def test_under_steering_and_rejection(self, lm: LM, strength: float) -> None:
        for seed in range(3):
            for rejection in (None, Rejection(0.3, ladder="strength")):
                steering = push(seed, strength)
                (text,) = texts(lm, [PROMPT], steering, json_schema=CHOICE, rejection=rejection)
                assert text in SENTENCES

    def test_a_character_in_parts(self, lm: LM) -> None:
        assert texts(lm, [PROMPT], json_schema={"enum": ["é", "日本"]})[0] in ('"é"', '"日本"')


def test_neighbours_dont_matter(lm: LM) -> None:
    """Constrained, free, steered, short and long rows in one batch: what each gets is what it gets alone."""
    prompts = [PROMPT, "A question", "an answer; (A) yes (B) no", "Write in capitals!", "blue", "user"]
    schemas = [FREE, None, {"enum": CHOICES}, None, {"type": "integer"}, FREE]
    steerings = [None, push(0, 2.0), push(1, 2.0), None, push(2, 30.0), push(3, 30.0)]
    for options in ({}, {"do_sample": True, "top_k": 0, "seed": 5}):
        together = lm.generate(prompts, steerings, json_schema=schemas, chat=False, max_new_tokens=24, **options)
        free = lm.generate(prompts, steerings, chat=False, max_new_tokens=24, **options)
        for i, text in enumerate(together):
            if schemas[i] is None:
                assert text.token_ids == free[i].token_ids
            elif not options:
                alone = lm.generate(
                    [prompts[i]], steerings[i], json_schema=schemas[i], chat=False, max_new_tokens=24, **options
                )
                assert alone[0].token_ids == text.token_ids


def test_log_probabilities_are_the_models(lm: LM) -> None:
    """They are told before anything is forbidden, as they are before any temperature."""
    (answer,) = lm.generate([PROMPT], json_schema=FREE, chat=False, max_new_tokens=12, logprobs=True)
    assert answer.logprobs is not None
    ids = lm.encode(PROMPT, chat=False)
    whole = lm.model(torch.tensor([[*ids, *answer.token_ids]])).logits[0].log_softmax(-1)
    for i, (token, logprob) in enumerate(zip(answer.token_ids, answer.logprobs, strict=True)):
        assert logprob == pytest.approx(whole[len(ids) - 1 + i, token].item(), abs=1e-4)


def test_an_answer_ends_where_its_grammar_does(lm: LM) -> None:
    (answer,) = lm.generate([PROMPT], json_schema={"const": "x"}, chat=False, max_new_tokens=30)
    assert (answer.text, answer.finish_reason) == ('"x"', "stop")
    (cut,) = lm.generate([PROMPT], json_schema={"const": "x" * 50}, chat=False, max_new_tokens=9)
    assert cut.finish_reason == "length"
    assert json.dumps("x" * 50).startswith(cut.text)
    pieces = list(lm.stream(PROMPT, chat=False, json_schema={"const": "x"}, max_new_tokens=9))
    assert "".join(pieces) == '"x"'


def test_several_answers_to_a_prompt(lm: LM) -> None:
    for more in ({}, by_transformers()):
        answers = texts(
            lm, [PROMPT, "blue"], json_schema=[{"enum": CHOICES}, {"type": "integer", "minimum": 0, "maximum": 9}],
            do_sample=True, num_return_sequences=3, seed=1, **more,
        )  # fmt: skip
        assert all(json.loads(text) in CHOICES for text in answers[:3])
        assert all(json.loads(text) in range(10) for text in answers[3:])


def test_what_is_refused(lm: LM) -> None:
    for options, words in (
        ({"json_schema": {"type": "strin"}}, "Invalid type"),
        ({"json_schema": [{}, {}]}, "2 JSON schemas for 1 prompts"),
        ({"json_schema": {}, "num_beams": 2}, "beam search reorders its rows"),
        ({"json_schema": {}, "min_new_tokens": 2}, "where an answer ends"),
    ):
        with pytest.raises(TrimtabError, match=words):
            lm.generate([PROMPT], chat=False, max_new_tokens=9, **options)  # type: ignore[arg-type]


def test_what_other_settings_forbid_is_said(lm: LM) -> None:
    """Where nothing is left that may come, no token is chosen all the same."""
    banned = [[token] for token in range(len(lm.tokenizer)) if '"' in lm.tokenizer.decode([token])]
    with pytest.raises(TrimtabError, match="can't follow its grammar"):
        lm.generate([PROMPT], json_schema={"const": "x"}, chat=False, max_new_tokens=9, bad_words_ids=banned)


def test_a_tokenizer_without_bytes_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedError, match="fast version"):
        GrammarCompiler(Slow(), 10, [0])


def test_masks_of_some_rows_of_a_batch(lm: LM) -> None:
    """The mask of each row is its own matcher's, whatever stands beside it, also beyond the tokenizer's tokens."""
    size = len(lm.tokenizer) + 37
    grammars = GrammarCompiler(lm.tokenizer, size, [0])
    numbers, strings = (grammars.matcher(json_grammar(schema)) for schema in ({"type": "integer"}, {"type": "string"}))
    scores = torch.randn(4, size)
    masks = Masks([None, numbers, None, strings], size, torch.device("cpu"))
    masked = masks.apply(scores)
    some = (3, 0, 1, 1)  # in another order, and several times
    assert torch.equal(masks.apply(scores[list(some)], some), masked[list(some)])
    assert masks.apply(scores[:2], (0, 2)) is not masked
    assert torch.equal(masks.apply(scores[[0, 2]], (0, 2)), scores[[0, 2]])
    both = Masks([numbers, strings], size, torch.device("cpu"))
    assert torch.equal(both.apply(scores[[3, 1]], (1, 0)), masked[[3, 1]])
    assert torch.equal(both.apply(scores[[1, 3]]), masked[[1, 3]])
    assert torch.equal(masked[[0, 2]], scores[[0, 2]])
    for row, matcher in ((1, numbers), (3, strings)):
        bits = matcher._state.compute_bitmask()
        allowed = [token for token in range(size) if bits[token // 8] >> token % 8 & 1]
        assert masked[row].isfinite().nonzero()[:, 0].tolist() == allowed
        assert torch.equal(masked[row, allowed], scores[row, allowed])
    assert torch.equal(GrammarProcessor([numbers])(torch.tensor([[3]]), scores[1:2]), masked[1:2])


@pytest.mark.parametrize("rows", [1, 5])
def test_a_step_waits_once_and_copies_one_mask(tmp_path: Path, rows: int) -> None:
    """However many rows are constrained; on a pretend GPU."""
    from commands.conftest import save_model

    lm = LM.load(save_model(tmp_path / "tiny"), device="cpu", dtype="float32")
    move(lm.model)
    matcher = GrammarCompiler(lm.tokenizer, len(lm.tokenizer), [0]).matcher(
        json_grammar({"type": "string", "minLength": 30})
    )
    with pretending() as counts:
        batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
        for row in range(rows):
            ids = tuple(lm.encode(PROMPT[row:], chat=False))
            batch.insert(GenerationRequest(ids, push(row, 2.0), 20, matcher=matcher))
            batch.insert(GenerationRequest(ids, None, 20, Sampling(1.0, seed=row)))
        for _ in range(7):
            batch.step()
        for _ in range(3):
            counts.clear()
            assert len(batch.step()) == 2 * rows
            assert counts.totals[1:] == (1, 1), (counts.waits, counts.copies)


# ---- any schema, any strength --------------------------------------------------------------------------------

LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "integer", "minimum": -5, "maximum": 70},
        {"type": "null"},
        {"type": "string", "maxLength": 3},
        {"enum": ["x", 1, None]},
        {"type": "string", "pattern": "^[ab]{1,3}$"},
    ]
)


def larger(inner: Any) -> Any:
    names = st.sampled_from(["a", "b c", 'q"', "é"])
    objects = st.dictionaries(names, inner, max_size=3).map(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    )
    return st.one_of(
        objects,
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda some: {"anyOf": some}),
    )


def fits(value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether JSON is what such a schema describes; written down anew, as naively as can be."""
    if "anyOf" in schema:
        return any(fits(value, option) for option in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema["type"]
    if kind == "object":
        inner = schema["properties"]
        return isinstance(value, dict) and value.keys() == inner.keys() and all(fits(value[n], inner[n]) for n in inner)
    if kind == "array":
        return isinstance(value, list) and len(value) <= 2 and all(fits(item, schema["items"]) for item in value)
    if kind == "string":
        letters = isinstance(value, str) and ("pattern" not in schema or (value != "" and set(value) <= {"a", "b"}))
        return letters and len(value) <= 3
    if kind == "integer":
        return type(value) is int and -5 <= value <= 70
    return value is None if kind == "null" else type(value) is bool


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.recursive(LEAVES, larger, max_leaves=4),
    st.floats(-1000, 1000, allow_nan=False),
    st.integers(0, 100),
    st.booleans(),
    st.sampled_from([None, Rejection(0.5, ladder="strength")]),
)
def test_any_schema_at_any_strength(
    lm: LM, schema: Mapping[str, Any], strength: float, seed: int, sample: bool, rejection: Any
) -> None:
    options: Any = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": seed} if sample else {}
    (answer,) = lm.generate(
        [PROMPT],
        push(seed, strength),
        json_schema=schema,
        max_new_tokens=70,
        chat=False,
        rejection=rejection,
        **options,
    )
    if answer.finish_reason == "stop":
        assert fits(json.loads(answer.text), schema)
    else:
        assert len(answer.token_ids) == 70
