"""The slash commands of `trimtab chat`: a line and a conversation give a new conversation, and something to show.

A command is a function in `COMMANDS`. No command prints or asks the model for an answer: `/retry` returns the question
to send again, and `/make` the steering to make.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.commands.chat_make import USAGE, MakeRequest, parse_make_request
from trimtab.commands.chat_state import Conversation, NamedSteering, name_for
from trimtab.commands.terminal import shortened
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.pick import format_layers

if TYPE_CHECKING:
    from rich.console import RenderableType

    from trimtab.files.pick import Pick

MOST_LAYERS = 3
"""`/tokens` colors the answer at this many layers if the steering acts at more and no layer is given."""


@dataclass(frozen=True)
class ChatSetup:
    """What commands use besides the conversation: the model, its engine, and the folder of named steering files."""

    lm: Any
    engine: str = "transformers"
    folder: Path | None = None
    transfer: bool = False

    @property
    def names(self) -> dict[str, Path]:
        """The steering files that are now in the folder, by name."""
        return {} if self.folder is None else {path.stem: path for path in sorted(self.folder.glob("*.safetensors"))}


@dataclass(frozen=True)
class Outcome:
    """The result of a command.

    `note` is a remark, `shown` the requested output, `ask` a question for the model, and `make` a steering to make.
    """

    conversation: Conversation
    note: str = ""
    shown: tuple[RenderableType, ...] = ()
    ask: str | None = None
    make: MakeRequest | None = None
    leave: bool = False


def is_command(line: str) -> bool:
    """Whether a line is a command: it begins with one slash. Two slashes begin a question that starts with one."""
    return line.startswith("/") and not line.startswith("//")


def run_command(setup: ChatSetup, conversation: Conversation, line: str) -> Outcome:
    """Run the command of this line. For a line that can't be run, raises `TrimtabError` and changes nothing."""
    name, _, rest = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        raise TrimtabError(
            f"there is no command /{name}; {_suggestion(name, COMMANDS, '/')}/help lists them; to ask a question that"
            " begins with a slash, type two"
        )
    return COMMANDS[name].run(setup, conversation, rest.strip())


def load_named_steering(
    setup: ChatSetup, conversation: Conversation, file: Path, strength: float = 1.0
) -> NamedSteering:
    """Load a steering file under a name in this conversation. Raises `TrimtabError` if it doesn't fit the model."""
    from trimtab.files.load import load as load_steering

    steering = load_steering(file)
    try:
        setup.lm.check(steering, transfer=setup.transfer)
    except TrimtabError as error:
        raise type(error)(f"{file}: {error}") from None
    return NamedSteering(name_for(file, conversation.active_steerings), str(file), steering, strength)


def steering_from_pick(setup: ChatSetup, conversation: Conversation, pick: Pick) -> NamedSteering:
    """The steering of `FILE[@LAYERS][:STRENGTH]`. Raises `TrimtabError` like `load_named_steering` and `Pick.load`."""
    pick.load_unscaled()  # raises for layers that the file doesn't have
    return replace(load_named_steering(setup, conversation, pick.path, pick.strength), layers=pick.layers)


# ---- steering ----------------------------------------------------------------------------------------------


def _steer(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    words = _words(rest, 0, 2, "steer")
    if not words:
        return _list_steerings(setup, conversation)
    if words[1:] == ["off"]:
        chosen = _active_steering(conversation, words[0])
        return Outcome(conversation.without_steering(chosen.name), f"{chosen.name} is off")
    mine = conversation.find_made(words[0])
    if mine is not None and not mine.file:  # it is in no file yet
        strength = _number(words[1], f"/steer {words[0]}", "off removes it") if len(words) == 2 else 1.0
        mine = replace(mine, strength=strength)
        where = _where(mine.layers_on)
        return Outcome(conversation.with_steering(mine), f"{mine.name} is on at strength {strength:g}, {where}")
    file, strength = _file(setup, conversation, words[0])
    if len(words) == 2:
        strength = _number(words[1], f"/steer {words[0]}", "off removes it")
    steered = load_named_steering(setup, conversation, file, strength)
    where = _where(steered.layers_on)
    return Outcome(conversation.with_steering(steered), f"{steered.name} is on at strength {strength:g}, {where}")


def _strength(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    name, value = _words(rest, 2, 2, "strength")
    steered = _active_steering(conversation, name)
    strength = _number(value, f"/strength {name}", f"/steer {name} off removes it")
    return Outcome(
        conversation.with_steering(replace(steered, strength=strength)), f"{steered.name} is at strength {strength:g}"
    )


def _layer(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    name, *numbers = _words(rest, 2, 99, "layer")
    steered = _active_steering(conversation, name)
    if numbers == ["all"]:
        return Outcome(
            conversation.with_steering(replace(steered, layers=None)), f"{steered.name} acts at all its layers"
        )
    try:
        layers = tuple(sorted({int(part) for text in numbers for part in text.split(",") if part}))
    except ValueError:
        raise TrimtabError(
            f"/layer {name}: {' '.join(numbers)!r} aren't layers; give numbers separated by commas, or all"
        ) from None
    if not layers:
        raise TrimtabError(f"/layer {name}: no layer is named; give numbers separated by commas, or all")
    steered.steering.only(layers)  # raises for layers that it doesn't have
    return Outcome(
        conversation.with_steering(replace(steered, layers=layers)), f"{steered.name} acts at {_where(layers)} only"
    )


def _emphasize(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    if not rest:
        return Outcome(
            conversation, "" if conversation.emphasized else "nothing is emphasized", conversation.emphasized
        )
    if rest == "off":
        return Outcome(replace(conversation, emphasized=()), "nothing is emphasized")
    if setup.engine != "transformers":
        raise UnsupportedError(
            f"/emphasize steers attention, which the engine {setup.engine} doesn't expose; leave --engine out"
        )
    if rest in conversation.emphasized:
        return Outcome(conversation, f"{rest!r} is emphasized already")
    return Outcome(replace(conversation, emphasized=(*conversation.emphasized, rest)), f"{rest!r} is emphasized")


def _system(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    if not rest:
        if conversation.system is None:
            return Outcome(conversation, "there is no system message")
        return Outcome(conversation, shown=(conversation.system,))
    system = None if rest == "off" else rest
    message = "the system message is removed" if system is None else "the system message is set"
    return Outcome(replace(conversation, system=system), message)


def _compare(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    _words(rest, 0, 0, "compare")
    compare = not conversation.compare
    message = "each question is answered unsteered as well" if compare else "answers are no longer compared"
    if compare and not conversation.active_steerings and not conversation.emphasized:
        message += ", once a steering is on: /steer FILE"
    return Outcome(replace(conversation, compare=compare), message)


# ---- the history -------------------------------------------------------------------------------------------


def _undo(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    _words(rest, 0, 0, "undo")
    return Outcome(conversation.without_last_turn(), f"removed: {shortened(conversation.last().question, 60)}")


def _retry(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    _words(rest, 0, 0, "retry")
    last = conversation.last()
    return Outcome(replace(conversation.without_last_turn(), images=last.images), ask=last.question)


def _image(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    from trimtab.text.images import read_image

    words = _words(rest, 0, 99, "image")
    if words == ["off"]:
        return Outcome(replace(conversation, images=()), "the next question has no image")
    if words:
        setup.lm.require("images")
        _ = getattr(setup.lm, "processor", None)  # raises if the model takes no images
        for word in words:
            read_image(Path(word).expanduser(), what=f"/image {word}")
        files = tuple(str(Path(word).expanduser()) for word in words)
        conversation = replace(conversation, images=(*conversation.images, *files))
    about = ", ".join(conversation.images) or "no image; /image FILE adds one"
    return Outcome(conversation, f"the next question is about {about}")


def _reset(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    _words(rest, 0, 0, "reset")
    count = len(conversation.turns)
    message = f"forgot {count} turn{'s' * (count != 1)}; the steerings and the system message stay"
    return Outcome(replace(conversation, turns=()), message)


def _save(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    from trimtab.commands.chat_file import save_conversation, save_made

    name, *which = _words(rest, 1, 2, "save")
    path = Path(name).expanduser()
    if path.suffix == ".safetensors":
        saved = save_made(path, conversation, _made_steering(conversation, which))
        return Outcome(saved, f"wrote {name}")
    if which:
        raise TrimtabError(
            f"/save {name} {which[0]}: a conversation goes into a .json file, a steering into a .safetensors file"
        )
    saved, files = save_conversation(path, conversation, setup.lm.name)
    return Outcome(saved, f"wrote {' and '.join([*map(str, files), name])}")


def _made_steering(conversation: Conversation, which: Sequence[str]) -> NamedSteering:
    """The steering that `/make` made under this name, or the last one."""
    if not conversation.made_steerings:
        raise TrimtabError("nothing was made here, so there is no steering to save; /make TEXT makes one")
    if not which:
        return conversation.made_steerings[-1]
    chosen = conversation.find_made(which[0])
    if chosen is None:
        names = [steered.name for steered in conversation.made_steerings]
        raise TrimtabError(f"{which[0]!r} wasn't made here; {_suggestion(which[0], names)}made: {', '.join(names)}")
    return chosen


def _make(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    if setup.engine != "transformers":
        raise UnsupportedError(
            f"/make learns from activations, which needs the engine transformers, not {setup.engine}"
        )
    return Outcome(conversation, make=parse_make_request(rest))


def _load(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    from trimtab.commands.chat_file import load_conversation

    (name,) = _words(rest, 1, 1, "load")
    loaded, remarks = load_conversation(Path(name).expanduser(), setup)
    loaded = replace(loaded, made_steerings=conversation.made_steerings)
    count = len(loaded.turns)
    return Outcome(loaded, "; ".join([f"read {count} turn{'s' * (count != 1)} from {name}", *remarks]))


# ---- looking at the last answer ----------------------------------------------------------------------------


def _tokens(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    from trimtab.report.tokens import answer_cosines, color_limit, coloured_cosines

    words = _words(rest, 0, 2, "tokens")
    turn = conversation.last()
    if setup.engine != "transformers":
        raise UnsupportedError(f"/tokens reads activations, which needs the engine transformers, not {setup.engine}")
    if not conversation.active_steerings:
        raise TrimtabError("/tokens colors an answer along a steering, and none is on; /steer NAME_OR_FILE")
    steered = _active_steering(conversation, words[0]) if words else conversation.active_steerings[0]
    if not turn.answer.token_ids:
        raise TrimtabError(
            "the last answer's tokens aren't known, because another model generated it; /retry generates a new one"
        )
    layers = _layers_to_colour(steered, words[1] if len(words) == 2 else None)
    earlier = replace(conversation, turns=conversation.turns[:-1])
    prompt = setup.lm.encode(earlier.messages(turn.question), system=turn.system)
    by_layer = [answer_cosines(setup.lm, steered.steering, prompt, turn.answer.token_ids, layer) for layer in layers]
    max_cosine = color_limit(by_layer)
    shown: list[RenderableType] = [
        f"cosine with {steered.name}: blue along it, red against it, full color at ±{max_cosine:.2f}"
    ]
    for cosines in by_layer:
        shown += [f"layer {cosines.layer}", coloured_cosines(cosines, max_cosine)]
    return Outcome(conversation, shown=tuple(shown))


def _layers_to_colour(steered: NamedSteering, wanted: str | None) -> list[int]:
    from trimtab.evaluate.ab import evenly_spaced
    from trimtab.report.sweep import directions

    if wanted is not None:
        if not wanted.isdecimal():
            raise TrimtabError(
                f"/tokens {steered.name}: {wanted!r} isn't a layer; it has {_numbers(steered.steering.layers)}"
            )
        return list(steered.steering.only([int(wanted)]).layers)
    acting = steered.steering.only(steered.layers_on)
    return evenly_spaced(sorted(directions(acting)), MOST_LAYERS)


def _dose(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    from rich.table import Table

    _words(rest, 0, 0, "dose")
    answer = conversation.last().answer
    if answer.doses is None:
        return Outcome(
            conversation, "no dose was measured: neither vLLM nor rejection, which /emphasize uses, measures it"
        )
    if not answer.doses:
        return Outcome(conversation, "the last answer was not steered")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("layer", "site", "dose", "tokens"):
        table.add_column(heading, justify="left" if heading == "site" else "right")
    for dose in answer.doses:
        table.add_row(str(dose.layer), dose.kind, f"{dose.ratio:.3f}", str(dose.tokens))
    return Outcome(conversation, "near 1 and above, text tends to break", (table,))


# ---- the session -------------------------------------------------------------------------------------------


def _help(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    from rich.table import Table

    words = _words(rest, 0, 1, "help")
    name = words[0].removeprefix("/") if words else None
    if name is not None and name not in COMMANDS:
        raise TrimtabError(f"there is no command /{name}; {_suggestion(name, COMMANDS, '/')}/help lists them")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for called, command in COMMANDS.items():
        if name in (None, called):
            table.add_row(f"/{called} {command.takes}".strip(), command.help)
    return Outcome(conversation, shown=(table,))


def _quit(setup: ChatSetup, conversation: Conversation, rest: str) -> Outcome:
    _words(rest, 0, 0, "quit")
    return Outcome(conversation, leave=True)


@dataclass(frozen=True)
class Command:
    """One command: its function, the words that follow it, and its help."""

    run: Callable[[ChatSetup, Conversation, str], Outcome]
    takes: str
    help: str


COMMANDS: dict[str, Command] = {
    "steer": Command(
        _steer,
        "[NAME_OR_FILE [STRENGTH|off]]",
        "Add a steering, change its strength (1 unless given), or remove it. Without arguments: list what is on.",
    ),
    "strength": Command(_strength, "NAME X", "Change the strength of a steering: 2 is twice as hard, -1 the opposite."),
    "layer": Command(_layer, "NAME N[,N…]|all", "Steer only at these of its layers, or at all of them again."),
    "make": Command(
        _make,
        USAGE,
        "Make a steering from a sentence, a persona or pairs, test it, and turn it on if it works. Takes some minutes.",
    ),
    "system": Command(_system, "[TEXT|off]", "Set the system message, or remove it. Without arguments: show it."),
    "emphasize": Command(
        _emphasize,
        "[PHRASE|off]",
        "Steer attention towards a phrase of the conversation, with rejection; off: none. Without arguments: list"
        " them.",
    ),
    "image": Command(
        _image,
        "[FILE …|off]",
        "Add images to the next question, or remove them. Without arguments: list them. For image-text models.",
    ),
    "compare": Command(
        _compare, "", "Turn unsteered answers side by side on or off. The steered answer goes into the history."
    ),
    "undo": Command(_undo, "", "Remove the last question and its answer."),
    "retry": Command(_retry, "", "Answer the last question again, with the current settings."),
    "reset": Command(_reset, "", "Forget the conversation; the steerings stay on."),
    "save": Command(
        _save,
        "FILE.json|FILE.safetensors",
        "Write the conversation and the settings to a file; or a steering that /make made.",
    ),
    "load": Command(_load, "FILE.json", "Continue from a file that /save wrote."),
    "tokens": Command(
        _tokens, "[NAME [LAYER]]", "Color the last answer's tokens by their cosine with a steering's vector."
    ),
    "dose": Command(_dose, "", "Show the norm of the push in the last answer, relative to the activation's, by layer."),
    "help": Command(_help, "[COMMAND]", "List the commands, or explain one."),
    "quit": Command(_quit, "", "Leave, as Ctrl-D does."),
}


# ---- parsing -----------------------------------------------------------------------------------------------


def _words(rest: str, least: int, most: int, name: str) -> list[str]:
    """The words after a command; a name with spaces can be quoted."""
    try:
        words = shlex.split(rest)
    except ValueError:
        raise TrimtabError(f"/{name} {rest}: a quotation mark isn't closed; close it") from None
    if not least <= len(words) <= most:
        usage = f"/{name} {COMMANDS[name].takes}".strip()
        got = f"{len(words)} word{'s' * (len(words) != 1)} after it" if words else "nothing after it"
        raise TrimtabError(f"/{name} got {got}; usage: {usage}")
    return words


def _number(text: str, what: str, otherwise: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise TrimtabError(f"{what}: a strength is a finite number, got {text!r}; {otherwise}")
    return value


def _active_steering(conversation: Conversation, name: str) -> NamedSteering:
    chosen = conversation.find(name)
    if chosen is None:
        names = [steered.name for steered in conversation.active_steerings]
        on = f"on: {', '.join(names)}" if names else "nothing is on"
        raise TrimtabError(f"no steering {name!r} is on; {_suggestion(name, names)}{on}; /steer {name} turns it on")
    return chosen


def _file(setup: ChatSetup, conversation: Conversation, word: str) -> tuple[Path, float]:
    """The file and strength that a word names: a steering that is on or was made, a name in the folder, or a path."""
    steerings = (*conversation.made_steerings, *conversation.active_steerings)
    files = {**setup.names, **{steered.name: Path(steered.file) for steered in steerings if steered.file}}
    head, colon, tail = word.rpartition(":")
    for text, strength in ((word, 1.0), *([(head, _number_or_none(tail))] if colon else [])):
        path = files.get(text, Path(text).expanduser())
        if strength is not None and (text in files or path.is_file()):
            return path, strength
    names = dict.fromkeys([*files, *(steered.name for steered in steerings)])
    known = f"names: {', '.join(names)}" if names else "there is no --steerings folder to look names up in; give a path"
    raise TrimtabError(f"there is no steering or file {word!r}; {_suggestion(word, names)}{known}")


def _number_or_none(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _list_steerings(setup: ChatSetup, conversation: Conversation) -> Outcome:
    from rich.table import Table

    names = dict.fromkeys([*setup.names, *(steered.name for steered in conversation.made_steerings)])
    others = [name for name in names if conversation.find(name) is None]
    note = f"off: {', '.join(others)}" if others else ""
    if not conversation.active_steerings:
        return Outcome(conversation, f"nothing is on{'; ' + note if note else '; /steer FILE adds a steering'}")
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("steering", "strength", "layers", "file"):
        table.add_column(heading, justify="right" if heading == "strength" else "left", overflow="fold")
    for steered in conversation.active_steerings:
        table.add_row(
            steered.name,
            f"{steered.strength:g}",
            _numbers(steered.layers_on),
            steered.file or "made here, not saved yet",
        )
    return Outcome(conversation, note, (table,))


def _where(layers: Sequence[int]) -> str:
    return f"layer{'s' * (len(layers) != 1)} {_numbers(layers)}"


def _numbers(layers: Sequence[int]) -> str:
    """Layers in order, with runs of three or more shortened: `0-29` or `3, 5, 6`."""
    return format_layers(layers).replace(",", ", ") or "none"


def _suggestion(word: str, known: Iterable[str], before: str = "") -> str:
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {before}{near[0]}? " if near else ""
