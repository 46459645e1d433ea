"""Check how complete the types of trimtab's exported symbols are, as Pyright counts them.

    python tools/typed.py build/pyright/bin/pyright

`make typed` installs Pyright and runs this. It prints the symbols without a complete type, and the share of those with
one, and exits with 1 if that is below `FLOOR`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FLOOR = 0.95


def incomplete(report: dict[str, Any]) -> list[str]:
    """The exported symbols without a complete type, each with what Pyright says first about it."""
    symbols = [symbol for symbol in report["symbols"] if symbol["isExported"] and not symbol["isTypeKnown"]]
    return [f"{symbol['name']}: {message(symbol)}" for symbol in symbols]


def message(symbol: dict[str, Any]) -> str:
    """The first line of the first finding."""
    return next((finding["message"].splitlines()[0] for finding in symbol.get("diagnostics", [])), "no type")


def main() -> int:
    """Print the share; return the exit status."""
    (pyright,) = sys.argv[1:]
    # Pyright asks the `python` on the path where packages are; with --verifytypes it ignores its own --pythonpath.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    command = [pyright, "--verifytypes", "trimtab", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)["typeCompleteness"]
    except (ValueError, KeyError):
        sys.exit(f"Pyright failed: {done.stderr.strip() or done.stdout.strip()}")
    score, symbols = report["completenessScore"], report["exportedSymbolCounts"]
    print("\n".join(incomplete(report)))
    print(f"{score:.1%} of {sum(symbols.values()):,} exported symbols have complete types; at least {FLOOR:.0%} must")
    return 0 if score >= FLOOR else 1


if __name__ == "__main__":
    sys.exit(main())
