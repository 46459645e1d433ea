"""Requests that are steered over a clean cache, through the application in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.serve.policy import Key, Policy

ASK = [{"role": "user", "content": "The sea is wide and blue."}]
BODY: dict[str, Any] = {"model": "trimtab", "messages": ASK, "max_tokens": 5, "temperature": 0}
PATH = "/v1/chat/completions"


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


class TestCleanCache:
    def test_the_answer_is_generate_s(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any], tiny_lm: Any, steerings: Path
    ) -> None:
        from trimtab import load

        client = client_of(make_service())
        for name in ("s0", "s1", "s3"):
            steered = load(steerings / f"{name}.safetensors")
            (wanted,) = tiny_lm.generate(ASK, steered, clean_cache=True, max_new_tokens=5)
            response = client.post(PATH, json={**BODY, "steering": [{"name": name}], "clean_cache": True})
            assert text_of(response) == wanted.text
            assert response.json()["trimtab"]["answers"][0]["edits"] == list(wanted.applied.edits)

    def test_the_server_s_default(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any], tiny_lm: Any, steerings: Path
    ) -> None:
        from trimtab import load

        client = client_of(make_service(clean_cache=True))
        steered = load(steerings / "s0.safetensors")
        for wish in (None, True, False):
            (wanted,) = tiny_lm.generate(ASK, steered, clean_cache=wish is not False, max_new_tokens=5)
            response = client.post(PATH, json={**BODY, "steering": [{"name": "s0"}], "clean_cache": wish})
            assert text_of(response) == wanted.text

    @pytest.mark.parametrize("clean", [True, False])
    def test_what_is_always_on_acts_as_the_server_has_it(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any], clean: bool
    ) -> None:
        keys = (Key("bob", hashlib.sha256(b"bob").digest()),)
        client = client_of(make_service(policy=Policy(keys, (("s7", 1.0),)), clean_cache=clean))
        options = {"headers": {"Authorization": "Bearer bob"}}
        assert client.post(PATH, json={**BODY, "clean_cache": clean}, **options).status_code == 200
        assert client.post(PATH, json={**BODY, "clean_cache": not clean}, **options).status_code == 403
