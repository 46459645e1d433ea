"""Run the notebooks in `examples/notebooks`, and save them with their output.

    python tools/notebooks.py            # all of them
    python tools/notebooks.py format     # one

The package and the default model must be installed. `tests/examples/test_notebooks.py` runs them as well, and compares.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"


def executed(path: Path) -> Any:
    """A notebook, run from its first cell to its last in a new kernel."""
    import nbformat
    from nbclient import NotebookClient

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}})
    client.execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # execution times
        if cell.cell_type == "code":
            cell.outputs = joined(output for output in cell.outputs if output.get("name") != "stderr")
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    return notebook


def joined(outputs: Iterable[Any]) -> list[Any]:
    """Outputs with the pieces of a stream joined, however they were split."""
    kept: list[Any] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def main(names: list[str]) -> None:
    import nbformat

    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            nbformat.write(executed(path), path)
            print(path.relative_to(FOLDER.parents[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
