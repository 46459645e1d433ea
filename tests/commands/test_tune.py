"""`trimtab tune` on tiny models: what it finds, what it says, what it writes."""

import json
import signal

import pytest

from trimtab.commands.terminal import sigterm_interrupts
from trimtab.commands.tune_task import answer_task, check_of
from trimtab.errors import TrimtabError
from trimtab.files.steering_file import edits_digest, load_steering, steering_digest
from trimtab.text.pairs import Pair
from trimtab.tune import Setting

SUBJECTS = [
    *("sea", "sky", "day", "sun", "rain", "wind", "snow", "ice", "sand", "rock", "tree", "leaf"),
    *("moon", "star", "hill", "lake", "road", "wall", "door", "roof", "boat", "bird", "fish", "seed"),
]
OFF = [
    part for limit in ("perplexity", "certainty", "repeated", "empty", "cut") for part in ("--guard", f"{limit}=off")
]


@pytest.fixture
def cpu(trimtab, model):
    return lambda *arguments: trimtab("tune", "--model", model, "--device", "cpu", "--max-new-tokens", 4, *arguments)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"A {s}? Shout!", "prompt_without_instruction": f"A {s}?"} for s in SUBJECTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def differs(trimtab, model, tmp_path):
    """A check that holds where the answer is another than the unsteered one: what a strong steering surely does."""
    prompts = [part for subject in SUBJECTS for part in ("--prompt", f"A {subject}? Shout!")]
    ran = trimtab("generate", "--model", model, "--device", "cpu", "--max-new-tokens", 4, "--json", *prompts)
    plain = {row["prompt"].removesuffix(" Shout!"): row["text"] for row in ran.json["answers"]}
    path = tmp_path / "checks.py"
    path.write_text(
        f"PLAIN = {plain!r}\nCALLS = []\n"
        "def differs(answer, prompt):\n    return answer != PLAIN[prompt]\n"
        "def never(answer):\n    return False\n"
        "def text(answer):\n    return 'yes'\n"
        "def stop(answer, prompt):\n    CALLS.append(1)\n    if len(CALLS) > 20:\n        raise KeyboardInterrupt\n"
        "    return differs(answer, prompt)\n"
    )
    return path


def test_what_works_is_saved_with_the_search_in_its_card(trimtab, cpu, pairs, differs, tmp_path):
    out, figure = tmp_path / "s.safetensors", tmp_path / "s.png"
    options = ("--pairs", pairs, "--check", f"{differs}:differs", "--strengths", "0.001,30", "--operation", "add", *OFF)
    ran = cpu(*options, "--out", out, "--figure", figure)
    assert ran.code == 0, ran.err
    for words in ("learned from 12 pairs", "searched on 7 prompts, confirmed on 5 others", "don't steer", "chosen"):
        assert words in ran.out
    assert f"saved {out}" in ran.out
    assert "interrupted" not in ran.out
    assert figure.read_bytes().startswith(b"\x89PNG")

    steering = load_steering(out)
    tuning = steering.card.measured["tuning"]
    assert tuning["chosen"]["strength"] == 30
    assert steering.layers == (tuning["chosen"]["layer"],)
    assert tuning["held_out"]["steered"] == 1
    assert tuning["held_out"]["unsteered"] == 0
    assert len(tuning["table"]) == 1 + 4 * 2
    divergence = steering.card.divergence
    assert divergence["p95"] >= divergence["mean"] > 0
    assert divergence["tokens"] > 0
    assert divergence["edits"] == edits_digest(steering)
    seen = trimtab("inspect", out)
    words = "chosen among 8 candidates; on 5 held-out prompts 1.00 instead of 0.00, difference [+1.00, +1.00]"
    assert words in " ".join(seen.out.split())

    learned, *rounds = ran.err.splitlines()[:-1]
    assert learned == "learned from 12 pairs at 4 blocks"
    assert rounds[0].startswith("round 1 of 2: 8 candidates on 6 prompts; best so far 1.00, unsteered 0.00: ")
    assert rounds[1].endswith("best so far 1.00, unsteered 0.00: " + str(Setting(**tuning["chosen"])))
    assert "better: 1.00 instead of 0.00 on 5 held-out prompts (5 better, 0 worse; p = 0.031)" in ran.out

    again = cpu(*options, "--out", tmp_path / "t.safetensors", "--json")
    assert (again.code, again.err) == (0, "")
    assert (tmp_path / "t.safetensors").read_bytes() == out.read_bytes()
    assert again.json["steer"] is True
    assert again.json["digest"] == steering_digest(steering)
    assert again.json["setting"] == tuning["chosen"]
    assert again.json["held_out"]["difference"]["estimate"] == 1
    assert [row["setting"] for row in again.json["table"]].count(None) == 1
    assert again.json["warnings"] == []
    assert again.json["advice"] == []


def test_two_held_out_prompts_are_too_few_whatever_works(cpu, pairs, differs, tmp_path):
    options = ("--pairs", pairs, "--check", f"{differs}:differs", "--strengths", 30, "--operation", "add", *OFF)
    ran = cpu(*options, "--limit", 6, "--out", tmp_path / "s.safetensors", "--json")
    assert ran.code == 3
    (doubt,) = ran.json["warnings"]
    assert doubt.startswith("the final test has 2 prompts, and even if all of them are won that can't be told")
    assert "can't be told from luck: 1.00 instead of 0.00 on 2 held-out prompts" in ran.json["reason"]


def test_the_guard_forbids_what_breaks_answers(cpu, pairs, differs, tmp_path):
    options = ("--pairs", pairs, "--check", f"{differs}:differs", "--strengths", 30, "--operation", "add", *OFF)
    ran = cpu(*options, "--guard", "perplexity=1", "--out", tmp_path / "s.safetensors", "--json")
    assert ran.code == 3, ran.err
    rows = [row for row in ran.json["table"] if row["setting"]]
    assert any("perplexity too high" in reason for row in rows for reason in row["broken"])
    broken = {json.dumps(row["setting"]) for row in rows if row["broken"]}
    assert json.dumps(ran.json["setting"]) not in broken


def test_dont_steer_writes_nothing(cpu, pairs, differs, tmp_path):
    out = tmp_path / "s.safetensors"
    ran = cpu("--pairs", pairs, "--check", f"{differs}:never", "--out", out)
    assert ran.code == 3
    assert "don't steer: no candidate scored above not steering" in ran.out
    assert "nothing is written" in ran.out
    advised = [line for line in ran.out.splitlines() if line.startswith("try next: ")]
    other = "learn it with another method: trimtab methods lists those that your pairs can be used for"
    assert advised[-1] == f"try next: {other}"
    assert not out.exists()
    as_json = cpu("--pairs", pairs, "--check", f"{differs}:never", "--out", out, "--json")
    assert (as_json.code, as_json.json["steer"], as_json.json["file"], as_json.json["digest"]) == (3, False, None, None)
    assert [f"try next: {line}" for line in as_json.json["advice"]] == advised


def test_control_c_keeps_the_best_so_far(cpu, pairs, differs, tmp_path):
    out = tmp_path / "s.safetensors"
    options = ("--pairs", pairs, "--strengths", 30, "--operation", "add", *OFF, "--batch-size", 9)
    ran = cpu(
        *options, "--check", f"{differs}:stop", "--layers", "all", "--limit", 6, "--out", out, "--strengths", "20,30"
    )
    assert ran.code == 0, ran.err
    assert "interrupted: this is the best so far" in ran.out
    assert "\nnot confirmed: add at block " in ran.out
    assert "\nsteer: " not in ran.out
    tuning = load_steering(out).card.measured["tuning"]
    assert (tuning["cut_short"], tuning["confirmed"]) == (True, False)


def test_sigterm_keeps_the_best_so_far_too(cpu, pairs, differs, tmp_path):
    """It is sent while the check is being asked."""
    out, outside = tmp_path / "s.safetensors", []
    with differs.open("a") as stream:
        stream.write(
            "import os, signal\n"
            "def ended(answer, prompt):\n    CALLS.append(1)\n"
            "    if len(CALLS) > 20:\n        os.kill(os.getpid(), signal.SIGTERM)\n"
            "    return differs(answer, prompt)\n"
        )
    options = ("--pairs", pairs, "--check", f"{differs}:ended", "--out", out, "--strengths", "20,30")
    before = signal.signal(signal.SIGTERM, lambda *_: outside.append(1))
    try:
        ran = cpu(*options, "--operation", "add", *OFF, "--batch-size", 9, "--layers", "all", "--limit", 6)
        assert outside == []
        signal.raise_signal(signal.SIGTERM)
        assert outside == [1]  # whose handler it was before has it again
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ran.code == 0, ran.err
    assert "interrupted: this is the best so far" in ran.out
    assert load_steering(out).card.measured["tuning"]["cut_short"] is True


def test_only_the_first_sigterm_interrupts():
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_interrupts():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_ended_before_anything_was_tried_is_no_verdict(cpu, pairs, differs, tmp_path):
    with differs.open("a") as stream:
        stream.write("def at_once(answer):\n    raise KeyboardInterrupt\n")
    out = tmp_path / "s.safetensors"
    ran = cpu("--pairs", pairs, "--check", f"{differs}:at_once", "--out", out, "--figure", tmp_path / "s.png")
    assert ran.code == 130
    assert "don't steer: nothing was tried: interrupted before the first" in ran.out
    assert not out.exists()


def test_pairs_of_answers_are_checked_on_the_models_own_answers(cpu, tmp_path, model, differs):
    path, out = tmp_path / "answers.jsonl", tmp_path / "s.safetensors"
    rows = [{"prompt": f"A {s}? Shout!", "positive": "YES YES", "negative": "no no"} for s in SUBJECTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "positive": "YES"}]))
    with differs.open("a") as stream:
        stream.write("def behaves(answer, prompt):\n    return answer != PLAIN[prompt.removesuffix(' Shout!')]\n")
    options = ("--pairs", path, "--check", f"{differs}:behaves", "--out", out, "--strengths", 30, *OFF, "--json")
    ran = cpu(*options)
    assert ran.code == 0, ran.err
    steering = load_steering(out)
    assert (steering.card.method, ran.json["setting"]["operation"]) == ("caa", "add")
    assert ran.json["held_out"]["steered"] == 1
    assert ran.json["searched_on"] + ran.json["confirmed_on"] == 12  # a prompt is asked once
    assert ran.json["pairs"] in (12, 13)
    assert cpu(*options, "--operation", "project").code == 2
    bare = cpu(*options, "--without-instruction")
    assert "pairs of answers have no instruction in their prompts" in bare.err


SYSTEM = {"role": "system", "content": "Be brief."}


def conversations(subject, positive_system, negative_system):
    """Two whole conversations that begin with a system message."""
    return Pair(
        (("system", positive_system), ("user", f"A {subject}?"), ("assistant", "YES")),
        (("system", negative_system), ("user", f"A {subject}?"), ("assistant", "no")),
        shape="answers",
    )


@pytest.mark.parametrize(
    ("pairs", "system"),
    [
        ([Pair("YES", "no", f"A {s}?", "answers", "Be brief.", "Be brief.") for s in SUBJECTS], True),
        ([Pair("YES", "no", f"A {s}?", "answers", "Shout!", None) for s in SUBJECTS], False),
        ([conversations(s, "Be brief.", "Be brief.") for s in SUBJECTS], True),
        ([conversations(s, "Shout!", "Whisper.") for s in SUBJECTS], False),
    ],
    ids=["one system prompt", "the positive side's", "one in messages", "two in messages"],
)
def test_prompts_are_searched_with_what_both_sides_share(pairs, system):
    """A system prompt of the positive side alone would ask the unsteered model for what the steering is to do."""
    task = answer_task(pairs, None, 0, "answers.jsonl")
    assert list(task.instructed) == list(task.prompts)
    for query, prompt in zip(task.queries, task.prompts, strict=True):
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        assert turns == [*([SYSTEM] if system else []), {"role": "user", "content": query}]


def test_a_system_message_alone_is_no_prompt():
    pairs = [
        Pair((("system", s), ("assistant", "YES")), (("system", "no"), ("assistant", "no")), "", "answers")
        for s in SUBJECTS
    ]
    with pytest.raises(TrimtabError, match="has answers without a prompt"):
        answer_task(pairs, None, 0, "answers.jsonl")


def test_a_shared_system_prompt_is_there_when_the_model_answers(cpu, tmp_path, differs, monkeypatch):
    from trimtab import LM

    path, prompts_seen, original = tmp_path / "answers.jsonl", [], LM.generate

    def generate(lm, prompts, *arguments, **options):
        prompts_seen.extend(prompts)
        return original(lm, prompts, *arguments, **options)

    monkeypatch.setattr(LM, "generate", generate)
    rows = [{"system": "Be brief.", "prompt": f"A {s}?", "positive": "YES", "negative": "no"} for s in SUBJECTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = cpu("--pairs", path, "--check", f"{differs}:never", "--out", tmp_path / "s.safetensors", "--strengths", 1)
    assert ran.code == 3, ran.err
    assert prompts_seen
    assert all(prompt[0] == SYSTEM for prompt in prompts_seen)


def test_a_spent_budget_is_said(cpu, pairs, differs, tmp_path):
    options = ("--pairs", pairs, "--check", f"{differs}:differs", "--strengths", 30, "--operation", "add", *OFF)
    ran = cpu(*options, "--out", tmp_path / "s.safetensors", "--batch-size", 5, "--budget-tokens", 4 * (5 * 2 + 10 + 1))
    assert ran.code == 0, ran.err
    assert "the budget is spent: this is the best so far" in ran.out
    assert "warning: the budget of 84 tokens may cover only 2 of the 6 prompts of the first round" in ran.err
    assert "give 160, or try fewer layers or strengths" in ran.err
    assert ran.err.index("warning: the budget") < ran.err.index("learned from")
    poor = cpu(*options, "--out", tmp_path / "s.safetensors", "--budget-tokens", 8)
    assert poor.code == 2
    assert "a budget of 8 tokens doesn't cover one prompt" in poor.err
    assert "learned from" not in poor.err


def test_too_few_prompts_are_said_before_the_model_is_loaded(trimtab, pairs, differs, tmp_path):
    arguments = ("--pairs", pairs, "--check", f"{differs}:differs", "--limit", 6, "--model", tmp_path / "none")
    ran = trimtab("tune", *arguments, "--out", tmp_path / "s.safetensors")
    assert ran.code == 2
    assert ran.err.index("warning: the final test has 2 prompts") < ran.err.index("error: ")


def test_a_short_time_is_said(cpu, pairs, differs, tmp_path):
    options = ("--pairs", pairs, "--check", f"{differs}:differs", "--operation", "add", *OFF, "--batch-size", 5)
    ran = cpu(*options, "--out", tmp_path / "s.safetensors", "--budget-minutes", 0.0005, "--json")
    (doubt,) = ran.json["warnings"]
    assert "s per answer, the budget of 0.0005 minutes covers about " in doubt


def test_letters_are_scored_without_generating(cpu, tmp_path):
    path = tmp_path / "letters.jsonl"
    sides = [("(A)", "(B)"), ("(B)", "(A)")]
    keys = ("answer_matching_behavior", "answer_not_matching_behavior")
    rows = [
        {"question": f"Is it {s}? (A) yes (B) no", **dict(zip(keys, sides[i % 2], strict=True))}
        for i, s in enumerate(SUBJECTS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ran = cpu("--pairs", path, "--out", tmp_path / "s.safetensors", "--json")
    assert ran.code == 3, ran.err
    assert ran.json["tokens"] == ran.json["answers"]
    assert all(0 < row["score"] < 1 and row["perplexity"] is None for row in ran.json["table"])
    refused = cpu("--pairs", path, "--out", tmp_path / "s.safetensors", "--check", "json")
    assert "leave out --check" in refused.err


def test_a_known_instruction_brings_its_check():
    assert check_of("Answer in JSON format.") == ("json", None, None)
    assert check_of("answer in json format") == ("json", None, None)
    assert check_of("Answer in all lowercase letters.") == (None, "change_case:english_lowercase", "{}")
    assert check_of("Use no commas at all.") == (None, "punctuation:no_comma", "{}")
    _, kind, kwargs = check_of("Answer with exactly 4 bullet points.")
    assert (kind, json.loads(kwargs)) == ("detectable_format:number_bullet_lists", {"num_bullets": 4})
    assert check_of("First repeat the request word for word, then give your answer.") == (None, None, None)
    assert check_of("Answer like a pirate.") == (None, None, None)


def test_an_ifeval_type_is_a_check(cpu, pairs, tmp_path):
    pytest.importorskip("trimtab.evaluate.ifeval", reason="needs IFEval's checks: pip install 'trimtab[eval]'")
    options = ("--pairs", pairs, "--out", tmp_path / "s.safetensors", "--operation", "add", "--layers", 2)
    ran = cpu(*options, "--type", "punctuation:no_comma", "--json")
    assert ran.code == 3, ran.err
    assert cpu(*options, "--type", "punctuation:none_such").code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--check json", "give one of --instruction and --pairs"),
        ("--instruction Shout! --pairs PAIRS --check json", "give one of --instruction and --pairs"),
        ("--pairs PAIRS", "give one of --check and --type"),
        ("--pairs PAIRS --check json --type punctuation:no_comma", "give one of --check and --type"),
        ("--pairs PAIRS --check json --kwargs {}", "give --type as well"),
        ("--pairs PAIRS --type punctuation:no_comma --kwargs [", "--kwargs is not JSON"),
        ("--pairs PAIRS --type punctuation:no_comma --kwargs []", "--kwargs is a JSON object"),
        ("--pairs PAIRS --check shouting", "neither json, title"),
        ("--pairs PAIRS --check no_such_module:f", "can't import no_such_module: ModuleNotFoundError"),
        ("--pairs PAIRS --check none.py:f", "can't import none.py: FileNotFoundError"),
        ("--pairs PAIRS --check CHECKS:missing", "has no function 'missing'"),
        ("--pairs PAIRS --check CHECKS:text", "the check returned 'yes'"),
        ("--pairs PAIRS --check json --strengths 1,x", "isn't a list of numbers"),
        ("--pairs PAIRS --check json --margin nan", "--margin is a finite number"),
        ("--pairs PAIRS --check json --strengths 0", "not steering is always tried"),
        ("--pairs PAIRS --check json --layers 9", "there is no layer 9"),
        ("--pairs PAIRS --check json --operation turn", "--operation is add, project or both"),
        ("--pairs PAIRS --check json --positions nowhere", "positions 'nowhere' are not known"),
        ("--pairs PAIRS --check json --guard speed=3", "there is no limit 'speed'"),
        ("--pairs PAIRS --check json --guard cut=x", "'x' isn't a number; write cut=0.5"),
        ("--pairs PAIRS --check json --guard perplexity=0.1", "'perplexity' is a number from 1"),
        ("--pairs PAIRS --check json --budget-minutes 0", "--budget-minutes is a number above 0"),
        ("--pairs none.jsonl --check json", "there is no file none.jsonl"),
        ("--instruction", "--instruction"),
    ],
)
def test_bad_input_is_one_line(cpu, pairs, differs, tmp_path, arguments, said):
    out = tmp_path / "s.safetensors"
    ran = cpu(
        "--out", out, *(w.replace("PAIRS", str(pairs)).replace("CHECKS", str(differs)) for w in arguments.split())
    )
    assert ran.code == 2
    assert said in ran.err
    assert [line for line in ran.err.splitlines() if not line.startswith(("learned from 12", "warning: the last"))] == [
        line for line in ran.err.splitlines() if line.startswith("error: ")
    ]
    assert ran.err.count("error: ") == 1
    assert not out.exists()


def test_an_empty_instruction_is_refused(cpu, tmp_path):
    ran = cpu("--instruction", " ", "--check", "json", "--out", tmp_path / "s.safetensors")
    assert (ran.code, "--instruction is empty" in ran.err) == (2, True)
    assert cpu("--instruction", "Hi", "--check", "json", "--out", tmp_path / "s.txt").code == 2


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.long
def test_on_the_default_model_json_is_made_to_hold(trimtab, tmp_path):
    out = tmp_path / "json.safetensors"
    ran = trimtab(
        *(
            "tune",
            "--instruction",
            "Reply with a valid JSON object only.",
            "--dtype",
            "float32",
            "--out",
            out,
            "--json",
        ),
        *("--layers", "12,18", "--strengths", "0.6", "--operation", "add", "--limit", 24, "--max-new-tokens", 32),
    )
    assert ran.code == 0, ran.err
    assert ran.json["steer"] is True
    assert ran.json["held_out"]["difference"]["estimate"] > 0.1
    assert load_steering(out).card.measured["tuning"]["held_out"]["items"] == ran.json["confirmed_on"]


def test_rules_and_lists_of_tokens_in_one_option() -> None:
    from trimtab import Positions
    from trimtab.commands.tune import _rules

    assert _rules("all, tokens:2,-1,opening:8,tokens:3") == [
        Positions.all(),
        Positions.tokens([2, -1]),
        Positions.opening(8),
        Positions.tokens([3]),
    ]
