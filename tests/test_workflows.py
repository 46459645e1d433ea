"""The workflows, which run elsewhere: they are valid, and name targets, files and extras that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github/workflows").glob("*.yml")}
EXTRAS = {
    name
    for table in re.findall(
        r"(?ms)^\[project\.optional-dependencies\]$(.*?)(?=^\[|\Z)", (ROOT / "pyproject.toml").read_text()
    )
    for name in re.findall(r"(?m)^([\w-]+) = \[", table)
}
TARGETS = {
    name
    for names in re.findall(r"(?m)^([a-z][\w -]*):(?!=)", (ROOT / "Makefile").read_text())
    for name in names.split()
}


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def commands(name: str) -> list[str]:
    return [step["run"] for step in steps(name) if "run" in step]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_each_step_is_an_action_of_a_version_or_a_command(name: str) -> None:
    assert all(job["timeout-minutes"] for job in WORKFLOWS[name]["jobs"].values() if "environment" not in job)
    for step in steps(name):
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w./-]+@[\w./-]+", step["uses"])


@pytest.mark.parametrize("name", WORKFLOWS)
def test_what_it_runs_exists(name: str) -> None:
    matrix = [job["strategy"]["matrix"] for job in WORKFLOWS[name]["jobs"].values() if "strategy" in job]
    named = {target for choices in matrix for target in choices.get("target", [])}
    for command in commands(name):
        for line in re.findall(r"(?:^|&& |; )make ([a-z -]+)", command, re.MULTILINE):
            named |= set(line.split())
        for path in re.findall(r"(?<![\w/.])((?:tests|tools|requirements)/[\w./-]+)", command):
            assert (ROOT / path).exists(), path
        for constraints in re.findall(r"-c ([\w./-]+\.txt)", command):
            assert (ROOT / constraints).exists(), constraints
        for extras in re.findall(r"\.\[([\w,-]+)\]", command):
            assert set(extras.split(",")) <= EXTRAS, extras
    assert named <= TARGETS


def test_every_dependency_has_something_that_updates_it() -> None:
    """The locks, the actions, and the images in `deploy/`: all but torch, whose version is chosen with the figures."""
    assert any("make lock" in command for command in commands("locks"))
    assert [step["with"]["add-paths"] for step in steps("locks") if "pull-request" in step.get("uses", "")] == [
        LOCKS.name
    ]
    updates = yaml.safe_load((ROOT / ".github/dependabot.yml").read_text())["updates"]
    named = {(update["package-ecosystem"], update["directory"]) for update in updates}
    assert named == {("github-actions", "/"), ("docker", "/deploy"), ("docker-compose", "/deploy")}
    assert (ROOT / "deploy/Dockerfile").exists()
    assert (ROOT / "deploy/compose.yaml").exists()


def test_the_other_systems_are_tested() -> None:
    smoke = WORKFLOWS["test"]["jobs"]["smoke"]
    assert {system.partition("-")[0] for system in smoke["strategy"]["matrix"]["system"]} == {"macos", "windows"}
    assert any("tests/test_platforms.py" in command for command in commands("test"))
