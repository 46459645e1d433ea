"""Who may send requests, which steerings they may use, and how hard they may steer.

Steering is dual-use: what makes a model safer can undo it too. A policy is a JSON file in which everything is optional:

    {"keys": [{"name": "alice", "sha256": "…of the key…", "steerings": ["json"], "strength": [0, 2],
               "max_dose": 0.5, "add": true}],
     "always": [{"name": "safety", "strength": 1}],
     "monitors": [{"name": "harm", "threshold": 0.9, "action": "stop"}],
     "strength": [-4, 4],
     "max_dose": 1.0}

A key without `steerings` may use all of them; the tighter of its own and the common limits applies. A range of
strengths bounds the sum of one steering's strengths in a request, over all layers. Those in `always` are applied to
every request, and no request can name, weaken or reject them, nor push along their directions (see `protected`).
`monitors` read every answer, and take their action beyond their threshold; `steer` takes a `steering` and a `strength`.
`add` lets a key add steerings that only it can use, if the server allows adding them at all.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.errors import TrimtabError

STRENGTHS = (-100.0, 100.0)
"""No request steers by more than this, whatever the policy says."""
NO_KEYS = {hashlib.sha256(text.encode()).digest() for text in ("", " ", "\n", "\r\n")}
"""Digests of an empty key: what `sha256sum` prints if the variable that should contain the key isn't set."""


@dataclass(frozen=True)
class Key:
    """A caller. `steerings=None`: all; `max_dose=None`: no cap for this key. `digest` is the SHA-256 of the API key."""

    name: str
    digest: bytes = b""
    steerings: frozenset[str] | None = None
    strength: tuple[float, float] = STRENGTHS
    max_dose: float | None = None
    add: bool = False


ANYBODY = Key("anybody", add=True)


@dataclass(frozen=True)
class MonitorRule:
    """A monitor that reads every answer, by name, and its action. `threshold=None`: the one in its file."""

    name: str
    threshold: float | None = None
    action: str = "log"
    steering: str | None = None
    strength: float = 1.0


@dataclass(frozen=True)
class Policy:
    """The callers, the limits for all of them, and the steerings that are always on, as `(name, strength)`."""

    keys: tuple[Key, ...] = ()
    always: tuple[tuple[str, float], ...] = ()
    strength: tuple[float, float] = STRENGTHS
    max_dose: float | None = None
    monitors: tuple[MonitorRule, ...] = ()

    def caller(self, secret: str | None) -> Key | None:
        """The caller with this API key; `None` if nobody has it or it is missing. Takes the same time for any key.

        Without keys, everybody is `ANYBODY`.
        """
        if not self.keys:
            return ANYBODY
        if not secret or not secret.strip():
            return None
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        matching = None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                matching = key
        return matching

    def range_of(self, key: Key) -> tuple[float, float]:
        """The range of strengths that a caller may request."""
        return max(self.strength[0], key.strength[0]), min(self.strength[1], key.strength[1])

    def dose_cap(self, key: Key) -> float | None:
        """The cap on the sum of the doses of all sites in a caller's answer; `None`: no cap."""
        caps = [cap for cap in (self.max_dose, key.max_dose) if cap is not None]
        return min(caps) if caps else None


class _Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


class _Key(_Strict):
    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    steerings: list[str] | None = None
    strength: list[float] | None = Field(None, min_length=2, max_length=2)
    max_dose: float | None = Field(None, gt=0)
    add: bool = False


class _Always(_Strict):
    name: str
    strength: float = 1.0


class _Monitor(_Strict):
    name: str
    threshold: float | None = None
    action: Literal["log", "stop", "steer"] = "log"
    steering: str | None = None
    strength: float = 1.0


class _Policy(_Strict):
    keys: list[_Key] = []
    always: list[_Always] = []
    monitors: list[_Monitor] = []
    strength: list[float] | None = Field(None, min_length=2, max_length=2)
    max_dose: float | None = Field(None, gt=0)


def read_policy(path: Path) -> Policy:
    """The policy in a file. Raises `TrimtabError` if it can't be read or contains anything unknown."""
    try:
        parsed = _Policy.model_validate_json(path.read_bytes())
    except OSError as error:
        raise TrimtabError(f"can't read the policy {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise TrimtabError(f"the policy {path} is not valid at {where}: {first['msg']}") from None
    names = [key.name for key in parsed.keys]
    if len(set(names)) < len(names) or len({key.sha256 for key in parsed.keys}) < len(names):
        raise TrimtabError(f"the policy {path} has two keys with the same name, or the same key twice")
    if nothing := [key.name for key in parsed.keys if bytes.fromhex(key.sha256) in NO_KEYS]:
        raise TrimtabError(
            f"the policy {path} has the digest of an empty key for {nothing[0]!r}, which would admit anybody;"
            ' was the variable empty in printf %s "$KEY" | sha256sum?'
        )
    keys = tuple(
        Key(
            key.name,
            bytes.fromhex(key.sha256),
            None if key.steerings is None else frozenset(key.steerings),
            _range(key.strength, path),
            key.max_dose,
            key.add,
        )
        for key in parsed.keys
    )
    always = tuple((steering.name, _finite(steering.strength, path)) for steering in parsed.always)
    monitors = tuple(MonitorRule(**monitor.model_dump()) for monitor in parsed.monitors)
    return Policy(keys, always, _range(parsed.strength, path), parsed.max_dose, monitors)


def with_key(policy: Policy, secret: str) -> Policy:
    """The policy with one more caller, who may do everything that the policy allows."""
    if not secret.strip():
        raise TrimtabError("the API key is empty; give a long random one")
    key = Key("default", hashlib.sha256(secret.encode()).digest(), add=True)
    return replace(policy, keys=(*policy.keys, key))


def policy_from(path: Path | None, max_dose: float | None, secret: str | None) -> Policy:
    """The policy in a file, if given, with one more key and a cap on doses, if these are given."""
    rules = Policy() if path is None else read_policy(path)
    if secret is not None:
        rules = with_key(rules, secret)
    if max_dose is not None:
        rules = replace(rules, max_dose=max_dose if rules.max_dose is None else min(max_dose, rules.max_dose))
    return rules


def check_names(policy: Policy, known: Iterable[str]) -> None:
    """Raises `TrimtabError` if the policy names a steering that doesn't exist: none may go missing unnoticed."""
    names = set(known)
    named = {name for name, _ in policy.always}.union(*(key.steerings or () for key in policy.keys))
    if missing := sorted(named - names):
        raise TrimtabError(
            f"the policy names {missing[0]!r}, but the steerings are {', '.join(sorted(names)) or 'none'}"
        )


def _range(bounds: list[float] | None, path: Path) -> tuple[float, float]:
    if bounds is None:
        return STRENGTHS
    low, high = (_finite(value, path) for value in bounds)
    if low > high:
        raise TrimtabError(
            f"the policy {path} has a range of strengths from {low:g} to {high:g}; the lower comes first"
        )
    return max(low, STRENGTHS[0]), min(high, STRENGTHS[1])


def _finite(value: float, path: Path) -> float:
    if not math.isfinite(value):
        raise TrimtabError(f"the policy {path} has a strength that isn't a finite number")
    return value
