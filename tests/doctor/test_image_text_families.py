"""The language model inside of every type of image-text model: nothing is wrong, and the page says what works."""

from __future__ import annotations

import pytest
from every_family import IMAGES, page, reasons, row, written_for_this_release

from trimtab import TrimtabError

SHORT = {"gemma4:images", "qwen3_vl:images"}


@pytest.mark.long_unless(lambda kind: kind in SHORT)
@pytest.mark.parametrize("kind", IMAGES)
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
