"""The syntax `FILE[@LAYERS][:STRENGTH]`: a steering file, which of its layers act, and a factor for its strength."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.steering import Steering

FORM = "FILE[@LAYERS][:STRENGTH]"
SUFFIXES = (".safetensors", ".gguf", ".pt", ".npy", ".npz", ".svec", ".json")
_SPAN = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class Pick:
    """A steering file as named on a command line.

    `layers` are the layers of the file that act, `None` for all; `strength` is the factor for the steering, and
    `has_strength` says whether one was typed. `option` is the name of the command-line option, for error messages.
    """

    path: Path
    layers: tuple[int, ...] | None = None
    strength: float = 1.0
    option: str = "--steer"
    has_strength: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.path}{self.layer_suffix}" + ("" if self.strength == 1 else f":{self.strength:g}")

    @property
    def layer_suffix(self) -> str:
        """The layers in the syntax of the command line: `@10-12,15`, or nothing for all of the file's."""
        return "" if self.layers is None else f"@{format_layers(self.layers)}"

    def load(self) -> Steering:
        """The steering: `strength * trimtab.load(path).only(layers)`. Raises as `load_unscaled` does."""
        return self.strength * self.load_unscaled()

    def load_unscaled(self) -> Steering:
        """The steering before it is multiplied by the strength.

        Raises:
            TrimtabError: The file can't be loaded, or has nothing at one of the layers; the message lists those it has.
        """
        from trimtab.files.load import load

        steering = load(self.path)
        if self.layers is None:
            return steering
        if missing := [layer for layer in self.layers if layer not in steering.layers]:
            has = format_layers(steering.layers) or "none"
            raise TrimtabError(
                f"{self.option} {self}: {self.path} has nothing at layer {missing[0]}; it has layers {has}"
            )
        return steering.only(self.layers)

    def to_json(self) -> dict[str, Any]:
        """The pick as a JSON value; `layers` is null if all of the file's layers act."""
        return {
            "file": str(self.path),
            "layers": None if self.layers is None else list(self.layers),
            "strength": self.strength,
        }


def parse_pick(text: str, option: str = "--steer") -> Pick:
    """Parse `FILE`, `FILE:0.8`, `FILE@14`, `FILE@14,15:0.8` or `FILE@10-14`.

    If a file with the whole text as its name exists, that file is meant.

    Args:
        text: The text that was typed.
        option: The option it was given to, for error messages.

    Raises:
        TrimtabError: There is no such file, the strength isn't a finite number, or the layers aren't a list of layers.

    Examples:
        >>> Path("shout.safetensors").touch()
        >>> pick = parse_pick("shout.safetensors@10-12:0.8")
        >>> pick.layers, pick.strength
        ((10, 11, 12), 0.8)
    """
    if Path(text).exists():
        return Pick(Path(text), option=option)
    name, strength, has_strength = text, 1.0, False
    head, colon, tail = text.rpartition(":")
    if colon:
        try:
            name, strength, has_strength = head, float(tail), True
        except ValueError:
            if _is_file(head.rpartition("@")[0]) or _is_file(head):
                hint = f"; the layers come first: {head}@{tail.partition('@')[2]}:{tail.partition('@')[0]}"
                raise TrimtabError(
                    f"{option} {text}: the strength {tail!r} isn't a number{hint if '@' in tail else ''}"
                ) from None
    if not math.isfinite(strength):
        raise TrimtabError(f"{option} {text}: a strength is a finite number, got {strength}")
    layers = None
    if not Path(name).exists():
        before, at, listed = name.rpartition("@")
        if at and (_SPAN.match(listed) or _is_file(before)):
            name, layers = before, _layers(listed, f"{option} {text}")
    if not Path(name).exists():
        raise TrimtabError(f"{option} {text}: there is no file {name}")
    return Pick(Path(name), layers, strength, option, has_strength)


def format_layers(layers: Sequence[int]) -> str:
    """Layers in short form, with runs of three or more as a range: `10-14,20`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    return ",".join(parts)


def _is_file(name: str) -> bool:
    return name.endswith(SUFFIXES) or bool(name and Path(name).exists())


def _layers(text: str, where: str) -> tuple[int, ...]:
    layers: list[int] = []
    for part in text.split(","):
        match = _SPAN.fullmatch(part.strip())
        if match is None:
            raise TrimtabError(f"{where}: {text!r} isn't a list of layers; write @14, @14,15 or @10-14")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise TrimtabError(f"{where}: the layers {part!r} end before they begin; write {last}-{first}")
        if last - first > 10_000:
            raise TrimtabError(f"{where}: {part!r} is {last - first + 1} layers, more than any model has")
        layers += range(first, last + 1)
    if len(set(layers)) < len(layers):
        raise TrimtabError(f"{where}: the layers {text!r} name a layer twice; name each once")
    return tuple(sorted(layers))
