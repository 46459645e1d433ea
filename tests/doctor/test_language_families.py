"""Every type of language model that transformers has: nothing is wrong, and what works is what the page says."""

from __future__ import annotations

import pytest
from every_family import LANGUAGE, page, reasons, row, written_for_this_release

from trimtab import TrimtabError

SHORT = {"deepseek_v3", "gemma4_text@shared", "gpt_oss"}


@pytest.mark.long_unless(lambda kind: kind in SHORT)
@pytest.mark.parametrize("kind", LANGUAGE)
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
