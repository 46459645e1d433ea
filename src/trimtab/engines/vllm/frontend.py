"""The plugin in vLLM's front end: named steerings, and requests for them, which it checks and resolves.

A request has `extra_args={"steering": …}` (over HTTP: `vllm_xargs`): a list of `{"name": …}`, each with a `"strength"`
(default: 1) and `"positions"` (a rule as on the command line; default: the steering's own), or the same as JSON text,
or a single name. Several steerings are added up. A request that the engine can't run raises before it is accepted.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from trimtab.engines.meanings import check_meanings, meanings_of
from trimtab.engines.vllm import emphasized
from trimtab.engines.vllm.admission import check_supported
from trimtab.engines.vllm.attach import INSIDE
from trimtab.engines.vllm.capacity import ADDITIONS, Capacity, union
from trimtab.engines.vllm.doses import adds_only
from trimtab.engines.vllm.forms import capacity_for, check_fits
from trimtab.engines.vllm.identity import identify
from trimtab.engines.vllm.program import IdentifiedEdit, check_range
from trimtab.engines.vllm.request_context import RequestContext
from trimtab.engines.vllm.rpc import Rpc
from trimtab.engines.vllm.segment_tracker import reserved_segments
from trimtab.engines.vllm.settings import STEERINGS, settings_of
from trimtab.engines.vllm.wire import RESOLVED_KEY, STEERING_KEY, Part, Wire, content_of, identified_edits
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.steering_file import load_steering, steering_to_bytes
from trimtab.steering import ModelId, Positions, ScaleKeys, ScaleScores, Steering, by_keys
from trimtab.steering.identity import check_learned_on
from trimtab.text.spans import Span

MAX_UNNAMED = 256
"""The number of most recently used contents without a registered name that the workers keep."""

REMEMBERED = 1024
LONGEST = 4096
"""Requests for steering that are at most this long, in characters, are cached (the last `REMEMBERED` of them)."""

GRACE_SECONDS = 60.0
"""Seconds that a content is kept after that: a request that was just resolved may not have reached the core yet."""

FIELDS = {"name", "strength", "positions"}


class Names:
    """The steerings that requests can name."""

    def __init__(self) -> None:
        self._steerings: dict[str, Steering] = {}
        self.version = 0
        """Changes whenever a name is added, removed or replaced."""
        self.pinned: dict[str, str] = {}
        """Names that can't be changed as long as the server runs, and why."""

    def register(self, name: str, steering: Steering) -> None:
        """Register a steering, replacing any of the same name."""
        if not name or not isinstance(name, str):
            raise TrimtabError(f"a steering's name is a text, got {name!r}")
        self._check_free(name)
        if not isinstance(steering, Steering) or not steering.edits:
            raise TrimtabError(f"{name!r} isn't a steering with edits")
        if any(edit.gate.readings for edit in steering.edits):
            raise UnsupportedError(
                f"{name!r} has a gate that reads the prompt before anything is steered, which takes a separate forward"
                " pass; pass it to LM.generate(…, steering=…)"
            )
        self._steerings[name] = steering
        self.version += 1

    def unregister(self, name: str) -> None:
        """Remove a name. Raises `TrimtabError` if it isn't registered."""
        self[name]
        self._check_free(name)
        del self._steerings[name]
        self.version += 1

    def _check_free(self, name: str) -> None:
        if name in self.pinned:
            raise TrimtabError(f"{name!r} {self.pinned[name]}; restart the server to change it")

    def __getitem__(self, name: str) -> Steering:
        if not isinstance(name, str) or name not in self._steerings:
            raise TrimtabError(
                f"there is no steering {name!r}; registered: {', '.join(sorted(self._steerings)) or 'none'}"
            )
        return self._steerings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._steerings))

    def load(self, folder: str | Path) -> None:
        """Register all `.safetensors` files of a folder, under their names without the extension."""
        folder = Path(folder)
        if not folder.is_dir():
            raise TrimtabError(f"there is no folder {folder} of steerings")
        for file in sorted(folder.glob("*.safetensors")):
            self.register(file.stem, load_steering(file))

    def capacity(self) -> Capacity:
        """The capacity of captured graphs that the steerings need; one that fits in none counts as `ADDITIONS`."""
        return union(capacity_for(by_keys(steering)) for steering in self._steerings.values())

    def sites(self) -> frozenset[str]:
        """The kinds of sites inside blocks at which any of the steerings acts."""
        return frozenset(e.site.kind for s in self._steerings.values() for e in by_keys(s).edits) & frozenset(INSIDE)

    def load_environment(self) -> None:
        """Load the folder that `$TRIMTAB_STEERINGS` names, if it is set."""
        if folder := os.environ.get(STEERINGS):
            self.load(folder)


NAMES = Names()
"""The names of this process, shared by its engines."""


def parse(requested: Any, names: Names) -> Steering:
    """The steering that a request specifies. Raises `TrimtabError` if it can't be parsed, or for unknown names."""
    if isinstance(requested, str):
        try:
            requested = json.loads(requested) if requested.lstrip()[:1] in ("[", "{") else [{"name": requested}]
        except ValueError:
            raise TrimtabError(f"a request's steering isn't JSON: {requested[:80]!r}") from None
    items = [requested] if isinstance(requested, Mapping) else requested
    if not isinstance(items, Sequence) or not items:
        raise TrimtabError('a request\'s steering is a list such as [{"name": "shout", "strength": 1.5}]')
    total = Steering()
    for item in items:
        if not isinstance(item, Mapping) or "name" not in item or set(item) - FIELDS:
            raise TrimtabError(f"each steering of a request has name, strength and positions, got {item!r}")
        steering = item.get("strength", 1.0) * names[item["name"]]
        if item.get("positions") is not None:
            steering = steering.at(Positions.parse(str(item["positions"])))
        total = total + steering
    return total


@dataclass
class Link:
    """A front end's knowledge of its engine: what it supports, and which contents its workers have."""

    slots: int
    layers: int
    width: int
    static: bool
    sent: OrderedDict[str, Steering] = field(default_factory=OrderedDict)  # by digest, most recently used last
    retired: dict[str, float] = field(default_factory=dict)  # digests to drop, and since when they are unused
    dtype: torch.dtype = torch.float32  # of the residual stream
    capacity: Capacity = ADDITIONS  # of captured graphs
    maps: int = 1
    inside: Mapping[str, int] = field(default_factory=dict)  # widths of the activations, by kind of site
    split: frozenset[str] = frozenset()  # the kinds of sites that are split over workers
    unmeasured: str = "this worker gives no reason"  # why doses can't be measured, or empty
    tokens_unknown: str = ""  # why workers don't know each token before the next pass, or empty
    identity: ModelId | None = None  # once it has been requested
    # by names' version and request text
    part_cache: OrderedDict[tuple[int, str], Part] = field(default_factory=OrderedDict)

    def check(self, steering: Steering) -> None:
        """Raises `TrimtabError` for a steering that the engine can't run."""
        widths = {"residual": self.width, **self.inside}
        check_supported(by_keys(steering), layers=self.layers, widths=widths, split=self.split, capacity=self._capacity)
        if self.tokens_unknown and meanings_of(steering.edits):
            raise UnsupportedError(
                "positions by meaning depend on each token, which has to be known before the next one is computed:"
                f" {self.tokens_unknown}"
            )

    @property
    def _capacity(self) -> Capacity | None:
        return self.capacity if self.static else None

    def wire_for_prompt(self, wire: Wire, prompt_length: int) -> Wire:
        """The wire for a prompt of this length.

        Raises `TrimtabError` if a span reaches past the prompt, if more slots are needed than exist, or for additions
        that overflow the model's dtype.
        """
        edits: list[IdentifiedEdit] = []
        for part in wire.parts:
            edits += identified_edits(part, self.sent[part.digest])
        segments = reserved_segments(edits, prompt_length)
        for segment in segments:
            check_range(segment.state, self.dtype)
            if self.static:
                check_fits(segment.state, self.capacity)
        final_wire = wire.with_spans(segments, prompt_length, static=self.static)
        if len(final_wire.maps) > self.maps - 1:
            raise TrimtabError(
                f"this request needs {len(final_wire.maps)} slots of maps, the engine has {self.maps - 1}; raise"
                " TRIMTAB_MAPS"
            )
        if len(final_wire.slots) > self.slots - 1:
            raise TrimtabError(
                f"this request needs {len(final_wire.slots)} slots, the engine has {self.slots - 1}; raise"
                " TRIMTAB_SLOTS"
            )
        return final_wire


def link_from(handshakes: Sequence[Mapping[str, Any]], config: Any) -> Link:
    """The link to an engine, from its workers' replies. Raises `UnsupportedError` unless all of them can steer."""
    workers = config.parallel_config.world_size
    if len(handshakes) < workers:
        raise UnsupportedError(
            f"{len(handshakes)} of {workers} workers answered trimtab; its plugin isn't in all of them"
        )
    for handshake in handshakes:
        if handshake["reasons"]:
            raise UnsupportedError(f"this engine can't be steered: {'; '.join(handshake['reasons'])}")
        if handshake["unfired"]:
            raise UnsupportedError(
                f"worker {handshake['rank']}'s compiled graph lacks trimtab's operator at {handshake['unfired'][0]};"
                " delete vLLM's compile cache and start again"
            )
    layers = handshakes[0]["layers"]
    if missing := sorted(set(range(layers)) - {layer for hello in handshakes for layer in hello["here"]}):
        raise UnsupportedError(f"no worker steers after block {missing[0]}")
    static = any(hello["static"] for hello in handshakes)
    settings = settings_of(config)
    return Link(
        settings.slots,
        layers,
        handshakes[0]["width"],
        static,
        dtype=getattr(torch, handshakes[0]["dtype"]),
        capacity=Capacity.from_plain(settings.capacity),
        maps=settings.maps,
        unmeasured=next((hello["unmeasured"] for hello in handshakes if hello.get("unmeasured")), ""),
        tokens_unknown=next((hello["untold"] for hello in handshakes if hello.get("untold")), ""),
        inside=handshakes[0].get("inside", {}),
        split=frozenset(handshakes[0].get("split", ())),
    )


LINK = "_trimtab_link"


def connect(engine: Any) -> Rpc:
    """The engine's link; the first call queries its workers."""
    link = getattr(engine, LINK, None)
    if link is None:
        try:
            handshakes = yield "trimtab_hello", ()
        except Exception as error:
            raise UnsupportedError(
                "this engine's workers don't know trimtab: its plugin failed to load there (see the log for 'Failed to"
                f" load plugin'), or VLLM_PLUGINS leaves it out ({type(error).__name__}: {str(error)[:200]})"
            ) from error
        link = link_from(handshakes, engine.vllm_config)
        setattr(engine, LINK, link)
        setattr(engine.input_processor, LINK, link)
    return link


def check(link: Link, engine: Any, steering: Steering) -> Rpc:
    """Raises `TrimtabError` for a steering that the engine can't run, or that was learned on another model."""
    link.check(steering)
    if meanings_of(steering.edits):
        check_meanings(steering, engine.get_tokenizer())
    if steering.card.models:
        if link.identity is None:
            link.identity = yield from identify(engine)
        check_learned_on(steering, link.identity)


def send(link: Link, steering: Steering) -> Rpc:
    """Send a steering's content to every worker that doesn't have it, and return the part that refers to it.

    `ScaleScores` is sent as scaled keys.
    """
    digest, content, strengths = content_of(by_keys(steering))
    link.retired.pop(digest, None)
    if digest not in link.sent:
        link.check(content)
        yield "trimtab_put", (digest, steering_to_bytes(content))
        link.sent[digest] = content
    link.sent.move_to_end(digest)
    return Part(digest, strengths)


def drop_unused(link: Link, names: Names) -> Rpc:
    """Make the workers drop contents without a registered name, except the `MAX_UNNAMED` most recently used ones."""
    if len(link.sent) <= MAX_UNNAMED and not link.retired:
        return
    named = {content_of(by_keys(names[name]))[0] for name in names}
    unnamed = [digest for digest in link.sent if digest not in named]
    now = time.monotonic()
    for digest in unnamed[: max(0, len(unnamed) - MAX_UNNAMED)]:
        link.retired.setdefault(digest, now)
    expired = [digest for digest, since in link.retired.items() if now - since >= GRACE_SECONDS]
    if not expired:
        return
    for digest in expired:
        link.sent.pop(digest, None)  # it is sent again if it is needed again
    kept = yield "trimtab_drop", (expired,)
    link.retired = {d: t for d, t in link.retired.items() if d not in expired or any(d in digests for digests in kept)}


def resolve(
    engine: Any, params: Any, names: Names, request_context: RequestContext | None = None, spans: Sequence[Span] = ()
) -> Rpc:
    """The sampling parameters with their steering, or that of the request context, resolved; unchanged if they have
    none.

    `spans` of the prompt are emphasized.
    """
    extra = getattr(params, "extra_args", None) or {}
    decided = None if request_context is None else request_context.steering
    steers = bool(extra.get(STEERING_KEY)) or (decided is not None and bool(decided.edits))
    if not steers and not spans:
        return params
    link = yield from connect(engine)
    cap = None if request_context is None else request_context.cap
    if cap is not None and decided is not None:
        check_measured(link, decided)
    parts = []
    if steers:
        parts.append((yield from _part_of(link, engine, extra.get(STEERING_KEY), names, request_context)))
    if spans:
        emphasis_part = yield from send(link, emphasized.content(link.layers))
        parts.append(replace(emphasis_part, spans=tuple(spans)))
    params = copy.copy(params)
    params.extra_args = {k: v for k, v in extra.items() if k not in (STEERING_KEY, emphasized.EMPHASIZED)}
    params.extra_args[RESOLVED_KEY] = Wire(tuple(parts), cap=cap).to_plain()
    return params


def check_measured(link: Link, steering: Steering) -> None:
    """Raises `UnsupportedError` for a steering with capped doses that this engine can't measure."""
    if link.unmeasured:
        raise UnsupportedError(f"this server caps doses, and they can't be measured here: {link.unmeasured}")
    for edit in steering.edits:
        if isinstance(edit.operation, (ScaleScores, ScaleKeys)):
            continue  # it directs attention, and pushes nothing
        if edit.strength and link.static and not adds_only(edit):
            raise UnsupportedError(
                "this server caps doses, and with captured graphs it measures only those of additions to the residual"
                f" stream, not of {edit}; start it with -- --enforce-eager"
            )
        if edit.strength and edit.site.kind in link.split:
            raise UnsupportedError(
                f"this server caps doses, and {edit} is split over workers, so its dose can't be measured"
            )


def _part_of(link: Link, engine: Any, requested: Any, names: Names, request_context: RequestContext | None) -> Rpc:
    """The part that refers to a request's steering; repeated requests aren't checked and hashed again."""
    text = _as_text(requested) if request_context is None else f"request {request_context.name}"
    key = None if text is None or len(text) > LONGEST else (names.version, text)
    part = None if key is None else link.part_cache.get(key)
    if key is not None and part is not None and part.digest in link.sent:
        link.part_cache.move_to_end(key)
        link.sent.move_to_end(part.digest)
        link.retired.pop(part.digest, None)
        return part
    steering = (
        parse(requested, names)
        if request_context is None or request_context.steering is None
        else request_context.steering
    )
    yield from check(link, engine, steering)
    part = yield from send(link, steering)
    yield from drop_unused(link, names)
    if key is not None:
        link.part_cache[key] = part
    if len(link.part_cache) > REMEMBERED:
        link.part_cache.popitem(last=False)
    return part


def _as_text(requested: Any) -> str | None:
    """A request's steering as text, used as a cache key; `None` if it isn't JSON-serializable, such as a tensor."""
    if isinstance(requested, str):
        return requested
    try:
        return json.dumps(requested)
    except (TypeError, ValueError):
        return None
