"""What is named at the top of the package: every method's function, and what `LM.load` gives, engine by engine."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

import trimtab
from trimtab.engines import ENGINES
from trimtab.methods.recipe import recipes

NAMES = """
    Ablate Add AddScaled Always BiasScores Card DoseWarning Edit FormatWarning Gate Highlight LM MaskNeurons
    MismatchWarning Monitor Operation Pair Part Pattern Phrase Positions ReadWrite Rejection Rotate RotateInPlane
    RotatePredicted RouteExperts ScaleElements ScaleKeys ScaleScores SetProjection Site Steering TargetMass
    Threshold TrimtabError UnsupportedError UntestedVersionWarning audit bake by_keys directer directional_ablation
    export from_pretrained from_repeng from_steering_vectors instaboost learn_actadd learn_bipo learn_caa learn_cap
    learn_cast learn_condition learn_distill learn_hpr learn_icv learn_inferaligner learn_instruct learn_iti
    learn_length learn_loreft learn_many learn_probe learn_random learn_repe learn_reps learn_sadi learn_safety
    learn_seka learn_steermoe learn_sttp learn_tda learn_word learn_word_logit load load_features make
    make_from_pairs pasta push_to_hub read_pairs save seka spotlight steering_from steerings_from to_repeng
    to_steering_vectors
"""
"""All public names. One may go only after two minor versions that warn (`trimtab.deprecation`)."""


def test_no_public_name_comes_or_goes_unnoticed() -> None:
    """A name that is missing here breaks users' programs; a new one is added here, and is then kept."""
    assert sorted(trimtab.__all__) == sorted(NAMES.split())
    assert all(hasattr(trimtab, name) for name in NAMES.split())


@pytest.mark.parametrize("recipe", recipes().values(), ids=lambda recipe: recipe.name)
def test_every_method_can_be_had_from_the_top(recipe: Any) -> None:
    assert getattr(trimtab, recipe.function.partition(":")[2]) is recipe.load()
    assert recipe.function.partition(":")[2] in trimtab.__all__


def test_the_package_waits_for_nothing_heavy() -> None:
    program = (
        "import sys, trimtab; dir(trimtab); print({'torch', 'transformers', 'numpy', 'pandas'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "set()\n"), ran.stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="overloads are looked up by what Python 3.11 has")
def test_an_editor_knows_what_is_loaded() -> None:
    from typing import get_overloads

    known = {}
    for overload in get_overloads(trimtab.LM.load):
        engine, made = overload.__annotations__["engine"], overload.__annotations__["return"]
        known[engine] = made
    named = {f"Literal['{name}']": made.partition(":")[2] for name, made in ENGINES.items()}
    assert known == {"Literal['transformers']": "LM", **named, "str": "LanguageModel"}
