"""`trimtab eval`: from a file of prompts to a table, a document and a file of records."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from trimtab.evaluate.records import read_records

pytest.importorskip("if_verifiable", reason="the checkers aren't installed: pip install 'trimtab[eval]'")
ASKED = ["What is the sea?", "Who are you?", "Why?", "Is it blue or wide?", "What is an answer?"]


def row(n, ask):
    kinds = ["punctuation:no_comma"] if n % 2 else ["keywords:existence", "punctuation:no_comma"]
    settings = [{}] if n % 2 else [{"keywords": ["a"]}, {}]
    prompt = {"prompt": f"{ask} Write no commas!", "prompt_without_instruction": ask}
    return {"key": n // 2, "instruction_id_list": kinds, "kwargs": settings, **prompt}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row(n, ask)) + "\n" for n, ask in enumerate(ASKED)))
    return path


@pytest.fixture
def ifeval(trimtab, model, prompts):
    options = ("--model", model, "--device", "cpu", "--data", prompts, "--max-new-tokens", 8, "--batch-size", 4)
    return lambda *rest: trimtab("eval", "ifeval", *options, *rest)


def test_json_and_records(ifeval, steering, tmp_path):
    out = tmp_path / "r.jsonl"
    options = ("--steer", f"{steering}:0.5", "--steer", steering, "--random", 1, "--repeat-instruction", "--out", out)
    ran = ifeval("--json", *options)
    assert ran.code == 0
    assert ran.err.startswith("warning: at layer")  # random weights, and a steering as long as the activations
    assert ran.err.count("\n") == 1  # once, in whatever batch
    arms = ["unsteered", "s x0.5", "s", "s x0.5, random 1", "s, random 1", "said twice"]
    assert list(ran.json["arms"]) == arms
    assert ran.json["prompts"] == 5
    header, records = read_records(out)
    assert header["about"]["evaluation"] == "ifeval"
    assert len(records) == 6 * 5
    assert {r.prompt for r in records if r.arm == "s"} == {r.prompt for r in records if r.arm == "unsteered"}
    (again,) = {r.prompt for r in records if r.arm == "said twice" and r.item == "0.2"}
    assert again.startswith("Who are you? Write no commas!\n\nIn your entire response")
    for line in ran.json["by_prompt"]:
        mine = [r.scores[line["score"]] for r in records if r.arm == line["arm"]]
        base = [r.scores[line["score"]] for r in records if r.arm == "unsteered"]
        assert line["mean"]["estimate"] == pytest.approx(sum(mine) / 5)
        if line["arm"] != "unsteered":
            assert line["difference"]["mean"]["estimate"] == pytest.approx((sum(mine) - sum(base)) / 5)
    assert {line["n"] for line in ran.json["by_instruction"]} == {8}
    assert {(line["key"], line["n"]) for line in ran.json["by_type"]} == {
        ("keywords:existence", 3),
        ("punctuation:no_comma", 5),
    }
    assert ran.json["arms"]["unsteered"]["steered"] == 0 == ran.json["arms"]["unsteered"]["mean_dose"]
    assert ran.json["arms"]["s"]["steered"] == 5

    kept = out.read_bytes()
    assert ifeval("--json", *options).json == ran.json  # nothing is left to answer
    assert out.read_bytes() == kept


def test_a_random_arm_is_pushed_as_hard(ifeval, steering, tmp_path):
    out = tmp_path / "r.jsonl"
    ran = ifeval("--json", "--steer", f"{steering}:0.2", "--random", 2, "--out", out, "--limit", 2)
    doses = {arm: facts["mean_dose"] for arm, facts in ran.json["arms"].items()}
    assert len({*doses.values()}) == 4
    assert doses["unsteered"] == 0
    edits = {r.arm: r.edits for r in read_records(out)[1] if r.arm != "unsteered"}
    assert edits["s x0.2"] == edits["s x0.2, random 1"] == edits["s x0.2, random 2"] != ()


def test_arms_by_layer_strength_and_system_message(ifeval, steering, tmp_path):
    out = tmp_path / "r.jsonl"
    options = (
        "--steer",
        steering,
        "--strength",
        "-0.5,0.5",
        "--layers",
        "all",
        "--system-prompt",
        "Write.",
        "--out",
        out,
    )
    ran = ifeval("--json", *options, "--limit", 2, "--out", out)
    assert ran.code == 0
    steered = [f"s @{layer} x{m}" for layer in (1, 2) for m in ("-0.5", "0.5")]
    assert list(ran.json["arms"]) == ["unsteered", *steered, "system: Write."]
    about = {"kind": "steered", "file": str(steering), "layers": [1], "strength": 0.5, "items": 2, "steered": 2}
    assert about.items() <= ran.json["arms"]["s @1 x0.5"].items()
    _, records = read_records(out)
    assert {r.prompt[0]["content"] for r in records if r.arm.startswith("system")} == {"Write."}
    assert {r.prompt[1]["content"] for r in records if r.arm.startswith("system")} == {
        r.prompt for r in records if r.arm == "unsteered"
    }


def test_a_file_that_is_called_as_the_baseline(ifeval, steering, tmp_path):
    for name in ("unsteered", "said twice"):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(steering.read_bytes())
        ran = ifeval("--json", "--steer", file, "--repeat-instruction", "--limit", 1)
        assert list(ran.json["arms"]) == ["unsteered", str(file), "said twice"]


def test_the_table(ifeval, steering):
    ran = ifeval("--steer", steering)
    assert ran.code == 0
    for word in (
        "IFEval on tiny, 5 prompts",
        "minus unsteered",
        "instructions followed",
        "punctuation:no_comma",
        " % [",
    ):
        assert word in ran.out
    assert "Traceback" not in ran.err


def test_without_the_instruction(ifeval, steering, tmp_path):
    out = tmp_path / "r.jsonl"
    assert ifeval("--steer", steering, "--without-instruction", "--out", out).code == 0
    assert {r.prompt for r in read_records(out)[1]} == set(ASKED)


def test_bad_input(ifeval, trimtab, model, steering, prompts, tmp_path, monkeypatch):
    out = tmp_path / "r.jsonl"
    assert ifeval("--out", out, "--limit", 1).code == 0

    def refused(ran, *words):
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
        for word in words:
            assert str(word) in ran.err

    refused(ifeval("--out", out, "--limit", 2), out, "holds another run", "arms.unsteered.requests is 1 there")

    def load(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("trimtab.commands.model.load_model", load)
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({k: v for k, v in row(0, "Why?").items() if k != "prompt_without_instruction"}) + "\n")
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(json.dumps({**row(0, "Why?"), "instruction_id_list": ["a:b", "c:d"]}) + "\n")
    refused(ifeval("--out", tmp_path / "r.txt"), "r.txt", "*.jsonl")
    refused(ifeval("--out", tmp_path / "nowhere" / "r.jsonl"), "must exist")
    refused(ifeval("--random", 1), "--random", "--steer")
    refused(ifeval("--repeat-instruction", "--without-instruction"), "--repeat-instruction", "leave one")
    refused(ifeval("--steer", "none.safetensors"), "no file none.safetensors")
    refused(ifeval("--steer", steering, "--steer", steering), "twice")
    refused(trimtab("eval", "ifeval", "--data", tmp_path / "none.jsonl"), "there is no file")
    refused(trimtab("eval", "ifeval", "--data", wrong), f"{wrong}:1", "'a:b'", "punctuation:no_comma")
    refused(trimtab("eval", "ifeval", "--data", bare, "--without-instruction"), "prompt_without_instruction")
    refused(trimtab("eval", "ifeval", "--limit", 0), "--limit", "trimtab eval ifeval --help")
    refused(trimtab("eval", "ifeva"), "ifeva", "trimtab eval --help")


def test_help_teaches(trimtab):
    ran = trimtab("eval", "ifeval", "--help")
    assert ran.code == 0
    for word in ("trimtab eval ifeval --steer", "instruction_id_list", "--without-instruction"):
        assert word in ran.out
    assert "ifeval" in trimtab("eval", "--help").out


@pytest.mark.slow
@pytest.mark.long
def test_ctrl_c_leaves_a_file_that_goes_on(ifeval, model, prompts, steering, tmp_path):
    many, out = tmp_path / "many.jsonl", tmp_path / "r.jsonl"
    many.write_text("".join(json.dumps({**row(n, ASKED[n % 5]), "key": n}) + "\n" for n in range(60)))
    arguments = ["eval", "ifeval", "--model", model, "--device", "cpu", "--data", many, "--steer", steering]
    arguments += ["--max-new-tokens", 12, "--batch-size", 4, "--out", out]
    program = "import signal, sys, trimtab.commands; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    command = [sys.executable, "-c", program + "sys.exit(trimtab.commands.main(sys.argv[1:]))", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if out.exists() and out.read_bytes().count(b"\n") >= 9:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=60)
    assert (process.returncode, printed) == (130, "")
    assert "the same command resumes the run" in " ".join(err.split())
    part = out.read_bytes()
    assert 9 <= part.count(b"\n") < 121
    rest = ["--data", many, "--steer", steering, "--max-new-tokens", 12, "--out", out]
    assert ifeval(*rest).code == 0
    whole = out.read_bytes()
    assert whole.startswith(part)
    out.unlink()
    assert ifeval(*rest).code == 0
    assert out.read_bytes() == whole


@pytest.mark.real
@pytest.mark.long
def test_real_weights_through_to_the_document(trimtab, lm, tmp_path):
    """The answers are those that the model gives alone, and what is counted is what stands in them."""
    data, out = tmp_path / "d.jsonl", tmp_path / "r.jsonl"
    words = {"bread": "flour", "rain": "water", "a horse": "gallop", "glass": "glass"}
    rows = [
        {"prompt": f"What is {thing}?", "instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": [word]}]}
        for thing, word in words.items()
    ]
    data.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    ran = trimtab(
        *("eval", "ifeval", "--data", data, "--max-new-tokens", 24, "--dtype", "float32", "--json", "--out", out)
    )
    assert (ran.code, ran.err) == (0, "")
    answers = {record.prompt: record.answer for record in read_records(out)[1]}
    prompts = [row["prompt"] for row in rows]
    assert [answers[p] for p in prompts] == [answer.text for answer in lm.generate(prompts, max_new_tokens=24)]
    followed = [word in answers[f"What is {thing}?"].lower() for thing, word in words.items()]
    assert ran.json["by_prompt"][1]["mean"]["estimate"] == sum(followed) / 4
    assert 0 < sum(followed) < 4
