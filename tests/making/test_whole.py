"""Among the best candidates one is taken under which the model doesn't repeat itself more than under the prompt."""

from __future__ import annotations

import pytest
from tiny import LAYERS, direction, tiny

from trimtab import Add, Edit, Site, Steering
from trimtab.making.candidates import Candidate
from trimtab.making.effect import Effect
from trimtab.making.material import Heard
from trimtab.making.whole import ALLOWED, TRIED, first_whole, is_repetitive

QUESTIONS = tuple(Heard(f"w{n} w{n + 7} w{n + 20}", f"w{n} w{n + 7} w{n + 20}") for n in range(3, 15))
TOKENS = 24

pytestmark = pytest.mark.filterwarnings("ignore::trimtab.lm.DoseWarning")


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_first_that_repeats_itself_no_more_or_the_one_that_does_least(seed: int) -> None:
    lm = tiny("llama", seed)

    def share(steering: Steering | None) -> float:
        texts = [lm.generate(question.bare, steering, max_new_tokens=TOKENS)[0] for question in QUESTIONS]
        return sum(is_repetitive(text) for text in texts) / len(texts)

    edits = [Edit(Site(LAYERS - 1), Add(direction(seed + n, 10.0 ** (2 - n)))) for n in range(TRIED + 1)]
    ranked = [Candidate(f"number {n}", Steering((edit,)), Effect({}, {})) for n, edit in enumerate(edits)]
    shares = [share(candidate.steering) for candidate in ranked[:TRIED]]
    least = share(None) + ALLOWED
    wanted = next((n for n, each in enumerate(shares) if each <= least), shares.index(min(shares)))
    passed_over: list[str] = []
    assert first_whole(lm, ranked, QUESTIONS, TOKENS, passed_over.append) is ranked[wanted]
    assert [line.split(":")[0] for line in passed_over][:wanted] == [f"number {n}" for n in range(wanted)]


def test_what_repeats_itself_is_passed_over() -> None:
    """Pushed far along a direction the model says one word for ever; pushed by next to nothing it goes on as before."""
    lm = tiny("llama")
    ranked = [
        Candidate(name, Steering((Edit(Site(LAYERS - 1), Add(direction(0, norm))),)), Effect({}, {}))
        for name, norm in (("far", 1e4), ("hardly", 1e-6))
    ]
    said: list[str] = []
    assert first_whole(lm, ranked, QUESTIONS, TOKENS, said.append).name == "hardly"
    assert said[0].startswith("far: 100% of its answers are repetitive")
