"""A strict reader of the GGUF container: a file that claims more than it holds is refused before anything is allocated.

The `gguf` package's reader trusts a file's counts and lengths; it is for trusted files. This one reads, from a memory
map, what control vectors use (version 2 and 3, little-endian): metadata of numbers and texts, and the names, shapes,
types and offsets of tensors.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LONGEST_NAME = 64  # of a tensor, as in llama.cpp
LONGEST_KEY = 65_535
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
TYPES = {0: ("F32", 4), 1: ("F16", 2), 28: ("F64", 8), 30: ("BF16", 2)}
"""The tensor types with plain floating-point numbers, and the sizes of these in bytes."""
SMALLEST_TENSOR = 8 + 4 + 4 + 8  # the length of the name, the number of dimensions, the type, the offset
SMALLEST_ENTRY = 8 + 4 + 1


@dataclass(frozen=True)
class TensorInfo:
    """A tensor: its shape, its type number, and the offset of its data in the file in bytes."""

    shape: tuple[int, ...]
    type: int
    start: int


@dataclass(frozen=True)
class Container:
    """The metadata (without arrays), the type number of each of its values, and the tensors by name."""

    metadata: dict[str, Any]
    kinds: dict[str, int]
    tensors: dict[str, TensorInfo]


class _Cursor:
    def __init__(self, data: Any) -> None:
        self.data, self.position, self.size = data, 0, len(data)

    def take(self, count: int, what: str) -> int:
        """Consume the next `count` bytes, and return their offset."""
        if count > self.size - self.position:
            raise TrimtabError(f"it is cut short or damaged: {what} reaches past its end")
        self.position += count
        return self.position - count

    def number(self, code: str, what: str) -> Any:
        layout = f"<{code}"
        return struct.unpack_from(layout, self.data, self.take(struct.calcsize(layout), what))[0]

    def text(self, longest: int, what: str) -> str:
        length = self.number("Q", what)
        if length > longest:
            raise TrimtabError(f"it is damaged: {what} has {length} bytes")
        start = self.take(length, what)
        try:
            return bytes(self.data[start : self.position]).decode()
        except UnicodeDecodeError:
            raise TrimtabError(f"it is damaged: {what} isn't UTF-8") from None


def read_container(data: Any, check: Callable[[str, Any], None] = lambda _key, _value: None) -> Container:
    """Read the header of a GGUF file from its bytes (or a memory map of them).

    `check(key, value)` is called with each value as it is read, so that other kinds of files are recognized early.
    Raises `TrimtabError` for a file that is truncated, has duplicate names, or claims more content than fits into it.
    """
    cursor = _Cursor(data)
    if bytes(data[:4]) != MAGIC:
        raise TrimtabError("it isn't a GGUF file")
    cursor.take(4, "the header")
    version = cursor.number("I", "the header")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
        what = "big-endian" if swapped else f"of version {version}"
        raise TrimtabError(f"it is {what}; trimtab reads little-endian GGUF of versions 2 and 3")
    tensor_count, entry_count = cursor.number("Q", "the header"), cursor.number("Q", "the header")
    if tensor_count * SMALLEST_TENSOR + entry_count * SMALLEST_ENTRY > cursor.size:
        raise TrimtabError(
            f"it is damaged: it is too short for the {entry_count} entries and {tensor_count} tensors in its header"
        )
    metadata: dict[str, Any] = {}
    kinds: dict[str, int] = {}
    for _ in range(entry_count):
        key = cursor.text(LONGEST_KEY, "a key")
        if key in kinds:
            raise TrimtabError(f"it has the entry {key[:80]!r} twice")
        kinds[key] = cursor.number("I", f"the entry {key[:80]!r}")
        value = _value(cursor, kinds[key], f"the entry {key[:80]!r}")
        if value is not None:
            metadata[key] = value
            check(key, value)
    return Container(metadata, kinds, _tensors(cursor, tensor_count, metadata))


def _value(cursor: _Cursor, kind: int, what: str) -> Any:
    """A number or a text; `None` for an array, which is skipped."""
    if kind in NUMBERS:
        return cursor.number(NUMBERS[kind], what)
    if kind == TEXT:
        return cursor.text(cursor.size, what)
    if kind != ARRAY:
        raise TrimtabError(f"it is damaged: {what} is of the unknown type {kind}")
    inner, count = cursor.number("I", what), cursor.number("Q", what)
    if inner in NUMBERS:
        cursor.take(count * struct.calcsize(f"<{NUMBERS[inner]}"), what)
    elif inner == TEXT and count * 8 <= cursor.size - cursor.position:
        for _ in range(count):
            cursor.take(cursor.number("Q", what), what)
    else:
        raise TrimtabError(f"it is damaged: {what} is an array of {count} of type {inner}")
    return None


def _tensors(cursor: _Cursor, count: int, metadata: dict[str, Any]) -> dict[str, TensorInfo]:
    declared: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = cursor.text(LONGEST_NAME, "a tensor's name")
        if name in declared:
            raise TrimtabError(f"it has the tensor {name!r} twice")
        dimensions = cursor.number("I", f"the tensor {name!r}")
        if not 1 <= dimensions <= 4:
            raise TrimtabError(f"it is damaged: the tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q", f"the tensor {name!r}") for _ in range(dimensions))
        declared[name] = (
            shape[::-1],
            cursor.number("I", f"the tensor {name!r}"),
            cursor.number("Q", f"the tensor {name!r}"),
        )
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise TrimtabError(f"it is damaged: its alignment is {alignment}")
    base = -(-cursor.position // alignment) * alignment
    return {name: TensorInfo(shape, kind, base + offset) for name, (shape, kind, offset) in declared.items()}
