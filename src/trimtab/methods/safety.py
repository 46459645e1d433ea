"""Refusal of harmful requests: a direction as in CAST (2409.05907) or as in Arditi et al. (2406.11717), and a condition
on the prompt as in InferAligner (2401.11206) or CAST (section 3, with a signed measure).

    v[l] = mean over requests of (refusing answer - complying answer)      averaged over the answers' tokens
      or   mean over harmful - mean over harmless requests                 at the last prompt token
    open if h_c . s > theta at the last prompt token                       s, theta: InferAligner's, at its best layer
      or if f(h_c(prompt)) > theta                                         c, theta: CAST's, on halves of the requests
    h_l[t] <- h_l[t] + strength * v[l]      from the last prompt token on, if open
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import digest_of, read_pooled
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.estimators import unit
from trimtab.learn.inputs import check_lm
from trimtab.learn.thresholds import Choice
from trimtab.methods.cast import learn_behaviour, learn_condition
from trimtab.methods.inferaligner import learn_inferaligner
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering
from trimtab.steering.gates import Gate, Reading
from trimtab.text.chat import Prompt
from trimtab.text.pairs import Pair

if TYPE_CHECKING:
    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


REFUSING = (
    "I'm sorry, but I can't help with that.",
    "I cannot assist with this request, because it could cause harm.",
    "I'm sorry, I can't do that. It would be wrong and dangerous.",
    "I can't help with this. Please reach out to someone you trust instead.",
)
COMPLYING = (
    "Sure, here is what you asked for.",
    "Of course! Here is a detailed answer, step by step.",
    "Certainly, I'd be happy to help you with this.",
    "Yes, let me show you how this is done.",
)
"""The openings of refusing and of complying answers, assigned to requests in turn."""

Direction = Literal["answers", "prompts"]
DIRECTIONS = ("answers", "prompts")
Gating = Literal["inferaligner", "cast"]
GATINGS = ("inferaligner", "cast")


@keywords
def learn_safety(
    lm: LM,
    harmful: Sequence[Prompt],
    layers: int | Sequence[int] | None = None,
    *,
    harmless: Sequence[Prompt] | None = None,
    direction: Direction = "answers",
    coefficient: float = 0.08,
    gate: Gating = "inferaligner",
    choice: Choice | None = None,
    false_alarms: float | None = None,
    requests: int = 24,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn a refusal that acts on prompts like `harmful`, and not on prompts like `harmless`.

    Args:
        lm: The model.
        harmful: Harmful requests.
        layers: Blocks to steer after (default: from 0.3 to 0.5 of the depth).
        harmless: Requests that should be answered, similar in form to the harmful ones.
        direction: What the direction is computed from: `"answers"` (answers that refuse and comply) or `"prompts"`
            (harmful and harmless prompts).
        coefficient: The relative norm of the edits: their strength is this times the median norm of the activations at
            the layer.
        gate: `"inferaligner"` (of `learn_inferaligner`, at its best layer) or `"cast"` (of `learn_condition`).
        choice: How the threshold of the CAST gate is chosen (default: `"youden"`).
        false_alarms: The maximum share of the harmless requests that may open the CAST gate.
        requests: With `"answers"`, the maximum number of harmful and of harmless requests to read answers for.
        positions: The tokens at which to add (default: from the last prompt token on).
        progress: `progress(done, total)`.

    Returns:
        The steering. Its card has the gate's curve: CAST's is measured on requests that its direction wasn't learned
        from, InferAligner's on training data.

    Raises:
        TrimtabError: Harmful or harmless requests are missing or too few, a layer or option is unknown, or the sides
            don't differ.
    """
    check_lm(lm)
    if not harmful or not harmless:
        raise TrimtabError("safety is learned from harmful and from harmless requests; one of the two is missing")
    if min(len(harmful), len(harmless)) < 2:
        raise TrimtabError("safety is learned from at least two harmful and two harmless requests")
    if gate not in GATINGS:
        raise TrimtabError(f"unknown gate {gate!r}; known: {', '.join(GATINGS)}")
    if gate != "cast" and (choice is not None or false_alarms is not None):
        raise TrimtabError("choice and false_alarms are options of CAST's gate; give gate=cast, or leave them out")
    edits = refusal(
        lm,
        harmful,
        harmless,
        layers,
        direction=direction,
        coefficient=coefficient,
        requests=requests,
        positions=positions,
        progress=progress,
    )
    prompt_gate, gate_entries = _gate(lm, harmful, harmless, gate, choice or "youden", false_alarms)
    options: dict[str, Any] = {
        "layers": [edit.site.layer for edit in edits],
        "direction": direction,
        "coefficient": coefficient,
        "gate": gate,
    }
    options |= {"choice": choice or "youden"} if gate == "cast" else {}
    options |= {} if false_alarms is None else {"false_alarms": false_alarms}
    measured = {"harmful": len(harmful), "harmless": len(harmless), "condition": gate_entries}
    data = digest_of(harmful=list(harmful), harmless=list(harmless))
    return Steering(edits, Card("safety", lm.identity, data, options, measured, versions())).when(prompt_gate)


def _gate(
    lm: LM, harmful: Sequence[Prompt], harmless: Sequence[Prompt], gate: Gating, choice: Choice, bound: float | None
) -> tuple[Gate, dict[str, Any]]:
    """The gate, and its entries for the card."""
    if gate == "cast":
        condition = learn_condition(lm, harmful, harmless, choice=choice, false_alarms=bound)
        return condition.gate, condition.measured
    aligner = learn_inferaligner(lm, harmful, harmless=harmless, gate="best")
    measured = aligner.card.measured
    return aligner.edits[0].gate, {"layer": measured["best_gate"], **measured["gates"][str(measured["best_gate"])]}


def refusal(
    lm: LM,
    harmful: Sequence[Prompt],
    harmless: Sequence[Prompt],
    layers: int | Sequence[int] | None = None,
    *,
    direction: Direction = "answers",
    coefficient: float = 0.08,
    requests: int = 24,
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> tuple[Edit, ...]:
    """The edits without the gate, which push every request towards refusal. The options are those of `learn_safety`."""
    if direction not in DIRECTIONS:
        raise TrimtabError(f"unknown direction {direction!r}; known: {', '.join(DIRECTIONS)}")
    if requests < 1:
        raise TrimtabError(f"answers are read from 1 request or more, got {requests}")
    edit_positions = positions or Positions.from_last_prompt_token()
    if direction == "answers":
        pairs = _refusal_pairs(harmful[:requests], harmless[:requests])
        edits, _ = learn_behaviour(
            lm, pairs, layers, coefficient=coefficient, behaviour="mean", positions=edit_positions, progress=progress
        )
        return edits
    if layers is None:
        count = lm.layout.layers
        layers = range(round(0.3 * count), max(round(0.3 * count) + 1, round(0.5 * count)))
    readings = [Reading(Site(layer)) for layer in check_layers(lm, layers, 0.4)]
    on, off = read_pooled(lm, harmful, readings, progress=progress), read_pooled(lm, harmless, readings)
    prompt_edits = []
    for reading in readings:
        try:
            v = unit(on[reading].mean(0) - off[reading].mean(0))
        except TrimtabError:
            raise TrimtabError(f"layer {reading.site.layer}: the two kinds of requests don't differ there") from None
        norm = float(on[reading].norm(dim=-1).median())
        prompt_edits.append(Edit(reading.site, Add(v.float()), edit_positions, coefficient * norm))
    return tuple(prompt_edits)


def _refusal_pairs(harmful: Sequence[Prompt], harmless: Sequence[Prompt]) -> list[Pair]:
    """Each request with a refusing answer (positive) and a complying one; harmful and harmless requests alternate."""
    mixed = [prompt for both in zip_longest(harmful, harmless) for prompt in both if prompt is not None]
    if odd := [prompt for prompt in mixed if not isinstance(prompt, str)]:
        raise TrimtabError(f"refusing answers are read after requests that are texts, got messages: {odd[0]!r}")
    return [
        Pair(REFUSING[i // 2 % len(REFUSING)], COMPLYING[i // 2 % len(COMPLYING)], str(prompt), "answers")
        for i, prompt in enumerate(mixed)
    ]
