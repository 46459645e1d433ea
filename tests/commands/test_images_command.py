"""`generate --image` and `/image` in a chat, with an image-text model loaded from a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pictured import image, image_prompt, pictured

from trimtab import LM, TrimtabError
from trimtab.commands.chat_answer import ask
from trimtab.commands.chat_commands import ChatSetup, run_command
from trimtab.commands.chat_file import load_conversation, save_conversation
from trimtab.commands.chat_state import Conversation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its processor, and an image beside it."""
    lm = pictured("idefics3")
    where = tmp_path_factory.mktemp("sees") / "tiny"
    lm.model.float().save_pretrained(where)
    lm.processor.save_pretrained(where)
    image(1).save(where.parent / "one.png")
    return where


def test_generate(trimtab: Callable[..., Any], folder: Path, model: Path) -> None:
    picture = folder.parent / "one.png"
    words = ["generate", "--prompt", "w10 w11", "--image", picture, "--max-new-tokens", 3, "--json"]
    ran = trimtab(*words, "--model", folder)
    assert ran.code == 0, ran.err
    lm = LM.load(folder, device="cpu")
    (expected,) = lm.generate([image_prompt(image(1), "w10 w11")], max_new_tokens=3)
    (row,) = ran.json["answers"]
    assert (row["text"], row["prompt_tokens"]) == (expected.text, expected.prompt_tokens)
    assert row["messages"][0]["content"][0] == {"type": "image", "path": str(picture)}
    for more, said in (
        (["--model", model], "is a text-only model"),
        (["--model", folder, "--plain"], "--plain doesn't use it"),
        (["--model", folder, "--image", folder / "config.json"], "can't be read"),
    ):
        ran = trimtab(*words, *more)
        assert ran.code != 0
        assert said in ran.err


def test_chat(folder: Path, model: Path, tmp_path: Path) -> None:
    picture = str(folder.parent / "one.png")
    lm = LM.load(folder, device="cpu")
    desk, start = ChatSetup(lm), Conversation(max_tokens=3)
    with pytest.raises(TrimtabError, match="no file"):
        run_command(desk, start, "/image none.png")
    with pytest.raises(TrimtabError, match="is a text-only model"):
        run_command(ChatSetup(LM.load(model, device="cpu")), start, f"/image {picture}")
    begun = run_command(desk, start, f"/image {picture}").conversation
    assert run_command(desk, begun, "/image off").conversation.images == ()
    heard: list[str] = []
    turn = ask(desk, begun, "w10 w11", lambda _side, piece: heard.append(piece))
    (expected,) = lm.generate([image_prompt(image(1), "w10 w11")], max_new_tokens=3)
    assert turn.answer.text == expected.text
    after = begun.with_turn(turn)
    assert after.images == ()
    assert after.messages("w12")[0]["content"][0] == {"type": "image", "path": picture}
    assert run_command(desk, after, "/retry").conversation.images == (picture,)
    save_conversation(tmp_path / "talk.json", after, lm.name)
    assert load_conversation(tmp_path / "talk.json", desk)[0].turns == after.turns
