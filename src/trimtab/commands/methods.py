"""`trimtab methods`: what can be learned, from what."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from trimtab.commands.model import JsonOption
from trimtab.commands.recipes import RECIPES
from trimtab.commands.terminal import show, write_json

ROWS = {
    "what": "title",
    "paper": "paper",
    "learns from": "data",
    "reads": "reads",
    "acts": "acts",
}


def methods(json: JsonOption = False) -> None:
    """Show the methods: their papers, the data they need, and where they act.

    [bold]  trimtab methods
      trimtab methods --json[/bold]

    Each learns from pairs of texts; `trimtab learn --help` shows their shapes.
    """
    if json:
        write_json({name: asdict(recipe) for name, recipe in RECIPES.items()})
        return
    table = Table("", *RECIPES, box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="bold")
    table.columns[0].style = "dim"
    for label, attribute in ROWS.items():
        table.add_row(label, *(str(getattr(recipe, attribute)) for recipe in RECIPES.values()))
    show(table, "trimtab learn METHOD --pairs FILE --out FILE.safetensors")
