"""The choices that a user made on the page, and the API requests for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.serve.schema import ChatRequest, CompletionRequest
from trimtab.serve.service import ALIAS, Service
from trimtab.text.chat import Message, has_template

SLOTS = 4
"""How many steerings the page has sliders for."""
AS_LEARNED = -1
"""As a layer: the one where it was learned."""
WIDEST = 4.0
"""Sliders end here in both directions, or at the policy's limit."""
LONGEST = 32_000
REJECTIONS = ("where something is emphasized", "always", "never")

Request = ChatRequest | CompletionRequest


@dataclass(frozen=True)
class PanelState:
    """The state of the panel. `steering` is (name, strength, layer); a layer may be `AS_LEARNED`."""

    steering: tuple[tuple[str, float, int], ...] = ()
    phrases: tuple[str, ...] = ()
    rejection: str = REJECTIONS[0]
    beta: float = 0.5
    system: str = ""
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """The steering fields of a request; those that would do nothing are omitted."""
        steering = [
            {"name": name, "strength": strength} | ({} if layer == AS_LEARNED else {"layer": layer})
            for name, strength, layer in self.steering
        ]
        body: dict[str, Any] = {"steering": steering} if steering else {}
        if self.phrases:
            body["emphasize"] = list(self.phrases)
        if self.rejection == REJECTIONS[1] or (self.rejection == REJECTIONS[0] and self.phrases):
            body["rejection"] = {"beta": self.beta}
        elif self.phrases:
            body["rejection"] = False
        return body


def panel_state(values: Sequence[Any]) -> PanelState:
    """The state for the panel's values, given in the panel's order."""
    names, values = list(values[0] or []), values[1:]
    strengths, layers, rest = values[:SLOTS], values[SLOTS : 2 * SLOTS], values[2 * SLOTS :]
    emphasis, rejection, beta, system, max_tokens, temperature, seed = rest
    steering = tuple(
        (str(name), float(strength or 0), AS_LEARNED if layer is None else int(layer))
        for name, strength, layer in zip(names, strengths, layers, strict=False)
    )
    return PanelState(
        steering,
        phrases(emphasis),
        str(rejection),
        float(beta),
        (system or "").strip(),
        int(max_tokens),
        float(temperature),
        int(seed or 0),
    )


def phrases(text: str | None) -> tuple[str, ...]:
    """One phrase per line."""
    return tuple(dict.fromkeys(line.strip() for line in (text or "").split("\n") if line.strip()))


def is_chat_model(service: Service) -> bool:
    """Whether the model has a chat template; without one it continues texts."""
    return has_template(service.lm.tokenizer)


def prompt_of(service: Service, choice: PanelState, history: Sequence[Message], text: str) -> Any:
    """The prompt: the conversation so far and the new message; or the text, if the model only continues texts.

    Raises `TrimtabError` for a text that is too long to be sent back and forth while a user types.
    """
    if len(text) + len(choice.system) > LONGEST:
        raise TrimtabError(
            f"on this page a message can have at most {LONGEST:,} characters; the API accepts longer ones"
        )
    if not is_chat_model(service):
        return text
    opening = [{"role": "system", "content": choice.system}] if choice.system else []
    return [*opening, *history, {"role": "user", "content": text}]


def request(service: Service, choice: PanelState, prompt: Any, *, steered: bool = True) -> Request:
    """The API request. Raises pydantic's `ValidationError` for values that aren't valid in a request."""
    body: dict[str, Any] = {"model": ALIAS, "messages" if is_chat_model(service) else "prompt": prompt}
    body |= {"max_tokens": choice.max_tokens, "temperature": choice.temperature}
    if choice.temperature > 0:
        body["seed"] = choice.seed
    if steered:
        body |= choice.fields
    return (ChatRequest if is_chat_model(service) else CompletionRequest).model_validate(body)


def span_of(low: float, high: float) -> tuple[float, float]:
    """The ends of a slider, if the policy allows strengths from `low` to `high`."""
    ends = max(low, -WIDEST), min(high, WIDEST)
    return ends if ends[0] < ends[1] else (low, high)


def reorder_slot_values(old: Sequence[str], new: Sequence[str], values: Sequence[Any], default: Any) -> list[Any]:
    """Move the values of the slots from the order of the `old` names to that of the `new` names."""
    known = dict(zip(old, values, strict=False))
    new_values = [known.get(name, default) for name in new]
    return new_values + [default] * (SLOTS - len(new_values))
