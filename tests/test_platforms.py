"""Systems without the modules of Unix: nothing is imported that isn't there, and what replaces it does the same."""

from __future__ import annotations

import ast
import importlib.util
import os
import socket
import sys
from collections.abc import Callable
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import trimtab

PACKAGE = Path(trimtab.__file__).parent
UNIX = {"curses", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}
Fresh = Callable[..., ModuleType]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Fresh:
    """A second copy of a module, imported where the modules `missing` aren't installed."""

    def load(name: str, *missing: str) -> ModuleType:
        for module in missing:
            monkeypatch.setitem(sys.modules, module, None)
        path = PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py")
        spec = importlib.util.spec_from_file_location(f"{name}_elsewhere", path)
        assert spec is not None
        assert spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        return copy

    return load


def unguarded(tree: ast.Module) -> list[str]:
    """The Unix-only modules that are imported outside of a `try` that handles `ImportError`."""
    inside = {
        id(node)
        for part in ast.walk(tree)
        if isinstance(part, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in part.handlers if h.type)
        for statement in part.body
        for node in ast.walk(statement)
    }
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {
        id(node): [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for node in imports
    }
    return [name for node in imports if id(node) not in inside for name in names[id(node)] if name in UNIX]


def test_unguarded_imports_are_recognized() -> None:
    code = "import os, fcntl\ntry:\n    import pwd\nexcept ImportError:\n  import tty\ndef f():\n    from pty import x"
    assert sorted(unguarded(ast.parse(code))) == ["fcntl", "pty", "tty"]


def test_no_module_of_unix_is_imported_unguarded() -> None:
    modules = {path: unguarded(ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")}
    assert {path.name: names for path, names in modules.items() if names} == {}


def test_a_chat_without_termios(fresh: Fresh) -> None:
    screen = fresh("trimtab.commands.chat_screen", "termios")
    with screen._echo_off():
        pass
    with pytest.raises(KeyError), screen._echo_off():
        raise KeyError


def test_a_character_that_a_code_page_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.commands import main

    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="cp1252", newline="\n"))
    assert main(["generate", "--help"]) == 0
    text = written.getvalue().decode("cp1252")
    assert "\\u2016edit\\u2016" in text  # the bars of a norm


class TestServing:
    @pytest.fixture(autouse=True)
    def installed(self) -> None:
        pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")

    def test_files_are_unlimited_without_resource(self, fresh: Fresh) -> None:
        assert fresh("trimtab.serve.connections", "resource").raise_file_limit(100_000) == 100_000

    @pytest.fixture
    def locked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
        """Windows' locks, as far as the audit log uses them: the calls, each with the file's number and position."""
        calls: list[tuple[int, int, int]] = []

        def locking(descriptor: int, mode: int, length: int) -> None:
            file, position = os.fstat(descriptor).st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
            if (mode, length) != (2, 1) or (file, position) in [call[1:] for call in calls]:
                raise OSError(36, "Resource deadlock avoided")
            calls.append((descriptor, file, position))

        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2))  # type: ignore[arg-type]
        return calls

    def test_the_audit_log_without_fcntl(
        self, fresh: Fresh, locked: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from trimtab.serve import file_lock

        monkeypatch.setattr(file_lock, "lock_file", fresh("trimtab.serve.file_lock", "fcntl").lock_file)
        for name in ("pread", "O_NONBLOCK", "O_CLOEXEC"):
            monkeypatch.delattr(os, name, raising=False)
        audit = fresh("trimtab.serve.audit")
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"n":1}\n{"n":2')
        log = audit.Audit(path)
        with pytest.raises(trimtab.TrimtabError, match="another server is writing to it"):
            audit.Audit(path)
        log.write({"n": 3})
        log.close()
        assert len(locked) == 1
        first, mended, third = path.read_bytes().splitlines()
        assert first == b'{"n":1}'
        assert b'"fragment":"{\\"n\\":2"' in mended
        assert third.endswith(b'"n":3}')
        assert path.stat().st_size < 1000  # the lock is beyond the end, and nothing is written there

    def test_the_audit_log_on_this_system(self, tmp_path: Path) -> None:
        from trimtab.serve.audit import Audit

        log = Audit(tmp_path / "a.jsonl")
        log.write({"n": 1})
        with pytest.raises(trimtab.TrimtabError, match="another server is writing to it"):
            Audit(tmp_path / "a.jsonl")
        assert (tmp_path / "a.jsonl").read_bytes().count(b"\n") == 1
        log.close()
        Audit(tmp_path / "a.jsonl").close()

    def test_two_servers_have_two_ports(self) -> None:
        from trimtab.serve.run import bind

        with bind("127.0.0.1", 0) as first:
            port = first.getsockname()[1]
            with pytest.raises(trimtab.TrimtabError, match="can't listen"):
                bind("127.0.0.1", port)
        bind("127.0.0.1", port).close()

    def test_windows_is_asked_for_a_port_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from trimtab.serve import run

        options: list[int] = []
        monkeypatch.setattr(run.socket, "SO_EXCLUSIVEADDRUSE", -5, raising=False)
        monkeypatch.setattr(run.socket.socket, "setsockopt", lambda _self, _level, option, _on: options.append(option))
        run.bind("127.0.0.1", 0).close()
        assert options == [-5]
        assert socket.SO_REUSEADDR not in options
