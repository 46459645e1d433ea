"""The scripts behind the Makefile: parts side by side, and environments that are kept by what they are made of."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = """
good:
\t@echo before; echo "12 passed, 3 skipped in 0.10s"
bad:
\t@echo the reason why; echo "1 failed, 2 passed in 0.10s"; exit 2
long:
\t@sleep 300 & echo $$! > child; wait
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the scripts, with a Makefile of three small parts."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "Makefile").write_text(MAKEFILE)
    return tmp_path


def parts(house: Path, *names: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, house / "tools/parts.py", *names]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


class TestParts:
    def test_all_pass(self, house: Path) -> None:
        ran = parts(house, "good")
        assert ran.returncode == 0
        assert "12 passed, 3 skipped in 0.10s" in ran.stdout.splitlines()
        assert "before" not in ran.stdout
        assert (house / "build/logs/good.log").read_text().startswith("before\n")

    def test_one_that_fails_is_shown_and_fails_all(self, house: Path) -> None:
        ran = parts(house, "bad", "good")
        assert ran.returncode == 1
        assert "the reason why" in ran.stdout
        assert "12 passed" in ran.stdout
        assert ran.stdout.splitlines()[-1] == "FAILED: bad"

    def test_a_part_that_there_is_not(self, house: Path) -> None:
        assert parts(house, "good", "none").returncode == 1

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_stopping_stops_all_that_was_started(self, house: Path, number: int) -> None:
        running = subprocess.Popen([sys.executable, house / "tools/parts.py", "long"], stdout=subprocess.DEVNULL)
        child = house / "child"
        try:
            until = time.monotonic() + 30
            while not (child.exists() and child.read_text()) and time.monotonic() < until:
                time.sleep(0.05)
            running.send_signal(number)
            assert running.wait(timeout=60) == 130
        finally:
            running.kill()
        state = Path(f"/proc/{child.read_text().strip()}/stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


class TestEnvironments:
    @pytest.fixture
    def installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        """`environment`, over a lock of its own, with a pip that only notes what it was asked for."""
        spec = importlib.util.spec_from_file_location("environment", ROOT / "tools/environment.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "environment", module)
        spec.loader.exec_module(module)
        (tmp_path / "requirements").mkdir()
        (tmp_path / "requirements/peers.lock").write_text("one==1")
        module.ROOT, module.commands = tmp_path, []

        def install(python: Path, *arguments: Any) -> None:
            module.commands.append(arguments)
            (tmp_path / "peers/one").write_text("")

        monkeypatch.setattr(module, "install", install)
        return module

    def test_an_unchanged_lock_installs_nothing(self, installed: Any, tmp_path: Path) -> None:
        installed.make("peers", tmp_path / "peers")
        assert len(installed.commands) == 1
        assert {"--no-deps", "--require-hashes"} <= set(installed.commands[0])
        installed.make("peers", tmp_path / "peers")
        assert len(installed.commands) == 1

    def test_torch_comes_without_hashes_and_with_what_it_needs(
        self, installed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(installed, "pip", lambda *_, **__: 1)  # PyTorch's own index can't be reached
        (tmp_path / "requirements/newest-torch.txt").write_text("torch==2")
        for _ in range(2):
            installed.make("newest-torch", tmp_path / "peers")
        (arguments,) = installed.commands
        assert {"--target", tmp_path / "peers", tmp_path / "requirements/newest-torch.txt"} <= set(arguments)
        assert not {"--no-deps", "--require-hashes"} & set(arguments)

    def test_a_changed_lock_makes_it_anew(self, installed: Any, tmp_path: Path) -> None:
        installed.make("peers", tmp_path / "peers")
        (tmp_path / "peers/old").write_text("")
        (tmp_path / "requirements/peers.lock").write_text("one==2")
        installed.make("peers", tmp_path / "peers")
        assert not (tmp_path / "peers/old").exists()

    def test_one_that_was_interrupted_isnt_taken_for_whole(
        self, installed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(installed, "install", interrupted)
            with pytest.raises(KeyboardInterrupt):
                installed.make("peers", tmp_path / "peers")
        (tmp_path / "peers/half").write_text("")
        installed.make("peers", tmp_path / "peers")
        assert (tmp_path / "peers/one").exists()
        assert not (tmp_path / "peers/half").exists()

    def test_a_folder_that_isnt_ours_is_kept(self, installed: Any, tmp_path: Path) -> None:
        (tmp_path / "peers").mkdir()
        (tmp_path / "peers/theirs").write_text("")
        installed.make("peers", tmp_path / "peers")
        assert (tmp_path / "peers/theirs").exists()


def test_the_makefile_runs_parts_that_there_are() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        name
        for line in makefile.splitlines()
        if ":" in line and line[0].isalpha()
        for name in line.split(":")[0].split()
    }
    for line in makefile.splitlines():
        if "tools/parts.py" in line:
            assert set(line.split("tools/parts.py")[1].split()) <= targets


def _tool(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_comments_in_code_are_prose_and_generated_parts_are_not() -> None:
    prose = _tool("prose")
    code = "so\n```python\nheed = 1  # what comes along\n```\n"
    page = f"{code}<!-- x: begin, 1 -->\nheed\n<!-- x: end -->\n```sh\nheed # anew\n```\n"
    text = prose.GENERATED.sub(prose.blank, page)
    assert text.count("\n") == page.count("\n")
    findings = [*prose.phrases(ROOT, 1, prose.without_code(text)), *prose.phrases(ROOT, 1, prose.code_comments(text))]
    assert [(finding.line, finding.phrase) for finding in findings] == [(3, "comes along"), (9, "anew")]


def test_prose_is_found_and_code_is_not() -> None:
    prose = _tool("prose")
    page = "Nothing\nfalls\napart.\n\n```sh\nfalls apart\n```\n`falls apart`\nIt falls apart-time, and falls apart."
    findings = list(prose.phrases(ROOT / "page.md", 1, prose.without_code(page)))
    assert [(finding.line, finding.phrase) for finding in findings] == [
        (2, "falls apart"),
        (9, "falls apart"),
        (9, "falls apart"),
    ]


def test_names_that_say_nothing_are_found_wherever_they_are_given(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "from x import given\ngiven(1)\none, two = 1, 2\nclass C:\n    told: int\n    def asked(self): ...\n"
        "f = lambda found: [one for one in found]\nfor row in (told := 1), 2: ...\n"
        "def g(*given): ...\nC().asked = C.told\n"
    )
    names = sorted((finding.line, finding.phrase) for finding in _tool("prose").vague_names(module))
    assert names == [(3, "one"), (6, "asked"), (7, "found"), (7, "one"), (8, "told"), (9, "given")]


def test_changes_of_the_public_api_are_found() -> None:
    griffe = pytest.importorskip("griffe")
    api = _tool("api")

    def package(code: str) -> Any:
        modules = {"__init__.py": "from trimtab.a import *\nfrom trimtab.a import f, gone, new, _own", "a.py": code}
        with griffe.temporary_visited_package("trimtab", modules, resolve_aliases=True) as visited:
            return visited

    old = package("def f(x, y): ...\ndef gone(): ...\ndef _own(x): ...\n")
    new = package("def f(x): ...\ndef new(): ...\ndef _own(): ...\n")
    assert list(api.changes(old, new)) == [
        ("y", "f: f(y): Parameter was removed"),
        ("gone", "gone was removed"),
        ("new", "new is new"),
    ]
    assert api.mentioned("learn_x", "- `learn_x(…)` is new")
    assert not api.mentioned("learn_x", "- learn_x and `learn_xy` are new")


class TestTheChangesOfTheApi:
    @pytest.fixture
    def api(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
        """The script in a repository of one commit, with a package of one function."""
        pytest.importorskip("griffe")
        module = _tool("api")
        monkeypatch.setattr(module, "ROOT", tmp_path)
        for name in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{name}_NAME", "Nobody")
            monkeypatch.setenv(f"GIT_{name}_EMAIL", "nobody@example.org")
        assert module.git("init", "-q") is not None
        (tmp_path / "src/trimtab").mkdir(parents=True)
        (tmp_path / "src/trimtab/__init__.py").write_text("from trimtab.a import f\n")
        (tmp_path / "src/trimtab/a.py").write_text("")
        self.commit(module, "pyproject.toml", 'name = "trimtab"\nversion = "0.1.0"\n')
        self.commit(module, "src/trimtab/a.py", "def f(x, y): ...\n")
        self.commit(module, "CHANGELOG.md", "# Changelog\n\n## [Unreleased]\n\n- `f`\n")
        return module

    @staticmethod
    def commit(api: Any, name: str, text: str) -> str:
        (api.ROOT / name).write_text(text)
        assert api.git("add", "-A") is not None
        assert api.git("commit", "-q", "-m", name) is not None
        return str(api.git("rev-parse", "HEAD"))

    def test_since_when_it_compares(self, api: Any) -> None:
        assert api.default_ref() == api.git("rev-list", "--max-parents=0", "HEAD")
        newer = self.commit(api, "pyproject.toml", 'version = "0.2.0"\n')
        self.commit(api, "pyproject.toml", 'version = "0.2.0"\nlicense = "Apache-2.0"\n')
        assert api.default_ref() == newer
        api.git("tag", "v0.2.0")
        assert api.default_ref() == newer  # not the tag of the commit itself, which has no changes
        self.commit(api, "README.md", "more\n")
        assert api.default_ref() == "v0.2.0"

    def test_a_change_fails_until_the_changelog_names_it(
        self, api: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["api.py"])
        assert api.main() == 0  # since the first commit, which has no changelog
        assert "f is new" in capsys.readouterr().out
        self.commit(api, "CHANGELOG.md", "## [Unreleased]\n\n## [0.1.0] - 2026-01-01\n\n- `f` and its `y`\n")
        api.git("tag", "v0.1.0")
        self.commit(api, "src/trimtab/a.py", "def f(x): ...\n")
        assert api.main() == 1
        assert "NEW: f: f(y): Parameter was removed\n1 changes since v0.1.0" in capsys.readouterr().out
        (api.ROOT / "CHANGELOG.md").write_text("## [Unreleased]\n\n- `f` has no `y`\n\n## [0.1.0]\n")
        assert api.main() == 0
        (api.ROOT / "CHANGELOG.md").write_text("## [Unreleased]\n\n## [0.2.0]\n\n- `f(y)`\n\n## [0.1.0]\n")
        assert api.main() == 0

    def test_a_commit_that_there_is_not(
        self, api: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", ["api.py", "v9"])
        with pytest.raises(SystemExit):
            api.main()
        assert "there is no commit v9" in capsys.readouterr().err


class TestTypes:
    @pytest.fixture
    def typed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """The script, and a Pyright that prints what `report.json` has, and notes its path."""
        pyright = tmp_path / "pyright"
        pyright.write_text(f'#!/bin/sh\ncd "{tmp_path}"; cat report.json; printf %s "$PATH" > path; exit 1\n')
        pyright.chmod(0o755)
        monkeypatch.setattr(sys, "argv", ["typed.py", str(pyright)])
        return _tool("typed")

    @pytest.mark.parametrize(("score", "code"), [(0.95, 0), (0.9499, 1)])
    def test_a_share_below_the_floor_fails(
        self, typed: Any, score: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "report.json").write_text(json.dumps({"typeCompleteness": REPORT | {"completenessScore": score}}))
        assert typed.main() == code
        assert (tmp_path / "path").read_text().partition(":")[0] == str(Path(sys.executable).parent)
        assert capsys.readouterr().out == (
            "trimtab.f: Return type is unknown\n"
            f"{score:.1%} of 1,003 exported symbols have complete types; at least 95% must\n"
        )

    def test_pyright_itself_fails(self, typed: Any, tmp_path: Path) -> None:
        (tmp_path / "report.json").write_text("No module named trimtab")
        with pytest.raises(SystemExit, match="Pyright failed: No module named trimtab"):
            typed.main()


REPORT = {
    "exportedSymbolCounts": {"withKnownType": 1001, "withAmbiguousType": 1, "withUnknownType": 1},
    "symbols": [
        {
            "name": "trimtab.f",
            "isExported": True,
            "isTypeKnown": False,
            "diagnostics": [{"message": "Return type is unknown\n  more"}],
        },
        {"name": "trimtab.g", "isExported": True, "isTypeKnown": True, "diagnostics": []},
        {"name": "trimtab._h", "isExported": False, "isTypeKnown": False, "diagnostics": []},
    ],
}
