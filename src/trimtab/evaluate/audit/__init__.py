"""The side effects of a steering: measured, described in words, and removed where possible."""

from trimtab.evaluate.audit.items import FULL, QUICK, Items, Size, check_protected, read_items
from trimtab.evaluate.audit.run import Audit, Comparison, Estimate, audit

__all__ = [
    "FULL",
    "QUICK",
    "Audit",
    "Comparison",
    "Estimate",
    "Items",
    "Size",
    "audit",
    "check_protected",
    "read_items",
]
