"""Each command does what its help says, and --json gives one document."""

import json

import pytest

from trimtab.commands.inspect import bar, describe_gate
from trimtab.files.steering_file import load_steering, steering_digest


@pytest.fixture
def cpu(trimtab, model):
    """The command with `model`."""
    return lambda command, *rest: trimtab(*command.split(), "--model", model, "--device", "cpu", *rest)


def test_learn_inspect_generate_compare(trimtab, cpu, prompt_pairs, tmp_path):
    out = tmp_path / "s.safetensors"
    learned = cpu("learn instruct --layers 1,2 --strength 2", "--pairs", prompt_pairs, "--out", out)
    assert learned.code == 0
    assert "from 4 pairs" in learned.out
    assert str(out) in learned.out
    steering = load_steering(out)
    assert steering.layers == (1, 2)
    assert {edit.strength for edit in steering.edits} == {2.0}

    seen = trimtab("inspect", out)
    assert seen.code == 0
    for word in ("instruct on tiny", "4 pairs", "█", "strength 2", steering_digest(steering)):
        assert word in seen.out

    ran = cpu("generate --max-new-tokens 5 --compare", "--steer", out, "--prompt", "Why?", "--prompt", "[bold]Who?")
    assert ran.code == 0
    for word in ("# Why?", "# [bold]Who?", "unsteered"):
        assert word in ran.out
    assert "dose" in ran.err


def test_json(trimtab, cpu, answer_pairs, tmp_path):
    out = tmp_path / "s.safetensors"
    learned = cpu("learn caa --layers all --json", "--pairs", answer_pairs, "--out", out)
    assert learned.code == 0
    assert learned.err.startswith("warning: the 4 pairs barely agree")  # random weights, and few pairs
    assert learned.err.count("\n") == 1
    assert [row["layer"] for row in learned.json["layers"]] == [0, 1, 2, 3]
    assert learned.json["digest"] == steering_digest(load_steering(out))

    seen = trimtab("inspect", out, "--json")
    assert (seen.code, seen.err) == (0, "")
    assert seen.json["digest"] == learned.json["digest"]
    assert seen.json["card"]["model"]["name"] == "tiny"
    assert [edit["norm"] for edit in seen.json["edits"]] == [row["norm"] for row in learned.json["layers"]]

    options = ("--prompt", "Früh?", "--prompt", "No.", "--steer", f"{out}:0.1", "--steer", f"{out}:-0.1")
    ran = cpu("generate --json --compare --max-new-tokens 6", *options)
    assert ran.code == 0
    assert [row["prompt"] for row in ran.json["answers"]] == ["Früh?", "No."]
    assert [row["strength"] for row in ran.json["steerings"]] == [0.1, -0.1]
    for row in ran.json["answers"]:
        assert row["text"] == row["unsteered"]["text"]  # the two cancel out
        assert row["dose"] < 1e-6
        assert row["new_tokens"] <= 6

    details = cpu("models --json").json
    assert (details["layers"], details["width"], details["blocks"]) == (4, 32, "model.layers")
    assert details["chat_template"] is True
    assert details["fingerprint"] == seen.json["card"]["model"]["fingerprint"]
    assert trimtab("models", "--json").json["default"]["name"] == "SmolLM2-135M-Instruct"
    assert {"caa", "instruct", "sadi", "iti", "tda"} <= set(trimtab("methods", "--json").json)


def test_learning_again_gives_the_same_bytes(cpu, prompt_pairs, tmp_path):
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for file in files:
        assert cpu("learn instruct", "--pairs", prompt_pairs, "--out", file).code == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_strength_zero_is_no_steering_and_a_strong_one_warns(cpu, steering):
    options = ("--prompt", "What is the sea?", "--max-new-tokens", 8, "--json")
    bare = cpu("generate", *options)
    assert bare.json["answers"][0]["edits"] == []
    zero = cpu("generate", *options, "--steer", f"{steering}:0")
    assert zero.json["answers"] == bare.json["answers"]
    strong = cpu("generate", *options, "--steer", f"{steering}:100")
    assert strong.json["answers"][0]["text"] != bare.json["answers"][0]["text"]
    assert strong.err.startswith("warning: at layer")
    assert strong.err.count("\n") == 1


def test_positions_replace_those_of_the_file(cpu, steering):
    options = ("--steer", f"{steering}:0.5", "--prompt", "What is the sea?", "--max-new-tokens", 3, "--json")
    for rule in ("all", "prompt", "first:2", "window:0:2", "span:0:3", "tokens:0,2,-2"):
        ran = cpu("generate", *options, "--positions", rule)
        edits = ran.json["answers"][0]["edits"]
        assert len(edits) == 2
        assert all(edit.endswith({"first:2": "window:0:2"}.get(rule, rule)) for edit in edits)


def test_prompts_from_files_and_standard_input(cpu, tmp_path, monkeypatch):
    import io

    lines, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_bytes("\ufeffWhy?\r\n\r\n  Früh?\r\n".encode())
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Who?"}]
    rows.write_text(json.dumps({"prompt": "Two\nlines", "id": 1}) + "\n" + json.dumps({"messages": messages}))

    def prompts_of(*arguments):
        ran = cpu("generate --json --max-new-tokens 2", *arguments)
        assert ran.code == 0, ran.err
        return [row.get("prompt") or row["messages"] for row in ran.json["answers"]]

    assert prompts_of("--prompts", lines) == ["Why?", "  Früh?"]
    assert prompts_of("--prompt", "first", "--prompts", rows) == ["first", "Two\nlines", messages]
    monkeypatch.setattr("sys.stdin", io.StringIO("One\nTwo\n"))
    assert prompts_of("--prompts", "-") == ["One", "Two"]
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "One"}\n'))
    assert prompts_of("--prompts", "-") == ["One"]


def test_system_plain_and_sampling_change_what_is_run(cpu, base, trimtab):
    def row(*arguments):
        ran = cpu("generate --json --max-new-tokens 12", "--prompt", "The sea", *arguments)
        assert ran.code == 0, ran.err
        return ran.json["answers"][0]

    chat = row()
    assert row("--plain")["prompt_tokens"] < chat["prompt_tokens"] < row("--system", "Be.")["prompt_tokens"]
    sampled = [row("--sample", "--temperature", "3", "--seed", seed)["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    plain = trimtab(
        "generate", "--model", base, "--device", "cpu", "--prompt", "The sea", "--max-new-tokens", 2, "--json"
    )
    assert plain.json["answers"][0]["prompt_tokens"] == row("--plain")["prompt_tokens"]


def test_transfer_must_be_allowed(trimtab, stranger, steering):
    arguments = ("generate", "--model", stranger, "--device", "cpu", "--steer", steering, "--prompt", "Why?")
    arguments += ("--max-new-tokens", 2)
    assert trimtab(*arguments).code == 2
    assert trimtab(*arguments, "--transfer").code == 0


def test_options_reach_the_model(trimtab, model):
    arguments = ("models", "--model", model, "--device", "cpu", "--json")
    assert trimtab(*arguments).json["dtype"] == "float32"
    other = trimtab(*arguments, "--dtype", "bf16", "--layers-path", "model.layers").json
    assert (other["dtype"], other["blocks"]) == ("bfloat16", "model.layers")


def test_a_picture(trimtab, steering, tmp_path):
    pytest.importorskip("matplotlib")
    assert trimtab("inspect", steering, "--plot", tmp_path / "s.png").code == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1


def test_a_picture_without_matplotlib(trimtab, steering, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    ran = trimtab("inspect", steering, "--plot", tmp_path / "s.png")
    assert (ran.code, ran.out) == (2, "")
    assert "pip install 'trimtab[plot]'" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_inspecting_a_sum_with_gates(trimtab, steering, tmp_path, monkeypatch):
    import torch

    from trimtab import Ablate, Edit, Site, Steering, Threshold, load, save

    gate = Threshold(Site(1), torch.ones(32), 0.5)
    unit = torch.nn.functional.normalize(torch.ones(32), dim=0)
    total = load(steering).when(gate & ~gate) + Steering((Edit(Site(0), Ablate(unit, keep_norm=True)),))
    save(total, tmp_path / "sum.safetensors")
    monkeypatch.setenv("COLUMNS", "160")
    ran = trimtab("inspect", tmp_path / "sum.safetensors")
    assert ran.code == 0
    for word in ("a sum of 2 steerings", "part 1: instruct on tiny", "part 2: manual", "ablate (norm kept)"):
        assert word in ran.out
    gates = [edit["gate"] for edit in trimtab("inspect", tmp_path / "sum.safetensors", "--json").json["edits"]]
    assert gates[1:] == ["(dot at residual[1] > 0.5 and not (dot at residual[1] > 0.5))", "always"]
    assert describe_gate(gate | gate) == "(dot at residual[1] > 0.5 or dot at residual[1] > 0.5)"


def test_bars():
    assert bar(8, 8, 4) == "████"
    assert bar(1, 8, 4) == "▌"
    assert bar(1e-9, 8, 4) == "▏"
    assert bar(0, 8, 4) == bar(0, 0, 4) == ""


def test_help_and_version(trimtab):
    assert trimtab("--version").out.startswith("trimtab ")
    assert "learn" in trimtab().out
    for command in ("learn", "generate", "inspect", "models", "methods"):
        shown = trimtab(command, "--help")
        assert shown.code == 0
        assert f"trimtab {command}" in shown.out  # an example
    for key in ("prompt_without_instruction", "positive", "answer_not_matching_behavior"):
        assert key in trimtab("learn", "--help").out


@pytest.mark.real
def test_the_default_model(lm, tmp_path, trimtab):
    from trimtab import learn_instruct, load, read_pairs, save

    asks = ["Name a fruit.", "What is the sea?", "Tell me about dogs.", "Who wrote Hamlet?", "How do I boil an egg?"]
    asks += ["Give me a tip for sleep.", "What is a tree?", "Describe the moon."]
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{a} Answer in capital letters only.", "prompt_without_instruction": a} for a in asks]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    save(learn_instruct(lm, read_pairs(pairs)), tmp_path / "s.safetensors")
    steering = load(tmp_path / "s.safetensors")
    bare, steered = (lm.generate("What is a cat?", s, max_new_tokens=12)[0] for s in (None, steering))
    assert bare.text != steered.text
    assert 0 < steered.applied.dose < 1
    assert steering.card.measured["pairs"] == 8
