"""The table of docs/families.md: what of trimtab works on which type of model, as the doctor finds it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import transformers

from trimtab.doctor import AS_LOADED, CHECKS, check_model
from trimtab.doctor.structure import VARIANTS
from trimtab.doctor.tiny import CAUSAL, IMAGE_TEXT, tiny_lm

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
MARKS = {"works": "yes", "partly": "some", "refused": "no", "wrong": "WRONG", "transformers": "theirs"}
"""What stands in the table for a finding."""
HYBRIDS = (
    "bailing_hybrid",
    "bamba",
    "falcon_h1",
    "falcon_mamba",
    "granitemoehybrid",
    "granitemoehybrid@dense",
    "jamba",
    "jamba@plain",
    "kimi_linear",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "mamba",
    "mamba2",
    "minimax",
    "nemotron_h",
    "nemotron_h@mixed",
    "olmo_hybrid",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
    "qwen4_exp_text",
    "recurrent_gemma",
    "rwkv",
    "zamba",
    "zamba2",
)
"""Types that keep a recurrent state."""
LANGUAGE = tuple(kind for kind in (*CAUSAL, *VARIANTS) if kind not in HYBRIDS)
IMAGES = tuple(f"{kind}:images" for kind in IMAGE_TEXT)
COLUMNS = tuple(name for name in CHECKS if name not in AS_LOADED)


def row(kind: str) -> dict[str, str]:
    """What the doctor finds of a type, one mark a column. Raises `TrimtabError` where no tiny model can be made."""
    name, _, images = kind.partition(":")
    report = check_model(tiny_lm(name, vision=bool(images)))
    return {finding.name: MARKS[finding.state] for finding in report.findings if finding.name in COLUMNS}


def reasons(kind: str) -> str:
    """What the doctor found wrong, for a test's message."""
    name, _, images = kind.partition(":")
    report = check_model(tiny_lm(name, vision=bool(images)))
    return "; ".join(f"{finding.name}: {finding.reason}" for finding in report.wrong)


@lru_cache
def page() -> tuple[str, dict[str, dict[str, str]], dict[str, str]]:
    """Of the page: the release of transformers, the table's rows, and the types that aren't in it, with reasons."""
    text = PAGE.read_text(encoding="utf-8")
    release = text.partition("transformers ")[2].split()[0].rstrip(",.;:")
    heads = {"type", "---"}
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:1] == "|"]
    known = [row for row in cells if row[0] not in heads]
    rows = {row[0]: dict(zip(COLUMNS, row[1:], strict=True)) for row in known if len(row) == len(COLUMNS) + 1}
    missing = {row[0]: row[1] for row in known if len(row) == 2}
    return release, rows, missing


def written_for_this_release() -> bool:
    """Whether the page was made with the transformers that is installed; another one has other models."""
    return page()[0].rsplit(".", 1)[0] == transformers.__version__.rsplit(".", 1)[0]
