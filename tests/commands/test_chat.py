"""`trimtab chat` itself: answers are the engine's own, lines of a pipe are read, and an answer can be cut short."""

from __future__ import annotations

import importlib.util
import io
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trimtab import LM, TrimtabError, load
from trimtab.commands.chat import converse
from trimtab.commands.chat_answer import ask
from trimtab.commands.chat_commands import ChatSetup, Outcome, load_named_steering
from trimtab.commands.chat_screen import TerminalScreen
from trimtab.commands.chat_state import Conversation, Turn

SEA = "What is the sea?"


@pytest.fixture(scope="module")
def tiny(model: Path) -> Any:
    return LM.load(model, device="cpu")


@pytest.fixture
def desk(tiny: Any) -> ChatSetup:
    return ChatSetup(tiny)


@pytest.fixture
def on(desk: ChatSetup, steering: Path) -> Conversation:
    start = Conversation(max_tokens=8)
    return start.with_steering(load_named_steering(desk, start, steering, 2.0))


class Heard:
    """A screen that keeps what it is shown, and lets something happen while an answer is given."""

    interrupt = True

    def __init__(self, during: Callable[[int], None] = lambda _n: None) -> None:
        self.pieces: list[tuple[str, str]] = []
        self.turns: list[Turn] = []
        self.outcomes: list[Outcome] = []
        self.during = during

    @contextmanager
    def answering(self, compared: bool) -> Iterator[Callable[[str, str], None]]:
        def hear(side: str, piece: str) -> None:
            self.pieces.append((side, piece))
            self.during(len(self.pieces))

        yield hear

    def finish_answer(self, turn: Turn, conversation: Conversation) -> None:
        self.turns.append(turn)

    def show_outcome(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)


def lines(*typed: str) -> Callable[[Conversation], str | None]:
    left = list(typed)
    return lambda _conversation: left.pop(0) if left else None


class TestAnswers:
    def test_are_generates_own_and_come_in_pieces(self, desk: ChatSetup, on: Conversation, steering: Path) -> None:
        pieces: list[str] = []
        first = ask(desk, replace(on, system="Be."), SEA, lambda _, piece: pieces.append(piece))
        (wanted,) = desk.lm.generate([SEA], 2.0 * load(steering), system="Be.", max_new_tokens=8)
        assert first.answer.text == wanted.text == "".join(pieces)
        assert len(pieces) > 3
        assert first.answer.edits == wanted.applied.edits
        assert first.answer.doses == wanted.applied.doses
        second = ask(desk, on.with_turn(first), "Why?", lambda *_: None)
        history = [
            {"role": "user", "content": SEA},
            {"role": "assistant", "content": wanted.text},
            {"role": "user", "content": "Why?"},
        ]
        (wanted,) = desk.lm.generate([history], 2.0 * load(steering), max_new_tokens=8)
        assert second.answer.text == wanted.text

    def test_samples_are_generates_own(self, desk: ChatSetup, on: Conversation, steering: Path) -> None:
        sampled = replace(on, temperature=0.9, seed=5)
        first = ask(desk, sampled, SEA, lambda *_: None)
        again = ask(desk, replace(sampled, answer_count=1), SEA, lambda *_: None)
        options = {"max_new_tokens": 8, "do_sample": True, "temperature": 0.9}
        for turn, seed in ((first, 5), (again, 6)):
            (wanted,) = desk.lm.generate([SEA], 2.0 * load(steering), seed=seed, **options)
            assert turn.answer.text == wanted.text
            assert turn.seed == seed
        assert first.answer.text != again.answer.text

    def test_emphasis_is_generates_own(self, desk: ChatSetup) -> None:
        pieces: list[str] = []
        emphasized = Conversation(max_tokens=8, emphasized=("the sea",))
        turn = ask(desk, emphasized, SEA, lambda _, piece: pieces.append(piece))
        (wanted,) = desk.lm.generate([SEA], emphasize=["the sea"], max_new_tokens=8)
        assert turn.answer.text == wanted.text == "".join(pieces)
        with pytest.raises(TrimtabError, match=r"isn't in the prompt.*/emphasize off drops"):
            ask(desk, emphasized, "Why?", lambda *_: None)

    def test_compared_ones_are_both_told(self, desk: ChatSetup, on: Conversation) -> None:
        heard = Heard()
        compared = replace(on, compare=True)
        turn = ask(desk, compared, SEA, lambda side, piece: heard.pieces.append((side, piece)))
        (bare,) = desk.lm.generate([SEA], max_new_tokens=8)
        assert turn.unsteered is not None
        assert turn.unsteered.text == bare.text != turn.answer.text
        for side, text in (("unsteered", bare.text), ("steered", turn.answer.text)):
            assert "".join(piece for which, piece in heard.pieces if which == side) == text
        assert compared.with_turn(turn).messages("x")[1]["content"] == turn.answer.text
        alone = ask(desk, Conversation(max_tokens=8, compare=True), SEA, lambda *_: None)
        assert alone.unsteered is None

    def test_a_full_context(self, desk: ChatSetup) -> None:
        used = len(desk.lm.encode(SEA))
        turn = ask(desk, Conversation(max_tokens=1000), SEA, lambda *_: None)
        assert turn.answer.finish_reason == "length"
        assert len(turn.answer.token_ids) == desk.lm.layout.context - used
        with pytest.raises(TrimtabError, match="context is 128; /undo"):
            ask(desk, Conversation().with_turn(turn), SEA, lambda *_: None)

    def test_an_engine_that_doesnt_stream_tells_all_at_once(self, desk: ChatSetup, on: Conversation) -> None:
        pieces: list[str] = []
        turn = ask(replace(desk, engine="vllm"), on, SEA, lambda _, piece: pieces.append(piece))
        assert pieces == [turn.answer.text]

    @pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="needs trimtab[llamacpp]")
    def test_llamacpp_streams(self, desk: ChatSetup, model: Path, tmp_path: Path) -> None:
        from gguf_models import write_llama

        llama = LM.load(write_llama(model, tmp_path / "tiny.gguf"), engine="llamacpp", cache="float32", threads=1)
        pieces: list[str] = []
        start = Conversation(max_tokens=8)
        turn = ask(ChatSetup(llama, "llamacpp"), start, SEA, lambda _, piece: pieces.append(piece))
        assert "".join(pieces) == turn.answer.text == ask(desk, start, SEA, lambda *_: None).answer.text
        assert len(pieces) > 3
        heard = Heard(lambda n: signal.raise_signal(signal.SIGINT) if n == 3 else None)
        assert converse(ChatSetup(llama, "llamacpp"), start, lines(SEA), heard)
        assert heard.turns[0].answer.finish_reason == "interrupted"
        assert heard.turns[0].answer.token_ids == turn.answer.token_ids[: len(heard.turns[0].answer.token_ids)]
        llama.close()


class TestInterrupting:
    def test_it_keeps_what_was_said_and_goes_on(self, desk: ChatSetup, on: Conversation) -> None:
        before = signal.getsignal(signal.SIGINT)
        whole = ask(desk, on, SEA, lambda *_: None).answer
        heard = Heard(lambda n: signal.raise_signal(signal.SIGINT) if n == 3 else None)
        assert converse(desk, on, lines(SEA, "/dose", "Why?"), heard)
        cut, after = heard.turns
        assert cut.answer.finish_reason == "interrupted"
        assert 3 <= len(cut.answer.token_ids) < len(whole.token_ids)
        assert cut.answer.token_ids == whole.token_ids[: len(cut.answer.token_ids)]
        assert cut.answer.doses
        assert heard.outcomes[0].shown
        history = on.with_turn(cut).messages("Why?")
        (wanted,) = desk.lm.generate([history], on.steering(), max_new_tokens=8)
        assert after.answer.text == wanted.text
        assert signal.getsignal(signal.SIGINT) is before

    def test_with_rejection_too(self, desk: ChatSetup) -> None:
        heard = Heard(lambda n: signal.raise_signal(signal.SIGINT) if n == 3 else None)
        assert converse(desk, Conversation(max_tokens=40, emphasized=("the sea",)), lines(SEA), heard)
        assert heard.turns[0].answer.finish_reason == "interrupted"
        assert 3 <= len(heard.turns[0].answer.token_ids) < 12

    def test_twice_drops_the_answer(
        self, desk: ChatSetup, on: Conversation, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def twice(n: int) -> None:
            if n == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        heard = Heard(twice)
        assert converse(desk, on, lines(SEA, "Why?"), heard)
        (only,) = heard.turns
        assert only.question == "Why?"
        assert only.answer.text == ask(desk, on, "Why?", lambda *_: None).answer.text
        assert "nothing has changed" in capsys.readouterr().err

    def test_outside_a_terminal_it_ends_the_program(self, desk: ChatSetup, on: Conversation) -> None:
        heard = Heard(lambda n: signal.raise_signal(signal.SIGINT) if n == 2 else None)
        heard.interrupt = False
        with pytest.raises(KeyboardInterrupt):
            converse(desk, on, lines(SEA), heard)


class TestGoingOn:
    def test_a_line_that_cant_be_run_changes_nothing(
        self, desk: ChatSetup, on: Conversation, capsys: pytest.CaptureFixture[str]
    ) -> None:
        heard = Heard()
        typed = lines("/stear", "/emphasize nowhere", SEA, "/emphasize off", SEA, "//steer", "/quit", "never")
        assert not converse(desk, on, typed, heard)
        assert [turn.question for turn in heard.turns] == [SEA, "/steer"]
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2
        assert "did you mean /steer?" in errors[0]
        assert "'nowhere' isn't in the prompt" in errors[1]

    def test_a_retry_that_fails_keeps_the_turn(self, desk: ChatSetup, on: Conversation) -> None:
        heard = Heard()
        assert not converse(desk, on, lines(SEA, "/emphasize nowhere", "/retry", "/emphasize off", "/retry"), heard)
        assert [turn.question for turn in heard.turns] == [SEA, SEA]
        assert heard.turns[0].answer.text == heard.turns[1].answer.text

    def test_a_fault_at_a_terminal_doesnt_lose_the_conversation(
        self, desk: ChatSetup, on: Conversation, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fault(n: int) -> None:
            if n == 2:
                raise RuntimeError("out of memory")

        heard = Heard(fault)
        assert converse(desk, on, lines(SEA, SEA), heard)
        assert len(heard.turns) == 1
        assert "error: RuntimeError: out of memory" in capsys.readouterr().err
        heard = Heard(fault)
        heard.interrupt = False
        with pytest.raises(RuntimeError):
            converse(desk, on, lines(SEA), heard)


def test_the_terminal_shows_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalScreen().answering(False) as hear:
        hear("steered", "a\x1b[31mb\n\tc\x9b\r")
    assert capsys.readouterr().out == "a␛[31mb\n\tc\ufffd␍\n"


def test_the_terminal_shows_two_columns(capsys: pytest.CaptureFixture[str]) -> None:
    with TerminalScreen().answering(True) as hear:
        hear("unsteered", "the [bold]sea")
        hear("steered", "THE SEA")
    heading, row = capsys.readouterr().out.splitlines()[-2:]
    assert heading.split() == ["unsteered", "steered"]
    assert row.index("THE SEA") == heading.rindex("steered")
    assert "the [bold]sea" in row


# ---- the command -------------------------------------------------------------------------------------------


@pytest.fixture
def piped(trimtab: Callable[..., Any], model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`trimtab chat` with these lines on standard input."""

    def run(text: str, *arguments: object) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return trimtab("chat", "--model", model, "--device", "cpu", "--max-tokens", 6, *arguments)

    return run


def test_lines_of_a_pipe(piped: Callable[..., Any], desk: ChatSetup, steering: Path) -> None:
    ran = piped(f"{SEA}\n\n/steer\nWhy?", "--steer", f"{steering}:2")
    assert ran.code == 0
    start = Conversation(max_tokens=6)
    start = start.with_steering(load_named_steering(desk, start, steering, 2.0))
    first = ask(desk, start, SEA, lambda *_: None)
    second = ask(desk, start.with_turn(first), "Why?", lambda *_: None)
    assert ran.out.startswith(first.answer.text + "\nsteering")
    assert ran.out.endswith(f"\n\n{second.answer.text}\n")


def test_one_json_object_an_answer(piped: Callable[..., Any], steering: Path) -> None:
    ran = piped(
        f"/steer s 2\n/layer s 2\n/steer\n{SEA}\n/retry\n", "--steerings", steering.parent, "--compare", "--json"
    )
    assert ran.code == 0
    first, second = map(json.loads, ran.out.splitlines())
    assert {**first, "seed": None} == second
    assert first["question"] == SEA
    assert first["answer"]["text"] != first["unsteered"]["text"]
    assert first["dose"] == first["answer"]["doses"][0]["ratio"] > 0
    (on,) = first["steerings"]
    assert (on["name"], on["file"], on["strength"], on["layers"]) == ("s", str(steering), 2.0, [2])
    assert str(steering) in "".join(ran.err.split())  # in a table, folded


def test_compared_answers_are_labelled(piped: Callable[..., Any], steering: Path) -> None:
    ran = piped(f"{SEA}\n", "--steer", steering, "--compare")
    assert ran.out.startswith("unsteered:\n")
    assert "\nsteered:\n" in ran.out


def test_the_exit_code_tells_that_a_line_couldnt_be_run(piped: Callable[..., Any]) -> None:
    ran = piped(f"/steer nothing\n{SEA}\n", "--json")
    assert ran.code == 2
    assert len(ran.out.splitlines()) == 1
    assert "error: there is no steering or file 'nothing'" in ran.err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seed", "1"], "--seed has no effect on greedy decoding; add --temperature"),
        (["--temperature", "0"], "--temperature is a number above 0"),
        (["--emphasize", " "], "--emphasize is empty"),
        (["--steerings", "nowhere"], "--steerings nowhere isn't a folder"),
        (["--steer", "nowhere.safetensors"], "there is no file nowhere.safetensors"),
    ],
)
def test_bad_input(piped: Callable[..., Any], arguments: list[str], named: str) -> None:
    ran = piped(SEA, *arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert named in ran.err
    assert ran.err.count("\n") == 1


def test_a_file_that_is_given_twice(piped: Callable[..., Any], steering: Path) -> None:
    ran = piped(SEA, "--steer", steering, "--steer", f"{steering}:2")
    assert ran.code == 2
    assert "is given twice" in ran.err


class Typed(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_needs_prompt_toolkit(trimtab: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.commands.chat.find_spec", lambda _name: None)
    monkeypatch.setattr("sys.stdin", Typed(SEA))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    ran = trimtab("chat")
    assert ran.code == 2
    assert "pip install 'trimtab[chat]'" in ran.err


def test_a_model_without_a_chat_template(trimtab: Callable[..., Any], base: Path) -> None:
    ran = trimtab("chat", "--model", base, "--device", "cpu")
    assert ran.code == 2
    assert "has no chat template" in ran.err
