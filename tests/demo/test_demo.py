from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from trimtab.commands.demo import (
    BEFORE,
    FALLBACK,
    LIVE,
    NOW,
    SETTINGS,
    TUNED_BLOCKS,
    Answer,
    Regime,
    demo,
    rows_to_show,
    try_setting,
)
from trimtab.data import instructions, queries
from trimtab.evaluate import CONSTRAINTS, paired_bootstrap

app = typer.Typer()
app.command()(demo)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of another kind and depth than the default one, in a folder."""
    from commands.conftest import save_model

    folder = save_model(tmp_path_factory.mktemp("models") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


def test_the_settings_are_of_known_instructions():
    for setting in SETTINGS:
        assert setting.name in CONSTRAINTS
        assert instructions()[setting.name].test
        assert setting.layer_of(TUNED_BLOCKS) == setting.layer < TUNED_BLOCKS


@pytest.mark.parametrize("blocks", [1, 2, 4, 12, 28, 80])
def test_every_depth_has_the_block(blocks):
    assert all(0 <= setting.layer_of(blocks) < blocks for setting in SETTINGS)


def _regime(before: str, after: str) -> Regime:
    """Answers that hold where the letters are `x`."""
    sides = [tuple(Answer(c, c == "x", 0.0, True, c == "x") for c in side) for side in (before, after)]
    flags = [[answer.holds for answer in side] for side in sides]
    return Regime(tuple(before), *sides, paired_bootstrap(*flags))


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [("..x", ".xx", [1, 0]), ("xx", "xx", [0]), ("..", "..", [0]), ("x.", ".x", [1, 0]), ("..", "xx", [0])],
)
def test_what_is_shown_is_a_success_and_a_failure_where_there_are_any(before, after, rows):
    assert rows_to_show(_regime(before, after)) == rows


def test_another_model_learns_all_now_and_says_when_it_cannot(tiny_model):
    ran = CliRunner().invoke(app, ["--model", str(tiny_model), "--limit", "2"])
    assert ran.exit_code == 0, ran.output
    assert "prove nothing" in ran.output
    assert "come with the package" not in ran.output
    for setting in SETTINGS:
        assert setting.shown in ran.output
    for where in ("without", "with"):
        lines = re.findall(rf"{where} it in the prompt: followed in \d of 2 unsteered, \d of 2 steered", ran.output)
        assert len(lines) == len(SETTINGS)
    assert ran.output.count(FALLBACK) == len(SETTINGS)  # a random model writes no answer to learn from


def test_json_is_one_document_and_nothing_else(tiny_model):
    ran = CliRunner().invoke(app, ["--model", str(tiny_model), "--limit", "3", "--json"])
    assert ran.exit_code == 0, ran.output
    document = json.loads(ran.stdout)
    assert document["tuned"] is False
    assert document["learned_from"] == 3
    assert [row["name"] for row in document["instructions"]] == [setting.name for setting in SETTINGS]
    for outcome in document["instructions"]:
        assert (outcome["learned"], outcome["edits"]) == (FALLBACK, 1)
        for regime in ("without", "with"):
            sides = outcome[regime]
            for side in ("unsteered", "steered"):
                assert sides[side]["of"] == len(sides["answers"]) == 3
                assert sides[side]["holds"] == sum(answer[side]["holds"] for answer in sides["answers"])
                assert sides[side]["holds"] <= sides[side]["has_form"]
            assert sides["difference"]["low"] <= sides["difference"]["estimate"] <= sides["difference"]["high"]
        instruction = instructions()[outcome["name"]].test[0]
        assert all(answer["prompt"].endswith(instruction) for answer in outcome["with"]["answers"])
        assert not any(instruction in answer["prompt"] for answer in outcome["without"]["answers"])


def test_a_limit_below_one_is_refused():
    assert CliRunner().invoke(app, ["--limit", "0"]).exit_code == 2


def test_progress_ends_at_its_total(tiny_model):
    from trimtab.lm import LM

    seen = []
    lm = LM.load(tiny_model, device="cpu")
    learn, test = queries("learn")[:3], queries("test")[:2]
    try_setting(lm, SETTINGS[0], learn, test, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long
def test_what_is_learned_live_holds_without_a_word_of_it_in_the_prompt(lm):
    (setting,) = [candidate for candidate in SETTINGS if candidate.name == LIVE]
    result = try_setting(lm, setting, queries("learn"), queries("test")[:8])
    assert (result.learned, result.edits) == (NOW, lm.layout.layers)
    before, after = (sum(answer.holds for answer in side) for side in (result.without.before, result.without.after))
    assert before == 0
    assert after >= 5
    assert 0.002 < result.dose < 0.5


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", [setting.name for setting in SETTINGS if setting.name != LIVE])
def test_what_was_learned_before_holds_without_a_word_of_it_in_the_prompt(lm, name):
    (setting,) = [candidate for candidate in SETTINGS if candidate.name == name]
    result = try_setting(lm, setting, (), queries("test")[:6], shipped=True)
    assert result.learned == BEFORE
    before, after = (sum(answer.holds for answer in side) for side in (result.without.before, result.without.after))
    assert after >= before + 2


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.smoke
@pytest.mark.long
def test_the_whole_demo_on_the_default_model(trimtab):
    ran = trimtab("demo", "--limit", 1, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["tuned"] is True
    assert ran.json["dtype"] == "float32"
    learned = {instruction["name"]: instruction["learned"] for instruction in ran.json["instructions"]}
    assert learned.pop(LIVE) == FALLBACK  # one query is too few
    assert set(learned.values()) == {BEFORE}


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_control_c_ends_it_with_130():
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may ignore it
        "from trimtab.commands import main; print('up', flush=True); raise SystemExit(main(['demo', '--json']))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.readline()
        time.sleep(8)  # it is loading, learning or generating by now
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    assert running.returncode == 130
    assert out == b""
    assert err.decode().strip().splitlines()[-1] == "interrupted"
