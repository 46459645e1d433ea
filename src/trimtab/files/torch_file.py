"""Read tensors from a `.pt` file, without running any code in it or trusting anything it says.

The file is checked before torch sees it: the archive must not claim more than the file's size, the pickle in it may
name nothing but tensors, and torch gets a new archive of exactly the checked content, with `weights_only=True`.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import TrimtabError

LARGEST = 1 << 31  # bytes of a file
LARGEST_PICKLE = 1 << 24
MOST_ENTRIES = 100_000
DEEPEST = 4  # the nesting depth down to which tensors are checked
STORAGES = ("Half", "BFloat16", "Float", "Double", "Byte", "Char", "Short", "Int", "Long", "Bool")
HARMLESS = {
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
    *(f"torch {name}Storage" for name in STORAGES),
}
CALL_OPCODES = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"}
"""Other opcodes with which a pickle names something to call."""


ARCHIVE_ERRORS = (
    *(zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError),
    *(ValueError, KeyError, IndexError, RuntimeError, OverflowError, MemoryError),  # NotImplementedError included
)
"""What `zipfile` raises for damaged archives."""


def read_torch_file(path: Path) -> Any:
    """What `torch.save` saved: tensors, and lists and dicts of tensors, numbers and texts.

    Raises `TrimtabError` for a file that contains anything else, was crafted to do harm, or is damaged.
    """
    if path.stat().st_size > LARGEST:
        raise TrimtabError(f"it has {path.stat().st_size >> 20} MB; a steering is smaller")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive, path.stat().st_size)
    except TrimtabError:
        raise
    except ARCHIVE_ERRORS as error:
        raise TrimtabError(f"it is cut short or damaged: {str(error)[:200] or type(error).__name__}") from None
    _check_pickle(entries[f"{next(iter(entries)).split('/')[0]}/data.pkl"])  # the one that torch reads
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as repacked:
        for name, data in entries.items():
            repacked.writestr(zipfile.ZipInfo(name), data)
    buffer.seek(0)
    try:
        value = torch.load(buffer, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, ValueError, TypeError, KeyError, AttributeError, EOFError) as error:
        raise TrimtabError(f"it is damaged: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from None
    except (IndexError, OverflowError, MemoryError, RecursionError, AssertionError) as error:
        raise TrimtabError(f"it is damaged: {type(error).__name__}") from None
    _check_tensors(value, max((len(data) for name, data in entries.items() if "/data/" in name), default=0))
    return value


def _entries(archive: zipfile.ZipFile, size: int) -> dict[str, bytes]:
    """The archive's content; it must be stored, not compressed, in one folder, and no larger than the file."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    if len(infos) > MOST_ENTRIES or sum(info.file_size for info in infos) > size:
        raise TrimtabError("its archive claims to hold more data than the file")
    if len(set(names)) != len(names):
        raise TrimtabError("its archive has two entries of the same name")
    for name in names:
        parts = name.split("/")
        if len(parts) < 2 or any(part in ("", ".", "..") for part in parts) or "\\" in name or ":" in parts[0]:
            raise TrimtabError(f"its archive has the name {name[:80]!r}, which torch never writes")
    tops = {name.split("/")[0] for name in names}
    if len(tops) != 1 or f"{next(iter(tops))}/data.pkl" not in names:
        raise TrimtabError("it is an archive, but not one that torch.save writes; save it with PyTorch 1.6 or later")
    if any(info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 for info in infos):
        raise TrimtabError("its archive is compressed or encrypted, which torch never does")
    return {info.filename: archive.read(info) for info in infos}


def _check_pickle(data: bytes) -> None:
    """Raises `TrimtabError` if the pickle names anything but tensors. Nothing in it is run."""
    if len(data) > LARGEST_PICKLE:
        raise TrimtabError("its pickle is too large for a file of tensors")
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in CALL_OPCODES or (opcode.name == "GLOBAL" and argument not in HARMLESS):
                named = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else f"an object ({opcode.name})"
                raise TrimtabError(
                    f"its pickle needs {named[:80]}, but trimtab opens only pickles of tensors, numbers and strings;"
                    " save only the tensors, with torch.save"
                )
    except TrimtabError:
        raise
    except Exception as error:  # pickletools raises many types of errors
        raise TrimtabError(f"it is damaged: its pickle can't be parsed ({type(error).__name__})") from None


def _check_tensors(value: Any, largest: int) -> None:
    """Raises `TrimtabError` for a tensor that is larger than its data in the file."""
    for tensor in _tensors(value, DEEPEST):
        stored = tensor.untyped_storage().nbytes()
        if tensor.layout != torch.strided or stored > largest or tensor.numel() * tensor.element_size() > stored:
            raise TrimtabError(f"it holds an incomplete tensor of shape {list(tensor.shape)}")


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item, depth - 1)
