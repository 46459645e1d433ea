"""The prompt that both sides of a pair share, without a system message or an instruction that only the positive side
has: what answers steered along the pair follow.
"""

from __future__ import annotations

from dataclasses import replace

from trimtab.text.chat import Prompt
from trimtab.text.pairs import Side, as_prompt


def with_system_apart(side: Side) -> Side:
    """The side with the system message of its prompt, if any, moved to its system prompt."""
    if isinstance(side.prompt, str) or len(side.prompt) < 2 or side.prompt[0][0] != "system":
        return side
    return replace(side, prompt=side.prompt[1:], system=side.prompt[0][1])


def shared_side(positive: Side, negative: Side) -> Side:
    """What the prompts of two sides share, as a side without an answer.

    Args:
        positive: The positive side, from `with_system_apart`.
        negative: The negative side, likewise.

    Returns:
        Their prompt, with their system prompt if it is the same. If the rest of the prompts differs, the negative
        side's prompt and system prompt.
    """
    common = positive.system if positive.system == negative.system else None
    shared = negative if positive.prompt != negative.prompt else replace(negative, system=common)
    return replace(shared, answer="")


def prompt_of(side: Side) -> Prompt:
    """The side's prompt under its system prompt, as `lm.generate` takes it."""
    if side.system is None:
        return as_prompt(side.prompt)
    talk = (("user", side.prompt),) if isinstance(side.prompt, str) else side.prompt
    return as_prompt((("system", side.system), *talk))
