"""The judge, against a real server on this machine that speaks the protocol and fails in the ways that servers do."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from judging import Served, complete, fails, send, serving

from trimtab.errors import TrimtabError
from trimtab.evaluate.judge import (
    KEY_VARIABLE,
    MODEL_VARIABLE,
    URL_VARIABLE,
    Endpoint,
    LocalJudge,
    Rubric,
    default_judge,
    judge_answers,
    judge_records,
    tally,
)
from trimtab.evaluate.records import Record
from trimtab.evaluate.summary import summarize

openai = pytest.importorskip("openai", reason="needs trimtab[judge]")

RUBRIC = Rubric("How polite is the answer?")


def answers(body: bytes, kind: str = "application/json") -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda handler: send(handler, 200, body, Content_Type=kind)


def hangs(seconds: float) -> Callable[[BaseHTTPRequestHandler], None]:
    def wait(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return wait


@pytest.fixture
def served() -> Iterator[Served]:
    with serving() as state:
        yield state


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pauses before another try, a hundredth as long."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    for name in (URL_VARIABLE, MODEL_VARIABLE, KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)


def endpoint(served: Served, **options: Any) -> Endpoint:
    return Endpoint(served.url, "m", **{"key": "k", "retries": 2, "timeout": 5.0, **options})


def test_each_answer_gets_the_score_of_its_own_reply(served: Served) -> None:
    served.reply = lambda prompt: f"Reasons.\nScore: {prompt.count('please')}"
    questions = [(f"question {i}", "please " * i) for i in range(10)]
    verdicts = judge_answers(endpoint(served), RUBRIC, questions)
    # the rubric's own text has no "please"
    assert [verdict.score for verdict in verdicts] == [float(i) for i in range(10)]
    assert set(served.keys) == {"Bearer k"}
    assert {(r["model"], r["temperature"]) for r in served.requests} == {("m", 0)}
    sent = "\n".join(r["messages"][0]["content"] for r in served.requests)
    assert all(f"question {i}" in sent for i in range(10))
    assert RUBRIC.criterion in sent


@pytest.mark.parametrize("fault", [fails(429), fails(500), fails(503)], ids=["429", "500", "503"])
def test_passing_faults_are_tried_again(served: Served, fault: Any) -> None:
    served.faults = [fault, fault]
    (verdict,) = judge_answers(endpoint(served), RUBRIC, [("q", "a")])
    assert verdict.score == 7
    assert len(served.requests) == 3


def test_the_pause_that_the_server_asks_for_is_kept(served: Served) -> None:
    served.faults = [fails(429, Retry_After="1")]
    (verdict,) = judge_answers(endpoint(served), RUBRIC, [("q", "a")])
    assert verdict.score == 7
    assert served.times[1] - served.times[0] >= 1


def test_a_server_that_stays_broken_gives_no_score_and_is_counted(served: Served, tmp_path: Path) -> None:
    served.faults = [fails(500)] * 3
    judge = endpoint(served, workers=1)
    verdicts = judge_answers(judge, RUBRIC, [("q", "a"), ("q", "b")], cache=tmp_path)
    assert [verdict.score for verdict in verdicts] == [None, 7]
    assert "HTTP 500 after 3 tries" in str(verdicts[0].problem)
    counts = tally(judge, verdicts)
    assert (counts.scored, counts.unreadable, counts.failed) == (1, 0, 1)
    assert counts.mean is not None
    assert counts.mean.estimate == 7  # not 3.5: a failure is no 0
    again = judge_answers(judge, RUBRIC, [("q", "a"), ("q", "b")], cache=tmp_path)
    assert [(v.score, v.cached) for v in again] == [(7, False), (7, True)]  # failures aren't kept


def test_a_server_that_hangs_is_given_up(served: Served) -> None:
    served.faults = [hangs(1.0)] * 2
    (verdict,) = judge_answers(endpoint(served, timeout=0.2, retries=1), RUBRIC, [("q", "a")])
    assert verdict.score is None
    assert verdict.reply is None
    assert "no reply within 0.2 s, 2 times" in str(verdict.problem)


def test_nobody_there(served: Served) -> None:
    judge = Endpoint("http://127.0.0.1:9/v1", "m", retries=1)
    (verdict,) = judge_answers(judge, RUBRIC, [("q", "a")])
    assert "no connection after 2 tries" in str(verdict.problem)
    assert tally(judge, [verdict]).mean is None


@pytest.mark.parametrize(
    "body",
    [b"<html>Welcome to the wifi</html>", b"{", b"{}", b'{"choices": []}', b"[1]", b"\xff\xfe", b"[" * 100_000],
    ids=["html", "cut", "empty", "no-choices", "list", "bytes", "deep"],
)
def test_garbage_is_a_failure_and_no_score(served: Served, body: bytes) -> None:
    served.faults = [answers(body)]
    judge = endpoint(served)
    verdicts = judge_answers(judge, RUBRIC, [("q", "a")])
    assert verdicts[0].score is None
    assert "isn't a chat completion" in str(verdicts[0].problem)
    assert tally(judge, verdicts).failed == 1


def test_a_reply_without_text_is_a_failure(served: Served) -> None:
    served.faults = [answers(b'{"choices": [{"message": {"content": null}}]}')]
    (verdict,) = judge_answers(endpoint(served), RUBRIC, [("q", "a")])
    assert verdict.score is None
    assert "has no text" in str(verdict.problem)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refusal_for_good_raises_at_once(served: Served, status: int) -> None:
    served.faults = [fails(status)] * 9
    with pytest.raises(TrimtabError, match=rf"HTTP {status}.*{KEY_VARIABLE}"):
        judge_answers(endpoint(served, workers=1), RUBRIC, [("q", "a")])
    assert len(served.requests) == 1


def test_replies_without_a_score_are_reported_and_never_0(served: Served) -> None:
    replies = iter(["Score: 8", "I would rather not.", "Score: 11", "Score: 4"])
    served.reply = lambda prompt: next(replies)
    judge = endpoint(served, workers=1)
    verdicts = judge_answers(judge, RUBRIC, [("q", a) for a in "abcd"])
    by_reply = {verdict.reply: verdict.score for verdict in verdicts}
    assert by_reply == {"Score: 8": 8, "I would rather not.": None, "Score: 11": None, "Score: 4": 4}
    counts = tally(judge, verdicts)
    assert (counts.scored, counts.unreadable, counts.failed) == (2, 2, 0)
    assert counts.mean is not None
    assert counts.mean.estimate == 6
    assert str(counts).endswith("over 2 answers, 2 unreadable")


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 7", 7),
        ("score = 7.5.", 7.5),
        ("**Score:** 3", 3),
        ("**Score: 3**", 3),
        ("Score: 7/10", 7),
        ("7", 7),
        (" 7/10. ", 7),
        ("Score: 2 at first, but on reflection\nScore: 9", 9),
        ("Score: 0", 0),
        ("Score: 7/100", None),
        ("Score: 1-10", None),
        ("Score: 10.5", None),
        ("Score: -1", None),
        ("Score: 123", None),
        ("There are 7 reasons.", None),
        ("Score: seven", None),
        ("", None),
    ],
)
def test_what_counts_as_a_score(reply: str, score: float | None) -> None:
    assert RUBRIC.parse_score(reply) == score


def test_the_cache_answers_what_was_asked_before_and_nothing_else(served: Served, tmp_path: Path) -> None:
    judge = endpoint(served)
    first = judge_answers(judge, RUBRIC, [("q", "a"), ("q", "b"), ("q", "a")], cache=tmp_path)
    assert len(served.requests) == 2  # what occurs twice is asked once
    again = judge_answers(judge, RUBRIC, [("q", "b"), ("q", "a")], cache=tmp_path)
    assert len(served.requests) == 2
    assert [v.cached for v in first] == [False] * 3
    assert [v.cached for v in again] == [True] * 2
    judge_answers(judge, Rubric("How long is it?"), [("q", "a")], cache=tmp_path)
    assert len(served.requests) == 3
    judge_answers(endpoint(served, max_tokens=9), RUBRIC, [("q", "a")], cache=tmp_path)
    assert len(served.requests) == 4
    judge_answers(endpoint(served, key="another"), RUBRIC, [("q", "a")], cache=tmp_path)
    assert len(served.requests) == 4
    assert b"another" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_a_damaged_cache_file_is_asked_again(served: Served, tmp_path: Path) -> None:
    judge_answers(endpoint(served), RUBRIC, [("q", "a")], cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:20])
    (verdict,) = judge_answers(endpoint(served), RUBRIC, [("q", "a")], cache=tmp_path)
    assert (verdict.score, verdict.cached) == (7, False)
    assert json.loads(file.read_text())["reply"].endswith("Score: 7")


def test_what_was_paid_for_is_kept_when_the_judge_refuses_in_the_middle(served: Served, tmp_path: Path) -> None:
    judge = endpoint(served, workers=1)
    judge_answers(judge, RUBRIC, [("q", "a")], cache=tmp_path)
    served.faults = [fails(401)]
    with pytest.raises(TrimtabError):
        judge_answers(judge, RUBRIC, [("q", "a"), ("q", "b")], cache=tmp_path)
    assert [v.score for v in judge_answers(judge, RUBRIC, [("q", "a"), ("q", "b")], cache=tmp_path)] == [7, 7]


def test_replies_that_are_under_way_when_the_judge_refuses_are_kept(served: Served, tmp_path: Path) -> None:
    def slow(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(0.3)
        complete(handler, "Score: 5")

    served.faults = [slow, slow, fails(401), *[fails(401)] * 9]
    with pytest.raises(TrimtabError, match="HTTP 401"):
        judge_answers(endpoint(served, workers=3), RUBRIC, [("q", a) for a in "abcdefgh"], cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert len(served.requests) < 8  # and no new ones are sent


def test_progress_counts_to_the_end(served: Served) -> None:
    seen: list[tuple[int, int]] = []
    judge_answers(endpoint(served), RUBRIC, [("q", a) for a in "abc"], progress=lambda d, t: seen.append((d, t)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_records_get_a_score_that_a_file_can_hold_and_a_summary_refuses_when_missing(served: Served) -> None:
    def record(item: str, answer: str) -> Record:
        return Record("steered", item, [{"role": "user", "content": "Hello?"}], answer, 3, "stop", scores={"x": 1.0})

    served.reply = lambda prompt: "no idea" if "mumble" in prompt else "Score: 5"
    scored, verdicts = judge_records(endpoint(served), RUBRIC, [record("1", "hi"), record("2", "mumble")])
    assert scored[0].scores == {"x": 1.0, "judge": 5.0}
    assert math.isnan(scored[1].scores["judge"])
    assert [v.score for v in verdicts] == [5, None]
    assert math.isnan(Record.from_json(scored[1].to_json()).scores["judge"])
    assert summarize(scored[:1], ["judge"])[0].mean.estimate == 5
    with pytest.raises(TrimtabError, match="isn't a number"):
        summarize(scored, ["judge"])


def test_the_environment_names_the_endpoint(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrimtabError, match=f"set {URL_VARIABLE} and {MODEL_VARIABLE}"):
        default_judge()
    monkeypatch.setenv(URL_VARIABLE, served.url)
    with pytest.raises(TrimtabError, match=f"set {MODEL_VARIABLE}"):
        default_judge()
    monkeypatch.setenv(MODEL_VARIABLE, "m")
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    judge = default_judge()
    assert not judge.weak
    assert "secret" not in repr(judge)
    judge_answers(judge, RUBRIC, [("q", "a")])
    assert served.keys == ["Bearer secret"]


@pytest.mark.parametrize("url", ["http://[", "localhost:8000/v1", "ftp://x/v1", "http://", "http://x:port/v1", "v1"])
def test_a_wrong_address_is_named(url: str) -> None:
    with pytest.raises(TrimtabError, match="isn't the URL"):
        judge_answers(Endpoint(url, "m"), RUBRIC, [("q", "a")])


def test_rubrics_that_make_no_sense() -> None:
    with pytest.raises(TrimtabError, match="criterion"):
        Rubric("  ")
    with pytest.raises(TrimtabError, match="scale"):
        Rubric("x", low=3, high=3)


@pytest.mark.real
@pytest.mark.long
def test_a_local_judge_is_marked_as_weak(lm: Any, tmp_path: Path) -> None:
    judge = default_judge(lm)
    assert isinstance(judge, LocalJudge)
    verdicts = judge_answers(judge, RUBRIC, [("Hello?", "Go away."), ("Hello?", "Good day!")], cache=tmp_path)
    assert all(verdict.reply for verdict in verdicts)
    counts = tally(judge, verdicts)
    assert counts.scored + counts.unreadable == 2
    assert str(counts).endswith("(weak judge)")
    assert all(v.cached for v in judge_answers(judge, RUBRIC, [("Hello?", "Go away.")], cache=tmp_path))
