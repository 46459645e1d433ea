"""The steerings that are included in the package, served when the operator has named none."""

from __future__ import annotations

import warnings

from trimtab.data.distilled import path_of
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import load_steering, steering_digest
from trimtab.lm import LM
from trimtab.serve.library import Library, LoadedSteering

NAMES = ("bullets", "json", "sentence")
"""Learned on the default model, which follows them without any instruction."""


def packaged_library(lm: LM) -> Library:
    """The packaged steerings that were learned on this model: all of them for the default model, none for others."""
    entries = []
    for name in NAMES:
        steering = load_steering(path_of(name))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lm.check(steering)
        except TrimtabError:
            continue
        entries.append(LoadedSteering(name, steering, steering_digest(steering), "file"))
    return Library(lm, entries)
