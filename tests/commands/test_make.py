"""`trimtab make`: what it takes, what it writes, and what it says where nothing holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from commands.conftest import save_model
from judging import fails, serving

from trimtab import load
from trimtab.commands.make import EXIT_NOTHING_BETTER, stage_reporter
from trimtab.data import read_trait
from trimtab.making.idea import idea_from_trait

QUESTIONS = [f"What is the number {i}?" for i in range(24)]


@pytest.fixture
def common(tmp_path: Path, model: Path) -> list[Any]:
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(QUESTIONS))
    return ["--questions", questions, "--model", model, "--device", "cpu", "--tokens", 8]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model's answers for and against barely differ: here they all count."""
    from trimtab.making import contrasts

    monkeypatch.setattr(contrasts, "_distinguishable", lambda _lm, answers: list(answers))


def test_what_it_writes_and_says(trimtab: Any, tmp_path: Path, common: list[Any], apart: None) -> None:
    out = tmp_path / "loud.safetensors"
    ran = trimtab("make", "shout, not whisper", *common, "--out", out, "--keep", "--json")
    assert ran.code in (0, EXIT_NOTHING_BETTER), ran.err
    document = ran.json
    assert document["file"] == str(out)
    assert (ran.code == 0) == document["verdict"]["holds"] == (not document["verdict"]["why_not"])
    assert (document["idea"], document["source"]) == ("shout, not whisper", "sentence")
    assert document["candidates"][0]["name"] == document["chosen"]
    assert [example["question"] for example in document["examples"]] == QUESTIONS[1::2]
    card = load(out).card
    assert card.options["idea"] == "shout, not whisper"
    assert card.measured["share_of_prompt"] == document["verdict"]["share_of_prompt"]


def test_where_nothing_holds_nothing_is_written(
    trimtab: Any, tmp_path: Path, common: list[Any], apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.making import verdict

    monkeypatch.setattr(verdict, "LEAST_SHARE", 1e9)
    out = tmp_path / "loud.safetensors"
    ran = trimtab("make", "--like", "a parrot", "--no-distill", *common, "--out", out)
    assert ran.code == EXIT_NOTHING_BETTER
    assert not out.exists()
    assert "verdict: none: " in ran.out
    assert "nothing is written" in ran.out
    assert "answering for and against …" in ran.err
    assert "--keep" in ran.err


def pairs_file(folder: Path, count: int = 20) -> Path:
    rows = [{"prompt": q, "chosen": f"Yes, {q}", "rejected": f"No {i}"} for i, q in enumerate(QUESTIONS[:count])]
    path = folder / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_pairs_of_ones_own(trimtab: Any, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "mine.safetensors"
    options = ["--from", pairs_file(tmp_path), "--model", model, "--device", "cpu", "--tokens", 8, "--keep"]
    ran = trimtab("make", *options, "--no-distill", "--out", out, "--json")
    assert ran.code in (0, EXIT_NOTHING_BETTER), ran.err
    assert (ran.json["idea"], ran.json["source"], ran.json["verdict"]["questions"]) == ("mine", "20 pairs", 10)
    assert ran.json["verdict"]["gain"] == load(out).card.measured["gain"]
    assert "share_of_prompt" not in ran.json["verdict"]
    assert ran.json["examples"][0]["prompted"] is None
    shown = trimtab("make", *options, "--no-distill", "--out", out)
    assert "these pairs have no system prompt" in shown.out
    assert "prompted:" not in shown.out
    assert f"trimtab chat --model {model} --steer {out}" in " ".join(shown.err.split())


def test_for_another_program(trimtab: Any, tmp_path: Path, model: Path) -> None:
    """It is measured as it runs there: at every token, and not at block 0."""
    from trimtab import Positions

    out = tmp_path / "mine.gguf"
    options = ["--from", pairs_file(tmp_path), "--model", model, "--device", "cpu", "--tokens", 8, "--keep"]
    ran = trimtab("make", *options, "--for", "llama.cpp", "--out", out, "--json")
    assert ran.code in (0, EXIT_NOTHING_BETTER), ran.err
    edits = load(out).edits
    assert edits
    assert all(edit.positions == Positions.all() and edit.site.layer > 0 for edit in edits)
    assert [line.split()[0] for line in ran.json["next"]] == ["llama-cli"]


def test_a_card_of_ones_own(trimtab: Any, tmp_path: Path, model: Path, apart: None) -> None:
    card = tmp_path / "loud.json"
    sides = {side: [f"You are {side} {i}." for i in range(5)] for side in ("positive", "negative")}
    questions = {"learn": QUESTIONS[:12], "test": QUESTIONS[12:]}
    card.write_text(json.dumps({"name": "loud", "description": "Loud.", "words": ["loud"], **sides, **questions}))
    out = tmp_path / "loud.safetensors"
    options = ("--model", model, "--device", "cpu", "--tokens", 8, "--no-distill", "--keep", "--json")
    ran = trimtab("make", "--card", card, *options, "--out", out)
    assert ran.code in (0, EXIT_NOTHING_BETTER), ran.err
    assert (ran.json["idea"], ran.json["source"]) == ("loud", "trait loud")
    assert load(out).card.options["source"] == "trait loud"


WRITTEN = {
    "name": "salty",
    "positive": [f"You are salty, {n}." for n in range(5)],
    "negative": [f"You are sweet, {n}." for n in range(5)],
    "questions": QUESTIONS,
}


def test_another_model_writes(
    trimtab: Any, tmp_path: Path, model: Path, apart: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai", reason="needs trimtab[judge]")
    monkeypatch.setenv("TRIMTAB_WRITER_KEY", "open sesame")
    out = tmp_path / "salty.safetensors"
    options = ("--model", model, "--device", "cpu", "--tokens", 8, "--no-distill", "--keep", "--json", "--out", out)
    with serving() as served:
        served.reply = lambda _: json.dumps(WRITTEN)
        ran = trimtab(
            "make",
            "--like",
            "a sailor",
            "--unlike",
            "a clerk",
            "--writer",
            served.url,
            "--writer-model",
            "big",
            *options,
        )
    assert ran.code in (0, EXIT_NOTHING_BETTER), ran.err
    (request,) = served.requests
    assert (request["model"], served.keys) == ("big", ["Bearer open sesame"])
    assert "be like a sailor, not like a clerk" in request["messages"][0]["content"]
    assert (ran.json["idea"], ran.json["source"]) == ("salty", "writer be like a sailor, not like a clerk")
    assert [example["question"] for example in ran.json["examples"]] == QUESTIONS[12:]
    assert load(out).card.options["idea"] == "salty"


def test_a_server_that_refuses_is_called_the_writer(trimtab: Any, tmp_path: Path) -> None:
    pytest.importorskip("openai", reason="needs trimtab[judge]")
    arguments = ("make", "be salty", "--writer-model", "big", "--out", tmp_path / "x.safetensors", "--model", "nowhere")
    with serving() as served:
        served.faults = [fails(401)]
        ran = trimtab(*arguments, "--writer", served.url)
    assert ran.code == 2
    said = " ".join(ran.err.split())
    assert f"the writer big at {served.url} rejected the request: HTTP 401" in said
    assert "check --writer, --writer-model and TRIMTAB_WRITER_KEY" in said
    assert "--writer='nonsense' isn't the URL" in " ".join(trimtab(*arguments, "--writer", "nonsense").err.split())


def test_the_model_itself_writes(trimtab: Any, tmp_path: Path, apart: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.evaluate.judge import LocalJudge, Reply

    requests: list[str] = []

    def ask(self: LocalJudge, prompts: Any, receive: Any) -> None:
        requests.extend(prompt[0]["content"] for prompt in prompts)
        receive(0, Reply(f"```json\n{json.dumps(WRITTEN)}\n```"))

    monkeypatch.setattr(LocalJudge, "ask", ask)
    model, out = save_model(tmp_path / "model", context=4096), tmp_path / "salty.safetensors"
    options = ("--model", model, "--device", "cpu", "--tokens", 8, "--no-distill", "--keep", "--out", out)
    ran = trimtab("make", "be salty", "--writer", "self", *options)
    assert ran.code in (0, EXIT_NOTHING_BETTER), ran.err
    assert ["be salty" in request for request in requests] == [True]
    assert "the model writes the system prompts and the questions …" in ran.err
    assert "salty: from what the writer wrote, 12 questions to learn from and 12 to test" in ran.err
    card = load(out).card
    assert (card.options["idea"], card.options["source"]) == ("salty", "writer be salty")


def test_a_model_that_can_not_write(trimtab: Any, tmp_path: Path, model: Path) -> None:
    out = tmp_path / "x.safetensors"
    ran = trimtab("make", "be salty", "--writer", "self", "--model", model, "--device", "cpu", "--out", out)
    said = " ".join(ran.err.split())
    assert (ran.code, "holds 128 tokens: too few for the request" in said) == (2, True), said
    assert "leave the writer out, and the sentence itself is put into system prompts" in said
    assert not out.exists()


def test_a_trait_file_of_persona_vectors_is_a_card_and_not_pairs(trimtab: Any, tmp_path: Path) -> None:
    path, out = tmp_path / "sly.json", tmp_path / "sly.safetensors"
    sides = [{"pos": f"Be sly {i}.", "neg": f"Be open {i}."} for i in range(5)]
    path.write_text(json.dumps({"instruction": sides, "questions": QUESTIONS, "eval_prompt": "{question}"}))
    ran = trimtab("learn", "caa", "--pairs", path, "--out", out, "--model", "nowhere")
    assert ran.code == 2
    assert f"`trimtab make --card {path}`" in " ".join(ran.err.split())
    ran = trimtab("make", "--card", path, "--out", out, "--model", "nowhere")
    assert "sly.json" not in ran.err
    assert "nowhere" in ran.err  # the card was read: the model is what is missing
    idea = idea_from_trait(read_trait(path))
    assert (idea.positive[0], idea.learn[0]) == ("You are a sly assistant. Be sly 0.", QUESTIONS[0])
    assert (len(idea.positive), len(idea.learn), len(idea.test)) == (5, 12, 12)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), 'describe what you want: a sentence such as "be blunt'),
        ((" ",), "describe what you want"),
        (("be", "loud"), "put a text with spaces in quotes"),
        (("be loud", "--like", "a parrot"), "a sentence and --like both say what is wanted"),
        (("be loud", "--unlike", "a mouse"), "--unlike goes with --like"),
        (("be loud", "--writer", "http://localhost:1/v1"), "--writer and --writer-model go together"),
        (("be loud", "--writer", "self", "--writer-model", "m"), "leave out --writer-model"),
        (("--card", "loud.json", "--writer", "self"), "leave out --card or --writer"),
        (("be loud", "--out", "loud.txt"), r"must be named \*.safetensors"),
        (("--card", "nowhere.json"), "nowhere.json"),
        (("be loud", "--from", "x.jsonl"), "a sentence and --from both say what is wanted"),
        (("--from", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--from", "x.jsonl", "--unlike", "a mouse"), "--from contains everything .* leave out --unlike"),
        (("be loud", "--keys", "positive=a"), r"--keys applies to the columns of pairs; give --from FILE"),
        (("be loud", "--for", "ollama"), "'ollama' is not known"),
        (("be loud", "--out", "x.gguf"), "for a .gguf file give --for llama.cpp"),
    ],
)
def test_errors_come_before_the_model(trimtab: Any, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    out = () if "--out" in arguments else ("--out", tmp_path / "x.safetensors")
    ran = trimtab("make", *arguments, *out, "--model", "nowhere")
    assert ran.code == 2
    ran_err = " ".join(ran.err.split())
    assert re.search(words, ran_err), ran_err


def test_conversations_are_not_questions(trimtab: Any, tmp_path: Path) -> None:
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps([[{"role": "user", "content": question}] for question in QUESTIONS]))
    ran = trimtab(
        "make", "be loud", "--questions", questions, "--out", tmp_path / "x.safetensors", "--model", "nowhere"
    )
    assert (ran.code, "questions are texts, not conversations" in ran.err) == (2, True), ran.err


def test_too_few_questions_are_counted_before_the_model(trimtab: Any, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(QUESTIONS[:14]))
    ran = trimtab(
        "make", "be loud", "--questions", questions, "--out", tmp_path / "x.safetensors", "--model", "nowhere"
    )
    assert ran.code == 2
    assert f"{questions}: 14 questions, and at least 15 are needed" in ran.err


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long
def test_a_pirate_on_the_default_model(trimtab: Any, tmp_path: Path) -> None:
    out = tmp_path / "pirate.safetensors"
    ran = trimtab("make", "talk like a pirate", "--dtype", "float32", "--out", out, "--json")
    assert ran.code == 0, ran.err
    verdict = ran.json["verdict"]
    assert ran.json["source"] == "trait pirate"
    assert verdict["interval"][0] > max(verdict["random"])
    assert verdict["signs"][2] > verdict["signs"][0]
    assert load(out).card.measured["holds"] is True


def test_without_a_terminal_a_stage_is_said_when_it_begins_and_at_each_quarter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = stage_reporter(None, quiet=False)
    stage("answering", 0, 1)
    for done in range(9):
        stage("answering", done, 8)
    stage("learning", 0, 1)
    assert capsys.readouterr().err.splitlines() == [
        *("answering …", "answering: 2 of 8", "answering: 4 of 8", "answering: 6 of 8", "learning …")
    ]
