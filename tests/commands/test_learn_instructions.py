"""`trimtab learn instruct` from a sentence, a word, a length, or everything at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from trimtab.commands.instructions import all_instruction_datasets, base_queries, instruction_dataset
from trimtab.data import COMMON_LANGUAGES, instruction_types
from trimtab.files.steering_file import load_steering
from trimtab.steering import Add, Positions, SetProjection


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose context holds whole sentences in its few tokens."""
    from commands.conftest import save_model

    folder = save_model(tmp_path_factory.mktemp("models") / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    return folder


@pytest.fixture
def learn(trimtab, long_model):
    """`trimtab learn instruct …` from four queries at block 2."""
    fixed = ("learn", "instruct", "--model", long_model, "--device", "cpu", "--layers", 2)
    return lambda *more, count=4: trimtab(*fixed, *(("--queries", count) if count else ()), *more)


def test_a_known_sentence(learn, tmp_path):
    out = tmp_path / "lower.safetensors"
    ran = learn("--instruction", "Answer in all lowercase letters.", "--out", out)
    assert ran.code == 0, ran.err
    assert "recognized as change_case:english_lowercase" in ran.err
    steering = load_steering(out)
    (edit,) = steering.edits
    assert isinstance(edit.operation, SetProjection)
    assert edit.positions == Positions.all_but_first()
    options = steering.card.options
    assert options["instruction"] == "Answer in all lowercase letters."
    assert (options["type"], options["queries"], options["operation"]) == (
        "change_case:english_lowercase",
        "learn",
        "project",
    )
    assert len(options["phrasings"]) == 16
    assert steering.card.measured["pairs"] == 4
    assert steering.card.measured["target"]["2"] == pytest.approx(edit.operation.target, abs=1e-6)


def test_an_unknown_sentence_is_learned_from_alone(learn, tmp_path):
    out = tmp_path / "pirate.safetensors"
    ran = learn("--instruction", "Answer like a pirate.", "--out", out)
    assert ran.code == 0, ran.err
    assert "no known type of instruction" in ran.err
    assert "type" not in load_steering(out).card.options
    lesson = instruction_dataset("Answer like a pirate.", base_queries(3))
    assert [pair.positive for pair in lesson.pairs] == [f"{q} Answer like a pirate." for q in base_queries(3)]


def test_a_lesson_has_the_sentence_and_other_phrasings_of_the_same_values():
    lesson = instruction_dataset("Use five bullet points exactly", base_queries(None))
    assert len(lesson.pairs) == 64
    sentences = {pair.positive.removeprefix(pair.negative).strip() for pair in lesson.pairs}
    assert len(sentences) >= 5
    assert "Use five bullet points exactly" in sentences
    assert all("five" in text or "5" in text for text in sentences)
    assert lesson.options["values"] == {"n": 5}


def test_options(learn, tmp_path):
    out = tmp_path / "s.safetensors"
    options = ("--instruction", "Answer in JSON.", "--out", out, "--json")
    ran = learn(*options, "--positions", "generated", "--one-sided", "--strength", 0.5)
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["type"] == "detectable_format:json_format"
    assert ran.json["operation"] == "project"
    (edit,) = load_steering(out).edits
    assert (edit.strength, edit.positions, edit.operation.one_sided) == (0.5, Positions.generated(), True)
    for operation in ("add", "unit"):
        assert learn(*options, "--operation", operation).code == 0
        (edit,) = load_steering(out).edits
        assert isinstance(edit.operation, Add)
        assert (float(edit.operation.direction.norm()) == pytest.approx(1, abs=1e-5)) == (operation == "unit")


def test_options_for_ones_own_pairs(learn, prompt_pairs, tmp_path):
    out = tmp_path / "s.safetensors"
    options = ("--pairs", prompt_pairs, "--out", out)
    assert learn(*options, count=None).code == 0
    assert isinstance(load_steering(out).edits[0].operation, SetProjection)
    assert learn(*options, "--operation", "add", count=None).code == 0
    (edit,) = load_steering(out).edits
    assert isinstance(edit.operation, Add)
    assert edit.positions == Positions.from_last_prompt_token()


def test_words_and_lengths(learn, tmp_path):
    inside, outside, short = (tmp_path / f"{name}.safetensors" for name in ("in", "out", "short"))
    assert learn("--word", "harbour", "--out", inside).code == 0
    assert learn("--word", "harbour", "--exclude", "--out", outside).code == 0
    assert load_steering(outside) == -1.0 * load_steering(inside)
    assert load_steering(outside).card.options["word"] == "harbour"
    assert learn("--length", "concise", "--operation", "unit", "--strength", 20, "--out", short).code == 0
    (edit,) = load_steering(short).edits
    assert edit.strength == 20
    assert load_steering(short).card.options["length"] == "concise"


def test_a_words_own_logit(trimtab, long_model, tmp_path):
    out = tmp_path / "w70.safetensors"
    arguments = ("learn", "instruct", "--model", long_model, "--device", "cpu", "--logit", "--out", out)
    ran = trimtab(*arguments, "--word", "w70", "--exclude")
    assert ran.code == 0, ran.err
    card = load_steering(out).card
    assert (card.method, card.options["word"], card.options["exclude"]) == ("word-logit", "w70", True)
    for more, words in (
        (("--length", "concise"), "say which word with --word"),
        (("--word", "w70", "--layers", 2), "--layers doesn't apply to --logit"),
    ):
        ran = trimtab(*arguments, *more)
        assert ran.code == 2
        assert words in ran.err


def test_all_at_once(learn, tmp_path):
    folder = tmp_path / "all"
    ran = learn("--all", "--out", folder, "--json", count=3)
    assert (ran.code, ran.err) == (0, "")
    names = {Path(row["file"]).name for row in ran.json["files"]}
    assert names == {path.name for path in folder.iterdir()}
    assert len(names) == len(instruction_types()) - 1 + len(COMMON_LANGUAGES)
    assert {"english_lowercase.safetensors", "response_language_german.safetensors"} <= names
    types = {row["type"] for row in ran.json["files"]}
    assert types == set(instruction_types())
    steerings = {path.stem: load_steering(path) for path in folder.iterdir()}
    assert isinstance(steerings["json_format"].edits[0].operation, SetProjection)
    assert isinstance(steerings["number_words"].edits[0].operation, Add)
    # each is what learning it alone gives
    alone = tmp_path / "alone.safetensors"
    (lesson,) = [
        candidate for candidate in all_instruction_datasets(base_queries(3)) if candidate.name == "english_lowercase"
    ]
    rows = [{"prompt": p.positive, "prompt_without_instruction": p.negative} for p in lesson.pairs]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert learn("--pairs", tmp_path / "p.jsonl", "--out", alone, count=None).code == 0
    mine, theirs = steerings["english_lowercase"].edits[0].operation, load_steering(alone).edits[0].operation
    assert torch.allclose(mine.direction, theirs.direction, atol=1e-4)
    assert mine.target == pytest.approx(theirs.target, rel=1e-3, abs=1e-3)
    shown = learn("--all", "--out", folder, count=3)
    assert f"saved {len(names)} files in {folder}" in shown.out


def test_all_again_gives_the_same_bytes(learn, tmp_path):
    for name in ("a", "b"):
        assert learn("--all", "--out", tmp_path / name, count=2).code == 0
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_bad_input(learn, trimtab, prompt_pairs, tmp_path):
    out = tmp_path / "s.safetensors"

    def refused(*arguments, words, count=4):
        ran = learn(*arguments, count=count)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.count("\n") == 1
        for word in words:
            assert word in ran.err

    sentence = ("--instruction", "Answer in JSON.")
    refused("--out", out, words=["--pairs", "--instruction"])
    refused(*sentence, "--word", "sea", "--out", out, words=["--instruction and --word"])
    refused("--instruction", " ", "--out", out, words=["--instruction is empty"])
    refused("--exclude", *sentence, "--out", out, words=["--word"])
    refused(*sentence, "--operation", "rotate", "--out", out, words=["'rotate'", "project, add, unit"])
    refused(*sentence, "--operation", "add", "--one-sided", "--out", out, words=["--one-sided", "projections"])
    refused("--word", "sea", "--one-sided", "--out", out, words=["--one-sided", "projections"])
    refused("--word", "sea", "--operation", "project", "--out", out, words=["fixed weight"])
    refused(*sentence, "--positions", "nowhere", "--out", out, words=["'nowhere'", "all-but-first"])
    refused("--length", "middling", "--out", out, words=["concise, verbose"])
    refused("--pairs", prompt_pairs, "--out", out, words=["--queries"])
    refused("--all", "--out", out, words=["isn't a folder"])
    refused("--all", "--out", tmp_path / "no" / "where", words=["must exist"])
    caa = trimtab("learn", "caa", *sentence, "--out", out)
    assert caa.code == 2
    assert "--instruction is for instruct" in caa.err
    assert not out.exists()
    assert not (tmp_path / "no").exists()
