"""Makes and measures a steering, starting from an idea."""

from trimtab.making.idea import Idea, idea_from_contrast, idea_from_sentence
from trimtab.making.make import Made, make, make_from_pairs
from trimtab.making.verdict import Verdict
from trimtab.making.writer import idea_from_writer

__all__ = [
    "Idea",
    "Made",
    "Verdict",
    "idea_from_contrast",
    "idea_from_sentence",
    "idea_from_writer",
    "make",
    "make_from_pairs",
]
