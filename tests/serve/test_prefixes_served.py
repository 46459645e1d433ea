"""Turns of a conversation that go on from the one before, through the application in this process."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from trimtab.engines.transformers.prefixes import RequestPrefixCache
from trimtab.serve.policy import Key, Policy
from trimtab.serve.scheduler import Scheduler

PATH = "/v1/completions"
TEXT = "The sea is wide and blue, and nobody has seen its end, as they say in the towns of the coast."
BODY: dict[str, Any] = {"model": "trimtab", "max_tokens": 6, "temperature": 0}


@pytest.fixture
def clients(make_service: Callable[..., Any], client_of: Callable[..., Any]) -> Callable[..., Any]:
    """A client of a server that keeps what it has read, for two keys, and one that keeps nothing."""

    def make(shared: bool = False) -> tuple[Any, Any]:
        services = []
        for prefixes in (RequestPrefixCache(5000, shared=shared), None):
            keys = tuple(Key(name, hashlib.sha256(name.encode()).digest()) for name in ("alice", "bob"))
            service = make_service(policy=Policy(keys))
            scheduler = Scheduler(service.lm, rows=8, finished=service.metrics.count_answer, prefixes=prefixes)
            object.__setattr__(service, "scheduler", scheduler)
            services.append(client_of(service))
        return services[0], services[1]

    return make


def ask(client: Any, prompt: str, who: str = "alice", **more: Any) -> tuple[str, int]:
    """The answer's text, and how many of the prompt's tokens were taken over."""
    body = {**BODY, "prompt": prompt, **more}
    response = client.post(PATH, json=body, headers={"Authorization": f"Bearer {who}"})
    assert response.status_code == 200, response.text
    usage = response.json()["usage"]
    return response.json()["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(
    "more", [{}, {"steering": [{"name": "s0"}]}, {"steering": [{"name": "s0"}], "clean_cache": True}]
)
def test_turns_get_what_they_get_without(clients: Callable[..., Any], more: dict[str, Any]) -> None:
    keeping, plain = clients()
    prompt, taken = TEXT, []
    for turn in range(3):
        text, cached = ask(keeping, prompt, **more)
        assert ask(plain, prompt, **more) == (text, 0)
        taken.append(cached)
        prompt += f"{text} And then, {turn}?"
    assert taken[0] == 0
    assert 0 < taken[1] < taken[2]
    metrics = keeping.get("/metrics", headers={"Authorization": "Bearer alice"}).text
    assert "trimtab_cached_prompt_tokens_total" in metrics


def test_what_one_key_has_asked_helps_no_other(clients: Callable[..., Any]) -> None:
    keeping, _ = clients()
    ask(keeping, TEXT)
    assert ask(keeping, f"{TEXT} More", "bob")[1] == 0
    assert ask(keeping, f"{TEXT} More")[1] > 0


def test_unless_that_is_allowed_and_it_is_unsteered(clients: Callable[..., Any]) -> None:
    keeping, _ = clients(shared=True)
    ask(keeping, TEXT)
    assert ask(keeping, f"{TEXT} More", "bob")[1] > 0
    steered = {"steering": [{"name": "s0"}]}
    ask(keeping, TEXT, **steered)
    assert ask(keeping, f"{TEXT} More", "bob", **steered)[1] == 0
    assert ask(keeping, f"{TEXT} More", **steered)[1] > 0


def test_answers_to_one_prompt_count_it_once(clients: Callable[..., Any]) -> None:
    keeping, _ = clients()
    ask(keeping, TEXT)
    body = {**BODY, "prompt": [f"{TEXT} More", f"{TEXT} Other"], "n": 2, "temperature": 1, "seed": 1}
    usage = keeping.post(PATH, json=body, headers={"Authorization": "Bearer alice"}).json()["usage"]
    text = ask(keeping, f"{TEXT} More")[1]
    assert usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    assert usage["prompt_tokens_details"]["cached_tokens"] <= 2 * text
