"""InferAligner: Wang et al., "InferAligner: Inference-Time Alignment for Harmlessness through Cross-Model Guidance",
EMNLP 2024, arXiv 2401.11206, section 3.

    s[l] = mean over harmful - mean over harmless prompts of h_l, last prompt token, in the target model
    theta[l] = the same in an aligned guide model
    g = 1 if h_l . s[l] > the midpoint of the two sides, at the last prompt token, else 0
    h_l[t] <- h_l[t] + alpha * g * theta[l]        every token
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from trimtab.errors import TrimtabError
from trimtab.keywords import keywords
from trimtab.learn.activations import digest_of, read_pooled
from trimtab.learn.contrast import check_layers, versions
from trimtab.learn.estimators import unit
from trimtab.learn.inputs import check_lm
from trimtab.learn.thresholds import CHOICES, Choice, learn_threshold
from trimtab.steering import Add, Card, Edit, Positions, Site, Steering, Threshold
from trimtab.steering.gates import Reading
from trimtab.text.chat import Prompt

if TYPE_CHECKING:
    from torch import Tensor

    from trimtab.engines.language_model import LanguageModel as LM
    from trimtab.learn.contrast import Progress


@keywords
def learn_inferaligner(
    lm: LM,
    harmful: Sequence[Prompt],
    layers: int | Sequence[int] | None = None,
    *,
    harmless: Sequence[Prompt] | None = None,
    guide: LM | None = None,
    alpha: float = 1.0,
    gate: Literal["each", "best"] = "each",
    threshold: Choice = "midpoint",
    positions: Positions | None = None,
    progress: Progress | None = None,
) -> Steering:
    """Learn to steer `lm` by the safety directions of `guide`, on harmful prompts only.

    Directions and thresholds are learned from the same prompts, so the curves in the card are measured on training
    data: evaluate the gate on other prompts. Gates read the unsteered prompt, so edits at lower layers don't affect
    them.

    Args:
        lm: The target model.
        harmful: Harmful prompts.
        layers: Blocks to steer after (default: the middle third).
        harmless: Harmless prompts.
        guide: An aligned model of the same shape (default: `lm` itself).
        alpha: The strength of the edits. The paper doesn't give a value.
        gate: `"each"`: one gate per layer; `"best"`: at all layers the gate of the layer whose curve has the largest
            area.
        threshold: The gate's threshold: `"midpoint"` between the two sides (the paper's), or the best by `"youden"` or
            `"f1"`.
        positions: The tokens at which to add (default: all).
        progress: `progress(done, total)` counts harmful prompts.

    Returns:
        The steering. Its card has each layer's curve and threshold.

    Raises:
        TrimtabError: Harmful or harmless prompts are missing, the guide has another width, depth or vocabulary, a layer
            or option is unknown, or the sides don't differ.
    """
    check_lm(lm)
    if not harmful or not harmless:
        raise TrimtabError("InferAligner learns from harmful and from harmless prompts; one of the two is missing")
    if gate not in ("each", "best") or threshold not in CHOICES:
        raise TrimtabError(
            f"gate is each or best, and threshold is one of {', '.join(CHOICES)}; got {gate}, {threshold}"
        )
    check_guide(lm, guide)
    if layers is None:
        count = lm.layout.layers
        layers = range(count // 3, max(count // 3 + 1, 2 * count // 3))
    chosen = check_layers(lm, layers, 0.5)
    readings = {layer: Reading(Site(layer)) for layer in chosen}
    harmful_activations = read_pooled(lm, harmful, list(readings.values()), progress=progress)
    harmless_activations = read_pooled(lm, harmless, list(readings.values()))
    if guide is None:
        theta = {
            layer: _difference(harmful_activations[r], harmless_activations[r], layer) for layer, r in readings.items()
        }
    else:
        guide_harmful, guide_harmless = (
            read_pooled(guide, side, list(readings.values())) for side in (harmful, harmless)
        )
        theta = {layer: _difference(guide_harmful[r], guide_harmless[r], layer) for layer, r in readings.items()}
    gates, curve_entries, areas = {}, {}, {}
    for layer, reading in readings.items():
        s = unit(_difference(harmful_activations[reading], harmless_activations[reading], layer)).float()
        scores = [(x @ s.double()).tolist() for x in (harmful_activations[reading], harmless_activations[reading])]
        point, curve = learn_threshold(scores[0], scores[1], by=threshold)
        gates[layer] = Threshold(reading.site, s, point.threshold)
        curve_entries[str(layer)], areas[layer] = curve.for_card(point), curve.area
    best = max(chosen, key=lambda layer: areas[layer])
    edits = tuple(
        Edit(
            Site(layer),
            Add(theta[layer].float()),
            positions or Positions.all(),
            alpha,
            gates[best if gate == "best" else layer],
        )
        for layer in chosen
    )
    options: dict[str, Any] = {"layers": chosen, "alpha": alpha, "gate": gate, "threshold": threshold}
    if guide is not None:
        options["guide"] = {"name": guide.identity.name, "fingerprint": guide.identity.fingerprint}
    measured = {"harmful": len(harmful), "harmless": len(harmless), "gates": curve_entries, "best_gate": best}
    data = digest_of(harmful=list(harmful), harmless=list(harmless))
    return Steering(edits, Card("inferaligner", lm.identity, data, options, measured, versions()))


def check_guide(lm: LM, guide: LM | None) -> None:
    """Raise `TrimtabError` unless the guide has the model's width, number of layers and vocabulary."""
    if guide is None:
        return
    for property_name, model_value, guide_value in (
        ("width", lm.layout.width, guide.layout.width),
        ("number of layers", lm.layout.layers, guide.layout.layers),
        ("vocabulary", lm.tokenizer.get_vocab(), guide.tokenizer.get_vocab()),
    ):
        if model_value != guide_value:
            shown = "" if isinstance(model_value, dict) else f" ({guide_value} instead of {model_value})"
            raise TrimtabError(
                f"{guide.name} can't guide {lm.name}: they differ in {property_name}{shown}; a guide is a sibling of"
                " its target"
            )


def _difference(meant: Tensor, others: Tensor, layer: int) -> Tensor:
    difference = meant.mean(0) - others.mean(0)
    if not bool(difference.any()):
        raise TrimtabError(f"layer {layer}: harmful and harmless prompts don't differ there")
    return difference
