"""How a steering travels with a request, as plain data: in the front end resolved, in core and workers obeyed.

In the request's `extra_args`, what the user gives is `"steering"` (see `frontend`), and what the front end makes of it
`"trimtab"`. A steering's content, at strength 1, is sent to the workers once, under its digest; a request then names
digests and strengths, so that the same vectors at 200 strengths are sent once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from trimtab.engines.vllm.program import Identified, Segment
from trimtab.files.steering_file import steering_digest
from trimtab.steering import Site, Steering
from trimtab.steering.emphasis import at_spans

ASKED = "steering"
RESOLVED = "trimtab"


@dataclass(frozen=True)
class Part:
    """A steering's digest, and the strength of each of its edits (0: it doesn't act).

    Where there are `spans`, it acts at these tokens of the prompt, whatever its own positions are.
    """

    digest: str
    strengths: tuple[float, ...]
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Reading:
    """Activations to be kept for `take(id)`: at these sites, at these positions of the prompt."""

    id: str
    sites: tuple[Site, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """Over tokens `start` to `stop` (`None`: the end) what acts is named by `key`.

    `banked`: it needs a slot for what it adds; `mapped`: it needs one of the maps of captured graphs.
    """

    start: int
    stop: int | None
    key: str
    banked: bool
    mapped: bool = False


@dataclass(frozen=True)
class Wire:
    """All that core and workers get. `spans` are there once the prompt's length is known.

    Position rules count from `prompt_length`; until it is placed, 0 stands for all of the tokens that are given. `cap`
    is what the doses of all sites may add up to.
    """

    parts: tuple[Part, ...] = ()
    reading: Reading | None = None
    prompt_length: int = 0
    spans: tuple[Span, ...] = ()
    cap: float | None = None

    def to_plain(self) -> dict[str, Any]:
        reading = self.reading
        return {
            "parts": [_plain_part(part) for part in self.parts],
            "reading": None if reading is None else _plain_reading(reading),
            "prompt_length": self.prompt_length,
            "spans": [[span.start, span.stop, span.key, span.banked, span.mapped] for span in self.spans],
            "cap": self.cap,
        }

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> Wire:
        reading = data["reading"]
        return cls(
            tuple(_part_from(*part) for part in data["parts"]),
            None if reading is None else _reading_from(*reading),
            data["prompt_length"],
            tuple(Span(*span) for span in data["spans"]),
            data.get("cap"),
        )

    def placed(self, segments: Sequence[Segment], prompt_length: int, *, static: bool = False) -> Wire:
        """The same for a prompt of this length, with its spans; `static`: where captured graphs are replayed."""
        spans = tuple(Span(s.start, s.stop, s.state.key, s.state.banked, static and s.state.mapped) for s in segments)
        return replace(self, prompt_length=prompt_length, spans=spans)

    @property
    def slots(self) -> frozenset[str]:
        """The keys of what needs a slot for what it adds."""
        return frozenset(span.key for span in self.spans if span.banked)

    @property
    def maps(self) -> frozenset[str]:
        """The keys of what needs a slot of the maps."""
        return frozenset(span.key for span in self.spans if span.mapped)


def _plain_part(part: Part) -> list[Any]:
    return [part.digest, list(part.strengths), *map(list, part.spans)]


def _part_from(digest: str, strengths: Sequence[float], *spans: Sequence[int]) -> Part:
    return Part(digest, tuple(strengths), tuple((start, stop) for start, stop in spans))


def _plain_reading(reading: Reading) -> list[Any]:
    return [reading.id, [[site.layer, site.kind] for site in reading.sites], list(reading.positions)]


def _reading_from(name: str, sites: Sequence[Sequence[Any]], positions: Sequence[int]) -> Reading:
    return Reading(name, tuple(Site(layer, kind) for layer, kind in sites), tuple(positions))


def wire_of(params: Any) -> Wire | None:
    """What sampling parameters say of steering; `None`: nothing."""
    extra = getattr(params, "extra_args", None)
    return Wire.from_plain(extra[RESOLVED]) if extra and RESOLVED in extra else None


def content_of(steering: Steering) -> tuple[str, Steering, tuple[float, ...]]:
    """A steering as its content (all strengths 1, no card), the content's digest, and the strengths."""
    content = Steering(tuple(replace(edit, strength=1.0) for edit in steering.edits))
    return _digest(content), content, tuple(edit.strength for edit in steering.edits)


@lru_cache(maxsize=512)
def _digest(content: Steering) -> str:
    return steering_digest(content)


def identified(part: Part, content: Steering) -> tuple[Identified, ...]:
    """The part's edits that act, with names that tell their content."""
    return _identified(_Known(part, content))


@dataclass(frozen=True)
class _Known:
    """A part and its content, which its digest tells already."""

    part: Part
    content: Steering = field(compare=False)


@lru_cache(maxsize=512)
def _identified(known: _Known) -> tuple[Identified, ...]:
    part, content = known.part, known.content
    if part.spans:
        content = content.at(at_spans(part.spans))
    return tuple(
        Identified(f"{part.digest}.{i}*{strength!r}", replace(edit, strength=strength))
        for i, (edit, strength) in enumerate(zip(content.edits, part.strengths, strict=True))
        if strength != 0
    )
