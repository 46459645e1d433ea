"""`trimtab chat` in a real terminal: tmux types the keys and reads the screen."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from trimtab import Add, Edit, Site, Steering, load, save

pytest.importorskip("prompt_toolkit", reason="typing needs prompt_toolkit: pip install 'trimtab[chat]'")
pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("tmux") is None and not os.environ.get("CI"),  # CI installs it: there, its absence is an error
        reason="there is no tmux to type with: apt-get install tmux",
    ),
]
WIDTH = 576  # the default model's
PATIENCE = 120


class Tmux:
    """One pane of a server of its own."""

    def __init__(self, socket: Path, command: str) -> None:
        self.socket = socket
        self._tmux("-f", os.devnull, "new-session", "-d", "-x", "100", "-y", "40", command)

    def _tmux(self, *arguments: str) -> str:
        ran = subprocess.run(["tmux", "-S", str(self.socket), *arguments], capture_output=True, text=True, check=True)
        return ran.stdout

    def type(self, text: str) -> None:
        self._tmux("send-keys", "-l", text)

    def press(self, key: str) -> None:
        self._tmux("send-keys", key)

    def enter(self, line: str) -> None:
        self.type(line)
        self.press("Enter")

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-S", "-")

    def until(self, there: Callable[[str], bool]) -> str:
        """The screen once it is so."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if there(screen := self.screen()):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"the terminal shows\n{screen}")

    def close(self) -> None:
        subprocess.run(["tmux", "-S", str(self.socket), "kill-server"], capture_output=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A steering for the default model, which pushes somewhere."""
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    (tmp_path / "steerings").mkdir()
    save(Steering((Edit(Site(9), Add(vector)),)), tmp_path / "steerings" / "push.safetensors")
    return tmp_path / "steerings"


@pytest.fixture
def terminal(tmp_path: Path, folder: Path) -> Iterator[Tmux]:
    pane = chat(tmp_path, "--steerings", str(folder), "--max-tokens", "400")
    yield pane
    pane.close()


@pytest.fixture
def small(tmp_path: Path, model: Path) -> Iterator[Tmux]:
    """With a tiny random model, which is made something of in seconds."""
    pane = chat(tmp_path, "--model", str(model), "--device", "cpu", "--max-tokens", "4")
    yield pane
    pane.close()


def chat(tmp_path: Path, *options: str) -> Tmux:
    command = [sys.executable, "-m", "trimtab", "chat", *options]
    kept = {
        name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE") if name in os.environ
    }
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in kept.items())
    return Tmux(tmp_path / "tmux", f"{variables} {shlex.join(command)}; echo code $?; exec cat")


def prompt(label: str = "") -> Callable[[str], bool]:
    """Whether the last line waits for input, and this is on."""
    return lambda screen: screen.rstrip().splitlines()[-1:] == [f"{label}>"]


def test_a_conversation(terminal: Tmux) -> None:
    terminal.until(prompt())
    terminal.press("C-c")
    assert "Ctrl-D or /quit leaves" in terminal.until(lambda screen: "leaves" in screen.split("Ctrl-D leaves")[-1])

    terminal.until(prompt())
    terminal.enter("Tell me a long story about the sea.")
    terminal.until(lambda screen: bool(screen.partition("about the sea.")[2].strip()))  # it has begun
    terminal.press("C-c")
    screen = terminal.until(lambda screen: "kept as far as it got" in screen)
    assert "ended after" not in screen

    terminal.until(prompt())
    terminal.type("/stee")
    terminal.press("Tab")
    terminal.until(lambda screen: screen.rstrip().endswith("/steer"))
    terminal.type(" pu")
    terminal.press("Tab")
    terminal.until(lambda screen: screen.rstrip().endswith("/steer push"))
    terminal.enter(" 0.5")
    assert "push is on at strength 0.5, layer 9" in terminal.until(prompt("push:0.5 "))

    terminal.enter("/reset")
    terminal.until(lambda screen: "forgot 1 turn;" in screen)
    terminal.until(prompt("push:0.5 "))
    terminal.enter("/compare")
    terminal.until(lambda screen: "unsteered as well" in screen)
    terminal.until(prompt("push:0.5 "))
    terminal.enter("Say hello.")
    terminal.until(lambda screen: "unsteered  " in screen)
    terminal.type("/un")  # while answers come: it isn't shown amid them
    screen = terminal.until(lambda screen: screen.rstrip().endswith("push:0.5 > /un"))
    assert screen.count("/un") == 1
    (heading,) = [line for line in screen.splitlines() if line.startswith("unsteered")]
    assert heading.split() == ["unsteered", "steered"]

    terminal.press("C-u")
    terminal.press("Up")
    terminal.until(lambda screen: screen.rstrip().endswith("> Say hello."))
    terminal.press("C-u")
    terminal.until(prompt("push:0.5 "))
    terminal.enter("/dose")
    assert "residual" in terminal.until(lambda screen: "tends to break" in screen)
    terminal.until(prompt("push:0.5 "))
    terminal.enter("/quit")
    terminal.until(lambda screen: screen.rstrip().endswith("code 0"))


def test_making_a_steering(small: Tmux, tmp_path: Path) -> None:
    rows = [{"prompt": f"The sea {i}?", "positive": f"yes {i} the sea", "negative": f"no no {i}"} for i in range(16)]
    pairs = tmp_path / "mine.jsonl"
    pairs.write_text("\n".join(map(json.dumps, rows)))
    small.until(prompt())
    small.enter(f"/make --keep --from {pairs}")
    small.until(lambda screen: "learning" in screen or "measuring" in screen)  # the bar
    small.press("C-c")
    small.until(lambda screen: "stopped; nothing has changed" in screen)
    small.until(prompt())
    small.enter(f"/make --keep --from {pairs}")
    screen = small.until(prompt("mine:1 "))
    assert "verdict: " in screen
    assert "mine is on at strength 1; /save mine.safetensors writes it" in " ".join(screen.split())
    small.enter("Why?")
    small.until(lambda screen: "ended after 4 tokens" in screen.split("writes it")[-1])
    small.until(prompt("mine:1 "))
    small.enter(f"/save {tmp_path / 'mine.safetensors'}")
    small.until(lambda screen: "wrote " in screen)
    assert load(tmp_path / "mine.safetensors").card.options["idea"] == "mine"
    small.until(prompt("mine:1 "))
    small.press("C-d")
    small.until(lambda screen: screen.rstrip().endswith("code 0"))
