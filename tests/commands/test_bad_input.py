"""Bad input: one line that names the input, the reason and the fix; exit code 2; nothing written; no waiting."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save

from trimtab.files import steering_file

GOOD = '{"positive": "a", "negative": "b"}\n'


@pytest.fixture
def refused(trimtab):
    """Run a command that must be refused, and see that the one line on stderr holds all `words`."""

    def run(arguments, *words):
        ran = trimtab(*arguments)
        assert ran.code == 2, (ran.out, ran.err)
        assert ran.out == ""
        assert ran.err.startswith("error: ")
        assert ran.err.count("\n") == 1
        for word in words:
            assert str(word) in ran.err
        return ran.err

    return run


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model would be a mistake: the error must come before."""

    def load(*_, **__):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr("trimtab.commands.model.load_model", load)


# ---- before a model is loaded ------------------------------------------------------------------------------

PAIRS = {
    "missing file": (None, ["there is no file"]),
    "malformed row": (GOOD + "{oops\n", [":2", "not JSON"]),
    "empty": ("", ["no pairs", "positive + negative"]),
    "one-sided": ('{"positive": "a"}\n', [":1", "'positive'", "not the rest"]),
    "one side empty": ('{"positive": "a", "negative": ""}\n', [":1", "'negative'", "both sides"]),
    "pairs of answers": (
        '{"prompt": "q", "positive": "a", "negative": "b"}\n',
        ["answers", "the method for these is", "caa"],
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_pairs(refused, no_model, tmp_path, case):
    content, words = PAIRS[case]
    pairs = tmp_path / "pairs.jsonl"
    if content is not None:
        pairs.write_text(content)
    refused(["learn", "instruct", "--pairs", pairs, "--out", tmp_path / "s.safetensors"], pairs, *words)
    assert not (tmp_path / "s.safetensors").exists()


def test_what_learning_is_asked_for(refused, no_model, prompt_pairs, tmp_path):
    def learn(method="instruct", out=tmp_path / "s.safetensors", *more):
        return ["learn", method, "--pairs", prompt_pairs, "--out", out, *more]

    refused(learn("caa"), prompt_pairs, "pairs of prompts", "is instruct")
    refused(learn("hope"), "'hope'", "caa, cap, cast", "instruct, iti")
    nowhere = tmp_path / "nowhere" / "s.safetensors"
    refused(learn(out=nowhere), nowhere, "No such file", "must exist and be writable")
    refused(learn(out=prompt_pairs / "s.safetensors"), "Not a directory", "must exist and be writable")
    refused(learn(out=tmp_path / "s.pt"), "s.pt", "*.safetensors")
    good = tmp_path / "s.safetensors"
    refused(learn("instruct", good, "--layers", "1,x"), "--layers '1,x'", "12,14,16")
    refused(learn("instruct", good, "--strength", "nan"), "finite", "nan")
    refused(learn("instruct", good, "--strength", "strong"), "--strength", "trimtab learn --help")
    refused(["learn", "instruct", "--out", good], "--pairs", "trimtab learn --help")
    refused(["learn", "distil"], "no method 'distil'; did you mean 'distill'? Methods: actadd, ")
    refused(["learn", "--out", good, "nothing"], "no method 'nothing'; methods: actadd, ")
    for method in ("distill", "probe"):  # whose options another command would read in its own way
        refused(["learn", "--out", good, method, "--instruction", "Be brief."], f"trimtab learn {method} …")
    assert [path.name for path in tmp_path.iterdir()] == [prompt_pairs.name]


@pytest.mark.skipif(sys.platform != "linux", reason="a place where nobody can create a file")
def test_an_unwritable_folder(refused, no_model, prompt_pairs):
    refused(
        ["learn", "instruct", "--pairs", prompt_pairs, "--out", "/proc/s.safetensors"],
        "/proc/s.safetensors",
        "writable",
    )


def test_what_generating_is_asked_for(refused, no_model, steering, tmp_path):
    def ask(*more):
        return ["generate", "--prompt", "Why?", *more]

    refused(["generate"], "no prompt", "--prompt TEXT")
    refused(["generate", "--prompt", " "], "--prompt is empty")
    refused(ask("--steer", "nowhere.safetensors:2"), "no file nowhere.safetensors")
    for strength in ("nan", "inf", "-inf"):
        refused(ask("--steer", f"{steering}:{strength}"), steering, "finite number", strength)
    refused(ask("--steer", f"{steering}:strong"), "'strong' isn't a number")
    refused(ask("--steer", steering, "--positions", "everywhere"), "'everywhere'", "from-last-prompt-token", "span:A:B")
    refused(ask("--steer", steering, "--positions", "span:5:2"), "'span:5:2'")
    refused(ask("--positions", "all"), "--positions", "--steer")
    refused(ask("--compare"), "--compare", "--steer")
    refused(ask("--temperature", "1"), "--temperature", "--sample")
    refused(ask("--sample", "--temperature", "0"), "--temperature", "above 0")
    refused(ask("--max-new-tokens", "0"), "--max-new-tokens", "trimtab generate --help")
    refused(ask("--max-tokens", "0"), "--max-tokens", "trimtab generate --help")  # as chat and serve call it
    refused(["chat", "--max-new-tokens", "0"], "--max-new-tokens", "trimtab chat --help")
    refused(["generat"], "generat")


PROMPTS = {
    "missing": ("p.txt", None, ["no file"]),
    "empty": ("p.txt", " \n\n", ["no prompts"]),
    "not UTF-8": ("p.txt", b"\xe9", ["UTF-8"]),
    "malformed": ("p.jsonl", '{"prompt": "a"}\nb\n', [":2", "not JSON"]),
    "other keys": ("p.jsonl", '{"ask": "a"}\n', [":1", "it has 'ask'", "--column"]),
    "two keys": ("p.jsonl", '{"question": "a", "instruction": "b"}\n', [":1", "could each", "--column question"]),
    "a context": ("p.json", '[{"question": "a", "context": "b"}]', ["item 1", "'question' and 'context' could each"]),
    "no header": ("p.csv", "What is rain?\nIs it, so?\n", [":2", "1 column expected"]),
    "header of others": ("p.csv", "ask,id\nWhat?,1\n", [":2", "no prompt", "'ask', 'id'"]),
    "an empty cell": ("p.csv", "prompt,id\n,1\n", [":2", "empty"]),
    "not JSON": ("p.json", "[", ["not JSON"]),
    "two system prompts": (
        "p.jsonl",
        '{"system": "x", "messages": [{"role": "system", "content": "y"}]}\n',
        [":1", "system prompt is given twice"],
    ),
    "number": ("p.jsonl", '{"prompt": 1}\n', [":1", "not text"]),
    "no messages": ("p.jsonl", '{"messages": []}\n', [":1", "role"]),
    "no content": ("p.jsonl", '{"messages": [{"role": "user"}]}\n', [":1", "content"]),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(refused, no_model, tmp_path, case):
    name, content, words = PROMPTS[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(["generate", "--prompts", path], path, *words)


def test_columns_of_prompts(refused, no_model, tmp_path):
    table, lines = tmp_path / "p.csv", tmp_path / "p.txt"
    table.write_text("ask,id\nWhat?,1\n")
    lines.write_text("What?\n")
    refused(["generate", "--prompts", table, "--column", "prompt"], table, "no column 'prompt'", "'ask', 'id'")
    refused(["generate", "--prompts", lines, "--column", "prompt"], lines, "one prompt per line", "leave --column out")
    refused(["generate", "--prompt", "Hi", "--column", "prompt"], "--column", "there is none")


def test_messages_are_no_plain_text(refused, no_model, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    refused(["generate", "--plain", "--prompts", path], "--plain")
    path.write_text('{"system": "Be.", "prompt": "a"}\n')
    refused(["generate", "--system", "Be kind.", "--prompts", path], "--system", "prompts already have one")


# ---- steering files ----------------------------------------------------------------------------------------


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def damage(how, path, good, tmp_path):
    """Write to `path` a damaged copy of the steering file `good`."""
    data = good.read_bytes()
    if how == "truncated":
        path.write_bytes(data[:-5])
    elif how == "tampered":
        path.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif how == "pickle":
        path.write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    elif how == "torch pickle":
        torch.save(Trap(tmp_path / "sprung"), path)
    elif how == "foreign":
        path.write_bytes(save({"x": torch.ones(3), "y": torch.ones(3)}))
    elif how == "NaN":
        tensors = load_file(good)
        tensors["direction.1"][3] = float("nan")
        header = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["trimtab"])
        header["digest"] = steering_file._digest(header, tensors)
        path.write_bytes(save(tensors, metadata={"trimtab": json.dumps(header)}))


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("truncated", "fresh copy"),
        ("tampered", "altered"),
        ("pickle", "never opens"),
        ("torch pickle", "its pickle needs io.open"),
        ("foreign", "isn't a trimtab steering"),
        ("NaN", "NaN"),
    ],
)
def test_damaged_files(refused, no_model, steering, tmp_path, how, word):
    path = tmp_path / "bad.safetensors"
    damage(how, path, steering, tmp_path)
    for arguments in (["inspect", path], ["generate", "--prompt", "Why?", "--steer", path], ["chat", "--steer", path]):
        refused(arguments, path, word)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.safetensors"]


def test_inspecting(refused, steering, tmp_path):
    refused(["inspect", tmp_path / "s.safetensors"], "no file")
    refused(["inspect", steering, "--plot", tmp_path / "s.jpg"], "s.jpg", "*.png")
    refused(["inspect", steering, "--plot", tmp_path / "nowhere" / "s.png"], "must exist")
    assert list(tmp_path.iterdir()) == []


# ---- what only the model can tell --------------------------------------------------------------------------


def test_models(refused, trimtab, model, tmp_path):
    refused(["models", "--model", "nobody/nothing", "--device", "cpu"], "nobody/nothing", "Hub id")
    refused(["models", "--model", tmp_path], tmp_path, "config.json")
    refused(["models", "--model", tmp_path / "m.gguf"], "m.gguf")
    refused(["models", "--model", model, "--dtype", "float7"], "'float7'", "bfloat16")
    refused(["models", "--model", model, "--device", "abacus"], "--device abacus", "cpu")
    refused(["models", "--model", model, "--layers-path", "model.rungs"], "model.rungs", "model.layers (4)")
    error = refused(["models", "--model", model, "--layers-path", "model.norm"], "not a list of blocks")
    assert "model.layers (4)" in error


def test_what_does_not_fit_the_model(refused, model, wide, stranger, base, steering):
    def ask(model, *more, prompt="Why?"):
        return ["generate", "--model", model, "--device", "cpu", "--prompt", prompt, "--max-new-tokens", 2, *more]

    refused(ask(wide, "--steer", steering), "learned on tiny", "this is wide", "width 32 instead of 48")
    refused(ask(wide, "--steer", steering, "--transfer"), "width 32 instead of 48")
    refused(ask(stranger, "--steer", steering), "this is stranger", "different weights", "transfer")
    refused(ask(model, "--steer", steering, "--positions", "span:900:901"), "span 900:901", "not in the prompt")
    refused(ask(model, "--steer", steering, "--positions", "tokens:0,900"), "token 900", "not in the prompt")
    refused(ask(model, "--steer", steering, "--positions", "tokens:0,-900"), "token -900", "not in the prompt")
    refused(ask(model, prompt="word " * 200), "prompt 1", "128")
    refused(ask(model, "--max-new-tokens", 1000), "1000", "at most")
    refused(ask(base, "--system", "Be."), "chat template")


def test_layers_that_the_model_does_not_have(refused, model, prompt_pairs, tmp_path):
    out = tmp_path / "s.safetensors"
    options = ["learn", "instruct", "--model", model, "--device", "cpu", "--pairs", prompt_pairs, "--out", out]
    refused([*options, "--layers", "9"], "no layer 9", "0 to 3")
    refused([*options, "--layers", "-1"], "no layer -1")
    assert not out.exists()


# ---- what is no bad input ----------------------------------------------------------------------------------


def test_a_failure_is_one_line_and_exit_1(trimtab, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("the GPU\nis on fire")

    monkeypatch.setattr("trimtab.commands.model.load_model", fail)
    ran = trimtab("generate", "--prompt", "Why?")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("error: RuntimeError: the GPU is on fire")
    assert ran.err.count("\n") == 1
    monkeypatch.setenv("TRIMTAB_TRACEBACK", "1")
    with pytest.raises(RuntimeError):
        trimtab("generate", "--prompt", "Why?")


@pytest.mark.slow
def test_ctrl_c_while_learning(model, tmp_path):
    out = tmp_path / "s.safetensors"
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"positive": f"a {i}" + " sea" * 60, "negative": f"b {i}" + " sea" * 60} for i in range(300)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.write_bytes(b"old")
    ready = tmp_path / "ready"
    program = f"""  # runs the command line; tells when learning has begun, and takes its time
import pathlib, signal, sys, time, trimtab.learn.contrast as c, trimtab.methods.caa as m, trimtab.commands
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may have switched it off
def slow(*given, progress=None, **rest):
    def told(done, total):
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(1)
    return c.contrast_many(*given, progress=told, **rest)
m.contrast_many = slow
sys.exit(trimtab.commands.main(sys.argv[1:]))
"""
    arguments = ["learn", "caa", "--model", model, "--device", "cpu", "--pairs", pairs, "--out", out]
    command = [sys.executable, "-c", program, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not ready.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, err = process.communicate(timeout=300)
    assert (process.returncode, printed, err) == (130, "", "interrupted\n")
    assert out.read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"s.safetensors", "pairs.jsonl", "ready"}


@pytest.mark.slow
def test_a_real_process(tmp_path, model):
    """The exit code and the streams, as a shell sees them."""
    command = [sys.executable, "-m", "trimtab", "generate", "--model", str(model), "--prompt", "Why?", "--json"]
    ran = subprocess.run([*command, "--max-new-tokens", "3"], capture_output=True, env={**os.environ, "LC_ALL": "C"})
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert json.loads(ran.stdout)["answers"][0]["prompt"] == "Why?"
    ran = subprocess.run([*command, "--steer", "none.safetensors"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: --steer none.safetensors: there is no file none.safetensors\n"


def test_help_imports_nothing_heavy():
    program = (
        "import sys, trimtab, trimtab.commands; assert trimtab.commands.main(['--help']) == 0;"
        " print({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "set()\n")


def test_the_public_names():
    import trimtab

    for name in trimtab.__all__:
        assert getattr(trimtab, name).__module__.startswith("trimtab.")
    assert set(trimtab.__all__) == set(trimtab._PUBLIC) <= set(dir(trimtab))
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = trimtab.nothing_of_the_kind


def test_a_harness_that_isnt_installed(refused, monkeypatch):
    for name in ("lm_eval", "lm_eval.api.registry", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "trimtab.evaluate.harness", raising=False)
    refused(["eval", "lm-eval", "--tasks", "hellaswag"], "pip install 'trimtab[lm-eval]'")
