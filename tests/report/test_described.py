"""What a card says, in words."""

from __future__ import annotations

from pathlib import Path

import torch

from trimtab import Add, Card, Edit, Positions, Site, Steering, load, save
from trimtab.report.described import card_rows


def test_a_setting_that_was_measured_too_is_told_once_and_tries_in_words() -> None:
    tries = [{"asked": 64, "help": "", "kept": 26}, {"asked": 40, "help": "said in other ways", "kept": 4}]
    rows = card_rows(Card("distill", options={"steps": 16, "rank": 8}, measured={"steps": 16, "tries": tries}))
    assert rows == [("steps", "16"), ("rank", "8"), ("tries", "26 of 64 kept; said in other ways: 4 of 40 kept")]
    shorter = card_rows(Card("distill", options={"steps": 16}, measured={"steps": 12, "tries": "many"}))
    assert shorter == [("steps", "16"), ("steps", "12"), ("tries", "many")]


def test_an_audit_of_an_older_version_is_shown(tmp_path: Path) -> None:
    audit = {"version": 1, "size": "full", "verdict": ["no side effect found"], "refusal_direction": {"told": [0.9]}}
    steering = Steering((Edit(Site(1), Add(torch.ones(4)), Positions.all()),), card=Card("caa", audit=audit))
    save(steering, tmp_path / "old.safetensors")
    card = load(tmp_path / "old.safetensors").card
    assert card.audit == audit
    assert ("audit (full)", "no side effect found") in card_rows(card)
