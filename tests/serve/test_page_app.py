"""The page's own routes, asked by what is no page: made-up functions and sessions, other origins, unread answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'trimtab[serve]'")

from trimtab.serve.bodies import SMALL
from trimtab.serve.playground import page_app
from trimtab.serve.playground.choices import AS_LEARNED, REJECTIONS, SLOTS
from trimtab.serve.playground.page_app import PageApp, Sessions, _Few
from trimtab.serve.playground.paths import DATA, JOIN
from trimtab.serve.policy import Key, Policy

PANEL = [[], *[1.0] * SLOTS, *[AS_LEARNED] * SLOTS, "", REJECTIONS[2], 0.5, "", 8, 0.0, 0]


@pytest.fixture
def page(make_service: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """A client of the application with the page, its door, and the numbers of the page's functions by name."""
    from starlette.testclient import TestClient

    from trimtab.serve.app import make_app

    opened = []

    def make(policy: Policy | None = None) -> tuple[Any, PageApp, dict[str, int]]:
        guard: Any = make_app(make_service(policy=policy), playground=True, local=True)
        client = TestClient(guard, base_url="http://localhost", raise_server_exceptions=False)
        client.__enter__()
        opened.append(client)
        names = {function.name: number for number, function in guard.page.blocks.fns.items() if function.fn is not None}
        return client, guard.page, names

    yield make
    for client in opened:
        client.__exit__(None, None, None)


def copying(names: dict[str, int], session: str = "abc", text: str = "Why?", secret: str = "") -> dict[str, Any]:
    """What the page asks for to show the request."""
    return {"data": [secret, text, None, *PANEL], "fn_index": names["request_snippets"], "session_hash": session}


def answers(client: Any, session: str) -> list[dict[str, Any]]:
    with client.stream("GET", f"{DATA}?session_hash={session}") as response:
        return [json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:")]


def test_the_page_and_what_is_no_page(page: Callable[..., Any]) -> None:
    """One page for all of it: making one takes a second."""
    client, mine, names = page()
    response = client.post(JOIN, json=copying(names))
    assert response.status_code == 200, response.text
    done = next(answer for answer in answers(client, "abc") if answer["msg"] == "process_completed")
    assert "curl http://localhost/v1/chat/completions" in done["output"]["data"][0]
    assert mine.sessions.unread_sessions == []
    good = copying(names)
    for body in (
        b"", b"[]", b"null", b"{", b"[" * 10_000, b"\xff", json.dumps({**good, "fn_index": 9999}), "{\"data\": NaN}",
        *(json.dumps({**good, "fn_index": number}) for number in (-1, None, True, "1", 1.0, 10**30)),
        *(json.dumps({**good, "session_hash": session}) for session in (None, "", "a" * 65, "../x", 5, ["a"])),
        *(json.dumps({**good, "data": data}) for data in (None, [], {}, good["data"][1:], good["data"] * 2)),
    ):  # fmt: skip
        refused = client.post(JOIN, content=body, headers={"Content-Type": "application/json"})
        assert refused.status_code == 400, (body, refused.text)
        assert refused.json()["error"]["message"]

    # of other origins, though of this machine
    theirs = {"Origin": "http://localhost:3000"}
    assert client.post(JOIN, json=good, headers=theirs).status_code == 403
    ask = {**theirs, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    preflight = client.options(JOIN, headers=ask)
    assert preflight.status_code == 403
    for response in (preflight, client.get("/config", headers={"Origin": "http://localhost"}), client.get("/")):
        assert not [name for name in response.headers if name.startswith("access-control")], response.headers
    assert client.post(JOIN, json=copying(names, "own"), headers={"Origin": "http://localhost"}).status_code == 200

    # too long a text isn't sent back and forth
    assert client.post(JOIN, json=copying(names, "long", "x" * 40_000)).status_code == 200
    done = next(answer for answer in answers(client, "long") if answer["msg"] == "process_completed")
    assert "32,000 characters" in done["output"]["data"][0]


def test_unread_answers_are_few_and_expire(page: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_app, "SESSIONS", 5)
    monkeypatch.setattr(page_app, "EVENTS", 3)
    monkeypatch.setattr(Sessions, "sweep", lambda _self: asyncio.sleep(3600))
    client, mine, names = page()
    statuses = [client.post(JOIN, json=copying(names, f"s{i}")).status_code for i in range(8)]
    assert statuses == [200] * 5 + [429] * 3
    again = [client.post(JOIN, json=copying(names, "s0")).status_code for _ in range(4)]
    assert again == [200] * 2 + [429] * 2
    assert len(mine.sessions.unread_sessions) == 5
    queue = mine.blocks._queue
    client.portal.call(mine.sessions.drop_unread)
    assert len(mine.sessions.unread_sessions) == 5
    monkeypatch.setattr(page_app, "UNREAD", -1.0)
    client.portal.call(mine.sessions.drop_unread)
    assert mine.sessions.unread_sessions == []
    assert not queue.pending_event_ids_session
    assert not any(name in queue.pending_messages_per_session for name in ("s0", "s1", "s4"))
    assert client.post(JOIN, json=copying(names, "new")).status_code == 200


def test_with_keys_strangers_have_small_requests_and_no_answers(page: Callable[..., Any]) -> None:
    client, _, names = page(Policy((Key("ann", hashlib.sha256(b"ann").digest()),)))
    big = copying(names, text="x" * (SMALL + 1))
    assert client.post(JOIN, json=big).status_code == 413
    assert client.post(JOIN, json=big, headers={"Authorization": "Bearer eve"}).status_code == 413
    assert client.post(JOIN, json=big, headers={"Authorization": "Bearer ann"}).status_code == 200
    for secret, words in (("", "enter your API key first"), ("eve", "isn't known"), ("ann", "curl")):
        session = f"k{secret}"
        assert client.post(JOIN, json=copying(names, session, secret=secret)).status_code == 200
        done = next(answer for answer in answers(client, session) if answer["msg"] == "process_completed")
        assert words in done["output"]["data"][0]


def test_tracebacks_in_the_log_are_few(caplog: pytest.LogCaptureFixture) -> None:
    few = _Few()
    with caplog.at_level(logging.ERROR, logger="trimtab"):
        for _ in range(50):
            try:
                raise ValueError("made up")
            except ValueError:
                few.print_exc()
    assert len(caplog.records) == page_app.TRACEBACKS
