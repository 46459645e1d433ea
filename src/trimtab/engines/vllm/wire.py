"""The steering of a request as plain data, resolved by the front end and used by core and workers.

In the request's `extra_args`, `"steering"` is what the user specifies (see `frontend`), and `"trimtab"` is what the
front end resolves it to. A steering's content, at strength 1, is sent to the workers once, under its digest; requests
then refer to digests and strengths, so the same vectors at 200 strengths are sent once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from trimtab.engines.vllm.program import IdentifiedEdit, Segment
from trimtab.files.steering_file import steering_digest
from trimtab.steering import Site, Steering
from trimtab.steering.emphasis import at_spans

STEERING_KEY = "steering"
RESOLVED_KEY = "trimtab"


@dataclass(frozen=True)
class Part:
    """A steering's digest, and the strength of each of its edits (0: it doesn't act).

    With `spans`, it acts at these tokens of the prompt instead of at its own positions.
    """

    digest: str
    strengths: tuple[float, ...]
    spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Reading:
    """Activations to keep for `take(id)`: at these sites, and at these positions of the prompt."""

    id: str
    sites: tuple[Site, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True)
class StateSpan:
    """Tokens `start` to `stop` (`None`: the end), and the `key` of what acts on them.

    `banked`: it needs a slot for additions; `mapped`: it needs a slot of the maps of captured graphs.
    """

    start: int
    stop: int | None
    key: str
    banked: bool
    mapped: bool = False


@dataclass(frozen=True)
class Wire:
    """Everything that core and workers receive. `spans` are filled in once the prompt's length is known.

    Position rules refer to `prompt_length`; until the wire is placed, 0 means all given tokens. `cap` is the maximum
    for the sum of the doses over all sites.
    """

    parts: tuple[Part, ...] = ()
    reading: Reading | None = None
    prompt_length: int = 0
    spans: tuple[StateSpan, ...] = ()
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
            tuple(StateSpan(*span) for span in data["spans"]),
            data.get("cap"),
        )

    def with_spans(self, segments: Sequence[Segment], prompt_length: int, *, static: bool = False) -> Wire:
        """The wire for a prompt of this length, with its spans; `static` if captured graphs are replayed."""
        spans = tuple(
            StateSpan(s.start, s.stop, s.state.key, s.state.banked, static and s.state.mapped) for s in segments
        )
        return replace(self, prompt_length=prompt_length, spans=spans)

    @property
    def slots(self) -> frozenset[str]:
        """The keys that need a slot for additions."""
        return frozenset(span.key for span in self.spans if span.banked)

    @property
    def maps(self) -> frozenset[str]:
        """The keys that need a slot of the maps."""
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
    """The wire in sampling parameters, or `None`."""
    extra = getattr(params, "extra_args", None)
    return Wire.from_plain(extra[RESOLVED_KEY]) if extra and RESOLVED_KEY in extra else None


def content_of(steering: Steering) -> tuple[str, Steering, tuple[float, ...]]:
    """The digest of a steering's content, the content itself (all strengths 1, no card), and the strengths."""
    content = Steering(tuple(replace(edit, strength=1.0) for edit in steering.edits))
    return _digest(content), content, tuple(edit.strength for edit in steering.edits)


@lru_cache(maxsize=512)
def _digest(content: Steering) -> str:
    return steering_digest(content)


def identified_edits(part: Part, content: Steering) -> tuple[IdentifiedEdit, ...]:
    """The part's edits that act, with names that identify their content."""
    return _identified(_Known(part, content))


@dataclass(frozen=True)
class _Known:
    """A part and its content, which is determined by the part's digest."""

    part: Part
    content: Steering = field(compare=False)


@lru_cache(maxsize=512)
def _identified(known: _Known) -> tuple[IdentifiedEdit, ...]:
    part, content = known.part, known.content
    if part.spans:
        content = content.at(at_spans(part.spans))
    return tuple(
        IdentifiedEdit(f"{part.digest}.{i}*{strength!r}", replace(edit, strength=strength))
        for i, (edit, strength) in enumerate(zip(content.edits, part.strengths, strict=True))
        if strength != 0
    )
