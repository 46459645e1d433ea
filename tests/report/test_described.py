"""What a card says, in words."""

from __future__ import annotations

from trimtab import Card
from trimtab.report.described import card_rows


def test_a_setting_that_was_measured_too_is_told_once_and_tries_in_words() -> None:
    tries = [{"asked": 64, "help": "", "kept": 26}, {"asked": 40, "help": "said in other ways", "kept": 4}]
    rows = card_rows(Card("distill", options={"steps": 16, "rank": 8}, measured={"steps": 16, "tries": tries}))
    assert rows == [("steps", "16"), ("rank", "8"), ("tries", "26 of 64 kept; said in other ways: 4 of 40 kept")]
    shorter = card_rows(Card("distill", options={"steps": 16}, measured={"steps": 12, "tries": "many"}))
    assert shorter == [("steps", "16"), ("steps", "12"), ("tries", "many")]
