"""`trimtab generate`: generate answers, steered or not."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.rule import Rule
from rich.text import Text

from trimtab.commands.answer_json import answers_document
from trimtab.commands.model import EngineModelOptions, JsonOption
from trimtab.commands.options import check_picture, grouped
from trimtab.commands.prompts import ColumnOption, attach_images, gather_prompts
from trimtab.commands.schema_file import read_schema
from trimtab.commands.terminal import note, progress_bar, show, side_by_side, write_json
from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target, write_atomically
from trimtab.files.pick import FORM, Pick, parse_pick
from trimtab.text.images import text_of

if TYPE_CHECKING:
    from trimtab.engines.transformers.generate import Generation
    from trimtab.steering import Steering
    from trimtab.text.chat import Prompt

DECODING = "Decoding"
ATTENTION = "Attention and rejection"
DOSED_PROMPTS = 32
"""The maximum number of prompts, evenly chosen from all, on which a dose is measured."""


@grouped
def generate(
    *,
    steer: Annotated[
        list[str] | None,
        typer.Option(
            help="A steering file, trimtab's or another program's; after @, the layers that act (14, 14,15, "
            "10-14); after a colon, a strength to multiply it by. Several are added up.",
            metavar=FORM,
        ),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file (- is standard input) with one prompt per line; or .jsonl, .json, .csv, .tsv or .parquet, "
            "with the prompt in --column.",
            metavar="FILE|-",
        ),
    ] = None,
    column: ColumnOption = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            help="An image that each prompt is about, for image-text models; repeatable (needs trimtab\\[vision]).",
            metavar="FILE",
        ),
    ] = None,
    dose: Annotated[
        float | None,
        typer.Option(
            help="Scale the push to this dose (relative norm over all layers) on these prompts: 0.2 is mild. "
            "Strengths then only set the files' proportions.",
            metavar="NUMBER",
        ),
    ] = None,
    nats: Annotated[
        float | None,
        typer.Option(
            help="Scale the push to this divergence from the unsteered model on these prompts, in nats (95th "
            "percentile over tokens): 0.25 is hardly noticeable, 1 a clear change, 4 a strong one.",
            metavar="NUMBER",
        ),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer unsteered as well, side by side.")] = False,
    positions: Annotated[
        str | None,
        typer.Option(
            help="Steer at these tokens instead of the file's: all, all-but-first, prompt, generated, "
            "from-last-prompt-token, last-prompt-token, opening:K, first:K, window:FROM:TO, span:FROM:TO, "
            "tokens:2,10,-1 (of the prompt; -1 is its last); by meaning: thinking, answer, after:TEXT, "
            "at:TEXT, outside-tools; or several with |, & and ~.",
            metavar="RULE",
        ),
    ] = None,
    emphasize: Annotated[
        list[str] | None,
        typer.Option(
            help="A phrase of every prompt to steer attention towards (DIRECTER); repeatable.",
            metavar="TEXT",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    emphasize_system: Annotated[
        bool,
        typer.Option(
            "--emphasize-system", rich_help_panel=ATTENTION, help="Steer attention towards the system message."
        ),
    ] = False,
    rejection: Annotated[
        bool | None,
        typer.Option(
            help="Weaken or reject any kind of steering where its token is implausible. On by default with "
            "--emphasize.",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            help="With rejection: the minimum share of the likeliest token's probability; 0.5 by default.",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    ladder: Annotated[
        str | None,
        typer.Option(help="With rejection: halve (the layers; the default) or strength.", rich_help_panel=ATTENTION),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="With rejection: auto (the default: depends on the device), optimistic or fused; the answers are "
            "the same except for near-ties.",
            rich_help_panel=ATTENTION,
        ),
    ] = None,
    clean_cache: Annotated[
        bool,
        typer.Option(
            "--clean-cache",
            help="Steer over the unsteered model's cache, so that steering doesn't affect later turns through it; "
            "each token is computed twice.",
            rich_help_panel=DECODING,
        ),
    ] = False,
    trace: Annotated[
        bool,
        typer.Option("--trace", rich_help_panel=ATTENTION, help="Color each token by what rejection did there."),
    ] = False,
    trace_html: Annotated[
        Path | None, typer.Option(help="Write the traces to a page.", metavar="FILE", rich_help_panel=ATTENTION)
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the traces into this .png (needs trimtab\\[plot]).", metavar="FILE", rich_help_panel=ATTENTION
        ),
    ] = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(
            help="A file with a JSON schema: each answer is JSON that matches it, under any steering. An answer "
            "that ends at --max-new-tokens may be cut off (needs trimtab\\[serve]).",
            metavar="FILE",
            rich_help_panel=DECODING,
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message before each prompt.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Prompts are plain text: no chat template.")] = False,
    transfer: Annotated[
        bool, typer.Option("--transfer", help="Allow a steering learned on another model of the same width.")
    ] = False,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "--max-tokens", min=1, rich_help_panel=DECODING, help="Maximum tokens per answer."
        ),
    ] = 128,
    batch_size: Annotated[int, typer.Option(min=1, rich_help_panel=DECODING, help="Prompts at a time.")] = 32,
    sample: Annotated[
        bool, typer.Option("--sample", rich_help_panel=DECODING, help="Sample; the default is greedy decoding.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(rich_help_panel=DECODING, help="With --sample; above 0.")] = None,
    seed: Annotated[int | None, typer.Option(rich_help_panel=DECODING, help="With --sample: repeatable.")] = None,
    loader: EngineModelOptions,
    json: JsonOption = False,
) -> None:
    """Answer prompts, steered or unsteered.

    [bold]  trimtab generate --steer shout.safetensors --prompt "What is the sea?"
      trimtab generate --steer shout.safetensors:2 --compare \\
        --steer rude.safetensors:-0.5 --prompt "Hello" --prompt "Who are you?"
      trimtab generate --steer shout.safetensors@14:0.8 --prompt "Hello"
      trimtab generate --steer shout.safetensors --dose 0.2 --prompt "Hello"
      trimtab generate --steer shout.safetensors --prompts questions.txt --json
      trimtab generate --prompt "Name a fruit. Use capitals." \\
        --emphasize "Use capitals." --compare --trace
      echo "Once upon a time" | trimtab generate --prompts - --plain
      trimtab generate --model model.gguf --engine llamacpp --steer rude.gguf \\
        --prompt "Hello"
      trimtab generate --prompt "Describe Lyon." --json-schema city.json
      trimtab generate --model Qwen/Qwen2-VL-2B-Instruct --image harbour.jpg \\
        --prompt "What is to be seen?"[/bold]

    A file's rows may be objects with "messages"; if the last message is the
    assistant's, it is continued. A row's "system" is its system message.

    A strength multiplies the steering: 2 pushes twice as hard, -1 in the opposite
    direction, 0 not at all; without one a file acts at 1, and if its card suggests
    another, that is printed. @14,15 or @10-14 after the file selects layers. The dose
    reported at the end is the relative norm of the push, ‖edit‖ / ‖activation‖: with
    learned differences, text tends to break above about 0.3 over all layers. --dose
    finds the strength for a given dose, and --nats the one for a given divergence from
    the unsteered model.
    """
    all_prompts = gather_prompts(prompt or [], prompts, column)
    if continued := sum(not isinstance(item, str) and item[-1]["role"] == "assistant" for item in all_prompts):
        note(f"{continued} of {len(all_prompts)} prompts end with an answer, which is continued", quiet=json)
    if image:
        all_prompts = attach_images(all_prompts, image, plain=plain)
    picks = [parse_pick(text) for text in steer or []]
    decoding = _decoding(sample, temperature, seed)
    emphasis = _emphasis(emphasize or [], emphasize_system, system)
    rejecting = _rejection(rejection, beta, ladder, schedule, bool(picks), emphasis is not None)
    for name, shows in (("--trace", trace), ("--trace-html", trace_html), ("--plot", plot)):
        if shows and not rejecting:
            raise TrimtabError(f"{name} shows what rejection did; add --rejection")
    if trace_html is not None:
        check_target(trace_html, ".html")
    check_picture(plot)
    if compare and not picks and emphasis is None:
        raise TrimtabError("--compare needs something to compare with; give --steer FILE or --emphasize TEXT")
    if plain and loader.template:
        raise TrimtabError("--template changes the chat template, and --plain doesn't use it; leave one of them out")
    _check_strength(dose, nats, bool(picks), loader.engine)
    if plain and not image and not all(isinstance(item, str) for item in all_prompts):
        raise TrimtabError("--plain takes prompts as plain text, and these are messages; leave --plain out")
    if system is not None and any(not isinstance(item, str) and item[0]["role"] == "system" for item in all_prompts):
        raise TrimtabError("--system adds a system message, and some prompts already have one; leave one of them out")
    if clean_cache and not picks:
        raise TrimtabError("--clean-cache chooses the cache to steer over; give --steer FILE as well")
    loaded = [pick.load() for pick in picks]
    steering = _steering(loaded, positions)
    schema = {} if json_schema is None else {"json_schema": read_schema(json_schema)}
    lm = loader.load(quiet=json)
    rendering: dict[str, Any] = {"system": system, "chat": False if plain else None}
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "seed": seed,
        **rendering,
        **schema,
        **decoding,
    }
    scaled_to_dose, scaled_to_nats = None, None
    if steering is not None and (dose is not None or nats is not None):
        from trimtab.evaluate.ab import evenly_spaced
        from trimtab.tune import at_dose, at_nats

        sampled_prompts = evenly_spaced(all_prompts, DOSED_PROMPTS)
        if dose is not None:
            scaled_to_dose = at_dose(
                lm, steering, dose, sampled_prompts, transfer=transfer, batch_size=batch_size, **rendering
            )
            steering = scaled_to_dose.steering
        if nats is not None:
            scaled_to_nats = at_nats(lm, steering, nats, sampled_prompts, transfer=transfer, **rendering)
            steering = scaled_to_nats.steering
    with progress_bar("generating", quiet=json) as progress:
        emphasis_options: dict[str, Any] = {} if emphasis is None else {"emphasize": [emphasis] * len(all_prompts)}
        answers = lm.generate(
            all_prompts,
            steering,
            transfer=transfer,
            rejection=rejecting,
            clean_cache=clean_cache,
            progress=progress,
            **emphasis_options,
            **settings,
        )
    unsteered = None
    if compare:
        with progress_bar("unsteered", quiet=json) as progress:
            unsteered = lm.generate(all_prompts, progress=progress, **settings)
    if trace_html is not None:
        from trimtab.report.traces import trace_page

        write_atomically(trace_html, trace_page(lm.tokenizer, all_prompts, answers).encode())
    if plot is not None:
        from trimtab.report.trace_picture import plot_traces

        plot_traces(answers, plot)
    if json:
        document = answers_document(lm.name, picks, all_prompts, answers, unsteered)
        if scaled_to_dose is not None:
            document["dosed"] = {"dose": scaled_to_dose.dose, "factor": scaled_to_dose.factor}
        if scaled_to_nats is not None:
            divergence = scaled_to_nats.divergence
            document["divergence"] = {"p95": divergence.p95, "mean": divergence.mean, "tokens": divergence.tokens}
            document["divergence"] |= {"factor": scaled_to_nats.factor, "monotone": scaled_to_nats.monotone}
        if loader.engine == "vllm":
            for row in document["answers"]:
                row["dose"] = row["overall_dose"] = None  # doses aren't measured there
        write_json(document)
        return
    _print(all_prompts, answers, unsteered, lm.tokenizer if trace else None)
    traced = [answer.trace for answer in answers if answer.trace is not None]
    if traced:
        steps = [step for answer_trace in traced for step in answer_trace.steps]
        opened, changed = sum(s.open for s in steps), sum(s.replaced is not None for s in steps)
        were = "was" if changed == 1 else "were"
        note(f"of {len(steps)} tokens, steering was tried at {opened}, and {changed} {were} changed", quiet=False)
        if trace:
            colours = "green: steered; yellow: more weakly; red: implausible, so not steered; underlined: changed"
            note(colours, quiet=False)
    elif steering is not None:
        edits = list(dict.fromkeys(edit for answer in answers for edit in answer.applied.edits))
        named = "; ".join(edits) if len(edits) <= 2 else f"{len(edits)} edits, such as {edits[0]}"
        measured = loader.engine != "vllm"
        note(f"steered: {named or 'nothing'}{_doses(answers) if measured else ''}", quiet=False)
    if scaled_to_dose is None and scaled_to_nats is None:
        for hint in _hints(picks, loaded):
            note(hint, quiet=False)
    if scaled_to_dose is not None:
        note(f"dose {scaled_to_dose.dose:.2g} is {_strength(picks, scaled_to_dose.factor)}", quiet=False)
    if scaled_to_nats is not None:
        figures = (
            f"{scaled_to_nats.divergence.p95:.2g} nats (95th percentile; mean {scaled_to_nats.divergence.mean:.2g})"
        )
        note(f"{figures} are {_strength(picks, scaled_to_nats.factor)}", quiet=False)


def _strength(picks: Sequence[Pick], factor: float) -> str:
    """The strength factor, and the files with the strengths that result, as they are passed to --steer."""
    at = ", ".join(f"{pick.path}{pick.layer_suffix}:{pick.strength * factor:.3g}" for pick in picks)
    return f"strength × {factor:.3g}: --steer {at}"


def _doses(answers: Sequence[Generation]) -> str:
    """The largest dose at a layer; with several layers, also the dose over all of them."""
    layers = max(len(answer.applied.doses) for answer in answers)
    text = f"; dose {max(answer.applied.dose for answer in answers):.2g}"
    overall = max(answer.applied.overall for answer in answers)
    return text if layers < 2 else f"{text} at a layer, {overall:.2g} over {layers}"


def _check_strength(dose: float | None, nats: float | None, steers: bool, engine: str) -> None:
    if dose is not None and nats is not None:
        raise TrimtabError("--dose and --nats both say how hard to steer; leave one of them out")
    for option, amount, example in (("--dose", dose, "0.2"), ("--nats", nats, "1")):
        if amount is not None and not (math.isfinite(amount) and amount > 0):
            raise TrimtabError(f"{option} is a number above 0, such as {example}, got {amount:g}")
        if amount is not None and not steers:
            raise TrimtabError(f"{option} says how hard to steer; give --steer FILE as well")
    if dose is not None and engine == "vllm":
        raise TrimtabError(
            "--dose needs doses, and the vllm engine doesn't measure them; leave --engine out to find the"
            " strength, then give it as FILE:STRENGTH"
        )
    if nats is not None and engine == "vllm":
        raise TrimtabError(
            f"--nats needs all tokens' probabilities, which the {engine} engine doesn't return; leave --engine out to"
            " find the strength, then give it as FILE:STRENGTH"
        )


def _emphasis(phrases: Sequence[str], whole_system: bool, system: str | None) -> list[Any] | None:
    """What to emphasize in each prompt; `None` for nothing."""
    from trimtab.text.spans import Part

    if any(not phrase.strip() for phrase in phrases):
        raise TrimtabError("an --emphasize is empty; give it some text of the prompt")
    if whole_system and system is None:
        raise TrimtabError("--emphasize-system needs a system message; give --system TEXT")
    return [*phrases, *([Part("system")] if whole_system else [])] or None


def _rejection(
    wanted: bool | None, beta: float | None, ladder: str | None, schedule: str | None, steers: bool, emphasizes: bool
) -> Any:
    """The rejection settings for all prompts, or `False`."""
    from trimtab.decoding.rejection import Rejection

    on = emphasizes if wanted is None else wanted
    settings = {"beta": beta, "ladder": ladder, "schedule": schedule}
    chosen: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    if not on:
        if chosen:
            raise TrimtabError(f"--{next(iter(chosen))} is a setting of rejection; add --rejection")
        return False
    if not steers and not emphasizes:
        raise TrimtabError("--rejection needs a steering to reject; give --steer FILE or --emphasize TEXT")
    return Rejection(**chosen)


def _decoding(sample: bool, temperature: float | None, seed: int | None) -> dict[str, Any]:
    if not sample:
        if temperature is not None or seed is not None:
            name = "--temperature" if temperature is not None else "--seed"
            raise TrimtabError(f"{name} has no effect on greedy decoding; add --sample")
        return {}
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise TrimtabError(f"--temperature is a number above 0, got {temperature}")
    return {"do_sample": True, **({} if temperature is None else {"temperature": temperature})}


def _hints(picks: Sequence[Pick], loaded: Sequence[Steering]) -> list[str]:
    """For each file without a strength, the one that its card suggests, if that isn't 1."""
    from trimtab.report.suggested import suggested_strength

    hints = []
    for pick, steering in zip(picks, loaded, strict=True):
        suggested = None if pick.has_strength else suggested_strength(steering)
        if suggested not in (None, 1.0):
            hints.append(f"{pick} acts at strength 1; its card suggests --steer {quote(f'{pick}:{suggested:g}')}")
    return hints


def _steering(loaded: Sequence[Steering], positions: str | None) -> Steering | None:
    from trimtab.steering import Positions

    if positions is not None and not loaded:
        raise TrimtabError("--positions says where to steer; give --steer FILE as well")
    rule = None if positions is None else Positions.parse(positions)
    if not loaded:
        return None
    total = sum(loaded[1:], loaded[0])
    return total if rule is None else total.at(rule)


def _print(
    prompts: Sequence[Prompt], answers: Sequence[Generation], unsteered: Sequence[Generation] | None, tokenizer: Any
) -> None:
    """Print the answers; with a tokenizer, colored by their traces."""
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if len(prompts) > 1:
            heading = prompt if isinstance(prompt, str) else text_of(prompt[-1]["content"])
            show(*[""][: i > 0], _heading(heading))
        text = Text(answer.text)
        if tokenizer is not None and answer.trace is not None:
            from trimtab.report.traces import coloured

            text = coloured(tokenizer, answer)
        if unsteered is None:
            show(text if tokenizer is not None else answer.text)
            continue
        show(side_by_side(Text(unsteered[i].text), text))


def _heading(text: str) -> Rule | str:
    line = " ".join(text.split())
    return Rule(Text(line), align="left", style="dim") if sys.stdout.isatty() else f"# {line}"
