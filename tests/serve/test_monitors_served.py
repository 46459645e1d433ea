"""Monitors through the application in this process: values in answers, chunks and metrics, and what they do."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.errors import TrimtabError
from trimtab.serve.audit import Audit
from trimtab.serve.monitored import read_monitors
from trimtab.serve.policy import Key, MonitorRule, Policy, read_policy

ASK = [{"role": "user", "content": "The sea is wide and blue."}]
BODY: dict[str, Any] = {"model": "trimtab", "messages": ASK, "max_tokens": 6, "temperature": 0}
PATH = "/v1/chat/completions"


@pytest.fixture
def monitors(tiny_lm: Any, steerings: Path) -> Any:
    return read_monitors(tiny_lm, [f"a={steerings}/s0.safetensors", f"b={steerings}/s1.safetensors@1"])


def answer_of(client: Any, **more: Any) -> Any:
    response = client.post(PATH, json={**BODY, **more})
    assert response.status_code == 200, response.text
    return response.json()


class TestValues:
    def test_they_are_generate_s(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any], tiny_lm: Any, monitors: Any
    ) -> None:
        client = client_of(make_service(monitors=monitors))
        (wanted,) = tiny_lm.generate(ASK, max_new_tokens=6, monitors=list(monitors.values()))
        readings = answer_of(client, monitors=["a", {"name": "b", "threshold": 1e6}])["trimtab"]["answers"][0][
            "monitors"
        ]
        assert [(monitor["name"], monitor["action"], monitor["fired"]) for monitor in readings] == [
            ("a", "log", None),
            ("b", "log", None),
        ]
        for reading in readings:
            assert reading["values"] == pytest.approx(wanted.monitors[reading["name"]].values, rel=1e-4, abs=1e-5)
        assert answer_of(client)["trimtab"]["answers"][0]["monitors"] == []

    def test_in_a_stream_each_chunk_has_those_of_its_tokens(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any], monitors: Any
    ) -> None:
        client = client_of(make_service(monitors=monitors))
        whole = answer_of(client, monitors=["a", "b"])["trimtab"]["answers"][0]["monitors"]
        for path, body in ((PATH, BODY), ("/v1/completions", None)):
            fields = body or {"model": "trimtab", "prompt": "The sea", "max_tokens": 6, "temperature": 0}
            response = client.post(path, json={**fields, "monitors": ["a", "b"], "stream": True})
            chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
            pieces = [chunk["trimtab"]["monitors"] for chunk in chunks if chunk.get("choices") and "trimtab" in chunk]
            last = chunks[-1]["trimtab"]["answers"][0]["monitors"]
            for reading in last if body is None else whole:
                assert [value for piece in pieces for value in piece[reading["name"]]] == reading["values"]

    def test_metrics_and_the_list(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any], monitors: Any
    ) -> None:
        client = client_of(make_service(monitors=monitors))
        answer_of(client, monitors=["a", {"name": "b", "threshold": -1e6}])
        text = ""
        for _ in range(200):  # they are counted when the answer has gone
            text = client.get("/metrics").text
            if "trimtab_monitor_fired_total{" in text:
                break
            time.sleep(0.01)
        assert 'trimtab_monitor_projection_count{monitor="a"} 6.0' in text
        assert 'trimtab_monitor_fired_total{action="log",monitor="b"} 1.0' in text
        listed = client.get("/v1/monitors").json()["data"]
        assert [(monitor["name"], monitor["site"], monitor["always"]) for monitor in listed] == [
            ("a", "residual[0]", False),
            ("b", "residual[1]", False),
        ]


class TestActions:
    def test_stop(self, make_service: Callable[..., Any], client_of: Callable[..., Any], monitors: Any) -> None:
        client = client_of(make_service(monitors=monitors))
        whole = answer_of(client, monitors=["a"])
        values = whole["trimtab"]["answers"][0]["monitors"][0]["values"]
        at = max(range(1, 6), key=lambda i: values[i] - max(values[:i]))
        line = (values[at] + max(values[:at])) / 2 if values[at] > max(values[:at]) else max(values) - 1e-3
        fires = next(i for i, value in enumerate(values) if value > line)
        choice = {"name": "a", "threshold": line, "action": "stop"}
        answer = answer_of(client, monitors=[choice])
        assert answer["choices"][0]["finish_reason"] == "content_filter"
        assert answer["usage"]["completion_tokens"] == fires
        assert answer["trimtab"]["answers"][0]["monitors"][0]["fired"] == fires
        assert whole["choices"][0]["message"]["content"].startswith(answer["choices"][0]["message"]["content"])
        response = client.post(PATH, json={**BODY, "monitors": [choice], "stream": True})
        assert '"finish_reason":"content_filter"' in response.text

    def test_steer(
        self,
        make_service: Callable[..., Any],
        client_of: Callable[..., Any],
        tiny_lm: Any,
        steerings: Path,
        monitors: Any,
    ) -> None:
        from dataclasses import replace

        from trimtab import load

        client = client_of(make_service(monitors=monitors))
        towards = load(steerings / "s4.safetensors")
        choice = {"name": "a", "threshold": -1e6, "action": "steer", "steering": {"name": "s4", "strength": 2}}
        reading_answer = answer_of(client, monitors=[choice])
        steer = replace(monitors["a"], threshold=-1e6, action="steer", steering=2 * towards)
        (wanted,) = tiny_lm.generate(ASK, max_new_tokens=6, monitors=steer)
        assert reading_answer["choices"][0]["message"]["content"] == wanted.text
        assert reading_answer["trimtab"]["answers"][0]["edits"] == list(wanted.applied.edits)
        assert reading_answer["trimtab"]["answers"][0]["total_dose"] > 0


class TestPolicy:
    @pytest.fixture
    def client(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any], monitors: Any, tmp_path: Path
    ) -> Any:
        keys = (Key("bob", hashlib.sha256(b"bob").digest(), steerings=frozenset({"s4"}), strength=(-2, 2)),)
        policy = Policy(keys, monitors=(MonitorRule("a", -1e6, "steer", "s1", 0.5),))
        self.log = tmp_path / "audit.jsonl"
        return client_of(make_service(policy=policy, monitors=monitors, audit=Audit(self.log)))

    def ask(self, client: Any, **more: Any) -> Any:
        return client.post(PATH, json={**BODY, **more}, headers={"Authorization": "Bearer bob"})

    def test_what_is_always_on_reads_every_answer(self, client: Any) -> None:
        answer = self.ask(client).json()["trimtab"]["answers"][0]
        assert [(monitor["name"], monitor["action"], monitor["fired"]) for monitor in answer["monitors"]] == [
            ("a", "steer", 0)
        ]
        assert answer["edits"]
        ended = [json.loads(line) for line in self.log.read_text().splitlines() if '"ended"' in line]
        assert ended[-1]["fired"] == [{"a": 0}]
        assert self.ask(client, monitors=["a"]).status_code == 200
        assert self.ask(client, monitors=[{"name": "a", "threshold": 1e9}]).status_code == 403
        assert self.ask(client, steering=[{"name": "s4"}], rejection={"ladder": "strength"}).status_code == 400

    def test_what_a_monitor_switches_on_counts_as_if_it_were_on(self, client: Any) -> None:
        steer = {"name": "b", "threshold": 1e6, "action": "steer", "steering": {"name": "s4", "strength": 1.5}}
        assert self.ask(client, monitors=[steer]).status_code == 200
        assert self.ask(client, monitors=[steer], steering=[{"name": "s4"}]).status_code == 403
        hidden = {**steer, "steering": {"name": "s0", "strength": 1}}
        assert self.ask(client, monitors=[hidden]).status_code == 404

    @pytest.mark.parametrize(
        ("wish", "status"),
        [
            (["nothing"], 404),
            (["b", "b"], 400),
            ([{"name": "b", "action": "stop"}], 400),
            ([{"name": "b", "action": "steer", "threshold": 1}], 400),
            ([{"name": "b", "action": "shout"}], 400),
            ([{"name": "b", "thresholds": 1}], 400),
            (5, 400),
        ],
    )
    def test_refusals(self, client: Any, wish: Any, status: int) -> None:
        assert self.ask(client, monitors=wish).status_code == status

    def test_a_policy_in_a_file(self, tmp_path: Path, make_service: Callable[..., Any], monitors: Any) -> None:
        path = tmp_path / "policy.json"
        path.write_text('{"monitors": [{"name": "a", "threshold": 0.5, "action": "stop"}]}')
        service = make_service(policy=read_policy(path), monitors=monitors)
        assert [(monitor.name, monitor.threshold, monitor.action) for monitor in service.always_on_monitors] == [
            ("a", 0.5, "stop")
        ]
        for bad in ('{"name": "nothing"}', '{"name": "a", "action": "stop"}', '{"name": "a", "action": "steer"}'):
            path.write_text(f'{{"monitors": [{bad}]}}')
            with pytest.raises(TrimtabError):
                _ = make_service(policy=read_policy(path), monitors=monitors).always_on_monitors

    @pytest.mark.parametrize("text", ["a", "=x", "a b=x", "a=nothing.safetensors"])
    def test_options(self, tiny_lm: Any, text: str) -> None:
        with pytest.raises(TrimtabError):
            read_monitors(tiny_lm, [text])
