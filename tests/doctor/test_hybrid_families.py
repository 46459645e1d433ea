"""Every type of model that keeps a recurrent state: nothing is wrong, and what works is what the page says."""

from __future__ import annotations

import pytest
from every_family import HYBRIDS, page, reasons, row, written_for_this_release

from trimtab import TrimtabError

SHORT = {"lfm2", "mamba2", "qwen3_5_text"}


@pytest.mark.long_unless(lambda kind: kind in SHORT)
@pytest.mark.parametrize("kind", HYBRIDS)
def test_what_works(kind: str) -> None:
    _, rows, missing = page()
    if kind in missing and written_for_this_release():
        with pytest.raises(TrimtabError):
            row(kind)
        return
    findings = row(kind)
    assert "WRONG" not in findings.values(), reasons(kind)
    if written_for_this_release():
        assert findings == rows.get(kind, findings)
