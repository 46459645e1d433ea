"""`trimtab serve --engine vllm`: what it starts, and what it refuses before it does."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from other_programs import has_vllm

from trimtab import save
from trimtab.commands.serve_vllm import vllm_command, vllm_environment
from trimtab.steering import Gate, Steering


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIMTAB_API_KEY", raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been started: commands and environments."""
    programs: list[Any] = []

    def execve(program: str, command: list[str], environment: dict[str, str]) -> None:
        programs.append((command, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr("trimtab.engines.vllm.versions.vllm_version", lambda: "0.32.0")
    return programs


def test_vllms_server_is_started(trimtab: Callable[..., Any], started: list[Any], tmp_path: Path) -> None:
    arguments = ("--steerings", tmp_path, "--port", "0", "--rows", "7", "--model", "org/name", "--dtype", "float16")
    with pytest.raises(SystemExit):
        trimtab("serve", "--engine", "vllm", *arguments, "--", "--tensor-parallel-size", "2")
    ((command, environment),) = started
    assert command == [
        *(sys.executable, "-m", "trimtab.engines.vllm.command_line", "serve", "org/name"),
        *("--host", "127.0.0.1", "--port", "0", "--dtype", "float16", "--max-num-seqs", "7"),
        *("--served-model-name", "trimtab", "org/name", "--tensor-parallel-size", "2"),
        *("--middleware", "trimtab.serve.vllm.middleware.SteeringMiddleware"),
    ]
    assert environment["TRIMTAB_STEERINGS"] == str(tmp_path)
    assert "trimtab" in environment["VLLM_PLUGINS"].split(",")
    assert environment["PATH"] == os.environ["PATH"]


def test_a_name_and_plugins_of_the_users_own_stay() -> None:
    made = vllm_command(
        model="m", host="h", port=1, rows=None, dtype="auto", revision=None, vllm_options=["--served-model-name=x"]
    )
    assert made[4:-2] == ["m", "--host", "h", "--port", "1", "--served-model-name=x"]
    assert vllm_environment({"VLLM_PLUGINS": "mine"}, None)["VLLM_PLUGINS"] == "mine,trimtab"
    keyed = vllm_environment({"TRIMTAB_API_KEY": "k"}, None)
    assert keyed["VLLM_API_KEY"] == "k"
    assert "TRIMTAB_STEERINGS" not in keyed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--policy", "p.json"), "can't read the policy p.json"),
        (("--audit-prompts",), "--audit-prompts needs an audit log"),
        (("--max-dose", "1", "--", "--grpc"), "--grpc can't be combined with a policy"),
        (("--max-dose", "1", "--", "--api_key=x"), "--api-key can't be combined with a policy"),
        (("--max-tokens", "512"), "--max-tokens is an option of trimtab's own server"),
        (("--upload",), "--upload is an option of trimtab's own server"),
        (("--device", "cpu"), "--device is an option of trimtab's own server"),
        (("--host", "0.0.0.0"), "no API keys"),
        (("--steerings", "nowhere"), "there is no folder nowhere"),
        (("--model", "model.gguf"), "convert the GGUF file"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_it_cant_do_is_refused(
    trimtab: Callable[..., Any], started: list[Any], arguments: tuple[str, ...], words: str
) -> None:
    ran = trimtab("serve", "--engine", "vllm", *arguments)
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1
    assert not started


def test_steerings_are_looked_at_first(
    trimtab: Callable[..., Any], started: list[Any], tmp_path: Path, gated: Steering
) -> None:
    save(gated, tmp_path / "polite.safetensors")
    ran = trimtab("serve", "--engine", "vllm", "--steerings", tmp_path)
    assert ran.code == 2
    assert "'polite' has a gate that reads the prompt" in ran.err
    (tmp_path / "polite.safetensors").write_bytes(b"no tensors")
    assert trimtab("serve", "--engine", "vllm", "--steerings", tmp_path).code == 2
    assert not started


@pytest.fixture
def gated() -> Steering:
    import torch

    from trimtab import Add, Edit, Positions, Site, Threshold

    gate: Gate = Threshold(Site(0), torch.ones(4), 0.0)
    return Steering((Edit(Site(0), Add(torch.ones(4)), Positions.all(), gate=gate),))


def test_other_engines(trimtab: Callable[..., Any]) -> None:
    for arguments, words in (
        (("--engine", "llamacpp"), "--engine llamacpp can't serve"),
        (("--", "--tensor-parallel-size", "2"), "only --engine vllm takes more options"),
    ):
        ran = trimtab("serve", *arguments)
        assert ran.code == 2
        assert words in ran.err


@pytest.mark.skipif(has_vllm(), reason="vLLM is installed here")
def test_without_vllm(trimtab: Callable[..., Any]) -> None:
    ran = trimtab("serve", "--engine", "vllm")
    assert ran.code == 2
    assert "needs vLLM, which isn't installed here" in ran.err
