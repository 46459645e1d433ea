"""`trimtab models --check`: which features work on a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from trimtab.commands.model import BareModelOptions, silence, suppress_progress_bars
from trimtab.commands.terminal import note, say, show, write_json
from trimtab.errors import TrimtabError

if TYPE_CHECKING:
    from trimtab.doctor import Report

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
SHOWN = {"works": "yes", "partly": "partly", "refused": "no", "wrong": "WRONG", "transformers": "not there"}
"""The printed form of a finding's state; `"transformers"` means that transformers itself fails, without trimtab."""
STYLES = {"works": "green", "partly": "yellow", "refused": "dim", "wrong": "bold red", "transformers": "yellow"}


def check(loader: BareModelOptions, *, json: bool) -> None:
    """Check the model, folder, `config.json` or model type in `loader.model`, and print the result.

    Raises `typer.Exit` with 1 if something is wrong, so that it can serve as a test.
    """
    suppress_progress_bars(json)
    report = _report(loader, quiet=json)
    if json:
        write_json(report.as_json())
    else:
        _print(report)
    if report.wrong:
        raise typer.Exit(1)


def _report(loader: BareModelOptions, *, quiet: bool) -> Report:
    from trimtab.doctor import check_config, check_model
    from trimtab.doctor.tiny import CAUSAL, IMAGE_TEXT

    what = str(loader.model)
    path = Path(what)
    if path.is_dir() and (path / "config.json").is_file() and not any(next(path.glob(w), None) for w in WEIGHTS):
        path = path / "config.json"
    type_alone = not path.exists() and what.split("@")[0] in {**CAUSAL, **IMAGE_TEXT}
    if path.suffix == ".json" or type_alone:
        if not type_alone and not path.is_file():
            raise TrimtabError(f"there is no file {path}")
        silence(quiet)
        note("checking a tiny random model of that type …", quiet=quiet)
        return check_config(what if type_alone else path)
    lm = loader.load(quiet=quiet)
    note("checking …", quiet=quiet)
    return check_model(lm)


def _print(report: Report) -> None:
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in report.findings:
        table.add_row(Text(SHOWN[finding.state], STYLES[finding.state]), finding.what)
        if finding.reason:
            table.add_row("", Text(finding.reason, "dim"))
    show(f"{report.name} ({report.family}), blocks at {report.blocks}, weights {report.weights}", "", table)
    if report.wrong:
        say("Something is wrong: trimtab gives incorrect results there. Please report it with the lines above.")
