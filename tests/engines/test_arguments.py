"""What users give for a whole call."""

from __future__ import annotations

import pytest

from trimtab import TrimtabError
from trimtab.engines.arguments import check_batch_size


@pytest.mark.parametrize("size", [0, -1, True, 2.0, "8", None])
def test_a_batch_has_a_whole_number_of_prompts(size: object) -> None:
    check_batch_size(3)
    with pytest.raises(TrimtabError, match="batch_size is a whole number from 1"):
        check_batch_size(size)
