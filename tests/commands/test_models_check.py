"""`trimtab models --check`: what works, on given weights and on a tiny random model of a type."""

from __future__ import annotations

import json

import pytest

from trimtab import doctor
from trimtab.doctor import CHECKS, Finding, Report
from trimtab.doctor.report import WRONG


def test_a_model_s_own_weights(trimtab, model) -> None:
    ran = trimtab("models", "--check", model, "--device", "cpu", "--json")
    assert ran.code == 0
    assert ran.json["weights"] == "as given"
    assert [finding["name"] for finding in ran.json["findings"]] == list(CHECKS)
    states = {finding["name"]: finding["state"] for finding in ran.json["findings"]}
    assert states.pop("router") == "refused"  # no mixture of experts
    assert set(states.values()) == {"works"}, ran.json["findings"]


def test_a_type_and_its_reasons(trimtab) -> None:
    ran = trimtab("models", "--check", "mamba")
    assert ran.code == 0
    assert "mamba, tiny and random" in ran.out
    assert "has no attention, so there are no scores to steer" in " ".join(ran.out.split())


def test_a_configuration(trimtab, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "olmo"}))
    for what in (tmp_path, tmp_path / "config.json"):
        ran = trimtab("models", "--check", what, "--json")
        assert ran.code == 0
        assert ran.json["family"] == "olmo"
        assert ran.json["weights"] == "random, tiny"


@pytest.mark.parametrize(
    ("config", "said"), [({"model_type": "nonesuch"}, "'nonesuch'"), ({}, "has no model_type"), ([], "model_type")]
)
def test_what_is_no_configuration(trimtab, tmp_path, config, said) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    ran = trimtab("models", "--check", tmp_path / "config.json")
    assert ran.code == 2
    assert said in ran.err


def test_a_file_that_isnt_there(trimtab, tmp_path) -> None:
    ran = trimtab("models", "--check", tmp_path / "none.json")
    assert ran.code == 2
    assert "none.json" in ran.err


def test_what_is_wrong_shows_in_the_exit_code(trimtab, monkeypatch) -> None:
    report = Report(
        "olmo", "olmo", "model.layers", "random, tiny", (Finding("heads", "attention heads", WRONG, "off"),)
    )
    monkeypatch.setattr(doctor, "check_config", lambda _: report)
    ran = trimtab("models", "--check", "olmo")
    assert ran.code == 1
    assert "WRONG" in ran.out
