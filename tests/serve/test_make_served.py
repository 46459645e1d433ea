"""Making a steering while the server runs: what it answers, what is added, who may, and what becomes of the others."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trimtab import LM
from trimtab.making import contrasts, verdict
from trimtab.making.make import STAGES
from trimtab.serve.audit import Audit
from trimtab.serve.library import Library
from trimtab.serve.making import Finished, Step, learning_target, make_steering
from trimtab.serve.metrics import Metrics
from trimtab.serve.policy import ANYBODY, Key, Policy
from trimtab.serve.refusals import Refusal
from trimtab.serve.scheduler import Scheduler
from trimtab.serve.schema_steerings import MakeRequest
from trimtab.serve.service import Limits, Service

PATH = "/v1/steerings/make"
ASKED: dict[str, Any] = {
    "name": "loud", "idea": "shout, not whisper", "questions": 16, "tokens": 8, "distill": False, "keep": True,
}  # fmt: skip
WHO = {"request": "req-1", "key": "anybody", "route": PATH}
CHAT = {"model": "trimtab", "messages": [{"role": "user", "content": "The sea?"}], "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def roomy_lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """The tiny model, with room for questions under system prompts."""
    from commands.conftest import save_model

    folder = save_model(tmp_path_factory.mktemp("roomy") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    return LM.load(folder, device="cpu")


@pytest.fixture
def serving(roomy_lm: LM, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """A service on that model, without a steering at first."""
    made = []

    def make(**options: Any) -> Service:
        metrics = Metrics()
        scheduler = Scheduler(roomy_lm, rows=8, max_queued=16, finished=metrics.count_answer)
        audit = Audit(tmp_path / "audit.jsonl", prompts=True)
        limits = Limits(**{"max_tokens": 64, **options.pop("limits", {})})
        policy = options.pop("policy", Policy())
        service = Service(roomy_lm, Library(roomy_lm), scheduler, policy, audit, metrics, limits, learn=True, **options)
        scheduler.start()
        made.append(service)
        return service

    yield make
    for service in made:
        service.scheduler.close()


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny random model's answers for and against barely differ: here they all count."""
    monkeypatch.setattr(contrasts, "_distinguishable", lambda _lm, answers: list(answers))


def audited(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]


def events(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


class TestMaking:
    def test_it_is_measured_added_and_steers(
        self, serving: Callable[..., Any], client_of: Callable[..., Any], tmp_path: Path
    ) -> None:
        client = client_of(serving())
        response = client.post(PATH, json={**ASKED, "distill": True})
        assert response.status_code == 201, response.text
        made = response.json()
        assert (made["name"], made["added"], made["idea"]) == ("loud", True, "shout, not whisper")
        assert made["source"] == "sentence"
        assert made["chosen"].startswith(("mean difference", "distilled"))
        assert made["verdict"]["questions"] == len(learning_target(MakeRequest(**ASKED)).test) == 8
        assert made["verdict"]["holds"] == (not made["verdict"]["why_not"])
        assert made["verdict"]["lines"][0].startswith("verdict: ")
        assert len(made["examples"]) == 4
        assert client.get("/v1/steerings/loud").json() == made["steering"]
        assert made["steering"]["source"] == "made"
        measured = made["steering"]["card"]["measured"]
        assert measured["share_of_prompt"] == made["verdict"]["share_of_prompt"]
        example = made["examples"][0]
        for name, said in ((None, "unsteered"), ("loud", "steered")):
            body = {**CHAT, "messages": [{"role": "user", "content": example["question"]}], "max_tokens": 8}
            body["steering"] = [{"name": name}] if name else []
            answer = client.post("/v1/chat/completions", json=body).json()
            assert answer["choices"][0]["message"]["content"].strip() == example[said]
        lines = audited(tmp_path)
        assert (lines[0]["added"], lines[0]["source"]) == ("loud", "made")
        assert (lines[1]["made"], lines[1]["outcome"], lines[1]["route"]) == ("loud", "added", PATH)
        assert lines[1]["prompt"] == {"idea": "shout, not whisper"}
        assert client.post(PATH, json=ASKED).status_code == 400  # the name is taken

    def test_where_nothing_holds_nothing_is_added(
        self,
        serving: Callable[..., Any],
        client_of: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr(verdict, "LEAST_SHARE", 1e9)
        client = client_of(serving())
        body = {**ASKED, "idea": None, "like": "a parrot", "unlike": "a mouse", "keep": False, "stream": True}
        response = client.post(PATH, json=body)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        *steps, last = events(response.text)
        assert (steps[0]["stage"], steps[0]["number"]) == ("waiting for the model", 0)
        assert list(dict.fromkeys(step["stage"] for step in steps[1:])) == list(STAGES)
        assert all(step["stage"] == STAGES[step["number"] - 1] for step in steps[1:])
        assert any("answers show the difference" in step["said"] for step in steps)
        assert (last["added"], last["steering"], last["source"]) == (False, None, "persona")
        assert last["verdict"]["why_not"]
        assert last["verdict"]["lines"][0].startswith("verdict: none")
        assert client.get("/v1/steerings").json()["data"] == []
        (line,) = audited(tmp_path)
        assert (line["outcome"], line["holds"], line["prompt"]) == (
            "none",
            False,
            {"like": "a parrot", "unlike": "a mouse"},
        )

    def test_pairs_are_learned_from_and_tested_on(
        self, serving: Callable[..., Any], client_of: Callable[..., Any], tmp_path: Path
    ) -> None:
        client = client_of(serving())
        pairs = [
            {"prompt": f"What is {i}?", "positive": f"w7 w8 w{i + 9}", "negative": f"w20 w21 w{i + 9}"}
            for i in range(16)
        ]
        body = {"name": "mine", "pairs": pairs, "tokens": 8, "distill": False, "keep": True}
        response = client.post(PATH, json=body)
        assert response.status_code == 201, response.text
        verdict = response.json()["verdict"]
        assert (verdict["share_of_prompt"], verdict["loops_prompted"], verdict["questions"]) == (None, None, 8)
        assert verdict["gain"] == response.json()["steering"]["card"]["measured"]["gain"]
        assert response.json()["source"] == "16 pairs"
        assert response.json()["examples"][0]["prompted"] is None
        line = audited(tmp_path)[1]
        assert (line["gain"], line["prompt"]) == (pytest.approx(verdict["gain"], abs=1e-4), {"pairs": 16})
        assert client.post(PATH, json={**body, "name": "x", "questions": 16}).status_code == 400
        assert client.post(PATH, json={**body, "name": "x", "idea": "shout"}).status_code == 400
        alike = [{**pair, "negative": pair["positive"]} for pair in pairs]
        assert "the same" in client.post(PATH, json={**body, "name": "x", "pairs": alike}).json()["error"]["message"]

    def test_answers_that_hardly_differ(
        self, serving: Callable[..., Any], client_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(contrasts, "_distinguishable", lambda _lm, _answers: [])
        client = client_of(serving())
        response = client.post(PATH, json=ASKED)
        assert response.status_code == 400
        assert "barely differ" in response.json()["error"]["message"]
        *_, last = events(client.post(PATH, json={**ASKED, "stream": True}).text)
        assert "barely differ" in last["error"]["message"]
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200


class TestRequests:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"idea": None}, "describe what you want"),
            ({"like": "a parrot"}, "describe what you want"),
            ({"unlike": "a mouse"}, "unlike needs like"),
            ({"idea": " . "}, "describe in a sentence what you want"),
            ({"idea": None, "like": "a mouse", "unlike": "a mouse"}, "the same"),
            ({"idea": "x" * 501}, "at most 500 characters"),
            ({"questions": 15}, "must be at least 16"),
            ({"questions": 41}, "must be at most 40"),
            ({"tokens": 7}, "must be at least 8"),
            ({"tokens": 33}, "tokens can be at most 32 on this server"),
            ({"name": "../x"}, "name"),
            ({"keeep": True}, "keeep"),
        ],
    )
    def test_what_makes_no_sense_runs_nothing(
        self, serving: Callable[..., Any], client_of: Callable[..., Any], changes: dict[str, Any], words: str
    ) -> None:
        service = serving(limits={"max_tokens": 32})
        response = client_of(service).post(PATH, json={**ASKED, **changes})
        assert response.status_code == 400
        assert words in response.json()["error"]["message"]
        assert service.making_lock.acquire(blocking=False)

    def test_it_is_off_unless_learning_is_on(
        self, make_service: Callable[..., Any], client_of: Callable[..., Any]
    ) -> None:
        client = client_of(make_service())
        response = client.post(PATH, json=ASKED)
        assert response.status_code == 405
        assert "without --learn" in response.json()["error"]["message"]
        for method, path, option in (
            ("PUT", "/v1/steerings/x", "without --upload"),
            ("DELETE", "/v1/steerings/x", "without --learn or --upload"),
            ("GET", "/v1/completions", "doesn't take GET"),
        ):
            response = client.request(method, path)
            assert response.status_code == 405
            assert option in response.json()["error"]["message"]

    def test_questions_are_halved_and_a_card_is_taken(self) -> None:
        wanted = learning_target(MakeRequest(name="x", idea="talk like a pirate", questions=21))
        assert wanted.source == "trait pirate"
        assert (len(wanted.learn), len(wanted.test)) == (10, 11)
        assert len(learning_target(MakeRequest(name="x", like="a parrot")).learn) == 20

    def test_one_at_a_time(self, serving: Callable[..., Any], client_of: Callable[..., Any]) -> None:
        service = serving()
        client = client_of(service)
        with service.making_lock:
            response = client.post(PATH, json=ASKED)
        assert response.status_code == 429
        assert int(response.headers["Retry-After"]) > 0
        assert "another steering is being made" in response.json()["error"]["message"]
        assert client.post(PATH, json=ASKED).status_code == 201


class TestPolicy:
    def test_it_is_for_keys_that_may_add(self, serving: Callable[..., Any], client_of: Callable[..., Any]) -> None:
        key = Key("alice", hashlib.sha256(b"alice").digest())
        client = client_of(serving(policy=Policy((key,))), Authorization="Bearer alice")
        assert client.post(PATH, json=ASKED).status_code == 403
        assert client.post(PATH, json=ASKED, headers={"Authorization": "Bearer eve"}).status_code == 401

    @pytest.mark.parametrize("policy", [Policy(max_dose=5.0), Policy(strength=(0, 0.5))], ids=["dose", "strength"])
    def test_answers_that_the_policy_would_hold_back_are_not_shown(
        self, serving: Callable[..., Any], client_of: Callable[..., Any], policy: Policy
    ) -> None:
        made = client_of(serving(policy=policy)).post(PATH, json=ASKED).json()
        assert made["added"]
        assert made["examples"] == []

    def test_nor_answers_without_what_is_always_on(
        self, serving: Callable[..., Any], client_of: Callable[..., Any], roomy_lm: LM
    ) -> None:
        import torch

        from trimtab import Add, Card, Edit, Site, Steering

        service = serving(policy=Policy(always=(("safety", 1.0),)))
        service.library.add("safety", Steering((Edit(Site(1), Add(torch.ones(32))),), Card("manual")), "uploaded")
        assert client_of(service).post(PATH, json=ASKED).json()["examples"] == []


async def until(service: Service, ready: Callable[[Step], bool]) -> Any:
    """The steps up to one, and the generator."""
    steps = make_steering(service, ANYBODY, WHO, MakeRequest(**ASKED))
    async for step in steps:
        assert isinstance(step, Step)
        if ready(step):
            return steps
    raise AssertionError("it never came")


class TestEnds:
    def test_nobody_waits_any_more(self, serving: Callable[..., Any], roomy_lm: LM, tmp_path: Path) -> None:
        service = serving()

        async def run() -> Any:
            steps = await until(service, lambda step: step.stage == "learning")
            await steps.aclose()
            (line,) = audited(tmp_path)
            while service.making_lock.locked():
                await asyncio.sleep(0.01)
            # what comes next has the model as it was
            later = [step async for step in make_steering(service, ANYBODY, WHO, MakeRequest(**ASKED))]
            return line, later[-1]

        line, last = asyncio.run(run())
        assert line["outcome"] == "cancelled"
        assert isinstance(last, Finished)
        assert last.loaded is service.library.get("loud")
        (answer,) = roomy_lm.generate(last.examples[0].question, max_new_tokens=8)
        assert answer.text.strip() == last.examples[0].unsteered

    def test_the_server_shuts_down(self, serving: Callable[..., Any], tmp_path: Path) -> None:
        service = serving()

        async def run() -> None:
            steps = await until(service, lambda step: step.number == 1)
            service.scheduler.drain(0.0)
            async for _ in steps:
                pass

        with pytest.raises(Refusal, match="shutting down") as caught:
            asyncio.run(run())
        assert caught.value.status == 503
        assert audited(tmp_path)[0]["outcome"] == "shutdown"
        with pytest.raises(Refusal, match="shutting down"):
            asyncio.run(until(service, lambda _: False))
        assert not service.making_lock.locked()

    def test_what_fails_inside_is_the_servers_fault_and_it_goes_on(
        self,
        serving: Callable[..., Any],
        client_of: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def broken(_lm: Any, _answers: Any) -> Any:
            raise MemoryError("/home/x/secret")

        client = client_of(serving())
        with monkeypatch.context() as broke:
            broke.setattr(contrasts, "_distinguishable", broken)
            response = client.post(PATH, json=ASKED)
        assert response.status_code == 500
        assert "secret" not in response.text
        assert audited(tmp_path)[0]["outcome"] == "failed"
        with monkeypatch.context() as broke:
            broke.setattr(contrasts, "_distinguishable", broken)
            *_, last = events(client.post(PATH, json={**ASKED, "stream": True}).text)
        assert last["error"]["type"] == "server_error"
        assert "secret" not in str(last)
        assert "secret" in caplog.text
        assert client.post(PATH, json=ASKED).status_code == 201


class TestPage:
    """What the page's tab does, without a browser."""

    def function(self, service: Service) -> Callable[..., list[Any]]:
        """What the button calls: all that it shows, one after the other."""
        pytest.importorskip("gradio", reason="the page needs gradio: pip install 'trimtab[serve]'")
        from trimtab.serve.playground.page import make_blocks

        (create,) = {function.fn for function in make_blocks(service).fns.values() if function.name == "create"}
        assert create is not None

        async def steps(*inputs: Any) -> list[Any]:
            return [step async for step in create("", *inputs)]

        return lambda sentence, name, keep=True, like="", unlike="": asyncio.run(
            steps(sentence, like, unlike, name, keep)
        )

    @pytest.fixture(autouse=True)
    def quickly(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The page asks for all forty questions and for distilling: here for less."""
        from trimtab.serve.playground import make_part

        plain = make_part.build_make_request
        small = {key: ASKED[key] for key in ("questions", "tokens", "distill")}
        monkeypatch.setattr(
            make_part,
            "build_make_request",
            lambda *arguments, **more: plain(*arguments, **more).model_copy(update=small),
        )

    def test_stages_then_the_verdict_answers_and_the_file(self, serving: Callable[..., Any], tmp_path: Path) -> None:
        from trimtab import load

        service = serving()
        *steps, last = self.function(service)("shout, not whisper", "loud")
        shown = [step[0] for step in steps]
        assert "waiting for the model" in shown[0]
        for number, stage in enumerate(STAGES, 1):
            assert any(f"{number} of 4: {stage}" in html for html in shown)
        shares = [float(re.findall(r'value="([0-9.]+)"', html)[0]) for html in shown]
        assert shares == sorted(shares)
        assert shares[-1] == 1
        page, trouble, learned = last
        assert (trouble, learned) == ("", "loud")
        assert "verdict: " in page
        assert page.count('class="tt-answer tt-plain"') == page.count('class="tt-answer tt-steered"') == 2
        (data,) = re.findall(r'href="data:application/octet-stream;base64,([^"]+)"', page)
        (tmp_path / "loud.safetensors").write_bytes(base64.b64decode(data))
        loaded = service.library.get("loud")
        assert load(tmp_path / "loud.safetensors") == loaded.steering
        assert [(entry["route"], entry.get("outcome")) for entry in audited(tmp_path)] == [("/", None), ("/", "added")]

    def test_a_persona_and_its_opposite(self, serving: Callable[..., Any]) -> None:
        service = serving()
        *_, (page, trouble, learned) = self.function(service)("", "loud", like="a parrot", unlike="a mouse")
        assert (trouble, learned) == ("", "loud")
        options = service.library.get("loud").steering.card.options
        assert (options["source"], options["idea"]) == ("persona", "a parrot")
        assert "<strong>loud</strong> was made" in page

    def test_where_nothing_holds_it_says_why_and_nothing_is_chosen(
        self, serving: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(verdict, "LEAST_SHARE", 1e9)
        service = serving()
        page, _, learned = self.function(service)("<b>shout</b>", "loud", keep=False)[-1]
        assert "<strong>loud</strong> wasn't added: " in page
        assert "Or tick the box" in page
        assert "tt-save" not in page
        assert "<b>" not in page
        assert learned != "loud"
        assert service.library.names == []

    def test_what_is_missing_is_said(self, serving: Callable[..., Any], make_service: Callable[..., Any]) -> None:
        service = serving()
        create = self.function(service)
        for sentence, name, persona, words in (
            (" ", "x", {}, "Describe in a sentence what you want"),
            ("shout", " ", {}, "Give the steering a name"),
            ("shout", "../x", {}, "Name: a steering&#x27;s name has at most 64 letters"),
            ("shout", "x", {"like": "a parrot"}, "Give a sentence, or a persona and its opposite, not both"),
            ("", "x", {"unlike": "a mouse"}, "Also say whom the model should be like"),
        ):
            ((page, trouble, _),) = create(sentence, name, **persona)
            assert page == ""
            assert words in trouble
        with service.making_lock:
            ((_, trouble, _),) = create("shout", "x")
        assert "Another steering is being made" in trouble
        ((_, trouble, _),) = self.function(make_service())("shout", "x")
        assert "trimtab serve --learn" in trouble
