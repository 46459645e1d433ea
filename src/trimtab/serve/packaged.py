"""The steerings that come with the package, to begin with where an operator has named none."""

from __future__ import annotations

import warnings

from trimtab.data.distilled import path_of
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import load_steering, steering_digest
from trimtab.lm import LM
from trimtab.serve.library import Library, Loaded

NAMES = ("bullets", "json", "sentence")
"""They were learned on the default model, which follows them without any instruction."""


def packaged(lm: LM) -> Library:
    """Those of them that were learned on this model: on the default model all, on others none."""
    entries = []
    for name in NAMES:
        steering = load_steering(path_of(name))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lm.check(steering)
        except TrimtabError:
            continue
        entries.append(Loaded(name, steering, steering_digest(steering), "file"))
    return Library(lm, entries)
