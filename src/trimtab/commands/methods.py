"""`trimtab methods`: the available methods, and what they learn from."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from trimtab.commands.model import JsonOption
from trimtab.commands.terminal import show, write_json
from trimtab.methods.recipe import recipes


def methods(json: JsonOption = False) -> None:
    """Show the methods: their papers, the data they need, where they act, and what that costs.

    [bold]  trimtab methods
      trimtab methods --json[/bold]

    `trimtab learn METHOD --help` shows the options of each. Methods from other
    installed packages are at the end, with the package's name.
    """
    known = recipes()
    if json:
        write_json({name: asdict(recipe) for name, recipe in known.items()})
        return
    table = Table("", "", box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.columns[0].style = "bold"
    for name, recipe in known.items():
        table.add_row(name, f"{recipe.title}. {recipe.paper}")
        for label, value in (
            ("learns from", recipe.data),
            ("reads", recipe.reads),
            ("acts", f"{recipe.acts} ({recipe.sites})"),
            ("costs", recipe.cost),
            *([] if recipe.distribution == "trimtab" else [("from", recipe.distribution)]),
        ):
            table.add_row("", Text.assemble((f"{label}: ", "dim"), value))
        table.add_row("", "")
    show(table, "trimtab learn METHOD --pairs FILE --out FILE.safetensors")
