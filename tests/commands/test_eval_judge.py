"""`trimtab eval judge`: answers in arms, scored by a server on this machine or by the model itself."""

from __future__ import annotations

import json
import shutil

import pytest
from judging import fails, serving

from trimtab.evaluate.judge import KEY_VARIABLE, MODEL_VARIABLE, URL_VARIABLE
from trimtab.evaluate.records import read_records

pytest.importorskip("openai", reason="needs trimtab[judge]")

ASKED = ["What is the sea?", "Who are you?", "Is it blue or wide?", "Why?"]


@pytest.fixture
def served(monkeypatch):
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    with serving() as state:
        for name, value in ((URL_VARIABLE, state.url), (MODEL_VARIABLE, "m"), (KEY_VARIABLE, "secret")):
            monkeypatch.setenv(name, value)
        yield state


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "asked.txt"
    path.write_text("\n".join(ASKED))
    return path


@pytest.fixture
def judging(model, steering, prompts):
    shared = [
        "eval",
        "judge",
        "--model",
        model,
        "--device",
        "cpu",
        "--prompts",
        prompts,
        "--criterion",
        "Is it polite?",
    ]
    return [*shared, "--steer", steering, "--strength", "-0.5,0.5", "--max-new-tokens", 6]


def answer_in(prompt):
    return prompt.partition("<answer>\n")[2].partition("\n</answer>")[0]


def question_in(prompt):
    return prompt.partition("<question>\n")[2].partition("\n</question>")[0]


def test_arms_are_scored(trimtab, judging, served, tmp_path):
    out = tmp_path / "r.jsonl"
    served.reply = lambda prompt: f"So it is.\nScore: {len(answer_in(prompt)) % 11}"
    judging += ["--system-prompt", "Write yes.", "--random", 1, "--out", out]
    ran = trimtab(*judging, "--json")
    assert ran.code == 0
    assert all(line.startswith("warning: at layer") for line in ran.err.splitlines())  # of doses
    arms = ["unsteered", "s x-0.5", "s x0.5", "system: Write yes.", "s x-0.5, random 1", "s x0.5, random 1"]
    assert list(ran.json["arms"]) == arms
    assert ran.json["judge"]["weak"] is False
    assert ran.json["judge"]["model"] == "m"
    _, records = read_records(out)
    lines = {score["arm"]: score for score in ran.json["scores"]}
    of = {arm: {r.item: len(r.answer) % 11 for r in records if r.arm == arm} for arm in arms}
    for arm in arms:
        assert lines[arm]["mean"]["estimate"] == pytest.approx(sum(of[arm].values()) / 4)
        if arm != "unsteered":
            change = sum(of[arm][item] - of["unsteered"][item] for item in of[arm]) / 4
            assert lines[arm]["difference"]["mean"]["estimate"] == pytest.approx(change)
    sent = [request["messages"][0]["content"] for request in served.requests]
    assert {question_in(text) for text in sent} == set(ASKED)
    assert not any("Write yes." in text.replace(answer_in(text), "") for text in sent)  # the judge sees no arm
    judged = [json.loads(line) for line in (tmp_path / "r-judged.jsonl").read_text().splitlines()]
    assert len(judged) == 6 * 4
    assert all(row["reply"] == f"So it is.\nScore: {len(row['answer']) % 11}" for row in judged)
    assert "secret" not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    shown = trimtab(*judging)
    for word in ("Is it polite?", "judged by m", "s x-0.5, random 1", "minus unsteered", "4 of 4"):
        assert word in shown.out


def test_what_has_no_score_is_counted_and_in_no_mean(trimtab, judging, served, tmp_path):
    page = tmp_path / "r.html"
    served.reply = lambda prompt: "I can't say." if question_in(prompt) == "Why?" else "Score: 4"
    ran = trimtab(*judging, "--scale", "1,5", "--ends", "rude, polite", "--report", page, "--json")
    assert ran.code == 0
    assert all(line.startswith("warning: at layer") for line in ran.err.splitlines())  # of doses
    for facts in ran.json["arms"].values():
        assert (facts["scored"], facts["unreadable"], facts["failed"]) == (3, 1, 0)
    assert {(score["n"], score["mean"]["estimate"]) for score in ran.json["scores"]} == {(3, 4.0)}
    assert {score["pairs"] for score in ran.json["scores"]} == {None, 3}
    assert "from 1 (rude) to 5 (polite)" in served.requests[0]["messages"][0]["content"]
    assert "Is it polite?" in page.read_text()
    assert "s x0.5: can&#x27;t be told from luck: score 4.00 instead of 4.00 on 3 prompts" in page.read_text()
    assert "from 1 (rude) to 5 (polite)" in page.read_text()
    served.reply = lambda prompt: "I can't say."
    ran = trimtab(*judging, "--report", page)
    assert ran.code == 0
    for word in ("none", "0 of 4", "s x0.5: 4 replies unreadable, 0 requests failed"):
        assert word in ran.out


def test_a_run_goes_on_where_it_was_refused(trimtab, judging, served, tmp_path):
    out = tmp_path / "r.jsonl"
    served.reply = lambda prompt: f"Score: {len(answer_in(prompt)) % 11}"
    plain = trimtab(*judging, "--out", tmp_path / "whole.jsonl", "--json")
    sent = len(served.requests)
    served.requests.clear()
    served.faults = [None] * 3 + [fails(401)] * 99
    ran = trimtab(*judging, "--out", out, "--json")
    assert (ran.code, ran.out) == (2, "")
    assert "HTTP 401" in ran.err
    kept = out.read_bytes()
    assert len(read_records(out)[1]) == 3 * 4
    served.faults, done = [], len(list((tmp_path / "r-replies").iterdir()))
    assert 3 <= done < sent
    served.requests.clear()
    ran = trimtab(*judging, "--out", out, "--json")
    assert ran.code == 0
    assert len(served.requests) == sent - done
    assert out.read_bytes() == kept == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "r-judged.jsonl").read_bytes() == (tmp_path / "whole-judged.jsonl").read_bytes()
    assert ran.json["scores"] == plain.json["scores"]


def test_the_model_itself_is_a_weak_judge(trimtab, judging, model, tmp_path):
    long = tmp_path / "long"
    shutil.copytree(model, long)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    judging = [long if part == model else part for part in judging]
    ran = trimtab(*judging, "--limit", 2, "--local", "--json")
    assert ran.code == 0
    assert ran.json["judge"]["weak"] is True
    assert ran.json["judge"]["local"] == "long"
    assert {facts["scored"] + facts["unreadable"] for facts in ran.json["arms"].values()} == {2}
    assert "a weak judge" in trimtab(*judging, "--limit", 1, "--local").out


def test_bad_input(trimtab, judging, served, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("trimtab.commands.model.load_model", load)

    def refused(ran, *words):
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
        for word in words:
            assert word in ran.err

    refused(trimtab(*judging, "--scale", "1"), "--scale '1'", "0,10")
    refused(trimtab(*judging, "--scale", "5,1"), "from a low number to a high one")
    refused(trimtab(*judging, "--ends", "rude"), "--ends 'rude'")
    refused(trimtab(*judging, "--criterion", " "), "criterion")
    refused(trimtab(*judging, "--out", tmp_path / "r.txt"), "*.jsonl")
    refused(trimtab(*judging, "--prompts", tmp_path / "none.txt"), "none.txt")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}))
    refused(trimtab(*judging, "--prompts", rows, "--system-prompt", "z"), "system message already")
    monkeypatch.setenv(URL_VARIABLE, "localhost:8000")
    refused(trimtab(*judging), "'localhost:8000' isn't the URL")
    monkeypatch.delenv(URL_VARIABLE)
    refused(trimtab(*judging), f"set {URL_VARIABLE}", "--local")
    assert not served.requests


def test_help_teaches(trimtab):
    ran = trimtab("eval", "judge", "--help")
    assert ran.code == 0
    assert "TRIMTAB_JUDGE_URL" in ran.out
