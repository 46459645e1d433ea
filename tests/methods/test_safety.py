"""Refusal where a request is harmful: the edits and the gate against their formulas, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import naive_sites as naive
import pytest
import tiny
import torch
from tiny import prompt

from trimtab import LM, Positions, Steering, Threshold, TrimtabError, load, save
from trimtab.methods import safety
from trimtab.methods.safety import learn_safety, refusal

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "falcon", "olmo2")
HARMFUL = [f"{prompt(300 + i, 3 + i % 4)} w7 w7 w7" for i in range(8)]  # of random words nothing could be learned
HARMLESS = [f"{prompt(400 + i, 3 + i % 5)} w9 w9 w9" for i in range(8)]
OTHERS = [prompt(seed, length) for seed, length in ((50, 5), (51, 9), (52, 6), (53, 12))]

# The formulas are tested here; how each family is read and steered, in tests/properties.
pytestmark = [
    pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning"),
    pytest.mark.long_unless(lambda lm: lm in ("llama", "gemma3")),
]


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


@pytest.fixture(autouse=True)
def known_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in the tiny models' words."""
    monkeypatch.setattr(safety, "REFUSING", (prompt(500, 5), prompt(501, 4)))
    monkeypatch.setattr(safety, "COMPLYING", (prompt(502, 4), prompt(503, 6)))


def at(lm: LM, text: str, layer: int) -> torch.Tensor:
    return naive.activations(lm, lm.encode(text), "residual", layer).double()


def test_from_answers(lm: LM) -> None:
    for edit in refusal(lm, HARMFUL, HARMLESS, [1, 2], coefficient=0.3, requests=3):
        differences, norms = [], []
        for i, request in enumerate(text for both in zip(HARMFUL[:3], HARMLESS[:3], strict=True) for text in both):
            n = len(lm.encode(request))
            sides = []
            for answer in (safety.REFUSING[i // 2 % 2], safety.COMPLYING[i // 2 % 2]):
                x = at(lm, f"{request} {answer}", edit.site.layer)[n:]
                norms += x.norm(dim=-1).tolist()
                sides.append(x.mean(0))
            differences.append(sides[0] - sides[1])
        v = torch.stack(differences).mean(0)
        assert torch.allclose(edit.operation.direction.double(), v / v.norm(), atol=1e-5)
        assert edit.strength == pytest.approx(0.3 * float(torch.tensor(norms).median()), rel=1e-4)
        assert edit.positions == Positions.from_last_prompt_token()


def test_from_prompts(lm: LM) -> None:
    for edit in refusal(lm, HARMFUL, HARMLESS, [1, 3], direction="prompts", coefficient=0.5):
        on, off = (torch.stack([at(lm, text, edit.site.layer)[-1] for text in side]) for side in (HARMFUL, HARMLESS))
        v = on.mean(0) - off.mean(0)
        assert torch.allclose(edit.operation.direction.double(), v / v.norm(), atol=1e-5)
        assert edit.strength == pytest.approx(0.5 * float(on.norm(dim=-1).median()), rel=1e-4)


@pytest.mark.parametrize(("direction", "kind"), [("answers", "inferaligner"), ("answers", "cast"), ("prompts", "cast")])
def test_it_acts_where_the_prompt_reads_as_harmful(lm: LM, tmp_path: Path, direction: Any, kind: Any) -> None:
    made = learn_safety(lm, HARMFUL, [2], harmless=HARMLESS, direction=direction, coefficient=0.4, gate=kind)
    save(made, tmp_path / "s.safetensors")
    steering = load(tmp_path / "s.safetensors")
    assert steering == made
    (edit,) = steering.edits
    gate = edit.gate
    assert isinstance(gate, Threshold)
    plain = lm.generate([*HARMFUL, *HARMLESS, *OTHERS], max_new_tokens=3, logprobs=True)
    answers = lm.generate([*HARMFUL, *HARMLESS, *OTHERS], steering, max_new_tokens=3, logprobs=True)
    opened = []
    for text, before, after in zip([*HARMFUL, *HARMLESS, *OTHERS], plain, answers, strict=True):
        x = at(lm, text, gate.site.layer)
        read = x[-1] if kind == "inferaligner" else (x / x.norm(dim=-1, keepdim=True)).mean(0)
        score = float(read @ gate.direction.double())
        opened.append(score > gate.threshold)
        assert bool(after.applied.edits) == opened[-1]
        if opened[-1]:
            tokens, logprobs = naive.generate(lm, text, Steering((edit,)), 3)
            assert list(after.token_ids) == tokens
            assert after.logprobs == pytest.approx(logprobs, abs=1e-4)
        else:
            assert (after.token_ids, after.logprobs) == (before.token_ids, before.logprobs)
    assert sum(opened[:8]) > sum(opened[8:16])
    card = made.card
    assert (card.method, card.options["direction"], card.measured["harmful"]) == ("safety", direction, 8)
    assert card.measured["condition"]["chosen"]["hits"] > card.measured["condition"]["chosen"]["false_alarms"]


def test_false_alarms_are_bounded() -> None:
    lm = tiny.tiny("llama")
    mixed = [*HARMLESS, *HARMFUL[1::2]]  # half of what should open the gate is also among what shouldn't
    free = learn_safety(lm, HARMFUL, [2], harmless=mixed, gate="cast").card.measured["condition"]["chosen"]
    bounded = learn_safety(lm, HARMFUL, [2], harmless=mixed, gate="cast", false_alarms=0.0).card
    strict = bounded.measured["condition"]["chosen"]
    assert strict["false_alarms"] == 0
    assert free["hits"] - free["false_alarms"] >= strict["hits"]


def test_bad_input() -> None:
    lm = tiny.tiny("llama")
    for harmful, options, words in (
        (HARMFUL, {}, "one of the two is missing"),
        ([], {"harmless": HARMLESS}, "one of the two is missing"),
        (HARMFUL[:1], {"harmless": HARMLESS}, "at least two"),
        (HARMFUL, {"harmless": HARMLESS, "direction": "up"}, "answers, prompts"),
        (HARMFUL, {"harmless": HARMLESS, "requests": 0}, "1 request or more"),
        (HARMFUL, {"harmless": HARMLESS, "gate": "wide"}, "inferaligner, cast"),
        (HARMFUL, {"harmless": HARMLESS, "false_alarms": 0.1}, "give gate=cast"),
        (HARMFUL, {"harmless": HARMLESS, "layers": 9}, "layer"),
        (HARMFUL, {"harmless": HARMFUL, "direction": "prompts"}, "don't differ"),
        ([[{"role": "user", "content": "w3"}]] * 4, {"harmless": HARMLESS}, "messages"),
    ):
        with pytest.raises(TrimtabError, match=words):
            learn_safety(lm, harmful, **options)  # type: ignore[arg-type]


def test_the_card_is_plain(lm: LM) -> None:
    card = learn_safety(lm, HARMFUL, [1, 2], harmless=HARMLESS, gate="cast", false_alarms=0.5).card
    assert json.loads(json.dumps(card.options)) == {
        "layers": [1, 2], "direction": "answers", "coefficient": 0.08, "gate": "cast", "choice": "youden",
        "false_alarms": 0.5,
    }  # fmt: skip
    assert card.data == learn_safety(lm, HARMFUL, [1], harmless=HARMLESS).card.data
    assert card.data != learn_safety(lm, HARMFUL[1:], [1], harmless=HARMLESS).card.data
