"""Tables for pandas, which is imported only when a table is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trimtab.errors import TrimtabError


def frame(rows: Sequence[Mapping[str, Any]]) -> Any:
    """A data frame of these rows. Raises `TrimtabError` when pandas is missing."""
    try:
        import pandas
    except ImportError:
        raise TrimtabError("tables need pandas: pip install pandas") from None
    return pandas.DataFrame([dict(row) for row in rows])
