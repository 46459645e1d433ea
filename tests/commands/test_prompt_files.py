"""Files of prompts in every shape, answers that are begun, and the template's keywords on the command line."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import typer
from commands.conftest import save_model

from trimtab import LM
from trimtab.commands.model import ModelOptions
from trimtab.commands.prompts import gather_prompts
from trimtab.errors import TrimtabError

USER, BEGUN = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The sea"}
SYSTEM = {"role": "system", "content": "Be."}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if thinking is defined and not thinking %}yes yes{% endif %}{% endif %}"
)

FILES: dict[str, tuple[str, Any, list[Any]]] = {
    "a list of texts": ("p.json", ["Why?", "Two\nlines"], ["Why?", "Two\nlines"]),
    "a list of objects": ("p.json", [{"id": 1, "question": "Why?", "answer": "So."}], ["Why?"]),
    "a list of conversations": ("p.json", [[SYSTEM, USER], [USER, BEGUN]], [[SYSTEM, USER], [USER, BEGUN]]),
    "one conversation": ("p.json", [SYSTEM, USER], [[SYSTEM, USER]]),
    "columns": ("p.json", {"instruction": ["Why?", "Who?"], "n": [1, 2]}, ["Why?", "Who?"]),
    "a list in a file without a telling name": ("p.txt", ["Why?", "Who?"], ["Why?", "Who?"]),
    "a list in brackets that is text": ("p.txt", "[aside] Why?\nWho?\n", ["[aside] Why?", "Who?"]),
    "texts and conversations a line": ("p.jsonl", '"Why?"\n[{"role": "user", "content": "Who?"}]\n', ["Why?", [USER]]),
    "commas": ("p.csv", 'id,prompt\n1,"Why, oh why?"\n2,Who?\n', ["Why, oh why?", "Who?"]),
    "semicolons": ("p.csv", "n;text\n1;Why, oh why?\n", ["Why, oh why?"]),
    "tabs": ("p.tsv", 'instruction\tinput\nWhy?\t\nSay "Hi".\t\n', ["Why?", 'Say "Hi".']),
    "a system prompt": ("p.csv", "system,question\nBe.,Who?\n,Why?\n", [[SYSTEM, USER], "Why?"]),
    "a system prompt beside messages": (
        "p.jsonl",
        {"system": "Be.", "messages": [USER, BEGUN]},
        [[SYSTEM, USER, BEGUN]],
    ),
    "a system prompt by its other name": ("p.jsonl", {"system_prompt": "Be.", "Question": "Who?"}, [[SYSTEM, USER]]),
    "ShareGPT": ("p.jsonl", {"conversations": [{"from": "human", "value": "Who?"}]}, [[USER]]),
    "text parts": ("p.json", [{"role": "user", "content": [{"type": "text", "text": "Who?"}]}], [[USER]]),
    "messages as JSON": ("p.csv", 'messages\n"[{""role"": ""user"", ""content"": ""Who?""}]"\n', [[USER]]),
    "choices that the prompt has": ("p.jsonl", {"question": "a or b?", "choices": ["a", "b"]}, ["a or b?"]),
    "nothing but a prompt counts": ("p.jsonl", {"prompt": "Why?", "label": "x", "category": "y"}, ["Why?"]),
}


@pytest.mark.parametrize("case", FILES)
def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, content, expected = FILES[case]
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert gather_prompts([], str(tmp_path / name)) == expected
    if name in ("p.txt", "p.jsonl") and text.lstrip()[0] in "[{":
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert gather_prompts([], "-") == expected


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "Which?", "choices": ["a", "b"]}, "'question' and 'choices' could each belong"),
        ({"prompt": "What is this?", "image": "cat.png"}, "'prompt' and 'image' could"),
        ({"messages": [USER], "tools": [{"type": "function"}]}, "'messages' and 'tools' could"),
        ({"prompt": "Who?", "system": "Be.", "system_prompt": "Be!"}, "'system' and 'system_prompt' are two"),
        ({"prompt": "nan"}, "p.jsonl:1: the prompt is NaN"),
        ({"prompt": "\u200b"}, "p.jsonl:1: the prompt is empty"),
    ],
)
def test_nothing_that_belongs_to_a_prompt_is_dropped(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    with pytest.raises(TrimtabError, match=says):
        gather_prompts([], str(tmp_path / "p.jsonl"))


def test_a_named_column(tmp_path: Path) -> None:
    table = tmp_path / "p.csv"
    table.write_text("prompt,ask,context\nno,Why?,such\n")
    assert gather_prompts(["first"], str(table), "ask") == ["first", "Why?"]
    rows = tmp_path / "p.jsonl"
    rows.write_text(json.dumps({"prompt": "no", "chat": [USER], "system": "Be."}))
    assert gather_prompts([], str(rows), "chat") == [[SYSTEM, USER]]
    assert gather_prompts([], str(rows), "system") == ["Be."]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.Table.from_pylist([{"messages": [USER]}, {"messages": [USER]}]), tmp_path / "p.parquet")
    assert gather_prompts([], str(tmp_path / "p.parquet")) == [[USER], [USER]]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template has a keyword."""
    return save_model(tmp_path_factory.mktemp("models") / "thinker", template=TEMPLATE)


def test_begun_answers_and_keywords(trimtab: Any, thinker: Path, tmp_path: Path) -> None:
    rows = tmp_path / "p.jsonl"
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in ([USER, BEGUN], [USER])))
    arguments = ["generate", "--model", thinker, "--device", "cpu", "--prompts", rows, "--max-new-tokens", 6, "--json"]
    lm = LM.load(thinker, device="cpu")
    for more, template in (([], None), (["--template", "thinking=false"], {"thinking": False})):
        ran = trimtab(*arguments, *more)
        assert ran.code == 0, ran.err
        expected = lm.generate([[USER, BEGUN], [USER]], max_new_tokens=6, template=template)
        assert [row["text"] for row in ran.json["answers"]] == [answer.text for answer in expected]
        assert [row["prompt_tokens"] for row in ran.json["answers"]] == [answer.prompt_tokens for answer in expected]
    noted = trimtab(*[argument for argument in arguments if argument != "--json"])
    assert "1 of 2 prompts end with an answer, which is continued" in noted.err
    assert lm.tokenizer.decode(lm.encode([USER, BEGUN])).endswith("<|assistant|>The sea")


def test_what_is_learned_is_rendered_with_the_keywords(
    trimtab: Any, thinker: Path, answer_pairs: Path, tmp_path: Path
) -> None:
    from trimtab import load

    made = {}
    for name, more in (("on", []), ("off", ["--template", "thinking=false"])):
        out = tmp_path / f"{name}.safetensors"
        options = ["--pairs", answer_pairs, "--layers", "1", "--model", thinker, "--device", "cpu", "--out", out]
        assert trimtab("learn", "caa", *options, *more).code == 0
        made[name] = load(out)
    on, off = (made[name].edits[0].operation.direction for name in ("on", "off"))
    assert not on.equal(off)
    ran = trimtab(
        "generate", "--model", thinker, "--device", "cpu", "--steer", tmp_path / "off.safetensors", "--prompt", "Why?",
        "--max-new-tokens", 2,
    )  # fmt: skip
    assert "a different chat template" in ran.err


def test_keywords_that_can_not_be_given(trimtab: Any, thinker: Path, model: Path, base: Path) -> None:
    arguments = ["generate", "--prompt", "Why?", "--max-new-tokens", 2, "--device", "cpu", "--model"]
    for where, more, said in [
        (thinker, ["--template", "thinkin=false"], "it uses thinking"),
        (model, ["--template", "thinking=false"], "it uses none"),
        (base, ["--template", "thinking=false"], "no chat template that could use 'thinking'"),
        (thinker, ["--template", "thinking"], "write KEYWORD=VALUE"),
        (thinker, ["--template", "thinking=false", "--plain"], "leave one of them out"),
    ]:
        ran = trimtab(*arguments, where, *more)
        assert (ran.code, said in ran.err) == (2, True), ran.err


RENDERING = {
    "make": ("be loud", "--out", "{folder}/x.safetensors"),
    "chat": (),
    "bench": ("--out", "{folder}/run", "--tasks", "traits", "--dry-run"),
    "demo": ("--limit", "1"),
}
"""Commands that render prompts, with what they need besides a model."""


@pytest.mark.parametrize("name", RENDERING)
def test_the_keywords_reach_the_model(trimtab: Any, thinker: Path, tmp_path: Path, name: str) -> None:
    options = [option.format(folder=tmp_path) for option in RENDERING[name]]
    ran = trimtab(name, *options, "--model", thinker, "--template", "thinkin=false")
    assert (ran.code, "it uses thinking" in ran.err) == (2, True), ran.err


def test_every_command_that_loads_a_model_to_prompt_it_takes_keywords() -> None:
    from trimtab.commands import learn_distill, learn_probe
    from trimtab.commands.app import app
    from trimtab.commands.learn_method import command_for
    from trimtab.commands.recipes import require_recipe

    def leaves(command: Any, name: str) -> dict[str, Any]:
        if not hasattr(command, "commands"):
            return {name: command}
        return {k: v for part, inner in command.commands.items() for k, v in leaves(inner, f"{name} {part}").items()}

    commands = leaves(typer.main.get_command(app), "trimtab")
    commands |= {"distill": learn_distill.command(), "probe": learn_probe.command()}
    commands |= {"repe": command_for(require_recipe("repe"))}
    options = {name: {flag for p in command.params for flag in p.opts} for name, command in commands.items()}
    loading = {name for name, flags in options.items() if "--model" in flags}
    assert {"trimtab generate", "trimtab eval ab", "distill", "repe"} < loading
    # `models` runs plain text, and `bake` token ids
    assert {name for name in loading if "--template" not in options[name]} == {"trimtab models", "trimtab bake"}


def test_a_chat_is_rendered_with_the_keywords(trimtab: Any, thinker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = LM.load(thinker, device="cpu").generate(["Why?"], max_new_tokens=6, template={"thinking": False})
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    options = ("--model", thinker, "--device", "cpu", "--max-tokens", 6, "--json")
    ran = trimtab("chat", *options, "--template", "thinking=false")
    assert ran.code == 0, ran.err
    assert ran.json["answer"]["text"] == expected[0].text


def test_a_suggested_command_loads_the_model_with_the_same_keywords() -> None:
    assert ModelOptions().model_argument == ""
    loader = ModelOptions(model="my model", template=["thinking=false", "date=1 May"])
    assert loader.model_argument == "--model 'my model' --template thinking=false --template 'date=1 May' "


def test_a_rendered_prompt_is_noticed(trimtab: Any, thinker: Path) -> None:
    arguments = ["generate", "--model", thinker, "--device", "cpu", "--prompt", "<|user|>Why?\n<|assistant|>"]
    ran = trimtab(*arguments, "--max-new-tokens", 2)
    assert ran.code == 0
    assert "warning: the prompt contains '<|user|>', '<|assistant|>', which the chat template writes itself" in ran.err
    assert "warning" not in trimtab(*arguments, "--plain", "--max-new-tokens", 2).err
