"""A folder in which each part of a run is a file, written atomically, so that an interrupted run can be resumed."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError
from trimtab.files.atomic_write import write_atomically
from trimtab.files.steering_file import load_steering, save_steering

if TYPE_CHECKING:
    from trimtab.steering import Steering

HEAD = "run.json"
PACKAGE = Path(__file__).parents[1]


LONGEST = 60
"""The maximum number of characters of a setting that an error shows; longer ones are only named."""


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences between two runs, in words: a setting's name, with its old and its new value."""
    words = []
    for key in sorted({**there, **now}):
        before, after = there.get(key), now.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            words += differences(before, after)
        else:
            pair = f"{json.dumps(before)} there and {json.dumps(after)} now"
            words.append(f"{key}: {pair}" if len(pair) <= LONGEST else f"{key} differ")
    return words


@cache
def code_digest() -> str:
    """A digest of the package's source and data files, since parts that different code computed can't be compared."""
    digest = hashlib.sha256()
    for path in sorted(path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".json")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(PACKAGE).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]


class Store:
    """The folder of one run.

    Args:
        folder: The folder, created if it doesn't exist.
        head: Describes the run. Its entry `code` lists digests of the code that computed its parts.
        mix_code: Accept a run that other code began, and add the digest of this code to its head.

    Raises:
        TrimtabError: The folder has another run, or one that other code began, or can't be written.
    """

    def __init__(self, folder: Path, head: Mapping[str, Any], *, mix_code: bool = False) -> None:
        self.folder = folder
        try:
            for name in ("cells", "learned", "texts"):
                (folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrimtabError(f"can't write into {folder}: {error.strerror}; name another folder") from None
        path, wanted = folder / HEAD, canonical(head)
        if not path.is_file():
            write_atomically(path, wanted)
            return
        there, now = json.loads(path.read_bytes()), json.loads(wanted)
        before, code = there.pop("code", []), now.pop("code", [])
        if there != now:
            odd = ", ".join(differences(there, now))
            raise TrimtabError(
                f"{folder} holds a run with other settings ({odd}): give the same settings to continue it, or"
                " another folder"
            )
        if code in (before, before[-1:]):
            return
        if not mix_code:
            raise TrimtabError(
                f"{folder} holds a run that other code of trimtab began (digest {', '.join(before) or 'unknown'}, and"
                f" {', '.join(code)} now): name another folder, or give --mix-code (mix_code=True) to continue it"
                " nevertheless"
            )
        write_atomically(path, canonical({**there, "code": [*(before or ["unknown"]), *code]}))

    def done(self, kind: str, *names: str) -> bool:
        """Whether this part exists."""
        return self._path(kind, names, ".json").is_file()

    def get_or_create(self, kind: str, *names: str, make: Callable[[], Any]) -> Any:
        """The content of this part's file, which is made and written first if it doesn't exist. Values must be JSON."""
        path = self._path(kind, names, ".json")
        if not path.is_file():
            write_atomically(path, canonical(make()))
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            raise TrimtabError(f"{path} is damaged; delete it, and it will be made again") from None

    def get_or_create_steering(self, *names: str, make: Callable[[], Steering]) -> Steering:
        """The steering of this part, learned first if it doesn't exist."""
        path = self._path("learned", names, ".safetensors")
        if not path.is_file():
            save_steering(make(), path)
        return load_steering(path)

    def _path(self, kind: str, names: tuple[str, ...], suffix: str) -> Path:
        return self.folder / kind / f"{'--'.join(_plain(name) for name in names)}{suffix}"


def canonical(value: Any) -> bytes:
    """The value as JSON, the same bytes for the same value; NaN and infinities become null."""
    return (json.dumps(_finite(value), ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _plain(name: str) -> str:
    """The name as a file name: other characters are replaced, and a digest then keeps names distinct."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
