"""Keys, ranges and caps; nothing here needs a model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import TrimtabError

pytest.importorskip("fastapi", reason="serving needs trimtab[serve]")

from trimtab.serve.policy import ANYBODY, Key, Policy, check_names, read_policy, with_key


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


GOOD = {
    "keys": [
        {"name": "alice", "sha256": digest("a"), "steerings": ["json"], "strength": [0, 2], "max_dose": 0.5},
        {"name": "bob", "sha256": digest("b"), "add": True},
    ],
    "always": [{"name": "safety", "strength": 1.5}],
    "strength": [-1, 4],
    "max_dose": 0.8,
}


class TestPolicy:
    def test_the_tighter_limit_holds(self, tmp_path: Path) -> None:
        policy = read_policy(write(tmp_path / "p.json", GOOD))
        alice, bob = policy.caller("a"), policy.caller("b")
        assert alice is not None
        assert bob is not None
        assert (alice.name, policy.range_of(alice), policy.dose_cap(alice)) == ("alice", (0, 2), 0.5)
        assert (bob.name, policy.range_of(bob), policy.dose_cap(bob)) == ("bob", (-1, 4), 0.8)
        assert (alice.steerings, alice.add, bob.steerings, bob.add) == (frozenset({"json"}), False, None, True)
        assert policy.always == (("safety", 1.5),)

    @pytest.mark.parametrize("secret", [None, "", "A", "a ", "aa", "\udcff", "b" * 10_000])
    def test_a_wrong_key_is_nobodys(self, tmp_path: Path, secret: str | None) -> None:
        assert read_policy(write(tmp_path / "p.json", GOOD)).caller(secret) is None

    def test_without_keys_anybody_may_ask(self) -> None:
        assert Policy().caller(None) is ANYBODY
        assert with_key(Policy(), "secret").caller(None) is None
        assert with_key(Policy(), "secret").caller("secret") is not None
        with pytest.raises(TrimtabError, match="empty"):
            with_key(Policy(), " ")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "not valid at the file"),
            ({"kyes": []}, "kyes"),
            ({"keys": [{"name": "a", "sha256": "xyz"}]}, r"keys\.0\.sha256"),
            ({"keys": [{"name": "a", "key": "plain"}]}, r"keys\.0"),
            ({"strength": [2, 1]}, "the lower comes first"),
            ({"strength": [1]}, "strength"),
            ({"max_dose": -1}, "max_dose"),
            ({"always": [{"name": "s", "strength": "1"}]}, r"always\.0\.strength"),
            ('{"always": [{"name": "s", "strength": NaN}]}', "finite|JSON|valid"),
            ({"keys": [{"name": "a", "sha256": digest("a")}, {"name": "b", "sha256": digest("a")}]}, "twice"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path: Path, content: Any, words: str) -> None:
        with pytest.raises(TrimtabError, match=words):
            read_policy(write(tmp_path / "p.json", content))

    @pytest.mark.parametrize("nothing", ["", "\n", " ", "\r\n"])
    def test_the_digest_of_nothing_is_no_key(self, tmp_path: Path, nothing: str) -> None:
        """It is what `printf %s "$KEY" | sha256sum` says where KEY isn't set."""
        document = {"keys": [{"name": "a", "sha256": digest("a")}, {"name": "empty", "sha256": digest(nothing)}]}
        with pytest.raises(TrimtabError, match=r"digest of an empty key for 'empty'.*variable"):
            read_policy(write(tmp_path / "p.json", document))

    @pytest.mark.parametrize("secret", [None, "", " ", "\t"])
    def test_whoever_gives_no_key_is_nobody_whatever_the_keys_are(self, secret: str | None) -> None:
        keys = tuple(Key(f"k{i}", hashlib.sha256(text.encode()).digest()) for i, text in enumerate(("", " ", "\t")))
        assert Policy(keys).caller(secret) is None

    def test_a_file_that_isnt_there(self, tmp_path: Path) -> None:
        with pytest.raises(TrimtabError, match="can't read the policy"):
            read_policy(tmp_path / "none.json")

    def test_a_steering_that_must_be_there(self, tmp_path: Path) -> None:
        policy = read_policy(write(tmp_path / "p.json", GOOD))
        check_names(policy, ["json", "safety"])
        with pytest.raises(TrimtabError, match="'safety'"):
            check_names(policy, ["json"])
