"""Options of `trimtab serve` from the environment and from a TOML file: what goes before what, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from trimtab.commands.config_file import ConfigOption, FromEnvironment
from trimtab.errors import TrimtabError


@pytest.fixture
def run(tmp_path: Path):
    """Run a command with an option of each kind on a file of this text; the values that it was called with."""

    def call(text: str, *arguments: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        app = typer.Typer(add_completion=False)

        def command(
            max_tokens: int = 5,
            upload: Annotated[bool, typer.Option("--upload")] = False,
            page: Annotated[bool, typer.Option("--page/--no-page")] = True,
            monitor: Annotated[list[str] | None, typer.Option()] = None,
            folder: Path | None = None,
            config: ConfigOption = None,
        ) -> None:
            seen.update(max_tokens=max_tokens, upload=upload, page=page, monitor=monitor, folder=folder)

        app.command(cls=FromEnvironment, context_settings={"auto_envvar_prefix": "TRY"})(command)
        (tmp_path / "c.toml").write_text(text)
        app(["--config", str(tmp_path / "c.toml"), *arguments], standalone_mode=False)
        return seen

    return call


def test_every_kind_of_option(run: Any) -> None:
    seen = run('max-tokens = 7\nupload = true\npage = false\nmonitor = ["a", "b"]\nfolder = "x/y"\n')
    assert seen == {"max_tokens": 7, "upload": True, "page": False, "monitor": ["a", "b"], "folder": Path("x/y")}
    assert run("\ufeffmax_tokens = 8\n")["max_tokens"] == 8


def test_typed_goes_before_the_environment_and_that_before_the_file(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRY_MAX_TOKENS", "9")
    assert run("max-tokens = 7\n")["max_tokens"] == 9
    assert run("max-tokens = 7\n", "--max-tokens", "11")["max_tokens"] == 11
    monkeypatch.delenv("TRY_MAX_TOKENS")
    assert run("", "--no-page")["page"] is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max-token = 7", "do you mean max_tokens"),
        ("config = 'other.toml'", "there is no option 'config'"),
        ("[max-tokens]\nmost = 7", "is a table"),
        ("[serve]\nmax-tokens = 7", "serve is a table"),
        ("max-tokens = 7\nmax_tokens = 8", "max-tokens is given twice"),
        ("monitor = 'a'", "monitor is a list"),
        ("max-tokens = [1]", "max_tokens is one value"),
        ("max-tokens = ", "isn't TOML"),
    ],
)
def test_what_is_refused(run: Any, text: str, said: str) -> None:
    with pytest.raises(TrimtabError, match=said):
        run(text)


def test_a_file_that_isnt_there(trimtab: Any, tmp_path: Path) -> None:
    ran = trimtab("serve", "--config", tmp_path / "none.toml")
    assert ran.code == 2
    assert "none.toml" in ran.err
    (tmp_path / "latin.toml").write_bytes(b"host = '\xe9'")
    ran = trimtab("serve", "--config", tmp_path / "latin.toml")
    assert (ran.code, "is not UTF-8 text" in ran.err) == (2, True)


def test_a_value_of_the_wrong_type_says_which(trimtab: Any, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("max-tokens = 'many'")
    ran = trimtab("serve", "--config", tmp_path / "c.toml")
    assert ran.code == 2
    assert "'--max-tokens'" in ran.err


def test_help_says_it_once(trimtab: Any) -> None:
    printed = trimtab("serve", "--help").out
    assert printed.count("TRIMTAB_SERVE_") == 1
