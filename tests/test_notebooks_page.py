"""The page on notebooks runs from its first cell to its last, and prints what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "notebooks.md").read_text()
CELLS = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE, re.DOTALL)


@pytest.fixture
def closed() -> Iterator[None]:
    yield
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("closed")
@pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning")
def test_its_cells(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'trimtab[plot]'")
    cells: dict = {"__name__": "notebook"}
    capsys.readouterr()
    for number, (code, shown) in enumerate(CELLS, 1):
        exec(compile(code, f"docs/notebooks.md, cell {number}", "exec"), cells)
        printed = capsys.readouterr().out
        if shown:
            assert printed == shown, number
        else:
            assert printed.strip(), number  # the streamed answer
    for name in ("glad", "answer", "swept", "read"):
        assert cells[name]._repr_html_()
    assert cells["glad"].card._repr_html_()


def test_every_cell_is_followed_by_what_it_prints() -> None:
    assert len(CELLS) == PAGE.count("```python") > 6
    assert sum(not shown for _, shown in CELLS) == 1
