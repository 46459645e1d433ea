"""List the changes of the public API since a commit, and check that the changelog mentions them.

    python tools/api.py v0.1.0

It compares the names that `trimtab` exports, at that commit and in this tree, without importing either: names that were
added and removed, and the breaking changes that griffe finds in their signatures and members. Each must be mentioned in
the changelog under "Unreleased" by its last name, in backticks; it exits with 1 if one isn't.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
SOURCE = ("src",)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def exported(package: griffe.Module) -> dict[str, griffe.Object]:
    """The public names of a package, each with the object it refers to."""
    names: dict[str, griffe.Object] = {}
    for name, member in package.members.items():
        if member.is_alias and not name.startswith("_") and member.target_path.startswith("trimtab."):  # type: ignore[union-attr]
            try:
                names[name] = member.final_target  # type: ignore[union-attr]
            except griffe.AliasResolutionError:
                continue
    return names


def alone(name: str, stands_for: griffe.Object) -> griffe.Module:
    """A module with only this name, since griffe compares the members of modules."""
    module = griffe.Module("trimtab")
    module.members[name] = stands_for
    return module


def changes(old: griffe.Module, new: griffe.Module) -> Iterator[tuple[str, str]]:
    """The last name and a description of each change of the public API, in order."""
    before, after = exported(old), exported(new)
    for name in sorted(before.keys() | after.keys()):
        if name not in after:
            yield name, f"{name} was removed"
        elif name not in before:
            yield name, f"{name} is new"
        else:
            for broken in griffe.find_breaking_changes(alone(name, before[name]), alone(name, after[name])):
                if not re.search(r"(^|\.)_", broken.obj.path.removeprefix("trimtab.")):
                    what = COLOURS.sub("", broken.explain(griffe.ExplanationStyle.ONE_LINE)).partition(": ")[2]
                    parameter = re.search(r"\((\w+)\)", what.partition(": ")[0])
                    yield (parameter[1] if parameter else broken.obj.name), f"{name}: {what}"


def unreleased() -> str:
    """The changelog's section of unreleased changes."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return text.partition("## [Unreleased]")[2].partition("\n## [")[0]


def mentioned(name: str, text: str) -> bool:
    """Whether a name occurs in backticks, alone or as part of code."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code) for code in re.findall(r"`([^`]+)`", text))


def main() -> int:
    """Print the changes, marking those that the changelog lacks; return the exit status."""
    parser = argparse.ArgumentParser(description="Compare the public API with that of a commit.")
    parser.add_argument("ref", help="a tag or commit")
    ref = parser.parse_args().ref
    old = griffe.load_git("trimtab", ref=ref, repo=ROOT, search_paths=SOURCE, resolve_aliases=True)
    new = griffe.load("trimtab", search_paths=[ROOT / "src"], resolve_aliases=True)
    text, missing = unreleased(), 0
    for name, what in changes(old, new):  # type: ignore[arg-type]
        known = mentioned(name, text)
        missing += not known
        print(f"{'     ' if known else 'NEW: '}{what}")
    if missing:
        print(f"{missing} changes since {ref} aren't in the changelog under Unreleased")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
