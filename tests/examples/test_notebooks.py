"""The notebooks run from their first cell to their last, and print what they show."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def shown(notebook: dict) -> list[str]:
    """What each cell printed; of what is drawn, that it was."""
    texts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            for output in cell["outputs"]:
                drawn = sorted(output.get("data", {}))
                texts.append("".join(output["text"]) if "text" in output else f"drawn: {', '.join(drawn)}")
    return texts


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long  # the examples do the same
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem) for path in NOTEBOOKS],
)
def test_it_prints_what_it_shows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="notebooks are run by nbclient")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sys.modules.pop("notebooks", None)
    import notebooks

    assert shown(notebooks.executed(path)) == shown(json.loads(path.read_text()))


def test_there_are_four_and_each_opens_in_colab() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["format", "layers_and_doses", "persona", "serving"]
    for path in NOTEBOOKS:
        first = "".join(json.loads(path.read_text())["cells"][0]["source"])
        assert f"colab.research.google.com/github/trimtab/trimtab/blob/main/examples/notebooks/{path.name}" in first
