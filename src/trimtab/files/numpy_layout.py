"""NumPy's `.npy` files of directions. No pickle in them is ever opened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from trimtab.errors import TrimtabError
from trimtab.files.foreign import Found
from trimtab.files.tensor_layout import Wanted, tensor_layout

MAGIC = b"\x93NUMPY"


def read_numpy_layout(path: Path, wanted: Wanted) -> Found:
    """The directions in an `.npy` file.

    Raises:
        TrimtabError: The file is damaged, or holds something else than numbers, or it can't be told what they are.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # a map isn't longer than its file
        value = torch.from_numpy(np.array(array).astype(array.dtype.newbyteorder("=")))
    except (ValueError, OSError, EOFError, TypeError, OverflowError, MemoryError, SyntaxError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise TrimtabError(f"it is damaged, or no array of plain numbers: {reason}") from None
    return tensor_layout(value, path, wanted, "array")
