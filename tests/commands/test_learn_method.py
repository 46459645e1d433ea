"""Methods that describe themselves, with commands of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trimtab import TrimtabError, load
from trimtab.methods.recipe import Option, Recipe, recipes


def test_every_recipe_fits_its_function() -> None:
    """Options are keywords of the function, with the same defaults, and the function takes what it is given."""
    import inspect

    for recipe in recipes().values():
        parameters = inspect.signature(recipe.load()).parameters
        assert {"layers", "progress"} <= set(parameters), recipe.name
        for option in recipe.options:
            assert option.name in parameters, (recipe.name, option.name)
            if option.default is not None:
                assert parameters[option.name].default == option.default, (recipe.name, option.name)


def test_recipes_check_themselves() -> None:
    about: dict[str, Any] = {
        "name": "x",
        "title": "",
        "paper": "",
        "data": "",
        "reads": "",
        "acts": "",
        "function": "f",
    }
    with pytest.raises(TrimtabError, match="names their shapes"):
        Recipe(**about)
    with pytest.raises(TrimtabError, match="function is 'module:function', got 'f'"):
        Recipe(**about, takes="nothing")
    with pytest.raises(TrimtabError, match="unknown kind"):
        Option("a", "vector", None, "")


def test_listing_waits_for_no_torch() -> None:
    code = (
        "import sys; from trimtab.methods.recipe import recipes; from trimtab.commands.learn_method import command_for;"
        "[command_for(r) for r in recipes().values()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_heads_neurons_and_masks_from_the_command_line(
    trimtab: Any, tmp_path: Path, model: Path, answer_pairs: Path
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("The sea is wide and blue.\nA question, an answer; yes or no?\n")
    cases: dict[str, list[Any]] = {
        "sadi": ["--pairs", answer_pairs, "--k", 3, "--site", "neurons", "--delta", "0.5"],
        "iti": ["--pairs", answer_pairs, "--heads", 3, "--alpha", "2", "--bank", texts],
        "tda": ["--texts", texts, "--cett", "0.3"],
    }
    for name, options in cases.items():
        out = tmp_path / f"{name}.safetensors"
        common = ["--out", out, "--model", model, "--device", "cpu"]
        learned = trimtab("learn", name, *options, *common, "--json")
        assert learned.code == 0, learned.err
        assert learned.json["edits"] == [str(edit) for edit in load(out).edits]
        again = tmp_path / "again.safetensors"
        shown = trimtab("learn", name, *options, "--out", again, "--model", model, "--device", "cpu")
        assert (shown.code, "saved" in shown.out) == (0, True), shown.err
        assert again.read_bytes() == out.read_bytes()
        seen = trimtab("inspect", out, "--json")
        assert (seen.code, seen.json["card"]["method"]) == (0, name)
        assert trimtab("inspect", out).code == 0
        ran = trimtab("generate", "--steer", out, "--model", model, "--prompt", "Why?", "--max-new-tokens", 4, "--json")
        assert ran.code == 0, ran.err


def test_caps_and_targets_from_the_command_line(trimtab: Any, tmp_path: Path, model: Path, answer_pairs: Path) -> None:
    common = ["--pairs", answer_pairs, "--model", model, "--device", "cpu", "--layers", "1,2"]
    cases: dict[str, list[list[Any]]] = {
        "cap": [["--quantile", "0.5", "--over", "both"], ["--bound", "ceiling", "--positions", "generated"]],
        "sttp": [["--alpha", "2"], ["--move", "mirror", "--alpha", "0.5"]],
    }
    for name, runs in cases.items():
        shown = trimtab("learn", name, "--help").out
        for i, options in enumerate(runs):
            assert options[0] in shown
            out, again = tmp_path / f"{name}{i}.safetensors", tmp_path / "again.safetensors"
            learned = trimtab("learn", name, *common, *options, "--out", out, "--json")
            assert learned.code == 0, learned.err
            assert learned.json["edits"] == [str(edit) for edit in load(out).edits]
            assert trimtab("learn", name, *common, *options, "--out", again).code == 0
            assert again.read_bytes() == out.read_bytes()
            seen = trimtab("inspect", out, "--json")
            assert (seen.code, seen.json["card"]["method"]) == (0, name)
            generated = trimtab(
                "generate", "--steer", out, "--model", model, "--prompt", "Why?", "--max-new-tokens", 4, "--json"
            )
            assert generated.code == 0, generated.err
    for name, options, words in (
        ("cap", ["--quantile", "2"], "a quantile lies between 0 and 1"),
        ("sttp", ["--move", "away"], "target, mirror"),
    ):
        ran = trimtab("learn", name, *common, *options, "--out", tmp_path / "no.safetensors")
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert words in ran.err


def test_preferences_from_the_command_line(trimtab: Any, tmp_path: Path, model: Path, answer_pairs: Path) -> None:
    common = ["--pairs", answer_pairs, "--model", model, "--device", "cpu", "--layers", "1,2"]
    cases: dict[str, list[Any]] = {
        "bipo": ["--beta", "0.2", "--held-out", answer_pairs],
        "reps": ["--max-dose", "0.5", "--seed", "1"],
        "loreft": ["--rank", "2", "--rate", "0.02"],
    }
    for name, options in cases.items():
        shown = trimtab("learn", name, "--help").out
        assert options[0] in shown
        assert "--steps" in shown
        out, again = tmp_path / f"{name}.safetensors", tmp_path / "again.safetensors"
        learned = trimtab("learn", name, *common, *options, "--steps", 5, "--out", out, "--json")
        assert learned.code == 0, learned.err
        assert learned.json["edits"] == [str(edit) for edit in load(out).edits]
        assert learned.json["measured"]["steps"] == 5
        assert trimtab("learn", name, *common, *options, "--steps", 5, "--out", again).code == 0
        assert again.read_bytes() == out.read_bytes()
        seen = trimtab("inspect", out, "--json")
        assert (seen.code, seen.json["card"]["method"]) == (0, name)
        generated = trimtab(
            "generate", "--steer", out, "--model", model, "--prompt", "Why?", "--max-new-tokens", 4, "--json"
        )
        assert generated.code == 0, generated.err
    for name, options, words in (
        ("bipo", ["--beta", "0"], "above 0, got 0.0"),
        ("reps", ["--steps", "0"], "steps of a descent is above 0"),
        ("loreft", ["--rank", "0"], "whole number, 1 or more"),
    ):
        ran = trimtab("learn", name, *common, *options, "--out", tmp_path / "no.safetensors")
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran.err
        assert words in ran.err


# ---- read over answers, under system prompts -----------------------------------------------------------------


@pytest.fixture
def persona(tmp_path: Path) -> Path:
    path = tmp_path / "persona.jsonl"
    rows = [
        {
            "positive_system": "Write in capitals!",
            "negative_system": "no.",
            "prompt": [{"role": "user", "content": question}],
            "positive": f"The sea. (A) {question}",
            "negative": f"A question. (A) wide{' and blue' * i}",
        }
        for i, question in enumerate(("What is the sea?", "Who are you?", "Why?"))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["caa", "repe"])
@pytest.mark.parametrize("read_at", ["answer", "first:2", "after:(A)"])
def test_learning_over_answers(
    trimtab: Any, tmp_path: Path, model: Path, persona: Path, name: str, read_at: str
) -> None:
    from trimtab import LM, read_pairs

    out = tmp_path / "s.safetensors"
    options = ("--pairs", persona, "--out", out, "--model", model, "--device", "cpu", "--layers", "1", "--json")
    ran = trimtab("learn", name, *options, "--read-at", read_at)
    assert ran.code == 0, ran.err
    learned = load(out)
    assert learned.card.options["read_at"] == read_at
    function = recipes()[name].load()
    assert learned == function(LM.load(model, device="cpu"), read_pairs(persona), [1], read_at=read_at)
    assert learned != function(LM.load(model, device="cpu"), read_pairs(persona), [1])


def test_the_help_teaches_where_to_read(trimtab: Any) -> None:
    for name in ("--help", "repe"):
        shown = " ".join(trimtab("learn", name, "--help").out.split())
        assert "--read-at" in shown
        assert "first:8" in shown
        assert "after:MARKER" in shown
    assert "positive_system" in trimtab("learn", "--help").out
    assert "read_at" in [option["name"] for option in trimtab("methods", "--json").json["caa"]["options"]]


def test_where_nothing_can_be_read(
    trimtab: Any, tmp_path: Path, model: Path, base: Path, persona: Path, prompt_pairs: Path
) -> None:
    letters = tmp_path / "letters.json"
    row = {
        "question": "Is it?\n (A) Yes\n (B) No",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": "(B)",
    }
    letters.write_text(json.dumps([row]))
    for name, pairs, folder, read_at, said in (
        ("caa", persona, model, "middle", "use last, answer, first:K or after:MARKER"),
        ("caa", persona, model, "after:</think>", "pair 1, positive: the answer has no '</think>' in it"),
        ("repe", persona, model, "after:Why?", "pair 1, positive: the answer has no 'Why?' in it"),
        ("caa", letters, model, "answer", "read at their letter"),
        ("instruct", prompt_pairs, model, "answer", "--read-at applies to answers"),
        ("caa", persona, base, "answer", "pair 1: this tokenizer has no chat template"),
    ):
        out = tmp_path / "s.safetensors"
        ran = trimtab("learn", name, "--pairs", pairs, "--model", folder, "--out", out, "--read-at", read_at)
        assert (ran.code, ran.out) == (2, ""), ran
        assert said in ran.err
        assert not out.exists()


def test_tune_refuses_what_it_would_leave_out(trimtab: Any, tmp_path: Path) -> None:
    rows = {
        "plain texts": {"prompt": [{"role": "user", "content": "a"}], "prompt_without_instruction": "b"},
        "without system prompts": {"prompt": "a", "prompt_without_instruction": "b", "system": "Be kind."},
        "one system prompt": {
            "question": "Is it?",
            "answer_matching_behavior": "(A)",
            "answer_not_matching_behavior": "(B)",
            "positive_system": "Be kind.",
        },
    }
    for said, row in rows.items():
        path = tmp_path / "p.json"
        path.write_text(json.dumps([row, row]))
        check = () if "question" in row else ("--check", "json")
        ran = trimtab("tune", "--pairs", path, *check, "--out", tmp_path / "s.safetensors")
        assert (ran.code, ran.out) == (2, "")
        assert said in ran.err


@pytest.mark.filterwarnings("ignore")
def test_estimators_from_the_command_line(trimtab: Any, tmp_path: Path, model: Path, persona: Path) -> None:
    from trimtab import LM, learn_caa, learn_icv, learn_repe, read_pairs

    lm, pairs, out = LM.load(model, device="cpu"), read_pairs(persona), tmp_path / "e.safetensors"
    common = ["--pairs", persona, "--out", out, "--model", model, "--device", "cpu", "--layers", "1"]
    for name, flag, value, learned in (
        ("caa", "--estimator", "median", learn_caa(lm, pairs, [1], estimator="median")),
        ("icv", "--estimator", "probe", learn_icv(lm, pairs, [1], estimator="probe")),
        ("repe", "--reader", "median", learn_repe(lm, pairs, [1], reader="median")),
    ):
        ran = trimtab("learn", name, *common, flag, value)
        assert ran.code == 0, ran.err
        assert load(out) == learned
        assert value in load(out).card.options.values()
    for name, words in (
        ("caa", "no estimator 'mode'; estimators: mean-difference, median, pca, probe"),
        ("icv", "--estimator 'mode' is not known"),
        ("instruct", "--estimator is for caa, not for instruct"),
    ):
        ran = trimtab("learn", name, *common, "--estimator", "mode")
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
        assert words in ran.err
