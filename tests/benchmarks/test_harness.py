"""The harness of the benchmarks: interleaving, summaries, targets, JSON, Markdown and exit codes."""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as cli  # noqa: E402
from benchmarks.harness import Report, Result, Target, interleave, ratios, summarized  # noqa: E402
from benchmarks.machine import machine, versions  # noqa: E402
from benchmarks.memory import forget_peak, own_peak  # noqa: E402
from benchmarks.peers.older import older_config, older_folder, older_tokenizer  # noqa: E402
from benchmarks.report import markdown  # noqa: E402

FIELDS = {"case", "metric", "value", "unit", "low", "high", "target", "holds"}


def report(value: float = 0.99) -> Report:
    met = summarized("a", "speed", "ratio", [value, value, value], Target(0.98))
    return Report("static", machine(), versions(), (met, Result("a", "memory", 10.0, "MiB")))


def test_runs_are_interleaved_and_rotated() -> None:
    order: list[str] = []

    def run(name: str) -> float:
        order.append(name)
        return float(len(order))

    values = interleave({name: lambda name=name: run(name) for name in "abc"}, 3, warm_ups=1)
    rounds = ["".join(order[i : i + 3]) for i in range(0, 12, 3)]
    assert rounds[1:] == ["abc", "bca", "cab"]
    assert sorted(rounds[0]) == ["a", "b", "c"]
    assert {name: len(v) for name, v in values.items()} == {"a": 3, "b": 3, "c": 3}
    assert min(values["a"] + values["b"] + values["c"]) == 4  # the warm-up isn't counted


def test_ratios_are_of_the_same_round() -> None:
    assert ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]
    with pytest.raises(ValueError, match="argument 2"):
        ratios([1.0], [1.0, 2.0])


def test_a_summary_is_the_median_with_its_spread() -> None:
    result = summarized("c", "m", "ratio", [float(i) for i in range(11)], Target(5.0))
    assert (result.low, result.value, result.high) == (1.0, 5.0, 9.0)
    assert result.holds
    single = summarized("c", "m", "ratio", [2.0])
    assert (single.low, single.value, single.high, single.holds) == (2.0, 2.0, 2.0, None)


@pytest.mark.parametrize(("target", "holds"), [(Target(1.0), True), (Target(1.0, at_least=False), True)])
def test_a_target_includes_its_bound(target: Target, holds: bool) -> None:
    assert target.met(1.0) is holds
    assert not target.met(0.9 if target.at_least else 1.1)
    assert not target.met(float("nan"))


def test_json_has_the_documented_fields() -> None:
    data = json.loads(json.dumps(report().to_json()))
    assert set(data) == {field.name for field in fields(Report)}
    assert Report.from_json(data) == report()
    assert {"cpu", "cores", "ram_gib", "threads"} <= set(data["machine"])
    assert {"python", "torch", "transformers", "trimtab"} <= set(data["versions"])
    assert all(set(result) == FIELDS for result in data["results"])
    assert [result["holds"] for result in data["results"]] == [True, None]
    assert data["results"][0]["target"] == ">= 0.98"


def test_markdown_says_how_it_was_made() -> None:
    command = "python -m benchmarks static --rounds 3"
    text = markdown(replace(report(0.5), date="2026-01-02", commands=(command,), commit="abc1234"))
    assert "- Date: 2026-01-02, commit abc1234" in text
    assert f"`{command}`" in text
    assert "| a | speed | 0.5 | 0.5 … 0.5 | >= 0.98 | NO |" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize(("value", "check", "code"), [(0.99, True, 0), (0.5, True, 1), (0.5, False, 0)])
def test_check_fails_on_a_missed_target(
    value: float, check: bool, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    try:
        cli.finish(report(value), file, check, as_markdown=False)
        left = 0
    except typer.Exit as leaving:
        left = leaving.exit_code
    assert left == code
    written = Report.from_json(json.loads(file.read_text()))
    assert len(written.results) == 2
    assert datetime.date.fromisoformat(written.date) <= datetime.date.today()
    assert written.commands[0].startswith("python -m benchmarks")
    err = capsys.readouterr().err
    assert ("short: a: speed is 0.5, not >= 0.98" in err) is bool(code)


def test_the_command_is_told_without_where_its_results_go() -> None:
    kept = cli._that_matter(["static", "--json", "/x/y.json", "--rounds", "3", "--markdown", "--check", "--json=z"])
    assert kept == ["static", "--rounds", "3"]


def test_help_lists_the_benchmarks() -> None:
    done = CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "200"})  # so that no line begins in mid-sentence
    assert done.exit_code == 0
    assert "static" in done.output
    assert "extract" in done.output
    assert "peak" not in {line.strip("│ ").split(" ")[0] for line in done.output.splitlines()}


def test_extract_is_skipped_without_data(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["extract", "--data", str(tmp_path), "--check"])
    assert done.exit_code == 0
    assert "skipped" in done.output


def test_the_peak_is_in_mebibytes_and_can_start_anew() -> None:
    block = bytearray(64 * 2**20)
    block[:: 2**12] = b"x" * len(block[:: 2**12])
    high = own_peak()
    del block
    forget_peak()
    assert 64 < own_peak() <= high


def test_an_older_folder_has_the_same_weights_in_older_words(tmp_path: Path) -> None:
    source = tmp_path / "new"
    source.mkdir()
    config = {"dtype": "float32", "rope_parameters": {"rope_theta": 100000.0, "rope_type": "default"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    (source / "model.safetensors").write_bytes(b"weights")
    (source / "tokenizer.json").write_text("{}")
    for _ in range(2):  # the second time, it is there already
        made = older_folder(source, tmp_path / "old")
    assert json.loads((made / "config.json").read_text()) == {"torch_dtype": "float32", "rope_theta": 100000.0}
    assert (made / "model.safetensors").read_bytes() == b"weights"
    scaled = {"rope_parameters": {"rope_theta": 1.0, "rope_type": "linear", "factor": 2.0}}
    assert older_config(scaled)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert older_tokenizer({"eos_token": "</s>", "backend": "tokenizers"})["eos_token"] == "</s>"
