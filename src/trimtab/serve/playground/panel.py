"""The panel: which steerings, how strong and at which layer, what to emphasize, and how long answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from trimtab.serve.library import LoadedSteering
from trimtab.serve.playground.choices import AS_LEARNED, REJECTIONS, SLOTS, reorder_slot_values, span_of
from trimtab.serve.policy import Key
from trimtab.serve.service import Service

SELECTED = """(phrases) => {
  const { value, selectionStart, selectionEnd } = document.querySelector("#tt-message textarea");
  const phrase = value.slice(selectionStart, selectionEnd).trim();
  return phrase ? [phrases, phrase].filter((part) => part && part.trim()).join("\\n") : phrases;
}"""
"""JavaScript: adds the selected text of the message as another phrase."""


@dataclass(frozen=True)
class Slot:
    """The controls of a chosen steering."""

    row: Any
    strength: Any
    layer: Any


@dataclass(frozen=True)
class Panel:
    """The panel's components. `previous_names` holds the names of the steerings that the slots show."""

    names: Any
    previous_names: Any
    slots: tuple[Slot, ...]
    empty_note: Any
    emphasis: Any
    marks: Any
    rejection: Any
    beta: Any
    system: Any
    max_tokens: Any
    temperature: Any
    seed: Any

    @property
    def inputs(self) -> list[Any]:
        """The components in the order that `choices.chosen` reads."""
        strengths, layers = [slot.strength for slot in self.slots], [slot.layer for slot in self.slots]
        rest = [self.emphasis, self.rejection, self.beta, self.system, self.max_tokens, self.temperature, self.seed]
        return [self.names, *strengths, *layers, *rest]

    @property
    def slot_outputs(self) -> list[Any]:
        """The components that `slot_updates` updates."""
        return [self.previous_names, *(part for slot in self.slots for part in (slot.row, slot.strength, slot.layer))]

    @property
    def values(self) -> list[Any]:
        """The components of the slots' values, for `slot_updates`."""
        return [slot.strength for slot in self.slots] + [slot.layer for slot in self.slots]


def make_panel(service: Service) -> Panel:
    """The components, inside the current Gradio context."""
    names = gr.Dropdown(
        [],
        multiselect=True,
        max_choices=SLOTS,
        label="Steerings",
        info="What the model is pushed towards. The effects of several add up.",
        elem_id="tt-names",
    )
    empty_note = gr.HTML(elem_classes="tt-say")
    slots = tuple(_slot(service, number) for number in range(SLOTS))
    with gr.Accordion("Emphasize a part of your message", open=False):
        emphasis = gr.Textbox(
            label="Phrases to emphasize",
            info="One per line, exactly as in your message: the model's attention is steered towards them.",
            placeholder="in one sentence",
            lines=2,
            max_lines=6,
            elem_id="tt-emphasis",
        )
        marking = gr.Button("Add the selection in the message", size="sm", elem_id="tt-marking")
        marking.click(None, emphasis, emphasis, js=SELECTED)
        marks = gr.HTML(elem_classes="tt-say")
    with gr.Accordion("Hold steering back where it goes wrong", open=False):
        rejection = gr.Radio(
            list(REJECTIONS),
            value=REJECTIONS[2] if service.policy.always else REJECTIONS[0],
            label="Hold it back",
            info="Where the unsteered model finds the steered next word implausible, steering is weakened or"
            " left out for it.",
            elem_id="tt-rejection",
        )
        beta = gr.Slider(
            0,
            1,
            0.5,
            step=0.05,
            label="How plausible a word must be (β)",
            info="0: any word. 1: only the unsteered model's first choice.",
        )
    with gr.Accordion("Length, temperature, system message", open=False):
        context = service.lm.layout.context
        most = service.limits.max_tokens if context is None else min(service.limits.max_tokens, max(2, context // 2))
        max_tokens = gr.Slider(1, most, min(128, most), step=1, label="Maximum tokens", elem_id="tt-tokens")
        temperature = gr.Slider(
            0, 2, 0, step=0.1, label="Temperature", info="0: always the most likely token; above 0, tokens are sampled"
        )
        seed = gr.Number(0, precision=0, label="Seed", info="Above temperature 0: the same seed, the same answer")
        system = gr.Textbox(
            label="System message",
            info="Sent before the conversation, on both sides",
            lines=1,
            max_lines=6,
        )
    return Panel(
        names, gr.State([]), slots, empty_note, emphasis, marks, rejection, beta, system, max_tokens, temperature, seed
    )


def _slot(service: Service, number: int) -> Slot:
    low, high = span_of(*service.policy.strength)
    with gr.Row(visible=False, elem_classes="tt-slot") as row:
        strength = gr.Slider(
            low,
            high,
            _begin(low, high),
            step=0.1,
            label="strength",
            info="0 is off, 1 is as learned, below 0 is the opposite",
            elem_id=f"tt-strength-{number}",
            min_width=240,
        )
        layer = gr.Dropdown(
            [("as learned", AS_LEARNED)],
            value=AS_LEARNED,
            label="at layer",
            filterable=False,
            elem_id=f"tt-layer-{number}",
            min_width=150,
        )
    return Slot(row, strength, layer)


def _begin(low: float, high: float) -> float:
    return min(max(1.0, low), high)


def slot_updates(
    service: Service, key: Key, names: Sequence[str], previous_names: Sequence[str], values: Sequence[Any]
) -> list[Any]:
    """Updates of `Panel.arranged` for these names; steerings that were chosen before keep their values."""
    low, high = span_of(*service.policy.range_of(key))
    known = {entry.name: entry for entry in service.visible(key)}
    strengths = reorder_slot_values(previous_names, names, values[:SLOTS], _begin(low, high))
    layers = reorder_slot_values(previous_names, names, values[SLOTS:], AS_LEARNED)
    updates: list[Any] = [list(names)]
    for number in range(SLOTS):
        loaded = known.get(names[number]) if number < len(names) else None
        updates.append(gr.update(visible=loaded is not None))
        if loaded is None:
            updates += [gr.update(), gr.update()]
            continue
        strength = gr.update(
            label=f"{loaded.name}: strength", minimum=low, maximum=high, value=min(max(strengths[number], low), high)
        )
        updates += [strength, gr.update(**_layers(service, loaded, layers[number]))]
    return updates


def _layers(service: Service, loaded: LoadedSteering, value: int) -> dict[str, Any]:
    """The layers to choose from: a steering that acts at several stays where it is."""
    own = loaded.steering.layers
    if len(own) != 1:
        choices = [(f"{own[0]} to {own[-1]}, as learned", AS_LEARNED)]
        return {"choices": choices, "value": AS_LEARNED, "interactive": False, "label": "at layers"}
    others = [(str(layer), layer) for layer in range(service.lm.layout.layers)]
    return {"choices": [(f"{own[0]}, as learned", AS_LEARNED), *others], "value": value, "interactive": True}


def nameable(service: Service, key: Key) -> list[str]:
    """The steerings that may be chosen; those that are always on aren't listed."""
    always = {name for name, _ in service.policy.always}
    return [loaded.name for loaded in service.visible(key) if loaded.name not in always]
