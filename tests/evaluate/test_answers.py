"""An evaluation's file: the same bytes however often it was interrupted, and no other run's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import direction, prompt, tiny

from trimtab.errors import TrimtabError
from trimtab.evaluate.answers import answer
from trimtab.evaluate.records import ArmPrompt, Record, read_records
from trimtab.files.steering_file import steering_digest
from trimtab.steering import Add, Edit, Positions, SetProjection, Site, Steering

STEERINGS = {
    "unsteered": None,
    "pushed": Steering((Edit(Site(1), Add(direction(1, 2.0)), Positions.all()),)),
    "set": Steering((Edit(Site(2), SetProjection(direction(2), 1.5)),)),
}


def requests_of(count=5):
    prompts = [prompt(i, 3 + 2 * (i % 4)) for i in range(count)]
    return [ArmPrompt(arm, f"q{i}", p, s, f"g{i // 2}") for i, p in enumerate(prompts) for arm, s in STEERINGS.items()]


def score(_request, generation):
    return {"even": float(generation.token_ids[0] % 2 == 0), "third": len(generation.token_ids) / 3}


def run(out=None, lm=None, requests=None, **options):
    settings = {"score": score, "max_new_tokens": 6, "batch_size": 4, "out": out, **options}
    return answer(lm or tiny("llama"), requests or requests_of(), **settings)


def test_every_request_has_its_record_as_if_asked_alone():
    lm = tiny("llama")
    records = {(r.arm, r.item): r for r in run(lm=lm)}
    assert len(records) == 15
    for request in requests_of():
        (alone,) = lm.generate(request.prompt, request.steering, max_new_tokens=6)
        record = records[request.arm, request.item]
        assert (record.answer, record.tokens, record.finish) == (alone.text, 6, "length")
        assert (record.edits, record.group) == (alone.applied.edits, request.group)
        assert record.dose == pytest.approx(alone.applied.dose)
        assert record.scores == score(request, alone)
        assert record.steering == (request.steering and steering_digest(request.steering))
    assert records["pushed", "q0"].dose > 0 == records["unsteered", "q0"].dose


def test_records_survive_the_file(tmp_path):
    out = tmp_path / "r.jsonl"
    records = run(out)
    header, read = read_records(out)
    assert read == records
    assert header["arms"]["set"]["requests"] == 5
    assert header["options"]["max_new_tokens"] == 6
    odd = Record("a", "i", [{"role": "user", "content": "ü\n\u2028"}], "x", 1, "stop", dose=float("nan"))
    again = Record.from_json(odd.to_json())
    assert again.dose != again.dose
    assert again.prompt == odd.prompt
    assert "\n" not in odd.to_json()


def test_from_any_place_where_it_was_cut_it_ends_the_same(tmp_path):
    lm, whole = tiny("llama"), tmp_path / "whole.jsonl"
    records = run(whole, lm)
    data = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in [0, 7, ends[0], ends[0] + 5, ends[3], ends[4], ends[6] + 9, ends[-2], ends[-1] - 1, ends[-1]]:
        part = tmp_path / "part.jsonl"
        part.write_bytes(data[:cut])
        assert run(part, lm) == records
        assert part.read_bytes() == data


def test_a_finished_file_is_not_answered_again(tmp_path, monkeypatch):
    lm, out = tiny("llama"), tmp_path / "r.jsonl"
    records = run(out, lm)
    monkeypatch.setattr(type(lm), "generate", None)
    seen = []
    assert run(out, lm, progress=lambda done, total: seen.append((done, total))) == records
    assert seen == [(15, 15)]


def test_sampling_goes_on_with_the_same_numbers(tmp_path):
    lm = tiny("llama")
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    records = run(whole, lm, do_sample=True, seed=3)
    assert len({record.seed for record in records}) == 4
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:6]))
    run(part, lm, do_sample=True, seed=3)
    assert part.read_bytes() == whole.read_bytes()
    assert [r.answer for r in run(lm=lm, do_sample=True, seed=4)] != [r.answer for r in records]
    assert {record.seed for record in run(lm=lm)} == {None}


PROGRAM = """
import sys, time
sys.path[:0] = {path!r}
from test_answers import requests_of, score, run
def slow(request, generation):
    time.sleep(0.03)
    return score(request, generation)
run({out!r}, requests=requests_of(16), score=slow)
"""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_killed_and_started_again_it_writes_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    run(whole, requests=requests_of(16))
    here = Path(__file__).parent
    program = PROGRAM.format(path=[str(here), str(here.parent)], out=str(killed))
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if killed.exists() and killed.read_bytes().count(b"\n") >= 9:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it was killed"
    lines = killed.read_bytes().count(b"\n")
    assert 9 <= lines < 49
    with killed.open("ab") as stream:  # what a machine that fails in the middle of a write leaves
        stream.write(whole.read_bytes().splitlines()[lines][:20])
    run(killed, requests=requests_of(16))
    assert killed.read_bytes() == whole.read_bytes()


def test_another_runs_file_is_refused_and_left_alone(tmp_path):
    out = tmp_path / "r.jsonl"
    run(out, about={"evaluation": "x"})
    kept = out.read_bytes()
    changed = requests_of()
    changed[1] = ArmPrompt("pushed", "q0", "w3 w4", changed[1].steering)
    cases = [
        ({"max_new_tokens": 7}, "options.max_new_tokens is 6 there and 7 here"),
        ({"batch_size": 5}, "options.batch_size is 4 there and 5 here"),
        ({"do_sample": True}, "options.do_sample is none there and True here"),
        ({"about": {"evaluation": "y"}}, "about.evaluation is x there and y here"),
        ({"lm": tiny("llama", seed=1)}, "model.fingerprint"),
        ({"lm": tiny("qwen2")}, "model.family is llama there and qwen2 here"),
        ({"requests": changed}, "arms.pushed.digest"),
        ({"requests": requests_of(4)}, "arms.unsteered.requests is 5 there and 4 here"),
    ]
    for options, words in cases:
        with pytest.raises(TrimtabError, match="holds another run") as caught:
            run(out, **{"about": {"evaluation": "x"}, **options})
        assert words in str(caught.value)
        assert str(out) in str(caught.value)
        assert out.read_bytes() == kept


def test_other_files_are_left_alone(tmp_path):
    for content in (b"my diary", b"{}\n", b'{"prompt": "a"}\n', b"\xff\n"):
        out = tmp_path / "r.jsonl"
        out.write_bytes(content)
        with pytest.raises(TrimtabError, match=r"r\.jsonl isn't a file of records"):
            run(out)
        assert out.read_bytes() == content
    with pytest.raises(TrimtabError, match="existing, writable folder"):
        run(tmp_path / "nowhere" / "r.jsonl")


def test_a_damaged_file_is_refused(tmp_path):
    lm, out = tiny("llama"), tmp_path / "r.jsonl"
    run(out, lm)
    lines = out.read_bytes().splitlines(keepends=True)
    for damaged, where in (
        ([*lines[:2], b"{oops\n", *lines[3:]], ":3: this isn't a record"),
        ([*lines[:1], lines[2], lines[1], *lines[3:]], ":2 is out of order"),
        ([*lines, lines[-1]], "16 records for 15 requests"),
    ):
        out.write_bytes(b"".join(damaged))
        with pytest.raises(TrimtabError) as caught:
            run(out, lm)
        assert where in str(caught.value)


def test_what_cannot_run_is_said_before_anything_runs(tmp_path, monkeypatch):
    lm, out = tiny("llama"), tmp_path / "r.jsonl"
    monkeypatch.setattr(type(lm), "generate", None)
    late = Steering((Edit(Site(1), Add(direction(0)), Positions.span(50, 51)),))
    wrong = [
        ([], "no requests"),
        ([*requests_of(), requests_of()[0]], "'q0' occurs twice in arm 'unsteered'"),
        ([*requests_of(), ArmPrompt("a", "i", "w3 " * 130)], "128"),
        ([*requests_of(), ArmPrompt("a", "i", "w3", Steering((Edit(Site(9), Add(direction(0))),)))], "9"),
        ([*requests_of(), ArmPrompt("a", "i", "w3", late)], "50"),
    ]
    for requests, words in wrong:
        with pytest.raises(TrimtabError, match=words):
            answer(lm, requests, score=score, out=out)
    for options, words in (
        ({"batch_size": 0}, "at least one"),
        ({"num_return_sequences": 2}, "one answer"),
        ({"logits_processor": object()}, "JSON values"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(TrimtabError, match=words):
            run(out, lm, **options)
    assert not out.exists()


def test_the_header_is_one_line_of_json(tmp_path):
    out = tmp_path / "r.jsonl"
    run(out)
    header = json.loads(out.read_text().splitlines()[0])
    assert set(header) >= {"trimtab_records", "digest", "model", "options", "arms", "versions"}
