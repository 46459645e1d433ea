"""Methods that emphasize a phrase of the prompt; they need a steering per prompt, and some have their own scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trimtab.evaluate.controls import at_random_span
from trimtab.methods.directer import REJECTION, directer
from trimtab.methods.instaboost import instaboost
from trimtab.methods.pasta import pasta
from trimtab.methods.seka import learn_seka, seka
from trimtab.methods.spotlight import spotlight

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering
    from trimtab.text.chat import Prompt


@dataclass(frozen=True)
class Emphasis:
    """Such a method.

    Args:
        make: Makes the steering for a prompt and a phrase: `make(lm, prompt, phrase)`; if something is learned first,
            it is the last argument.
        title: A short description.
        options: Options for generating.
        fixed: If the strength isn't set by nats, the reason.
        learn: Learns from its own examples, once for each model.
    """

    make: Callable[..., Steering]
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: str = ""
    learn: Callable[[LM], Steering] | None = None


EMPHASIS = {
    "directer": Emphasis(
        directer,
        "dynamic rejection steering (arXiv 2603.06745)",
        {"rejection": REJECTION},
        "its rejection decides at each token how much of it acts, so it runs at its published strength",
    ),
    "instaboost": Emphasis(instaboost, "attention boosted towards an instruction (arXiv 2506.13734)"),
    "pasta": Emphasis(pasta, "post-hoc attention steering, all heads (arXiv 2311.02262)"),
    "seka": Emphasis(seka, "spectral editing of a phrase's keys (arXiv 2603.01281)", learn=learn_seka),
    "spotlight": Emphasis(
        spotlight,
        "attention kept on an instruction (arXiv 2505.12025)",
        {},
        "its strength is a share of attention between 0 and 1, so it runs at its published target",
    ),
}


def emphasis_steerings(
    lm: LM, method: Emphasis, prompts: Sequence[Prompt], phrases: Sequence[str], learned: Steering | None = None
) -> list[Steering]:
    """The method's steering for each prompt. Raises `TrimtabError` for a phrase that isn't in its prompt."""
    more = [] if learned is None else [learned]
    return [method.make(lm, prompt, phrase, *more) for prompt, phrase in zip(prompts, phrases, strict=True)]


def random_span_steerings(
    lm: LM, steerings: Sequence[Steering], prompts: Sequence[Prompt], phrases: Sequence[str]
) -> list[Steering]:
    """The controls of these steerings: each at a random span of its prompt, as long as the phrase."""
    return [
        at_random_span(lm, steering, prompt, phrase)
        for steering, prompt, phrase in zip(steerings, prompts, phrases, strict=True)
    ]
