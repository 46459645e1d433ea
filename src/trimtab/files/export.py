"""Export a steering to the formats of other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import check_target
from trimtab.files.control_vector import write_control_vector
from trimtab.files.numpy_layout import write_numpy
from trimtab.files.steering_file import save_steering
from trimtab.files.torch_layouts import write_lm_eval, write_torch
from trimtab.keywords import keywords
from trimtab.steering import Steering
from trimtab.steering.steering import check_steering


@dataclass(frozen=True)
class Target:
    """A program that reads steerings: the suffix of its files, and the function that writes one."""

    suffix: str
    write: Callable[[Steering, Path], object]


TARGETS: dict[str, Target] = {
    "trimtab": Target(".safetensors", save_steering),
    "llama.cpp": Target(".gguf", partial(write_control_vector, target="llama.cpp")),
    "repeng": Target(".gguf", partial(write_control_vector, target="repeng")),
    "easysteer": Target(".gguf", partial(write_control_vector, target="easysteer")),
    "torch": Target(".pt", write_torch),
    "numpy": Target(".npz", write_numpy),
    "lm-eval": Target(".pt", write_lm_eval),
}
BY_SUFFIX = {".safetensors": "trimtab", ".gguf": "llama.cpp", ".pt": "lm-eval", ".npz": "numpy"}


def target_of(path: Path, to: str | None) -> str:
    """The program to write for: as named, or the default for the suffix. Raises `TrimtabError` if it is unknown."""
    if to is not None and to not in TARGETS:
        raise TrimtabError(f"can't export to {to!r}; known: {', '.join(TARGETS)}")
    if to is None and path.suffix not in BY_SUFFIX:
        suffixes = ", ".join(f"{suffix} ({name})" for suffix, name in BY_SUFFIX.items())
        raise TrimtabError(f"{path} has no suffix of a known format; use {suffixes}, or name the program (--to, to=)")
    name = to or BY_SUFFIX[path.suffix]
    check_target(path, TARGETS[name].suffix)
    return name


@keywords
def export(steering: Steering, path: str | Path, to: str | None = None) -> str:
    """Write a steering for another program. Nothing is dropped silently.

    llama.cpp refuses a whole GGUF file that steers block 0, so for llama.cpp the direction of block 0 is left out, with
    a warning; repeng and EasySteer get it.

    Args:
        steering: The steering.
        path: The file, with the suffix of the program's format.
        to: `llama.cpp`, `repeng`, `easysteer`, `lm-eval`, `torch`, `numpy` or `trimtab`. By default the suffix decides:
            `.gguf` is for llama.cpp, `.pt` for lm-eval, `.npz` for numpy, `.safetensors` for trimtab.

    Returns:
        The name of the program that the file was written for.

    Raises:
        UnsupportedError: The program's format can't represent the steering. The message says why.
        TrimtabError: The program is unknown, the suffix doesn't fit, the steering has no edits, or the file can't be
            written.
    """
    check_steering(steering)
    path = Path(path)
    name = target_of(path, to)
    TARGETS[name].write(steering, path)
    return name
