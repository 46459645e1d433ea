"""What comes next under many steerings: the same as each text alone, recomputed from the start."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tiny import FAMILIES, SINGLE, direction, naive_logits, prompt, tiny

from trimtab import LM, TrimtabError
from trimtab.engines.transformers.next_token import Choice
from trimtab.steering import Add, Edit, Positions, SetProjection, Site, Steering, Threshold

RULES = [Positions.from_last_prompt_token(), Positions.generated(), Positions.last_prompt_token()]
LATE: list[Steering | None] = [
    None,
    *(Steering((Edit(Site(1 + i), Add(direction(i, 2.0)), rule),)) for i, rule in enumerate(RULES)),
    Steering((Edit(Site(1), Add(direction(1, 2.0))), Edit(Site(2), SetProjection(direction(2), 1.5)))),
]
EARLY = [Steering((Edit(Site(1), Add(direction(7, 1.0)), Positions.all()),))]


def choices(lm: LM, lengths: tuple[int, ...] = (12, 17, 9)) -> list[Choice]:
    texts = [lm.encode(prompt(i, n)) for i, n in enumerate(lengths)]
    return [Choice([*text, 20 + i, 30], len(text), (5, 6, 40)) for i, text in enumerate(texts)]


def crossed(lm: LM, steerings: list[Steering | None]) -> list[tuple[Choice, Steering | None]]:
    return list(itertools.product(choices(lm), steerings))


def check(lm: LM, rows: list[tuple[Choice, Steering | None]], **options: Any) -> None:
    results = lm.next_logprobs([c for c, _ in rows], [s for _, s in rows], **options)
    tolerance = 1e-3 if lm.name.removeprefix("tiny-") in SINGLE else 1e-8
    for (choice, steering), result in zip(rows, results, strict=True):
        logits = naive_logits(lm, list(choice.ids), choice.prompt_length, steering.edits if steering else ())
        expected = logits[-1].double().log_softmax(-1)[list(choice.candidates)].tolist()
        assert result.logprobs == pytest.approx(expected, abs=tolerance), steering
        assert result.applied.edits == tuple(str(edit) for edit in (steering.edits if steering else ()))
        assert (result.applied.dose > 0) == (steering is not None)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_what_each_text_gives_alone(family: str) -> None:
    lm = tiny(family)
    check(lm, crossed(lm, LATE), batch_size=7)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_whatever_the_batch(family: str, size: int) -> None:
    lm = tiny(family, seed=1)
    check(lm, crossed(lm, [*LATE, *EARLY]), batch_size=size)


def test_what_rows_have_in_common_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("llama")
    lm.next_logprobs([choices(lm)[0]] * 2, LATE[:2])  # what blocks put out is looked at once, by running them
    seen: list[tuple[int, int]] = []
    handle = lm.layout.decoder.register_forward_pre_hook(
        lambda _m, _a, inputs: seen.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    rows = crossed(lm, LATE)
    lm.next_logprobs([c for c, _ in rows], [s for _, s in rows])
    lm.next_logprobs([c for c, _ in rows], [*(s for _, s in rows[:-1]), EARLY[0]])  # it steers from the start on
    handle.remove()
    assert seen == [(3, 16), (15, 3), (15, 19)]


def test_strength_zero_and_none_are_the_same_to_the_bit() -> None:
    lm = tiny("llama", dtype=torch.float32)
    (choice, *_) = choices(lm)
    good = LATE[1]
    assert good is not None
    results = lm.next_logprobs([choice] * 4, [None, 0.0 * good, good, Steering()])
    assert results[0].logprobs == results[1].logprobs == results[3].logprobs != results[2].logprobs
    assert results[1].applied.edits == ()


def test_gates_read_the_prompt() -> None:
    lm = tiny("llama")
    (choice, *_) = choices(lm)
    (read,) = lm.capture(" ".join(f"w{i}" for i in choice.ids[: choice.prompt_length]), [1])
    height = float(read[Site(1)][-1] @ direction(3))
    edit = Edit(Site(1), Add(direction(5, 3.0)))
    gates = [Threshold(Site(1), direction(3), height + sign) for sign in (-0.1, 0.1)]
    rows = [Steering((edit,)).when(gate) for gate in gates]
    bare, opened, shut, pushed = lm.next_logprobs([choice] * 4, [None, *rows, Steering((edit,))])
    assert shut.logprobs == bare.logprobs
    assert opened.logprobs == pushed.logprobs != bare.logprobs


def test_bad_input() -> None:
    lm = tiny("llama")
    with pytest.raises(TrimtabError, match="text 1 is empty"):
        lm.next_logprobs([Choice([], 1, (1,))])
    with pytest.raises(TrimtabError, match="length is 4, and must be from 1 to the text's 3 tokens"):
        lm.next_logprobs([Choice([4, 5, 6], 4, (1,))])
    with pytest.raises(TrimtabError, match="there are no candidates"):
        lm.next_logprobs([Choice([4, 5, 6], 3, ())])
    with pytest.raises(TrimtabError, match="'shout' isn't a steering"):
        lm.next_logprobs([Choice([4, 5, 6], 3, (1,))], "shout")
    with pytest.raises(TrimtabError, match="2 steerings for 1"):
        lm.next_logprobs([Choice([4, 5, 6], 3, (1,))], [None, None])
    with pytest.raises(TrimtabError, match="layer 9"):
        lm.next_logprobs([Choice([4, 5, 6], 3, (1,))], Steering((Edit(Site(9), Add(direction(1))),)))
    assert lm.next_logprobs([]) == []
