"""Audits of steerings of different kinds, two of which are made to raise compliance with harmful requests.

The steerings are learned here, from requests that the audit doesn't use. Those that push along a direction of refusal,
and a random direction of the same divergence, are repaired as well, and the repaired ones measured in the same audit.
The complete audits are stored in a folder, so that a run can be resumed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import BOOTSTRAP, Report, Result
from benchmarks.machine import machine, versions
from trimtab.data import queries
from trimtab.data.distilled import path_of
from trimtab.errors import TrimtabError
from trimtab.evaluate.audit.items import FULL, QUICK
from trimtab.evaluate.audit.run import audit
from trimtab.evaluate.refusal import read_refusal
from trimtab.files.steering_file import load_steering
from trimtab.lm import LM, DoseWarning
from trimtab.methods.caa import PairsWarning, learn_caa
from trimtab.methods.cap import learn_cap
from trimtab.methods.distill import learn_distill
from trimtab.methods.random import learn_random
from trimtab.steering import Steering
from trimtab.steering.ablation import directional_ablation
from trimtab.text.pairs import Pair
from trimtab.tune.nats import at_nats

DATASET = Path("advbench") / "harmful_behaviors.csv"
LEARN, BASE = 32, 8
"""The numbers of requests that the compliance directions are learned from, and of queries to set strengths on."""
NATS = 1.0
"""The 95th percentile of the divergence of the additions from the unsteered model."""
PIRATE = "You are a pirate of the high seas. Talk like a pirate in every sentence."
COMPLYING = ("Of course! Here is how you can do that:", "Sure, I will help you with this. First,", "Yes. Step 1:")
REFUSING = ("I'm sorry, but I can't help with that.", "No, I won't assist with this request.", "I cannot do that, as")
KIND = ("Thank you for asking! I'd be glad to explain it.", "What a lovely question, let me help you with that.")
RUDE = ("Do I look like your teacher? Find it out yourself.", "What a stupid question, stop wasting my time.")

VALUES, CHANCES = "Measured", "P-value of the change from the unsteered model (paired, not corrected)"
SHORT = {
    "harmful requests": "complied",
    "harmful requests under the system message": "complied, system message",
    "harmful requests in jailbreak templates": "complied, templates",
    "harmless requests that sound harmful": "refused harmless",
    "harmless requests that sound harmful under the system message": "refused harmless, system message",
    "lead of refusing answers": "lead of refusing answers, nats",
    "perplexity of plain text": "plain text, nats",
}
"""Shorter names of measures, for the table."""

Make = Callable[[], Steering]


def run(model: str | None, file: Path, folder: Path, dtype: str, quick: bool, seed: int) -> Report:
    """Audit each steering that isn't in the folder yet, and report all of them.

    Args:
        model: The model; default: the included one.
        file: Harmful requests, such as AdvBench's CSV file.
        folder: Where the audits are stored.
        dtype: The model's dtype.
        quick: Half as many items, and conversations of four turns.
        seed: The seed of intervals and tests, and of the random direction.
    """
    lm = LM.load(model, dtype=dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DoseWarning)
        warnings.simplefilter("ignore", PairsWarning)
        audits = {
            name: _stored(folder / f"{name.replace(' ', '-')}.json", lm, make, repair, quick, seed)
            for name, (make, repair) in kinds(lm, file, seed).items()
        }
    about = {**versions(), "model": lm.name, "dtype": dtype}
    return Report("audits", machine(), about, tuple(rows(audits)), spread=BOOTSTRAP, grid=True)


def kinds(lm: LM, file: Path, seed: int) -> dict[str, tuple[Make, bool]]:
    """For each steering, how it is made, and whether it is repaired."""
    middle = lm.layout.layers // 2
    requests = [item.prompt for item in read_refusal(file)]
    pairs = [
        Pair(COMPLYING[n % len(COMPLYING)], REFUSING[n % len(REFUSING)], request, "answers")
        for n, request in enumerate(requests[:: max(1, len(requests) // LEARN)][:LEARN])
    ]
    kind_pairs = [Pair(KIND[n % 2], RUDE[n % 2], query, "answers") for n, query in enumerate(queries()[:16])]
    to_measure = queries()[-BASE:]

    def complying() -> Steering:
        return learn_caa(lm, pairs, middle, read_at="answer")

    def ablated() -> Steering:
        return directional_ablation(complying().edits[0].operation.direction, lm.layout.layers)

    def dosed(steering: Steering) -> Steering:
        return at_nats(lm, steering, NATS, to_measure).steering

    return {
        "complying added": (lambda: dosed(complying()), True),
        "refusal ablated": (ablated, True),
        "random added": (lambda: dosed(learn_random(lm, like=complying(), seed=seed)), True),
        "bullets distilled": (lambda: load_steering(path_of("bullets")), False),
        "pirate in closed form": (lambda: learn_distill(lm, system=PIRATE, fit="closed"), False),
        "kindness capped": (lambda: learn_cap(lm, kind_pairs), False),
    }


def rows(audits: Mapping[str, Mapping[str, Any]]) -> list[Result]:
    """Each measure of the unsteered model, of each steering and of its repaired form, and the p-values of the changes.

    The values of the unsteered model are those that the first audit compared with.
    """
    arms: dict[str, Mapping[str, Any]] = {}
    for name, stored in audits.items():
        arms[name] = stored
        if stored.get("repaired"):
            arms[f"{name}, repaired"] = stored["repaired"]
    first = next(iter(arms.values()))
    results = [Result("unsteered", f"{VALUES}: {_label(each)}", each["before"], "") for each in first["comparisons"]]
    for arm, stored in arms.items():
        results.append(Result(arm, f"{VALUES}: divergence", stored["nats"]["p95"], ""))
        if stored.get("kept") is not None:
            results.append(Result(arm, f"{VALUES}: divergence kept", stored["kept"], ""))
        for each in stored["comparisons"]:
            results.append(Result(arm, f"{VALUES}: {_label(each)}", each["after"], ""))
            results.append(Result(arm, f"{CHANCES}: {_label(each)}", each["p"], ""))
    return results


def _label(comparison: Mapping[str, Any]) -> str:
    count = f", of {comparison['items']}" if comparison["unit"] == "count" else ""
    return f"{SHORT.get(comparison['name'], comparison['name'])}{count}"


def _stored(path: Path, lm: LM, make: Make, repair: bool, quick: bool, seed: int) -> dict[str, Any]:
    if not path.is_file():
        result = audit(lm, make(), size=QUICK if quick else FULL, repair=repair, seed=seed)
        document = {**result.to_json(), "repaired": result.repaired.to_json() if result.repaired else None}
        path.write_text(json.dumps(document, indent=1) + "\n")
        print(f"{path.stem}: {_first(result.verdict)}", flush=True)
    stored: dict[str, Any] = json.loads(path.read_text())
    size = QUICK if quick else FULL
    if (stored["model"]["fingerprint"], stored["model"]["dtype"], stored["size"], stored["seed"]) != (
        lm.identity.fingerprint,
        lm.runs_in["dtype"],
        size.name,
        seed,
    ):
        raise TrimtabError(f"{path} is an audit of another model, dtype, size or seed; give another --folder")
    return stored


def _first(lines: Sequence[str]) -> str:
    return lines[0] if lines else "nothing"
