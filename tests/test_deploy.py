"""What stands in `deploy/` fits the program: options, variables and metrics that it names are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from trimtab.commands.config_file import read_config

DEPLOY = Path(__file__).parents[1] / "deploy"


def options() -> dict[str, Any]:
    """The long options of `trimtab serve`."""
    import typer

    from trimtab.commands.app import app

    command: Any = typer.main.get_command(app)
    served = command.get_command(command.context_class(command), "serve")
    return {name: param for param in served.params for name in param.opts if name.startswith("--")}


def test_the_environment_names_options() -> None:
    texts = [(DEPLOY / name).read_text() for name in ("Dockerfile", "compose.yaml", "trimtab.service")]
    named = set(re.findall(r"TRIMTAB_SERVE_([A-Z_]+)", "\n".join(texts)))
    assert {"HOST", "PORT", "STEERINGS", "CONFIG"} <= named
    assert {f"--{name.lower().replace('_', '-')}" for name in named} <= set(options())


def test_the_config_file_names_options(trimtab: Any) -> None:
    values = read_config(DEPLOY / "serve.toml")
    assert {f"--{name}" for name in values} <= set(options())
    ran = trimtab("serve", "--config", DEPLOY / "serve.toml", "--steerings", "no-such-folder")
    assert "there is no folder no-such-folder" in ran.err  # that is: all of the file was understood


def test_the_unit_starts_what_there_is() -> None:
    unit = (DEPLOY / "trimtab.service").read_text()
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    program, command, *rest = shlex.split(line)
    assert (Path(program).name, command) == ("trimtab", "serve")
    assert {word for word in rest if word.startswith("--")} <= set(options())


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    pytest.importorskip("prometheus_client", reason="metrics need trimtab[serve]")
    from trimtab.serve.metrics import Metrics

    known = set()
    for family in Metrics().registry.collect():
        ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[family.type]
        known |= {family.name + end for end in ends}
    board = json.loads((DEPLOY / "grafana" / "trimtab.json").read_text())
    shown = {
        name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"trimtab_\w+", t["expr"])
    }
    assert len(shown) >= 10
    assert shown <= known


def test_yaml_can_be_read() -> None:
    for path in (*DEPLOY.glob("*.y*ml"), *DEPLOY.glob("grafana/*.yaml")):
        assert yaml.safe_load(path.read_text()), path
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(compose["services"]) == {"trimtab", "prometheus", "grafana"}
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source


def test_the_image_can_keep_models_and_has_its_files() -> None:
    """A volume over a folder that isn't there belongs to root; what .dockerignore leaves out can't be copied."""
    done = re.sub(r"\\\n", "", (DEPLOY / "Dockerfile").read_text()).splitlines()
    volume = next(n for n, line in enumerate(done) if line.startswith("VOLUME"))
    before = done[:volume]
    assert before.index("RUN mkdir .cache") > before.index("WORKDIR /home/trimtab") > before.index("USER trimtab")
    kept = {line[1:] for line in (DEPLOY.parent / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for line in done if line.startswith("COPY ") for name in line.split()[1:-1]}
    assert copied == kept
    assert all((DEPLOY.parent / name).exists() for name in kept)
