"""`trimtab chat`: a conversation in the terminal, with steering that can change between answers."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trimtab.commands.chat_state import MAX_TOKENS
from trimtab.commands.model import EngineOption, ModelOptions
from trimtab.commands.options import grouped
from trimtab.commands.terminal import note, say
from trimtab.errors import TrimtabError
from trimtab.files.pick import parse_pick

if TYPE_CHECKING:
    from trimtab.commands.chat_commands import ChatSetup
    from trimtab.commands.chat_screen import Screen
    from trimtab.commands.chat_state import Conversation

DECODING = "Decoding"


@grouped
def chat(
    *,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            help="A steering file that is on from the start, with an optional strength after a colon; repeatable.",
            metavar="FILE[@LAYERS][:STRENGTH]",
        ),
    ] = None,
    steerings: Annotated[
        Path | None, typer.Option(help="A folder of steering files, which /steer offers by name.", metavar="FOLDER")
    ] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    emphasize: Annotated[
        list[str] | None,
        typer.Option(
            help="A phrase of the conversation to steer attention towards, with rejection; repeatable.", metavar="TEXT"
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer unsteered as well, side by side.")] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Allow steerings learned on another model of the same width.")
    ] = False,
    max_tokens: Annotated[
        int,
        typer.Option(
            "--max-tokens", "--max-new-tokens", min=1, rich_help_panel=DECODING, help="Maximum tokens per answer."
        ),
    ] = MAX_TOKENS,
    temperature: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=DECODING, help="Sample at this temperature, above 0; the default is greedy decoding."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, rich_help_panel=DECODING, help="With --temperature: repeatable.")
    ] = None,
    loader: ModelOptions,
    engine: EngineOption = "transformers",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object per answer, and nothing else.")] = False,
) -> None:
    """Chat with a model, and change the steering as you go.

    [bold]  trimtab chat --steerings steerings/
      trimtab chat --steer shout.safetensors:1.5 --compare
      trimtab chat --model Qwen/Qwen2.5-1.5B-Instruct --system "Be brief."
      printf 'Hi\\n/steer shout.safetensors\\n/retry\\n' | trimtab chat --json[/bold]

    A line that begins with a slash is a command: /steer shout 2 turns a steering on,
    /strength shout -1 reverses it, /layer shout 9 restricts it to a layer, /compare
    answers unsteered as well, /retry asks again, and /make talk like a pirate makes a
    steering from a sentence; /help lists them all.

    Ctrl-C stops an answer and keeps the part generated so far; Ctrl-D leaves. Lines
    from a pipe are questions and commands, too; the exit code is 2 if one of them
    couldn't be run.
    """
    picks = [parse_pick(text) for text in steer or []]
    for i, pick in enumerate(picks):
        if pick.path in [other.path for other in picks[:i]]:
            raise TrimtabError(f"--steer {pick.path} is given twice; give it once, with both strengths added up")
    if steerings is not None and not steerings.is_dir():
        raise TrimtabError(f"--steerings {steerings} isn't a folder; give a folder of steering files")
    if temperature is None and seed is not None:
        raise TrimtabError("--seed has no effect on greedy decoding; add --temperature")
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise TrimtabError(f"--temperature is a number above 0, got {temperature}; leave it out for greedy decoding")
    if any(not phrase.strip() for phrase in emphasize or []):
        raise TrimtabError("an --emphasize is empty; give it some text of the conversation")
    for pick in picks:
        pick.load_unscaled()  # report a missing or damaged file before a model is loaded
    interactive = sys.stdin.isatty() and sys.stdout.isatty() and not json
    if interactive and find_spec("prompt_toolkit") is None:
        raise TrimtabError("at a terminal, trimtab chat needs prompt_toolkit: pip install 'trimtab[chat]'")
    lm = loader.load(quiet=json, engine=engine)

    from trimtab.commands.chat_answer import STREAMING
    from trimtab.commands.chat_commands import ChatSetup, run_command, steering_from_pick
    from trimtab.commands.chat_screen import JsonScreen, PlainScreen, TerminalScreen
    from trimtab.commands.chat_state import Conversation
    from trimtab.text.chat import has_template

    if not has_template(lm.tokenizer):
        raise TrimtabError(
            f"{lm.name} has no chat template, so it can't hold a conversation; trimtab generate --plain continues a"
            " text"
        )
    setup = ChatSetup(lm, engine, steerings, transfer)
    start = Conversation(system=system, compare=compare, max_tokens=max_tokens, temperature=temperature, seed=seed)
    for pick in picks:
        start = start.with_steering(steering_from_pick(setup, start, pick))
    for phrase in emphasize or []:
        start = run_command(setup, start, f"/emphasize {phrase}").conversation
    if engine not in STREAMING:
        note(f"the engine {engine} doesn't stream, and its answers can't be interrupted", quiet=json)
    if interactive:
        from trimtab.commands.chat_prompt import make_reader

        note(f"{lm.name}; /help lists the commands, Ctrl-D leaves", quiet=False)
        converse(setup, start, make_reader(setup), TerminalScreen())
        return
    if not converse(setup, start, _line, JsonScreen() if json else PlainScreen()):
        raise typer.Exit(2)


def converse(
    setup: ChatSetup, conversation: Conversation, read: Callable[[Conversation], str | None], screen: Screen
) -> bool:
    """Read and run lines until there are no more, or one ends the conversation.

    Args:
        setup: The model, and what else commands work with.
        conversation: The conversation and its steering at the start.
        read: Returns the next line for the current conversation; `None` at the end.
        screen: Where answers and remarks are shown.

    Returns:
        Whether every line could be run. A line that fails changes nothing.
    """
    from trimtab.commands.chat_answer import STREAMING, ask
    from trimtab.commands.chat_commands import is_command, run_command
    from trimtab.commands.chat_make import make_steering
    from trimtab.commands.chat_screen import outcome_of

    all_succeeded = True
    while (line := read(conversation)) is not None:
        line = line.strip()
        if not line:
            continue
        before, question = conversation, line.removeprefix("/")
        try:
            if is_command(line):
                outcome = run_command(setup, conversation, line)
                screen.show_outcome(outcome)
                if outcome.leave:
                    break
                if outcome.make is not None:
                    with screen.making() as (stage, report):
                        make_result = make_steering(setup, outcome.conversation, outcome.make, stage, report)
                    conversation = make_result.conversation
                    screen.show_outcome(outcome_of(make_result))
                    continue
                if outcome.ask is None:
                    conversation = outcome.conversation
                    continue
                before, question = outcome.conversation, outcome.ask
            compared = before.compare and bool(before.active_steerings or before.emphasized)
            with screen.answering(compared) as on_piece:
                turn = ask(setup, before, question, on_piece, interrupt=screen.interrupt)
            conversation = before.with_turn(turn)
            screen.finish_answer(turn, conversation)
        except TrimtabError as error:
            say(f"error: {error}")
            all_succeeded = False
        except KeyboardInterrupt:
            if not screen.interrupt or setup.engine not in STREAMING:
                raise
            note("stopped; nothing has changed", quiet=False)
        except Exception as error:  # at a terminal, one failed answer doesn't end the conversation
            if not screen.interrupt or os.environ.get("TRIMTAB_TRACEBACK"):
                raise
            say(f"error: {type(error).__name__}: {error} (TRIMTAB_TRACEBACK=1 shows where, and ends the conversation)")
    return all_succeeded


def _line(conversation: Conversation) -> str | None:
    """The next line of standard input."""
    return sys.stdin.readline() or None
