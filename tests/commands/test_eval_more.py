"""`trimtab eval ab`, `refusal` and `capability`: from files to tables, documents, records and a page."""

from __future__ import annotations

import json
import re

import pytest

from trimtab.evaluate.records import read_records

WORDS = ["the sea", "a question", "an answer", "the user", "it", "capitals", "blue"]


@pytest.fixture
def data(tmp_path):
    """A folder laid out as the data sets are, each with a few items."""
    folder = tmp_path / "data"
    for name in ("caa/refusal", "mmlu", "truthfulqa", "gsm8k", "advbench", "xstest"):
        (folder / name).mkdir(parents=True)
    ask = "Is {} wide?\n (A) yes\n (B) no"
    rows = [(ask.format(word), *(("(A)", "(B)") if n % 3 else ("(B)", "(A)"))) for n, word in enumerate(WORDS)]
    keys = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
    ab = [dict(zip(keys, row, strict=True)) for row in rows]
    (folder / "caa/refusal/test_dataset_ab.json").write_text(json.dumps(ab))
    keys = ("prompt", "correct", "incorrect")
    two = [{**dict(zip(keys, row, strict=True)), "category": f"c{n // 4}"} for n, row in enumerate(rows)]
    (folder / "mmlu/mmlu.json").write_text(json.dumps(two))
    (folder / "truthfulqa/truthful_qa_ab.json").write_text(json.dumps(two[:3]))
    sums = [{"question": f"{n} and 1?", "answer": f"#### {n + 1}"} for n in range(3)]
    (folder / "gsm8k/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    (folder / "advbench/harmful_behaviors.csv").write_text(
        "goal,target\n" + "".join(f"Write {w},Sure\n" for w in WORDS)
    )
    safe = "".join(f"{n},How wide is {w}?,{'safe' if n % 2 else 'unsafe'}\n" for n, w in enumerate(WORDS))
    (folder / "xstest/xstest_prompts.csv").write_text("id,prompt,label\n" + safe)
    return folder


@pytest.fixture
def evaluate(trimtab, model):
    return lambda name, *rest: trimtab("eval", name, "--model", model, "--device", "cpu", *rest)


def line(results, arm, score):
    return next(entry for entry in results["scores"] if (entry["arm"], entry["score"]) == (arm, score))


def test_ab_by_layer_and_strength(evaluate, data, steering, tmp_path):
    out = tmp_path / "r.jsonl"
    test = data / "caa/refusal/test_dataset_ab.json"
    options = ["--data", test, "--steer", steering, "--strength", "-0.5,0,0.5", "--layers", "all", "--random", 1]
    options += ["--system-prompt", "Write yes.", "--out", out]
    ran = evaluate("ab", *options, "--json")
    assert (ran.code, ran.err) == (0, "")
    steered = [f"s @{layer} x{m}" for layer in (1, 2) for m in ("-0.5", "0.5")]
    random = [f"{name}, random 1" for name in steered]
    assert list(ran.json["arms"]) == ["unsteered", *steered, "system: Write yes.", *random]
    assert ran.json["polarity"] == "matching refuses"
    facts = ran.json["arms"]["s @2 x-0.5"]
    assert facts.pop("nats")["p95"] > 0
    assert facts | {"mean_dose": 0} == {
        "kind": "steered",
        "file": str(steering),
        "layers": [2],
        "strength": -0.5,
        "items": 7,
        "mean_dose": 0,
        "mean_tokens": 1,
        "cut": 0,
    }
    doses = {name: facts["mean_dose"] for name, facts in ran.json["arms"].items()}
    assert doses["unsteered"] == doses["system: Write yes."] == 0
    assert all(doses[name] > 0 for name in [*steered, *random])
    _, records = read_records(out)
    assert len(records) == 10 * 7
    for name in ran.json["arms"]:
        mine = [record.scores["matching"] for record in records if record.arm == name]
        assert line(ran.json, name, "matching")["mean"]["estimate"] == pytest.approx(sum(mine) / 7)
    assert all(0 < record.scores["mass"] < 1 for record in records)
    assert {r.prompt[0]["content"] for r in records if r.arm.startswith("system")} == {"Write yes."}
    kept = out.read_bytes()
    assert evaluate("ab", *options, "--json").json == ran.json
    assert out.read_bytes() == kept
    shown = evaluate("ab", *options)
    for word in ("7 questions", "matching refuses", "p(matching)", "s @1 x0.5", "random 1", "minus unsteered"):
        assert word in shown.out


def test_one_arm_at_a_time_says_the_same(evaluate, data, steering):
    test = ("--data", data / "caa/refusal/test_dataset_ab.json", "--json", "--dtype", "float64")
    together = evaluate("ab", *test, "--steer", steering, "--strength", "-1,2", "--layers", "1,2").json
    alone = evaluate("ab", *test, "--steer", f"{steering}:2", "--layers", "2", "--batch-size", 1).json
    for arm in ("unsteered", "s @2 x2"):
        for score in ("matching", "mass"):
            among_others, by_itself = (line(results, arm, score)["mean"]["estimate"] for results in (together, alone))
            assert among_others == pytest.approx(by_itself, abs=1e-9)


def test_report(evaluate, data, steering, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "r.html"
    test = data / "caa/refusal/test_dataset_ab.json"
    options = ["--data", test, "--steer", steering, "--strength", "-1,1", "--layers", "all", "--random", 1]
    ran = evaluate("ab", *options, "--system-prompt", "<b>&", "--report", page, "--json")
    assert (ran.code, ran.err) == (0, "")
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 4  # two sweeps, similarity, planes
    assert "<b>&" not in text
    assert "system: &lt;b&gt;&amp;" in text
    assert "matching refuses" in text
    assert "Is the sea wide?" in text
    assert "<meta name=viewport" in text
    verdict, *_ = text.split("</ul>")
    assert verdict.count("<li>") == 6  # five arms, and the random ones together
    assert "s @1 x-1: " in verdict
    assert "for comparison, 4 random directions" in verdict
    legend = text[text.index("<dl>") : text.index("</dl>")]
    for term in ("verdict", "p(matching)", "mass", "chosen", "minus unsteered", "dose", "random 1"):
        assert f"<dt>{term}<dd>" in legend
    assert not re.search(r"<script|https?://", text)


def test_refusal(evaluate, data, steering, tmp_path):
    out = tmp_path / "r.jsonl"
    options = ["--data", data, "--steer", steering, "--limit", 3, "--max-new-tokens", 6, "--out", out]
    ran = evaluate("refusal", *options, "--json")
    assert ran.code == 0
    assert [line[:17] for line in ran.err.splitlines()] == ["warning: at layer"]  # random weights: a hard push
    assert ran.json["items"] == 9
    assert ran.json["harmful"] == {
        "harmful_behaviors": True,
        "xstest_prompts unsafe": True,
        "xstest_prompts safe": False,
    }
    _, records = read_records(out)
    assert len(records) == 18
    assert {part["key"] for part in ran.json["by_part"]} == set(ran.json["harmful"])
    shown = evaluate("refusal", *options)
    for word in ("harmful: higher is better", "harmless: lower is better", "xstest_prompts safe"):
        assert word in shown.out


def test_refusal_report(evaluate, data, steering, tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "r.html"
    options = ["--data", data, "--steer", steering, "--limit", 3, "--max-new-tokens", 6, "--report", page]
    ran = evaluate("refusal", *options, "--json")
    assert ran.code == 0
    verdict, *_ = page.read_text().split("</ul>")
    for part in ran.json["harmful"]:  # each set has a verdict of its own: more refusals aren't always better
        assert f"<li>s, {part}: can&#x27;t be told from luck: refused " in verdict
    assert "these are too few requests for any other verdict: it takes at least 6" in verdict


def test_capability(evaluate, data, steering, tmp_path):
    out = tmp_path / "r.jsonl"
    options = ["--data", data, "--steer", steering, "--out", out]
    ran = evaluate("capability", *options, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert {name: task["items"] for name, task in ran.json["tasks"].items()} == {"mmlu": 7, "truthfulqa": 3}
    _, records = read_records(tmp_path / "r-mmlu.jsonl")
    parts = {
        name: [r.scores["matching"] for r in records if r.arm == "s" and r.item.startswith(name)]
        for name in ("c0", "c1")
    }
    macro = sum(sum(of) / len(of) for of in parts.values()) / 2
    assert ran.json["tasks"]["mmlu"]["macro"]["s"] == pytest.approx(macro)
    assert [len(of) for of in parts.values()] == [4, 3]
    sums = evaluate("capability", "--data", data, "--task", "gsm8k", "--max-new-tokens", 4, "--limit", 2)
    assert sums.code == 0
    assert "gsm8k, 2 items" in sums.out
    assert "macro p(correct)" in evaluate("capability", *options).out


def test_bad_input(evaluate, data, steering, tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("trimtab.commands.model.load_model", load)

    def refused(ran, *words):
        assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1), ran
        for word in words:
            assert str(word) in ran.err

    test = ("--data", data / "caa/refusal/test_dataset_ab.json")
    odd = tmp_path / "odd.json"
    odd.write_text(test[1].read_text().replace('(A)", "answer_not', '(C)", "answer_not'))
    refused(evaluate("ab", "--data", odd), "item 2", "(C)")
    refused(evaluate("ab", "--data", tmp_path / "none.json"), "none.json")
    refused(evaluate("ab", *test, "--strength", "1"), "--strength", "--steer FILE")
    refused(evaluate("ab", *test, "--steer", steering, "--strength", "1,x"), "'1,x'", "-2,-1,0,1,2")
    refused(evaluate("ab", *test, "--steer", steering, "--strength", "1,1"), "twice")
    refused(evaluate("ab", *test, "--steer", steering, "--layers", "3"), "nothing at layer 3", "1, 2")
    refused(evaluate("ab", *test, "--steer", steering, "--steer", steering), "twice")
    refused(evaluate("ab", *test, "--system-prompt", " "), "--system-prompt is empty")
    refused(evaluate("ab", *test, "--out", tmp_path / "r.txt"), "*.jsonl")
    refused(evaluate("ab", *test, "--report", tmp_path / "r.pdf"), "*.html")
    refused(evaluate("refusal", "--data", tmp_path), "doesn't contain any of", "xstest")
    refused(evaluate("refusal", "--data", tmp_path / "nowhere"), "no file or folder")
    refused(evaluate("capability", "--data", data, "--task", "chess"), "'chess'", "mmlu, truthfulqa, gsm8k")
    refused(evaluate("capability", "--data", data / "mmlu/mmlu.json", "--task", "mmlu"), "leave it out")


def test_help_teaches(trimtab):
    for name, word in (("ab", "answer_matching_behavior"), ("refusal", "XSTest"), ("capability", "GSM8K")):
        ran = trimtab("eval", name, "--help")
        assert ran.code == 0
        assert word in ran.out
        assert f"trimtab eval {name} --data" in ran.out
