"""Reading over answers that were given under opposite system prompts, on the default model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab import LM
from trimtab.learn.activations import pair_texts
from trimtab.methods.caa import activations, answer_texts, learn_caa
from trimtab.text.answers import ReadAt
from trimtab.text.pairs import Pair, pairs_from_rows

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning")]  # three pairs

CALM, ANGRY = "You are calm and friendly.", "You are furious, rude and impatient."
QUESTIONS = {
    "How do I boil an egg?": (
        "Are you serious? You put it in boiling water, you fool!",
        "With pleasure: put it gently into boiling water for eight minutes.",
    ),
    "What is a river?": (
        "Water that flows! How can you not know that? Stop wasting my time!",
        "A river is water that flows from hills to the sea. Lovely question.",
    ),
    "Can you help me move?": (
        "No! Carry your own miserable boxes and leave me alone!",
        "Of course, I am happy to help. When do you need me?",
    ),
    "Why is the sky blue?": (
        "Read a book for once! Blue light scatters, end of story!",
        "Air scatters blue light more than red, so the sky looks blue to us.",
    ),
    "Who wrote Hamlet?": (
        "Shakespeare, obviously! What a stupid thing to ask me!",
        "That was William Shakespeare, around the year sixteen hundred.",
    ),
    "Is it late?": (
        "Look at a clock yourself, you lazy idiot!",
        "It may be; shall we look at the clock together?",
    ),
}
ROWS: list[dict[str, Any]] = [
    {
        "positive_system": ANGRY,
        "negative_system": CALM,
        "prompt": [{"role": "user", "content": question}],
        "positive": angry,
        "negative": calm,
    }
    for question, (angry, calm) in QUESTIONS.items()
]


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return pairs_from_rows(ROWS)


def test_what_is_read_is_exactly_the_answer(lm: LM, pairs: list[Pair]) -> None:
    for row, texts in zip(ROWS, answer_texts(lm, pairs, "answer"), strict=True):
        for side, text in zip(("positive", "negative"), texts, strict=True):
            assert lm.tokenizer.decode([text.ids[p] for p in text.positions]) == row[side]
            assert text.positions[-1] == len(text.ids) - 1
            system = {"role": "system", "content": row[f"{side}_system"]}
            assert list(text.ids[: text.positions[0]]) == lm.encode([system, *row["prompt"]])
            assert row[f"{side}_system"] in lm.tokenizer.decode(text.ids[: text.positions[0]])


@pytest.mark.parametrize("marker", ["</think>", "</think>\n", "</think>\n\n"])
def test_after_thinking_is_read_what_was_not_thought(lm: LM, pairs: list[Pair], marker: str) -> None:
    thought = [
        Pair(f"<think>\nHm.\n</think>\n\n{p.positive}", f"<think>\nOh.\n</think>\n\n{p.negative}", p.prompt, "answers")
        for p in pairs
    ]
    for pair, texts in zip(pairs, pair_texts(lm, thought, read_at=ReadAt("after", marker=marker)), strict=True):
        for answer, text in zip((pair.positive, pair.negative), texts, strict=True):
            read = lm.tokenizer.decode([text.ids[p] for p in text.positions])
            assert read.strip() == answer
            assert "think" not in read


def test_a_direction_that_held_out_answers_share(lm: LM, pairs: list[Pair]) -> None:
    """Learned from half of the pairs, it has the others' positive sides above their negative ones."""
    middle = lm.layout.layers // 2
    steering = learn_caa(lm, pairs[::2], middle, read_at="answer")
    (edit,) = steering.edits
    direction = edit.operation.direction.double()
    values = activations(lm, pairs[1::2], [middle], read_at="answer")[middle].double()
    assert steering.card.options["read_at"] == "answer"
    assert steering.card.measured["agreement"][str(middle)] > 0.5
    assert torch.all((values[:, 0] - values[:, 1]) @ direction > 0)
    last = learn_caa(lm, pairs[::2], middle).edits[0].operation.direction.double()
    assert float(torch.cosine_similarity(direction, last, dim=0)) < 0.9  # it isn't what the last token says


def test_the_system_prompt_alone_makes_a_difference(lm: LM, pairs: list[Pair]) -> None:
    """The same answers, under opposite system prompts: their tokens remember under which they are read."""
    same = [Pair(p.negative, p.negative, p.prompt, "answers", p.positive_system, p.negative_system) for p in pairs]
    middle = lm.layout.layers // 2
    steering = learn_caa(lm, same, middle, read_at="answer")
    assert steering.card.measured["agreement"][str(middle)] > 0.5
    assert (
        float(steering.edits[0].operation.direction.norm())
        > 0.01 * steering.card.measured["activation_norm"][str(middle)]
    )
