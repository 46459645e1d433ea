"""For people: the command line, one command a file."""

from trimtab.commands.app import main

__all__ = ["main"]
