"""Evaluation of steered models: answers checked by code, and confidence intervals for the results."""

from trimtab.evaluate.constraints import CONSTRAINTS, Check, on_topic
from trimtab.evaluate.intervals import Interval, paired_bootstrap
from trimtab.text.repetition import repeated_share

__all__ = ["CONSTRAINTS", "Check", "Interval", "on_topic", "paired_bootstrap", "repeated_share"]
