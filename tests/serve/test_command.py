"""`trimtab serve` refuses what it can't do before it loads anything."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_API_KEY", raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_need_keys(trimtab: Callable[..., Any], host: str) -> None:
    ran = trimtab("serve", "--host", host)
    assert ran.code == 2
    assert "no API keys" in ran.err


def test_what_is_said_before_anything_is_loaded(trimtab: Callable[..., Any], tmp_path: Path) -> None:
    policy = tmp_path / "p.json"
    policy.write_text(json.dumps({"max_dose": "high"}))
    for arguments, words in (
        (("--policy", policy), "not valid at max_dose"),
        (("--policy", tmp_path / "none.json"), "can't read the policy"),
        (("--steerings", tmp_path / "none"), "there is no folder"),
        (("--steerings", tmp_path), "has no .safetensors files"),
        (("--monitor", "harm=none.safetensors"), "--monitor none.safetensors: there is no file"),
        (("--audit", tmp_path / "none" / "log"), "can't write the audit log"),
        (("--audit-prompts",), "give --audit FILE"),
        (("--rows", 0), "--rows"),
    ):
        ran = trimtab("serve", *arguments, "--model", tmp_path / "no-model")
        assert ran.code == 2
        assert words in ran.err, ran.err
        assert ran.err.count("\n") == 1


def test_a_port_that_is_taken(trimtab: Callable[..., Any], tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = trimtab("serve", "--port", port, "--model", tmp_path / "no-model")
    assert ran.code == 2
    assert f"can't listen on 127.0.0.1 port {port}" in ran.err


def test_a_policy_whose_steering_is_missing(
    trimtab: Callable[..., Any], tmp_path: Path, folder: Path, steerings: Path
) -> None:
    policy = tmp_path / "p.json"
    policy.write_text(json.dumps({"always": [{"name": "safety"}]}))
    ran = trimtab("serve", "--model", folder, "--steerings", steerings, "--policy", policy, "--port", 0)
    assert ran.code == 2
    assert "'safety'" in ran.err


def test_the_help_teaches(trimtab: Callable[..., Any]) -> None:
    ran = trimtab("serve", "--help")
    assert ran.code == 0
    for words in ("extra_body", "TRIMTAB_API_KEY", "--insecure", "/v1/steerings"):
        assert words in ran.out
