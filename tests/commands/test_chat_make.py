"""`/make` in `trimtab chat`: what it is told, what is on and saved afterwards, and that Ctrl-C leaves all as it was."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimtab import LM, Steering, TrimtabError, UnsupportedError, load, make_from_pairs
from trimtab.commands.chat import converse
from trimtab.commands.chat_answer import ask
from trimtab.commands.chat_commands import ChatSetup, Outcome, run_command
from trimtab.commands.chat_make import MakeRequest, name_of, parse_make_request
from trimtab.commands.chat_prompt import candidates
from trimtab.commands.chat_state import Conversation, NamedSteering, Turn
from trimtab.making import verdict
from trimtab.text.pairs import read_pairs

SEA = "What is the sea?"
EMPTY = Conversation(max_tokens=6)


@pytest.fixture(scope="module")
def desk(model: Path) -> ChatSetup:
    return ChatSetup(LM.load(model, device="cpu"))


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.making.from_pairs.STEPS", 3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"The sea {i}?", "positive": f"yes {i} the sea", "negative": f"no no {i}"} for i in range(16)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


class Screen:
    """A screen that keeps what it shows, and lets something happen at each stage of a making."""

    interrupt = True

    def __init__(self, during: Callable[[str, int], None] = lambda *_: None) -> None:
        self.turns: list[Turn] = []
        self.outcomes: list[Outcome] = []
        self.stages: list[str] = []
        self.during = during

    @contextmanager
    def answering(self, compared: bool) -> Iterator[Callable[[str, str], None]]:
        yield lambda _side, _piece: None

    @contextmanager
    def making(self) -> Iterator[Any]:
        def stage(what: str, done: int, total: int) -> None:
            self.stages.append(what)
            self.during(what, done)

        yield stage, lambda _words: None

    def finish_answer(self, turn: Turn, conversation: Conversation) -> None:
        self.turns.append(turn)

    def show_outcome(self, outcome: Outcome) -> None:
        if outcome.note or outcome.shown:
            self.outcomes.append(outcome)


def lines(*typed: str) -> Callable[[Conversation], str | None]:
    left = list(typed)
    return lambda _conversation: left.pop(0) if left else None


# ---- what it is told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "wish"),
    [
        ("be blunt, not flattering", MakeRequest("be blunt, not flattering")),
        ('"be blunt"', MakeRequest("be blunt")),
        ('don\'t be "nice"', MakeRequest('don\'t be "nice"')),
        ("--keep be blunt", MakeRequest("be blunt", keep=True)),
        ("--like 'a tired poet' --unlike clerk", MakeRequest(like="a tired poet", unlike="clerk")),
        ('--from "my pairs.jsonl" --keep', MakeRequest(pairs=Path("my pairs.jsonl"), keep=True)),
    ],
)
def test_what_stands_after_it(typed: str, wish: MakeRequest) -> None:
    assert parse_make_request(typed) == wish


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "takes one of these: TEXT.--like WHO"),
        ("--keep", "takes one of these"),
        ("--like a be blunt", "takes one of these"),
        ("--unlike clerk be blunt", "--unlike goes with --like"),
        ("--loud be blunt", "/make has no --loud; it has"),
        ("--from", "--from has nothing after it"),
        ("--like --unlike x", "--like has nothing after it"),
    ],
)
def test_what_cant_be_wished(typed: str, said: str) -> None:
    with pytest.raises(TrimtabError, match=said):
        parse_make_request(typed)


@pytest.mark.parametrize(
    ("idea", "name"),
    [
        ("pirate", "pirate"),
        ("be blunt, not flattering", "blunt"),
        ("a tired poet", "tired-poet"),
        ("write like a lawyer rather than like a friend", "lawyer"),
        ("answer in a way that nobody who reads it could ever forget", "in-way-that-nobody-who"),
        ("…", "made"),
        ("Größe", "größe"),
    ],
)
def test_names(idea: str, name: str) -> None:
    assert name_of(idea, set()) == name
    assert name_of(idea, {name, f"{name}-2"}) == f"{name}-3"


def test_another_engine(desk: ChatSetup) -> None:
    with pytest.raises(UnsupportedError, match="needs the engine transformers, not vllm"):
        run_command(replace(desk, engine="vllm"), EMPTY, "/make be blunt")


def test_it_is_completed(desk: ChatSetup, file: Path) -> None:
    assert candidates(desk, EMPTY, "/make --l") == ["--like"]
    assert candidates(desk, EMPTY, f"/make --from {file.parent}/m") == [str(file)]
    assert candidates(desk, EMPTY, "/make be bl") == []


# ---- what comes of it --------------------------------------------------------------------------------------


def test_it_is_on_steers_and_is_saved(desk: ChatSetup, file: Path, tmp_path: Path) -> None:
    screen = Screen()
    talk = tmp_path / "talk.json"
    typed = lines(
        f"/make --keep --from {file}", SEA, "/steer mine off", "/steer mine 0.5", SEA, f"/save {talk}", f"/load {talk}",
        "/steer", f"/save {tmp_path / 'alone.safetensors'}", "/steer nowhere",
    )  # fmt: skip
    assert not converse(desk, EMPTY, typed, screen)  # the last line can't be run
    wanted = make_from_pairs(desk.lm, read_pairs(file), name="mine", tokens=8).steering
    made = screen.outcomes[0]
    assert "verdict: " in str(made.shown[0])
    assert made.note == "mine is on at strength 1; /save mine.safetensors writes it"
    for turn, strength in zip(screen.turns, (1.0, 0.5), strict=True):
        (answer,) = desk.lm.generate(
            [[*(m for t in screen.turns[: screen.turns.index(turn)] for m in history(t)), user(SEA)]],
            strength * wanted,
            max_new_tokens=6,
        )
        assert turn.answer.text == answer.text
    beside = tmp_path / "talk.mine.safetensors"
    assert load(beside) == load(tmp_path / "alone.safetensors") == wanted
    assert json.loads(talk.read_text())["settings"]["steerings"][0]["file"] == str(beside)
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine.jsonl", "talk.json", "talk.mine.safetensors", "alone.safetensors",
    }  # fmt: skip


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def history(turn: Turn) -> list[dict[str, str]]:
    return [user(turn.question), {"role": "assistant", "content": turn.answer.text}]


def test_where_nothing_holds_nothing_is_on(desk: ChatSetup, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "MORE_LOOPS", -2.0)
    screen = Screen()
    assert converse(desk, EMPTY, lines(f"/make --from {file}", "/steer"), screen)
    made, listed = screen.outcomes
    assert "verdict: none" in str(made.shown[0])
    assert "nothing was turned on" in made.note
    assert "nothing is on" in listed.note


def test_a_sentence_and_a_persona_are_made_as_the_command_makes_them(
    desk: ChatSetup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ideas: list[Any] = []

    def make(_lm: Any, idea: Any, **_more: Any) -> Any:
        ideas.append(idea)
        raise TrimtabError("barely differ")

    monkeypatch.setattr("trimtab.making.make", make)
    typed = lines("/make shout, not whisper", "/make --like a-parrot --unlike a-mouse", "/make talk like a pirate")
    assert not converse(desk, EMPTY, typed, Screen())
    assert [(idea.name, idea.source) for idea in ideas] == [
        ("shout, not whisper", "sentence"), ("a-parrot", "persona"), ("pirate", "trait pirate"),
    ]  # fmt: skip
    assert capsys.readouterr().err.count("error: barely differ") == 3


def test_what_was_made_stays_after_off_and_load(desk: ChatSetup, steering: Path, tmp_path: Path) -> None:
    made = EMPTY.with_made(NamedSteering("mine", "", load(steering)))
    off = run_command(desk, made, "/steer mine off").conversation
    assert off.active_steerings == ()
    assert "off: mine" in run_command(desk, off, "/steer").note
    assert run_command(desk, off, "/steer mine 2").conversation.label() == "mine:2"
    run_command(desk, EMPTY, f"/save {tmp_path / 'empty.json'}")
    loaded = run_command(desk, off, f"/load {tmp_path / 'empty.json'}").conversation
    assert loaded.find_made("mine") is not None
    saved = run_command(desk, loaded, f"/save {tmp_path / 'x.safetensors'} mine").conversation
    assert saved.made_steerings[0].file == str(tmp_path / "x.safetensors")
    for line, said in (
        (f"/save {tmp_path / 'y.safetensors'} other", "'other' wasn't made here; made: mine"),
        (f"/save {tmp_path / 'y.json'} mine", "a conversation goes into a .json file"),
    ):
        with pytest.raises(TrimtabError, match=said):
            run_command(desk, loaded, line)
    with pytest.raises(TrimtabError, match="nothing was made here"):
        run_command(desk, EMPTY, f"/save {tmp_path / 'y.safetensors'}")


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["learning", "training", "measuring"])
def test_ctrl_c_leaves_all_as_it_was(
    at: str, desk: ChatSetup, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A descent that is interrupted would give the best so far and go on."""
    seen: list[tuple[str, int]] = []

    def press(what: str, done: int) -> None:
        training = bool(done) and seen.count((what, done)) == 3  # no candidate is done, and steps are
        seen.append((what, done))
        if what == at or (at == "training" and training):
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    screen = Screen(press)
    start = EMPTY.with_steering(NamedSteering("old", "old.safetensors", small_push(desk)))
    assert converse(desk, start, lines(SEA, f"/make --keep --from {file}", "/retry", "/steer"), screen)
    assert screen.stages[-1] == ("learning" if at == "training" else at)
    assert "nothing has changed" in capsys.readouterr().err
    first, second = screen.turns
    assert first.answer.token_ids == second.answer.token_ids
    assert [steered.name for steered in second.steerings] == ["old"]
    assert first.answer.text == ask(desk, start, SEA, lambda *_: None).answer.text
    assert len(screen.outcomes) == 1  # of /steer
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    assert all(not module._forward_hooks for module in desk.lm.model.modules())
    assert not any(p.grad is not None for p in desk.lm.model.parameters())


def small_push(desk: ChatSetup) -> Steering:
    import torch

    from trimtab import Add, Edit, Site

    return Steering((Edit(Site(1), Add(torch.ones(desk.lm.layout.width))),))


def test_outside_a_terminal_it_ends_the_program(desk: ChatSetup, file: Path) -> None:
    def press(what: str, done: int) -> None:
        if what == "learning":
            signal.raise_signal(signal.SIGINT)

    screen = Screen(press)
    screen.interrupt = False
    with pytest.raises(KeyboardInterrupt):
        converse(desk, EMPTY, lines(f"/make --from {file}"), screen)
