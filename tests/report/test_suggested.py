"""The strength to begin with: what it is made of, and that it has about the dose that it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import prompt, tiny

from trimtab import learn_instruct
from trimtab.methods.caa import learn_caa
from trimtab.report.suggested import MILD, named_with_strength, suggested_strength
from trimtab.steering import Ablate, Add, Card, Edit, Site, Steering
from trimtab.text.pairs import Pair

FILE = Path("s.safetensors")


def planted(*lengths, method="caa", **measured):
    """Additions so long at layers 0, 1, …, where activations have the norm 10."""
    edits = tuple(Edit(Site(layer), Add(torch.tensor([0.0, length]))) for layer, length in enumerate(lengths))
    norms = {str(layer): 10.0 for layer in range(len(lengths))}
    return Steering(edits, Card(method, measured={"activation_norm": norms, **measured}))


def test_it_is_the_strength_of_a_mild_dose_over_all_layers():
    assert suggested_strength(planted(1.0)) == pytest.approx(MILD / 0.1)
    assert suggested_strength(planted(3.0, 4.0)) == pytest.approx(MILD / 0.5)
    assert suggested_strength(2.0 * planted(3.0, 4.0)) == pytest.approx(MILD / 1.0)
    assert suggested_strength(planted(3.0, 4.0).only([1])) == pytest.approx(MILD / 0.4)
    assert named_with_strength(FILE, planted(3.0, 4.0)) == "s.safetensors:0.4"
    assert named_with_strength(Path("my s.gguf"), planted(3.0, 4.0)) == "'my s.gguf:0.4'"  # as it is typed


def test_what_was_found_with_its_strength_keeps_it():
    for steering in (
        planted(9.0, method="distill"),
        planted(9.0, tuning={"chosen": {}}),
        planted(9.0, share_of_prompt=0.8, holds=True),
        planted(9.0, gain=0.1, holds=False),  # written on request; its strength is the best that was found
        planted(9.0, method="word-logit"),
    ):
        assert suggested_strength(steering) == 1
        assert named_with_strength(FILE, steering) == "s.safetensors"


@pytest.mark.parametrize(("length", "strength"), [(2.1, 1), (1.9, 1), (1.5, 1.3), (2.5, 0.8)])
def test_what_is_nearly_1_is_called_1(length, strength):
    assert suggested_strength(planted(length)) == strength


def test_what_isnt_known_isnt_said():
    nothing = Steering()
    foreign = Steering((Edit(Site(0), Add(torch.ones(2))),))
    removes = Steering((Edit(Site(0), Ablate(torch.tensor([0.0, 1.0]))),), planted(1.0).card)
    for steering in (nothing, foreign, removes, 0.0 * planted(1.0), planted(1.0) + planted(1.0)):
        assert suggested_strength(steering) is None
        assert named_with_strength(FILE, steering) == "s.safetensors"


def test_a_learned_file_has_about_that_dose_where_it_was_learned():
    lm = tiny("llama")
    pairs = [Pair(prompt(seed, 9), prompt(50 + seed, 9), "", "prompts") for seed in range(6)]
    learned = learn_instruct(lm, pairs, [1, 2], operation="add")
    steered = lm.generate(
        [str(pair.positive) for pair in pairs], suggested_strength(learned) * learned, max_new_tokens=1
    )
    assert sum(answer.applied.overall for answer in steered) / 6 == pytest.approx(MILD, rel=0.3)
    answers = [Pair(prompt(seed, 4), prompt(50 + seed, 4), prompt(90 + seed, 5), "answers") for seed in range(12)]
    with pytest.warns(UserWarning, match="barely agree"):
        assert 0 < suggested_strength(learn_caa(lm, answers, [1, 2])) < 10
