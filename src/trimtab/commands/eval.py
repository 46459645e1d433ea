"""`trimtab eval`: does a steering do what it should? One command per benchmark."""

from __future__ import annotations

import typer

evaluations = typer.Typer(
    name="eval",
    help="Measure what a steering does: arms compared on the same items, with intervals.",
    rich_markup_mode="rich",
    no_args_is_help=True,
)
