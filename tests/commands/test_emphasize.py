"""`trimtab generate --emphasize` and `--rejection`, with traces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROMPT = "The sea is wide. Write in capitals!"


@pytest.fixture
def ask(trimtab: Callable[..., Any], model: Path) -> Callable[..., Any]:
    def run(*arguments: object) -> Any:
        return trimtab("generate", "--model", model, "--prompt", PROMPT, "--max-new-tokens", 8, *arguments)

    return run


class TestEmphasize:
    def test_json_tells_what_happened_at_each_token(self, ask: Callable[..., Any]) -> None:
        ran = ask("--emphasize", "Write in capitals!", "--beta", 0.01, "--schedule", "fused", "--json")
        assert ran.code == 0
        (answer,) = ran.json["answers"]
        trace = answer["trace"]
        assert trace["schedule"] == "fused"
        assert len(trace["steps"]) == answer["new_tokens"]
        assert trace["candidates"] == ["4 layers at strength 1", "2 layers at strength 1"]
        assert sorted(trace["ranking"]) == [0, 1, 2, 3]
        assert any(step["open"] for step in trace["steps"])

    def test_the_coloured_text_is_the_text(self, ask: Callable[..., Any]) -> None:
        plain = ask("--emphasize", "Write in capitals!", "--beta", 0.01)
        traced = ask("--emphasize", "Write in capitals!", "--beta", 0.01, "--trace")
        assert traced.code == 0
        assert traced.out.split() == plain.out.split()
        assert "steering was tried at" in traced.err
        assert "red: implausible" in traced.err

    def test_a_page(self, ask: Callable[..., Any], tmp_path: Path) -> None:
        page = tmp_path / "trace.html"
        ran = ask("--emphasize", "Write in capitals!", "--emphasize", "sea", "--beta", 0.01, "--trace-html", page)
        assert ran.code == 0
        text = page.read_text(encoding="utf-8")
        assert 'class="steered' in text or 'class="weakened' in text or 'class="rejected' in text
        assert "src=" not in text
        assert '<meta name="viewport" content="width=device-width">' in text
        assert "Write in capitals!" in text

    def test_a_picture(self, ask: Callable[..., Any], tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install 'trimtab[plot]'")
        picture = tmp_path / "trace.png"
        ran = ask("--emphasize", "Write in capitals!", "--beta", 0.01, "--plot", picture)
        assert ran.code == 0, ran.err
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_whole_system_message(self, ask: Callable[..., Any]) -> None:
        ran = ask("--system", "Write.", "--emphasize-system", "--compare", "--json")
        assert ran.code == 0
        (answer,) = ran.json["answers"]
        assert len(answer["edits"]) == 4
        assert "unsteered" in answer

    def test_without_rejection(self, ask: Callable[..., Any]) -> None:
        (answer,) = ask("--emphasize", "sea", "--no-rejection", "--json").json["answers"]
        assert "trace" not in answer
        assert answer["edits"]

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [
            (["--emphasize", "Write in capitalz!"], "the closest is 'Write in capitals!'"),
            (["--emphasize", " "], "--emphasize is empty"),
            (["--emphasize-system"], "--emphasize-system needs a system message"),
            (["--rejection"], "--rejection needs a steering"),
            (["--beta", "0.5"], "--beta is a setting of rejection"),
            (["--emphasize", "sea", "--beta", "2"], "beta lies between 0 and 1"),
            (["--emphasize", "sea", "--schedule", "quick"], "unknown schedule"),
            (["--emphasize", "sea", "--no-rejection", "--trace"], "--trace shows what rejection did"),
            (["--emphasize", "sea", "--trace-html", "a.txt"], "must be named"),
            (["--emphasize", "sea", "--no-rejection", "--plot", "a.png"], "--plot shows what rejection did"),
            (["--emphasize", "sea", "--plot", "a.txt"], "must be named"),
        ],
    )
    def test_bad_input(self, ask: Callable[..., Any], arguments: list[str], named: str) -> None:
        ran = ask(*arguments)
        assert ran.code == 2
        assert named in ran.err
        assert ran.err.count("\n") == 1
