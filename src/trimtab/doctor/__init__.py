"""The doctor: finds out what works on a model by running it.

from trimtab.doctor import check_model

report = check_model(LM.load("Qwen/Qwen2.5-0.5B-Instruct"))
report["heads"].state     # "works", "partly", "refused", "wrong", or "transformers": wrong without trimtab
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from trimtab.doctor.checks import AS_LOADED as AS_LOADED
from trimtab.doctor.checks import CHECKS as CHECKS
from trimtab.doctor.checks import run_checks
from trimtab.doctor.report import Finding as Finding
from trimtab.doctor.report import Report as Report
from trimtab.doctor.tiny import CAUSAL, tiny_lm, tiny_prompts
from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.lm import LM

PROMPTS = (
    "The harbour is quiet today, and the boats lie still.",
    "Write one sentence about rain.",
    "Answer in three words: which animals can you see in a wood in the north, and when?",
)


@keywords
def check_model(lm: LM, *, weights: str = "as given") -> Report:
    """Check what works on this model.

    Every check runs on the model itself, with a few tokens, and is compared with a plain computation: one text, no
    cache, one hook. Float32 and float64 show errors; a coarser dtype hides small differences.

    Args:
        lm: The model.
        weights: The report's description of the weights.

    Returns:
        A report with one finding per check, indexed by name; see `CHECKS`.
    """
    prompts = tiny_prompts() if lm.name.startswith("tiny ") else list(PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doses are high on random weights
        findings = run_checks(lm, prompts)
    return Report(lm.name, lm.identity.family, lm.layout.path, weights, findings)


def check_config(source: str | Path | dict[str, Any]) -> Report:
    """Check what works on models with this configuration, on a tiny random model of the same type.

    Args:
        source: A `config.json`, its contents, or a model type of transformers such as `"qwen3_next"`. Of a
            configuration, only the model type is used; sizes and weights don't matter.

    Returns:
        The report.

    Raises:
        TrimtabError: It names no model type that transformers knows, or one that can't run on text alone.
    """
    if isinstance(source, dict):
        config = source
    elif Path(source).is_file():
        config = json.loads(Path(source).read_text(encoding="utf-8"))
    else:
        config = {"model_type": str(source)}
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise TrimtabError(f"{source} has no model_type; give a config.json of transformers")
    vision = kind.split("@")[0] not in CAUSAL
    report = check_model(tiny_lm(kind, vision=vision), weights="random, tiny")
    return Report(f"{kind}, tiny and random", report.family, report.blocks, report.weights, report.findings)
