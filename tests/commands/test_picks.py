"""FILE@LAYERS:STRENGTH wherever a command takes a steering file, and the same as in Python."""

import json

import pytest

from trimtab import LM, load
from trimtab.files.steering_file import steering_digest


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "ab.json"
    keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    ask = "Is {} wide?\n (A) yes\n (B) no"
    rows = [dict(zip(keys, (ask.format(word), "(A)", "(B)"), strict=True)) for word in ("sea", "sky", "sand")]
    path.write_text(json.dumps(rows))
    return path


def test_generate_steers_at_the_layer_that_is_named(trimtab, model, steering):
    options = ("--model", model, "--device", "cpu", "--prompt", "Why?", "--max-new-tokens", 4, "--json")
    ran = trimtab("generate", *options, "--steer", f"{steering}@2:0.8", "--steer", f"{steering}@1")
    assert ran.code == 0
    assert ran.json["steerings"] == [
        {"file": str(steering), "layers": [2], "strength": 0.8},
        {"file": str(steering), "layers": [1], "strength": 1.0},
    ]
    whole = load(steering)
    both = 0.8 * whole.only([2]) + whole.only([1])
    (row,) = ran.json["answers"]
    assert row["edits"] == [str(edit) for edit in both.edits]
    (answer,) = LM.load(model, device="cpu").generate(["Why?"], both, max_new_tokens=4)
    assert row["text"] == answer.text
    assert row["dose"] == answer.applied.dose


@pytest.mark.parametrize("command", ["generate --prompt Hi --steer", "eval ab --data DATA --steer", "inspect"])
def test_a_layer_that_isnt_there_names_those_that_are(trimtab, questions, steering, command):
    ran = trimtab(*command.replace("DATA", str(questions)).split(), f"{steering}@1-3:2")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert f"{steering}@1-3:2: {steering} has nothing at layer 3; it has layers 1,2" in ran.err


def test_arms_are_named_by_their_layers(trimtab, model, questions, steering):
    options = ("--model", model, "--device", "cpu", "--data", questions, "--strength", "0.5,1", "--json")
    steers = [part for tail in ("@1:2", "@2:2", "@1-2", "") for part in ("--steer", f"{steering}{tail}")]
    ran = trimtab("eval", "ab", *options, *steers)
    assert ran.code == 0
    assert list(ran.json["arms"])[1:] == ["s@1", "s@1 x2", "s@2", "s@2 x2", "s@1,2 x0.5", "s@1,2", "s x0.5", "s"]
    arm = ran.json["arms"]["s@2 x2"]
    assert (arm["file"], arm["layers"], arm["strength"]) == (str(steering), [2], 2.0)
    twice = trimtab("eval", "ab", *options, "--steer", f"{steering}@1,2", "--steer", f"{steering}@1-2")
    assert "the same --steer or --system-prompt is given twice" in twice.err


def test_inspect_shows_what_acts(trimtab, steering):
    seen = trimtab("inspect", f"{steering}@2:-0.5", "--json").json
    assert seen["file"] == str(steering)
    assert [(edit["layer"], edit["strength"]) for edit in seen["edits"]] == [(2, -0.5)]
    assert seen["digest"] == steering_digest(-0.5 * load(steering).only([2]))
    assert f"{steering}@2:-0.5: instruct on tiny" in trimtab("inspect", f"{steering}@2:-0.5").out
    two = trimtab("inspect", f"{steering}@1", f"{steering}@2", "--json").json
    assert (two["layers"], two["across"]) == ([1], [2])


def test_ifevals_arms_too(trimtab, model, steering, tmp_path):
    pytest.importorskip("if_verifiable", reason="the checkers aren't installed: pip install 'trimtab[eval]'")
    data = tmp_path / "prompts.jsonl"
    data.write_text(
        json.dumps({"key": 1, "prompt": "Why?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})
    )
    options = ("--model", model, "--device", "cpu", "--data", data, "--max-new-tokens", 2, "--json")
    ran = trimtab("eval", "ifeval", *options, "--steer", f"{steering}@1:0.5", "--steer", f"{steering}@2:0.5")
    assert ran.json["steerings"] == {
        f"s@{layer} x0.5": {"file": str(steering), "layers": [layer], "strength": 0.5} for layer in (1, 2)
    }
