"""The command line, with one command per file."""

from trimtab.commands.app import main

__all__ = ["main"]
