"""List the changes of the public API since a commit, and check that the changelog mentions them.

    python tools/api.py v0.1.0

It compares the names that `trimtab` exports, at that commit and in this tree, without importing either: names that were
added and removed, and the breaking changes that griffe finds in their signatures and members. Each must be mentioned in
the changelog by its last name, in backticks, under "Unreleased" or a version that the commit's changelog doesn't have;
it exits with 1 if one isn't. Without a commit it takes the last tag before the current commit, or if there is none the
commit that last changed the version in pyproject.toml.
"""

from __future__ import annotations

import argparse
import re
import subprocess
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


def git(*arguments: str) -> str | None:
    """What git prints; `None` if it fails."""
    done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, encoding="utf-8")
    return None if done.returncode else done.stdout.strip()


def default_ref() -> str | None:
    """The last tag before the current commit, else the commit that last changed the project's version."""
    tag = git("describe", "--tags", "--abbrev=0", "HEAD^")
    return tag or git("log", "-1", "--format=%H", "-G^version = ", "HEAD^", "--", "pyproject.toml") or None


def sections(changelog: str) -> dict[str, str]:
    """The sections of a changelog by version."""
    heads = list(re.finditer(r"(?m)^## \[([^]]+)\].*$", changelog))
    ends = [*(head.start() for head in heads), len(changelog)][1:]
    return {head[1]: changelog[head.end() : end] for head, end in zip(heads, ends, strict=True)}


def new_text(changelog: str, old: str) -> str:
    """What a changelog says under Unreleased, and under the versions that an older one doesn't have."""
    kept = sections(old).keys() - {"Unreleased"}
    return "".join(text for version, text in sections(changelog).items() if version not in kept)


def mentioned(name: str, text: str) -> bool:
    """Whether a name occurs in backticks, alone or as part of code."""
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", code) for code in re.findall(r"`([^`]+)`", text))


def main() -> int:
    """Print the changes, marking those that the changelog lacks; return the exit status."""
    parser = argparse.ArgumentParser(description="Compare the public API with that of a commit.")
    parser.add_argument("ref", nargs="?", help="a tag or commit; default: the last tag, or else the last new version")
    ref = parser.parse_args().ref or default_ref()
    if ref is None or git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}") is None:
        parser.error(f"there is no commit {ref}" if ref else "there is no tag or new version; name a commit")
    old = griffe.load_git("trimtab", ref=ref, repo=ROOT, search_paths=SOURCE, resolve_aliases=True)
    new = griffe.load("trimtab", search_paths=[ROOT / "src"], resolve_aliases=True)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    text, missing = new_text(changelog, git("show", f"{ref}:CHANGELOG.md") or ""), 0
    for name, what in changes(old, new):  # type: ignore[arg-type]
        known = mentioned(name, text)
        missing += not known
        print(f"{'     ' if known else 'NEW: '}{what}")
    if missing:
        print(f"{missing} changes since {ref} aren't in the changelog: name them under Unreleased, in backticks")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
