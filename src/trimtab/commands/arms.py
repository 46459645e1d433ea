"""The arms of an evaluation, from options: steerings by layer and strength, system messages, random directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.errors import TrimtabError
from trimtab.files.pick import FORM, Pick, parse_pick

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering
    from trimtab.text.chat import Prompt

BASELINE = "unsteered"
REPEATED = "said twice"
"""An unsteered arm of `eval ifeval` that states the instructions twice."""
PANEL = "Arms"


@dataclass(frozen=True)
class ArmOptions:
    """The options for the arms that an evaluation compares with the unsteered model."""

    steer: Annotated[
        list[str] | None,
        typer.Option(
            help="A steering file; after @, which of its layers act (14, 14,15, 10-14), after a colon a strength to"
            " multiply it by. May be given several times.",
            metavar=FORM,
            rich_help_panel=PANEL,
        ),
    ] = None
    strength: Annotated[
        str | None,
        typer.Option(
            help="Multipliers, such as -2,-1,0,1,2: an arm for each. 0 is the unsteered arm, which always runs.",
            metavar="NUMBERS",
            rich_help_panel=PANEL,
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(
            help="Steer at one layer at a time: 10,12,14, or all of the file's. Without it: as the file has it.",
            metavar="LAYERS",
            rich_help_panel=PANEL,
        ),
    ] = None
    random: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="For each steered arm, N arms that push equally hard in random directions.",
            rich_help_panel=PANEL,
        ),
    ] = 0
    system_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--system-prompt",
            help="An unsteered arm with this system message. May be given several times.",
            metavar="TEXT",
            rich_help_panel=PANEL,
        ),
    ] = None

    def plan(self) -> ArmPlan:
        """Check the options. Raises `TrimtabError` if they are malformed, or need --steer and don't have it."""
        if not self.steer:
            choices = {"--strength": self.strength, "--layers": self.layers, "--random": self.random}
            for name, value in choices.items():
                if value:
                    raise TrimtabError(f"{name} needs a steering; give --steer FILE")
        picks = [parse_pick(text) for text in self.steer or []]
        systems = self.system_prompt or []
        if not all(text.strip() for text in systems):
            raise TrimtabError("a --system-prompt is empty; give it some text")
        if len(set(picks)) < len(picks) or len(set(systems)) < len(systems):
            raise TrimtabError("the same --steer or --system-prompt is given twice; give each arm once")
        return ArmPlan(tuple(picks), _strengths(self.strength), self.layers, self.random, tuple(systems))


@dataclass(frozen=True)
class Arm:
    """One arm: a steering, a system message, or neither, and facts about where the steering comes from."""

    steering: Steering | None = None
    system: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ArmPlan:
    """The options, checked before a model is loaded; `arms()` makes the arms."""

    picks: tuple[Pick, ...]
    strengths: tuple[float, ...]
    layers: str | None
    random: int
    systems: tuple[str, ...]

    def arms(self) -> dict[str, Arm]:
        """All arms by name, the baseline first, without the random ones. Raises `TrimtabError` like `Pick.load`."""
        arms = {BASELINE: Arm(about={"kind": "baseline"})}
        stems = [Path(file).stem for file in {str(pick.path) for pick in self.picks}]
        for pick in self.picks:
            whole = pick.load_unscaled()
            unique_stem = stems.count(pick.path.stem) == 1 and pick.path.stem not in (BASELINE, REPEATED)
            name = f"{pick.path.stem if unique_stem else pick.path}{pick.layer_suffix}"
            for layer in _layers(self.layers, whole):
                chosen = whole if layer is None else whole.only([layer])
                for strength in self.strengths:
                    if (multiplier := pick.strength * strength) == 0:
                        continue
                    where = "" if layer is None else f" @{layer}"
                    arm_name = f"{name}{where}" + ("" if multiplier == 1 else f" x{multiplier:g}")
                    about = {
                        "kind": "steered",
                        "file": str(pick.path),
                        "layers": list(chosen.layers),
                        "strength": multiplier,
                    }
                    arms[arm_name] = Arm(multiplier * chosen, about=about)
        for text in self.systems:
            arms[f"system: {text}"] = Arm(system=text, about={"kind": "system", "system": text})
        return arms

    def controls(self, lm: LM, arms: Mapping[str, Arm], prompts: Sequence[Prompt], *, transfer: bool) -> dict[str, Arm]:
        """The random arms. For edits that set a projection, the size of the push is matched on these prompts."""
        if not self.random:
            return {}
        from dataclasses import replace

        from trimtab.evaluate.controls import means_for, random_like

        steered = {name: arm for name, arm in arms.items() if arm.steering is not None}
        steerings = [arm.steering for arm in steered.values() if arm.steering is not None]
        for steering in steerings:
            lm.check(steering, transfer=transfer)
        means = means_for(lm, steerings, prompts)
        controls = {}
        for name, arm in steered.items():
            assert arm.steering is not None
            for seed in range(1, self.random + 1):
                about = {**arm.about, "kind": "random", "random": seed, "like": name}
                controls[f"{name}, random {seed}"] = replace(
                    arm, steering=random_like(arm.steering, seed, means), about=about
                )
        return controls


def _strengths(text: str | None) -> tuple[float, ...]:
    from trimtab.steering.steering import check_strength

    if text is None:
        return (1.0,)
    try:
        strengths = tuple(check_strength(float(part)) for part in text.split(","))
    except (ValueError, TrimtabError):
        raise TrimtabError(f"--strength {text!r} isn't a list of numbers; write 1, or -2,-1,0,1,2") from None
    if len(set(strengths)) < len(strengths):
        raise TrimtabError(f"--strength {text} names a number twice")
    return strengths


def _layers(text: str | None, steering: Steering) -> list[int | None]:
    from trimtab.commands.learn import parse_layers

    wanted = parse_layers(text)
    if wanted is None:
        return [None]
    if isinstance(wanted, str):
        return list(steering.layers)
    steering.only(wanted)  # raises for layers that it doesn't have
    return list(dict.fromkeys(wanted))
