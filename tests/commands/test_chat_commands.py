"""The slash commands of `trimtab chat`: a conversation in, another one out, and no terminal anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.text import Text

from trimtab import LM, TrimtabError, UnsupportedError
from trimtab.commands.chat_answer import ask
from trimtab.commands.chat_commands import COMMANDS, ChatSetup, Outcome, is_command, run_command
from trimtab.commands.chat_prompt import candidates
from trimtab.commands.chat_state import ChatAnswer, Conversation, Turn

EMPTY = Conversation(max_tokens=6)


@pytest.fixture(scope="module")
def tiny(model: Path) -> Any:
    return LM.load(model, device="cpu")


@pytest.fixture
def folder(tmp_path: Path, steering: Path) -> Path:
    """Two names for the same file."""
    (tmp_path / "steerings").mkdir()
    for name in ("shout", "two words"):
        (tmp_path / "steerings" / f"{name}.safetensors").write_bytes(steering.read_bytes())
    return tmp_path / "steerings"


@pytest.fixture
def desk(tiny: Any, folder: Path) -> ChatSetup:
    return ChatSetup(tiny, folder=folder)


@pytest.fixture
def do(desk: ChatSetup) -> Callable[..., Conversation]:
    """The conversation after these lines, from an empty one or `start`."""

    def run(*lines: str, start: Conversation = EMPTY) -> Conversation:
        for line in lines:
            start = run_command(desk, start, line).conversation
        return start

    return run


def said(*questions: str) -> Conversation:
    """A conversation without a model's answers."""
    turns = [Turn(question, ChatAnswer(f"<{question}>", "stop", 3, (4, 5))) for question in questions]
    return replace(EMPTY, turns=tuple(turns), answer_count=len(turns))


def shown(outcome: Outcome) -> str:
    from rich.console import Console

    console = Console(width=200, markup=False)
    with console.capture() as captured:
        console.print(*outcome.shown)
    return captured.get()


class TestSteer:
    def test_names_files_and_strengths(self, do: Callable[..., Conversation], folder: Path, steering: Path) -> None:
        assert [(o.name, o.strength) for o in do("/steer shout", '/steer "two words" -0.5').active_steerings] == [
            ("shout", 1.0),
            ("two words", -0.5),
        ]
        assert do(f"/steer {steering} 2").label() == "s:2"
        assert do(f"/steer {steering}:3").label() == "s:3"
        assert do("/steer shout:1.5").label() == "shout:1.5"

    def test_again_replaces_and_off_takes_out(self, do: Callable[..., Conversation]) -> None:
        twice = do("/steer shout", '/steer "two words"', "/layer shout 2", "/steer shout 3")
        assert twice.label() == "shout:3 two words:1"
        assert do("/steer shout off", start=twice).label() == "two words:1"

    def test_two_files_of_one_name_are_two(
        self, do: Callable[..., Conversation], steering: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "s.safetensors"
        other.write_bytes(steering.read_bytes())
        both = do(f"/steer {steering}", f"/steer {other} 2")
        assert [steered.name for steered in both.active_steerings] == ["s", str(other)]

    def test_what_acts_is_the_sum(self, do: Callable[..., Conversation], steering: Path) -> None:
        from trimtab import load

        file = load(steering)
        both = do("/steer shout 2", '/steer "two words" -1', "/layer shout 1")
        assert both.steering() == 2.0 * file.only([1]) + -1.0 * file
        assert EMPTY.steering() is None

    def test_alone_it_lists(self, desk: ChatSetup, do: Callable[..., Conversation]) -> None:
        nothing = run_command(desk, EMPTY, "/steer")
        assert "nothing is on" in nothing.note
        assert "shout, two words" in nothing.note
        some = run_command(desk, do("/steer shout 2", "/layer shout 2"), "/steer")
        assert "two words" in some.note
        line = next(line for line in shown(some).splitlines() if line.startswith("shout"))
        assert line.split()[:3] == ["shout", "2", "2"]

    def test_a_steering_of_another_model(self, stranger: Path, steering: Path) -> None:
        lm = LM.load(stranger, device="cpu")
        with pytest.raises(TrimtabError, match=f"{steering}: "):
            run_command(ChatSetup(lm), EMPTY, f"/steer {steering}")
        transferred = run_command(ChatSetup(lm, transfer=True), EMPTY, f"/steer {steering}")
        assert transferred.conversation.label() == "s:1"

    def test_many_layers_are_told_shortly(self, desk: ChatSetup, tmp_path: Path) -> None:
        from trimtab import Add, Edit, Site, Steering, save

        edits = [Edit(Site(layer), Add(torch.ones(32)), strength=0.1) for layer in (0, 1, 2, 3)]
        for layers, wanted in ((4, "layers 0-3"), (2, "layers 0, 1"), (1, "layer 0")):
            save(Steering(tuple(edits[:layers])), tmp_path / "many.safetensors")
            note = run_command(desk, EMPTY, f"/steer {tmp_path / 'many.safetensors'}").note
            assert note == f"many is on at strength 1, {wanted}"
        save(Steering((*edits[:1], *edits[2:])), tmp_path / "many.safetensors")
        assert run_command(desk, EMPTY, f"/steer {tmp_path / 'many.safetensors'}").note.endswith("layers 0, 2, 3")


class TestSettings:
    def test_strength(self, do: Callable[..., Conversation]) -> None:
        assert do("/steer shout", "/layer shout 2", "/strength shout -2").label() == "shout:-2@2"

    def test_layers(self, do: Callable[..., Conversation]) -> None:
        on = do("/steer shout")
        assert do("/layer shout 2", start=on).active_steerings[0].effective_steering.layers == (2,)
        for typed in ("1,2", "2, 1", "1 2"):
            assert do(f"/layer shout {typed}", start=on).active_steerings[0].layers == (1, 2)
        assert do("/layer shout 2", "/layer shout all", start=on) == on

    def test_system(self, desk: ChatSetup, do: Callable[..., Conversation]) -> None:
        conversation = do('/system Don\'t be brief; [be] "loud".')
        assert conversation.system == 'Don\'t be brief; [be] "loud".'
        assert shown(run_command(desk, conversation, "/system")).strip() == conversation.system
        assert do("/system off", start=conversation).system is None
        assert "no system message" in run_command(desk, EMPTY, "/system").note

    def test_emphasize(self, desk: ChatSetup, do: Callable[..., Conversation]) -> None:
        two = do("/emphasize in capitals!", "/emphasize the sea")
        assert two.emphasized == ("in capitals!", "the sea")
        assert do("/emphasize the sea", start=two) == two
        assert "the sea" in shown(run_command(desk, two, "/emphasize"))
        assert do("/emphasize off", start=two).emphasized == ()
        with pytest.raises(UnsupportedError, match="vllm"):
            run_command(replace(desk, engine="vllm"), EMPTY, "/emphasize sea")

    def test_compare_turns_on_and_off(self, do: Callable[..., Conversation]) -> None:
        assert do("/compare").compare
        assert not do("/compare", "/compare").compare


class TestHistory:
    def test_undo_and_reset(self, do: Callable[..., Conversation]) -> None:
        two = said("a", "b")
        assert do("/undo", start=two).turns == two.turns[:1]
        assert do("/steer shout", "/reset", start=two).turns == ()
        assert do("/steer shout", "/reset", start=two).label() == "shout:1"

    def test_retry_asks_the_last_question_again(self, desk: ChatSetup) -> None:
        two = said("a", "b")
        outcome = run_command(desk, two, "/retry")
        assert outcome.ask == "b"
        assert outcome.conversation.turns == two.turns[:1]

    def test_a_retry_has_a_seed_of_its_own(self, desk: ChatSetup) -> None:
        two = replace(said("a", "b"), seed=7)
        assert two.next_seed == 9
        assert run_command(desk, two, "/retry").conversation.next_seed == 9
        assert said("a").next_seed is None

    def test_the_history_alternates(self) -> None:
        assert said("a", "b").messages("c") == [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "<a>"},
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "<b>"},
            {"role": "user", "content": "c"},
        ]


class TestLooking:
    def test_doses(self, desk: ChatSetup, do: Callable[..., Conversation]) -> None:
        on = do("/steer shout 2")
        turn = ask(desk, on, "What is the sea?", lambda *_: None)
        lines = shown(run_command(desk, on.with_turn(turn), "/dose")).splitlines()
        assert [line.split()[:2] for line in lines[1:3]] == [["1", "residual"], ["2", "residual"]]
        assert lines[1].split()[2] == f"{turn.answer.doses[0].ratio:.3f}"
        unsteered = run_command(desk, said("a"), "/dose")
        assert "not steered" in unsteered.note

    def test_doses_that_arent_measured(self, desk: ChatSetup, do: Callable[..., Conversation]) -> None:
        on = do("/steer shout", "/emphasize the sea")
        turn = ask(desk, on, "What is the sea?", lambda *_: None)
        assert turn.answer.edits
        assert turn.answer.dose is None
        assert "no dose was measured" in run_command(desk, on.with_turn(turn), "/dose").note

    def test_tokens_are_coloured_as_the_report_does(self, desk: ChatSetup, do: Callable[..., Conversation]) -> None:
        from trimtab.report.tokens import answer_cosines, color_limit, coloured_cosines

        before = replace(do("/steer shout", "/layer shout 2"), turns=said("Why?").turns, system="Be.")
        turn = ask(desk, before, "What is the sea?", lambda *_: None)
        after = replace(before.with_turn(turn), system="Something else since.")
        steered = before.active_steerings[0]
        prompt = desk.lm.encode(before.messages("What is the sea?"), system="Be.")
        wanted = answer_cosines(desk.lm, steered.steering, prompt, turn.answer.token_ids, 2)
        for line in ("/tokens", "/tokens shout", "/tokens shout 2"):
            *_, layer, text = run_command(desk, after, line).shown
            assert layer == "layer 2"
            assert isinstance(text, Text)
            assert text == coloured_cosines(wanted, color_limit([wanted]))
        all_layers = run_command(desk, run_command(desk, after, "/layer shout all").conversation, "/tokens").shown
        assert [part for part in all_layers if str(part).startswith("layer ")] == ["layer 1", "layer 2"]


class TestFiles:
    def test_what_is_saved_is_what_is_loaded(
        self, desk: ChatSetup, do: Callable[..., Conversation], tmp_path: Path
    ) -> None:
        start = replace(EMPTY, temperature=0.7, seed=3)
        on = do("/steer shout 2", "/layer shout 2", "/system Be.", "/emphasize sea", "/compare", start=start)
        on = replace(on, emphasized=())  # so that the tiny model's answer has doses
        full = on.with_turn(ask(desk, on, "What is the sea?", lambda *_: None))
        full = replace(full, emphasized=("sea",))
        path = tmp_path / "talk.json"
        assert run_command(desk, full, f"/save {path}").note == f"wrote {path}"
        assert run_command(desk, EMPTY, f"/load {path}").conversation == full
        assert json.loads(path.read_text())["turns"][0]["answer"]["doses"][0]["layer"] == 2
        assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []

    def test_another_model_and_a_changed_file_are_remarked(
        self, desk: ChatSetup, do: Callable[..., Conversation], tmp_path: Path, stranger: Path, steering: Path
    ) -> None:
        from trimtab import load, save

        path, file = tmp_path / "talk.json", tmp_path / "own.safetensors"
        save(load(steering), file)
        run_command(desk, do(f"/steer {file}", start=said("a")), f"/save {path}")
        save(2.0 * load(steering), file)
        assert f"{file} has changed since" in run_command(desk, EMPTY, f"/load {path}").note
        elsewhere = ChatSetup(LM.load(stranger, device="cpu"), transfer=True)
        outcome = run_command(elsewhere, EMPTY, f"/load {path}")
        assert "held with tiny, not stranger" in outcome.note
        with pytest.raises(TrimtabError, match="tokens aren't known"):
            run_command(elsewhere, outcome.conversation, "/tokens")

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            (lambda d: d.pop("kind"), "doesn't contain a conversation"),
            (lambda d: d.update(version=2), "version 2"),
            (lambda d: d.pop("settings"), "settings isn't an object"),
            (lambda d: d["settings"].update(max_tokens=0), "settings.max_tokens isn't a whole number from 1"),
            (lambda d: d["settings"].update(temperature=-1), "settings.temperature isn't a number above 0"),
            (lambda d: d["settings"].update(compare=1), "settings.compare isn't true or false"),
            (lambda d: d["settings"]["steerings"][0].update(file="gone.safetensors"), "gone.safetensors"),
            (lambda d: d["settings"]["steerings"][0].update(layers=[3]), "nothing at layer 3"),
            (lambda d: d["settings"]["steerings"][0].update(strength="much"), "settings.steerings[0].strength isn't"),
            (lambda d: d["turns"][0].update(question=None), "turns[0].question isn't a string"),
            (lambda d: d["turns"][0]["answer"].update(token_ids=[-1]), "turns[0].answer.token_ids isn't a list"),
            (lambda d: d["turns"][0]["answer"].update(doses=[{}]), "turns[0].answer.doses[0].layer isn't"),
        ],
    )
    def test_a_malformed_file(
        self, desk: ChatSetup, do: Callable[..., Conversation], tmp_path: Path, change: Callable[[Any], Any], named: str
    ) -> None:
        path = tmp_path / "talk.json"
        run_command(desk, do("/steer shout", start=said("a")), f"/save {path}")
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))
        with pytest.raises(TrimtabError) as caught:
            run_command(desk, EMPTY, f"/load {path}")
        assert named in str(caught.value)

    def test_no_such_file_and_no_json(self, desk: ChatSetup, tmp_path: Path) -> None:
        for line, named in (
            (f"/load {tmp_path / 'none.json'}", "there is no file"),
            (f"/save {tmp_path / 'talk.txt'}", "must be named"),
            (f"/save {tmp_path / 'nowhere' / 'talk.json'}", "can't write"),
        ):
            with pytest.raises(TrimtabError, match=named):
                run_command(desk, EMPTY, line)
        (tmp_path / "broken.json").write_text("{")
        with pytest.raises(TrimtabError, match="not JSON"):
            run_command(desk, EMPTY, f"/load {tmp_path / 'broken.json'}")


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/stear shout", "no command /stear; did you mean /steer?"),
        ("/", "no command /"),
        ("/steer shuot", "no steering or file 'shuot'; did you mean shout?"),
        ("/steer shout much", "a strength is a finite number, got 'much'"),
        ("/steer shout nan", "got 'nan'"),
        ("/steer shout 1 2", "got 3 words after it; usage: /steer [NAME_OR_FILE"),
        ('/steer "shout', "a quotation mark isn't closed"),
        ("/steer shout off", "no steering 'shout' is on; nothing is on"),
        ("/strength shout", "got 1 word after it; usage: /strength NAME X"),
        ("/strength shout 2", "/steer shout turns it on"),
        ("/layer", "got nothing after it"),
        ("/undo", "there is no question yet"),
        ("/undo twice", "usage: /undo"),
        ("/retry", "there is no question yet"),
        ("/tokens", "there is no question yet"),
        ("/dose", "there is no question yet"),
        ("/save", "usage: /save FILE.json"),
        ("/help stear", "no command /stear; did you mean /steer?"),
    ],
)
def test_what_cant_be_run_names_what_is_meant(desk: ChatSetup, line: str, named: str) -> None:
    with pytest.raises(TrimtabError) as caught:
        run_command(desk, EMPTY, line)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/layer shout 3", "nothing at layer 3; it has layers 1, 2"),
        ("/layer shout two", "'two' aren't layers"),
        ("/layer shout ,", "no layer is named"),
        ("/strength shuot 2", "did you mean shout? on: shout"),
        ("/tokens shout 3", "nothing at layer 3"),
        ("/tokens shout x", "'x' isn't a layer; it has 1, 2"),
    ],
)
def test_what_cant_be_done_with_what_is_on(
    desk: ChatSetup, do: Callable[..., Conversation], line: str, named: str
) -> None:
    with pytest.raises(TrimtabError) as caught:
        run_command(desk, do("/steer shout", start=said("a")), line)
    assert named in str(caught.value)


def test_tokens_needs_something_that_is_on(desk: ChatSetup) -> None:
    with pytest.raises(TrimtabError, match="none is on"):
        run_command(desk, said("a"), "/tokens")
    with pytest.raises(UnsupportedError, match="needs the engine transformers, not llamacpp"):
        run_command(replace(desk, engine="llamacpp"), said("a"), "/tokens")


def test_help_names_every_command(desk: ChatSetup) -> None:
    overview = shown(run_command(desk, EMPTY, "/help"))
    for name, command in COMMANDS.items():
        assert f"/{name}" in overview
        assert command.help in overview
    undo = shown(run_command(desk, EMPTY, "/help undo"))
    assert undo.count("\n") == 1
    assert run_command(desk, EMPTY, "/quit").leave


def test_the_page_names_every_command() -> None:
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text()
    for name in COMMANDS:
        assert f"`/{name}" in page


def test_two_slashes_begin_a_question() -> None:
    assert is_command("/steer")
    assert not is_command("//etc/passwd is what?")
    assert not is_command("What is /etc?")


class TestCompletion:
    @pytest.mark.parametrize(
        ("before", "wanted"),
        [
            ("/st", ["/steer", "/strength"]),
            ("What is /st", []),
            ("//st", []),
            ("/steer sh", ["shout"]),
            ("/steer shout o", ["off"]),
            ("/strength ", ["shout"]),
            ("/layer shout ", ["all", "1", "2"]),
            ("/tokens shout ", ["1", "2"]),
            ("/layer other ", ["all"]),
            ("/help un", ["undo"]),
            ("/system ", ["off"]),
            ("/undo ", []),
        ],
    )
    def test_words(self, desk: ChatSetup, do: Callable[..., Conversation], before: str, wanted: list[str]) -> None:
        assert candidates(desk, do("/steer shout"), before) == wanted

    def test_files(self, desk: ChatSetup, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "talk.json").write_text("{}")
        (tmp_path / "notes.txt").write_text("")
        monkeypatch.chdir(tmp_path)
        assert candidates(desk, EMPTY, "/load ") == ["steerings/", "talk.json"]
        assert candidates(desk, EMPTY, "/load t") == ["talk.json"]
        assert candidates(desk, EMPTY, "/steer steerings/s") == ["steerings/shout.safetensors"]
        assert candidates(desk, EMPTY, f"/steer {tmp_path}/steerings/two") == [
            f"'{tmp_path}/steerings/two words.safetensors'"
        ]
        assert candidates(desk, EMPTY, "/load nowhere/") == []
        assert candidates(desk, EMPTY, "/steer tw") == ["'two words'"]
