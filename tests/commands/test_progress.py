"""What long work says while it runs: a bar on a terminal, and lines now and then in a log."""

from __future__ import annotations

import pytest

from trimtab.commands import terminal
from trimtab.commands.terminal import progress_bar


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with progress_bar("answering", quiet=False) as progress:
        assert progress is not None
        for done in range(1, 101):
            now[0] += 1.0
            progress(done, 100)
        progress(label="step 1 of 4")
        progress(label="step 1 of 4")
        now[0] += 40.0
        progress(2, 4)
        now[0] += 40.0
        progress(4, 4)
    out, err = capfd.readouterr()
    lines = [
        "answering (30 of 100)",
        "answering (60 of 100)",
        "answering (90 of 100)",
        "step 1 of 4",
        "step 1 of 4 (2 of 4)",
    ]
    assert (out, err.splitlines()) == ("", lines)


@pytest.mark.parametrize("how", [{"quiet": True}, {"quiet": False, "lines": False}])
def test_there_may_be_none(how: dict[str, bool], capfd: pytest.CaptureFixture[str]) -> None:
    with progress_bar("answering", **how) as progress:
        assert progress is None
    assert capfd.readouterr() == ("", "")
