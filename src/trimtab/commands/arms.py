"""The arms of an evaluation, from options: steerings by layer and strength, system messages, random directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimtab.errors import TrimtabError
from trimtab.files.pick import FORM, Pick, parse_pick

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.steering import Steering
    from trimtab.text.chat import Prompt

BASELINE = "unsteered"
PANEL = "Arms"

SteerOption = Annotated[
    list[str] | None,
    typer.Option(
        help="A steering file; after @, which of its layers act (14, 14,15, 10-14), after a colon a strength to"
        " multiply it by. May be given several times.",
        metavar=FORM,
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
StrengthOption = Annotated[
    str | None,
    typer.Option(
        help="Multipliers, such as -2,-1,0,1,2: an arm for each. 0 is the unsteered arm, which always runs.",
        metavar="NUMBERS",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        help="Steer at one layer at a time: 10,12,14, or all of the file's. Without it: as the file has it.",
        metavar="LAYERS",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
RandomOption = Annotated[
    int,
    typer.Option(
        min=0,
        metavar="N",
        help="For each steered arm, N arms pushed as hard in random directions.",
        rich_help_panel=PANEL,
    ),
]
SystemOption = Annotated[
    list[str] | None,
    typer.Option(
        "--system-prompt",
        help="An unsteered arm with this system message. May be given several times.",
        metavar="TEXT",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


@dataclass(frozen=True)
class Arm:
    """What is compared: a steering or a system message (or neither), and where the steering comes from."""

    steering: Steering | None = None
    system: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """The options, checked before a model is loaded: `arms()` makes the arms."""

    files: tuple[Pick, ...]
    strengths: tuple[float, ...]
    layers: str | None
    random: int
    systems: tuple[str, ...]

    @classmethod
    def of(
        cls,
        steer: Sequence[str] | None,
        strength: str | None,
        layers: str | None,
        random: int,
        systems: Sequence[str] | None,
    ) -> Plan:
        """Raises `TrimtabError` for options that are malformed, or make no sense without --steer."""
        if not steer:
            for name, value in (("--strength", strength), ("--layers", layers), ("--random", random)):
                if value:
                    raise TrimtabError(f"{name} is about a steering; give --steer FILE")
        files = [parse_pick(text) for text in steer or []]
        for text in systems or []:
            if not text.strip():
                raise TrimtabError("a --system-prompt is empty; give it some text")
        if len(set(files)) < len(files) or len(set(systems or [])) < len(systems or []):
            raise TrimtabError("the same --steer or --system-prompt is given twice; each arm once is enough")
        return cls(tuple(files), _strengths(strength), layers, random, tuple(systems or []))

    def arms(self) -> dict[str, Arm]:
        """All arms by name but the random ones, the baseline first. Raises `TrimtabError` as `Pick.load` does."""
        found = {BASELINE: Arm(about={"kind": "baseline"})}
        stems = [pick.path.stem + pick.where for pick in self.files]
        for pick, stem in zip(self.files, stems, strict=True):
            whole = pick.unscaled()
            name = stem if stems.count(stem) == 1 else f"{pick.path}{pick.where}:{pick.strength:g}"
            for layer in _layers(self.layers, whole):
                one = whole if layer is None else whole.only([layer])
                for strength in self.strengths:
                    if (multiplier := pick.strength * strength) == 0:
                        continue
                    where = "" if layer is None else f" @{layer}"
                    arm = f"{name}{where}" + ("" if multiplier == 1 else f" x{multiplier:g}")
                    about = {
                        "kind": "steered",
                        "file": str(pick.path),
                        "layers": list(one.layers),
                        "strength": multiplier,
                    }
                    found[arm] = Arm(multiplier * one, about=about)
        for text in self.systems:
            found[f"system: {text}"] = Arm(system=text, about={"kind": "system", "system": text})
        return found

    def controls(self, lm: LM, arms: Mapping[str, Arm], prompts: Sequence[Prompt], *, transfer: bool) -> dict[str, Arm]:
        """The random arms. Where projections are set, pushes are matched on these prompts."""
        if not self.random:
            return {}
        from dataclasses import replace

        from trimtab.evaluate.controls import means_for, random_like

        steered = {name: arm for name, arm in arms.items() if arm.steering is not None}
        steerings = [arm.steering for arm in steered.values() if arm.steering is not None]
        for steering in steerings:
            lm.check(steering, transfer=transfer)
        means = means_for(lm, steerings, prompts)
        found = {}
        for name, arm in steered.items():
            assert arm.steering is not None
            for seed in range(1, self.random + 1):
                about = {**arm.about, "kind": "random", "random": seed, "like": name}
                found[f"{name}, random {seed}"] = replace(
                    arm, steering=random_like(arm.steering, seed, means), about=about
                )
        return found


def _strengths(text: str | None) -> tuple[float, ...]:
    from trimtab.steering.steering import check_strength

    if text is None:
        return (1.0,)
    try:
        found = tuple(check_strength(float(part)) for part in text.split(","))
    except (ValueError, TrimtabError):
        raise TrimtabError(f"--strength {text!r} is no list of numbers; write 1, or -2,-1,0,1,2") from None
    if len(set(found)) < len(found):
        raise TrimtabError(f"--strength {text} names a number twice")
    return found


def _layers(text: str | None, steering: Steering) -> list[int | None]:
    from trimtab.commands.learn import parse_layers

    wanted = parse_layers(text)
    if wanted is None:
        return [None]
    if isinstance(wanted, str):
        return list(steering.layers)
    steering.only(wanted)  # says which layers it has
    return list(dict.fromkeys(wanted))
