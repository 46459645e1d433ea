"""NumPy's `.npy` and `.npz` files of directions. Pickles in them are never loaded."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.files.foreign import Imported, sum_additions
from trimtab.files.named_layout import named_layout, named_tensors
from trimtab.files.tensor_layout import Selection, tensor_layout
from trimtab.steering import Steering

MAGIC = b"\x93NUMPY"
LARGEST = 1 << 28  # bytes of an archive's uncompressed arrays
ARRAY_ERRORS = (
    *(ValueError, OSError, EOFError, TypeError, OverflowError, MemoryError, SyntaxError, KeyError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
)


def read_numpy_layout(path: Path, selection: Selection) -> Imported:
    """The directions in an `.npy` file, or in an `.npz` archive of named arrays.

    Raises:
        TrimtabError: The file is damaged, or contains something other than numbers, or it isn't clear what they are.
    """
    try:
        if zipfile.is_zipfile(path):
            return named_layout(named_tensors(_arrays(path), kind="array"), path, selection)
        value = _tensor(np.load(path, mmap_mode="r", allow_pickle=False))  # a map isn't larger than its file
    except TrimtabError:
        raise
    except ARRAY_ERRORS as error:
        raise TrimtabError(f"it is damaged, or isn't an array of plain numbers: {_first_line(error)}") from None
    return tensor_layout(value, path, selection, "array")


def _arrays(path: Path) -> dict[str, Tensor]:
    with zipfile.ZipFile(path) as archive:
        size = sum(info.file_size for info in archive.infolist())
        if size > LARGEST:
            raise TrimtabError(f"its arrays have {size >> 20} MB; a steering is smaller")
        names = archive.namelist()
    if len(set(names)) != len(names):
        raise TrimtabError("its archive has two entries of the same name")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: _tensor(arrays[name]) for name in arrays.files}


def write_numpy(steering: Steering, path: Path) -> None:
    """Write an `.npz` archive of arrays `layer_<N>` `[width]`, float32: what is added at the output of block N.

    Strengths are folded in. Raises `UnsupportedError` for anything but additions at every token.
    """
    sums = sum_additions(steering, "a file of arrays")
    arrays: dict[str, Any] = {f"layer_{site.layer}": vector.numpy() for site, vector in sums.items()}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array).astype(array.dtype.newbyteorder("=")))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
