"""`trimtab learn … --for llama.cpp`: a steering that fits into a control vector, and how to run it there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target

if TYPE_CHECKING:
    from trimtab.steering import Steering

LLAMA = "llama.cpp"
IMPLIED: dict[str, dict[str, Any]] = {
    "bipo": {},
    "caa": {},
    "distill": {"fit": "gradient", "rank": 0},
    "instruct": {"operation": "add"},
    "random": {},
    "repe": {"control": "add", "keep_norm": False},
    "reps": {},
}
"""The methods that can learn additions to the residual stream, and the options that make them do so."""
SCALE = 0.8
"""The strength to try first where none is suggested for a steering."""

ForOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        help="Learn a steering that this program can run: additions at every token. If --out ends in .gguf, "
        "the program's own file format is written.",
        metavar=LLAMA,
    ),
]


def options_for_program(
    program: str | None, method: str, options: Mapping[str, Any], layers: Any, out: Path
) -> dict[str, Any]:
    """The options that a method needs in addition to learn for this program.

    Args:
        program: The value of `--for`; without it, nothing is added.
        method: The method's name.
        options: The options by name; `None` for one that isn't set.
        layers: The requested layers, if they are numbers.
        out: The file to write.

    Raises:
        TrimtabError: The program isn't known, the method can't learn for it, an option contradicts it, or the file's
            name doesn't fit.
    """
    check_output(program, out)
    if program is None:
        return {}
    if method not in IMPLIED:
        raise TrimtabError(
            f"{method} isn't known to only add to the residual stream, and {LLAMA} can do nothing else; methods for it:"
            f" {', '.join(IMPLIED)}"
        )
    for name, wanted in IMPLIED[method].items():
        allowed = ("add", "unit") if name == "operation" else (wanted,)
        if options.get(name) is not None and options[name] not in allowed:
            flag = f"--{name.replace('_', '-')}"
            raise TrimtabError(
                f"--for {LLAMA} means {flag} {wanted}, and {flag} {options[name]} was given; leave one out"
            )
    if options.get("positions") not in (None, "all"):
        raise TrimtabError(
            f"--for {LLAMA} means --positions all, because it adds at every token, and --positions"
            f" {options['positions']} was given; leave one out"
        )
    if options.get("one_sided"):
        raise TrimtabError(f"--one-sided is for projections, and --for {LLAMA} learns additions; leave one out")
    if isinstance(layers, list) and layers and set(layers) == {0}:
        raise TrimtabError(f"{LLAMA} can't steer block 0; give other --layers")
    return {name: wanted for name, wanted in IMPLIED[method].items() if options.get(name) is None}


def check_output(program: str | None, out: Path) -> None:
    """Raise `TrimtabError` unless the program is known, and a steering for it can be written to this file."""
    if program not in (None, LLAMA):
        raise TrimtabError(f"--for {program!r} is not known; known: {LLAMA}")
    if program is None and out.suffix == ".gguf":
        raise TrimtabError(f"{out}: steerings are saved as .safetensors files; for a .gguf file give --for {LLAMA}")
    check_target(out, ".gguf" if out.suffix == ".gguf" else ".safetensors")


def save_for(program: str | None, steering: Steering, path: Path) -> tuple[Steering, str]:
    """Write a learned steering for this program; returns it as written, and its digest.

    Raises `UnsupportedError` if the program can't represent it.
    """
    from trimtab.files.export import TARGETS
    from trimtab.files.foreign import sum_additions
    from trimtab.files.steering_file import save_steering, steering_digest
    from trimtab.steering import Positions

    if program is None:
        return steering, save_steering(steering, path)
    steering = steering.at(Positions.all())
    sum_additions(steering, f"a control vector for {program}")
    if path.suffix == ".gguf":
        TARGETS[program].write(steering, path)
        return steering, steering_digest(steering)
    return steering, save_steering(steering, path)


def learning_hint(steering: Steering) -> str:
    """A sentence that says how to learn a steering for a control vector or, for ablations, suggests baking."""
    from trimtab.steering import Ablate

    if any(isinstance(edit.operation, Ablate) for edit in steering.edits):
        return "`trimtab bake` can put ablations into a model's weights, and that model can be converted to GGUF"
    cards = steering.card.parts or (steering.card,)
    methods = list(dict.fromkeys(card.method for card in cards if card.method in IMPLIED))
    which = methods[0] if len(methods) == 1 else "|".join(methods or IMPLIED)
    return f"`trimtab learn {which} … --for {LLAMA}` learns steerings that can be written"


def scale_for(steering: Steering) -> float:
    """The strength of the printed commands: the one suggested for what is written, all but block 0, if it is known."""
    from trimtab.report.suggested import suggested_strength

    written = steering.only([layer for layer in steering.layers if layer != 0])
    return suggested_strength(written) or SCALE


def commands_for(program: str | None, path: Path, scale: float) -> list[str]:
    """The commands that run the file in this program at this strength."""
    if program is None:
        return []
    gguf = path.with_suffix(".gguf")
    convert = [] if path.suffix == ".gguf" else [f"trimtab convert {quote(str(path))} {quote(str(gguf))}"]
    return [*convert, f'llama-cli -m MODEL.gguf --control-vector-scaled {quote(str(gguf))}:{scale:g} -p "…"']


def next_steps(program: str | None, path: Path, scale: float) -> list[str]:
    """The same commands as lines of output."""
    lines = [f"  {line}" for line in commands_for(program, path, scale)]
    older = f"(older builds of llama.cpp take {path.with_suffix('.gguf').name} {scale:g}, without the colon)"
    return [f"for {program}:", *lines, f"  {older}"] if lines else []
