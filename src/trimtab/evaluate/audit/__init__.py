"""What a steering does besides what it is for: found, said in words, and taken out of it where it can be."""

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
