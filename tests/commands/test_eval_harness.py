"""EleutherAI's harness, steered: against its own `hf`, and against the textbook, on tasks with local data."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import naive_generate, naive_logits

from trimtab import Add, Edit, Positions, Site, Steering, TrimtabError, load, save
from trimtab.engines.transformers.next_token import Choice
from trimtab.errors import UnsupportedError
from trimtab.steering import MaskNeurons, ScaleScores
from trimtab.steering.gates import Threshold

lm_eval = pytest.importorskip("lm_eval", reason="needs trimtab[lm-eval]")

from trimtab.evaluate.harness import SteeredHFLM  # noqa: E402 (after the skip)

pytestmark = pytest.mark.slow

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: [" yes", " no", " yes yes, it is"]
doc_to_target: label
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
GENERATED = """
task: local_generated
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
TASKS = {"local_choice": CHOICE, "local_rolling": ROLLING, "local_generated": GENERATED}
QUESTIONS = ["Is the sea wide?", "A question, an answer: is it blue? Write", "Is it?", "The sea is", "user (A)", "Why"]


@pytest.fixture
def tasks(tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": q, "label": n % 3, "answer": "yes"} for n, q in enumerate(QUESTIONS)]
    file = tmp_path / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text.format(file=file, cache=tmp_path / "cache"))
    return folder


@pytest.fixture
def steered(model, steering):
    """The class on the tiny model, in float64, under a file; `options` are its arguments."""

    def make(steer=f"{steering}:3", **options):
        settings = {"dtype": "float64", "device": "cpu", "batch_size": 3, **options}
        return SteeredHFLM(str(model), steer, **settings)

    return make


def run(tasks, kind, arguments, batch_size):
    evaluated = lm_eval.simple_evaluate(
        kind,
        model_args=arguments,
        tasks=list(TASKS),
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False),
        batch_size=batch_size,
        device="cpu",
        bootstrap_iters=0,
    )
    answers = {task: [sample["resps"] for sample in evaluated["samples"][task]] for task in TASKS}
    return evaluated["results"], answers


def close(value, other):
    """The same answers: texts and yes or no exactly, log-probabilities but for rounding."""
    if isinstance(value, (list, tuple)):
        return len(value) == len(other) and all(close(a, b) for a, b in zip(value, other, strict=True))
    return value == pytest.approx(other, abs=1e-9) if isinstance(value, float) else value == other


@pytest.mark.slow
@pytest.mark.long
def test_unsteered_it_is_the_harness_s_own_class(tasks, model, steering):
    arguments = f"pretrained={model},dtype=float64"
    results, answers = run(tasks, "hf", arguments, 3)
    assert {len(of) for of in answers.values()} == {len(QUESTIONS)}
    same, plain = run(tasks, "trimtab", arguments, 3)
    assert plain == answers
    assert same == results
    # strength 0 goes through everything that steering goes through, in batches of another size
    same, nothing = run(tasks, "trimtab", f"{arguments},steer={steering}:0", 4)
    assert close(nothing, answers)
    _, other = run(tasks, "trimtab", f"{arguments},steer={steering}:3", 4)
    for task in TASKS:
        assert not close(other[task], answers[task])


def requests_of(lm):
    """Contexts of different lengths; continuations of one token (two after the same context) and of several."""
    encode = lm.tok_encode
    contexts = [encode(q) for q in QUESTIONS]
    requests = [(("q", str(i)), context, encode(" yes, it")) for i, context in enumerate(contexts)]
    requests += [(("one", str(i)), context, [token]) for i, context in enumerate(contexts[:3]) for token in (40, 41)]
    # the same text, divided elsewhere: another prompt, and so another steering
    requests += [(("cut", "0"), contexts[0][:-1], [contexts[0][-1], *encode(" yes, it")])]
    return requests


@pytest.fixture
def added(tmp_path):
    """A file that adds, from the last prompt token on."""
    vector = torch.randn(32, generator=torch.Generator().manual_seed(4))
    save(Steering((Edit(Site(1), Add(vector), Positions.from_last_prompt_token()),)), tmp_path / "added.safetensors")
    return tmp_path / "added.safetensors"


@pytest.mark.parametrize("rule", ["from_last_prompt_token", "prompt", "generated", "all"])
def test_log_likelihoods_are_those_of_the_textbook(steered, tmp_path, model, rule):
    file = tmp_path / "rule.safetensors"
    positions = getattr(Positions, rule)()
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    save(Steering((Edit(Site(1), Add(vector), positions), Edit(Site(2), Add(-vector), positions))), file)
    lm = steered(f"{file}:2")
    edits = (2.0 * load(file)).edits
    requests = requests_of(lm)
    results = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    for (_, context, continuation), (logprob, greedy) in zip(requests, results, strict=True):
        ids = [*context, *continuation]
        logprobs = naive_logits(lm.lm, ids, len(context), edits).log_softmax(-1)[len(context) - 1 : -1]
        assert logprob == pytest.approx(float(sum(x[t] for x, t in zip(logprobs, continuation, strict=True))), abs=1e-9)
        assert greedy == (logprobs.argmax(-1).tolist() == continuation)


def test_what_is_greedy_is_known(steered, steering):
    lm = steered()
    ids = lm.tok_encode(QUESTIONS[0])
    best = []
    for _ in range(3):
        best.append(int(naive_logits(lm.lm, [*ids, *best], len(ids), (3.0 * load(steering)).edits)[-1].argmax()))
    worse = [*best[:2], (best[2] + 1) % 300]
    results = lm._loglikelihood_tokens([(None, ids, best), (None, ids, worse)], disable_tqdm=True)
    assert [greedy for _, greedy in results] == [True, False]


def test_a_gate_reads_the_context(steered, tmp_path):
    lm = steered(None)
    contexts = [lm.tok_encode(q) for q in QUESTIONS]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    reads = [lm.lm.capture(q, [1], chat=False)[0][Site(1)][-1] for q in QUESTIONS]
    heights = [float(x.double() @ direction.double()) for x in reads]
    middle = sorted(heights)[2] + 1e-6
    gate = Threshold(Site(1), direction, middle * 1.0)
    open_for = [gate.is_open({gate.reading: x}) for x in reads]
    assert {True, False} == set(open_for)
    file = tmp_path / "gated.safetensors"
    save(Steering((Edit(Site(2), Add(20 * direction), gate=gate),)), file)
    requests = [(None, context, lm.tok_encode(" yes, it")) for context in contexts]
    plain = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    gated = steered(str(file))._loglikelihood_tokens(requests, disable_tqdm=True)
    for ungated, with_gate, opened in zip(plain, gated, open_for, strict=True):
        assert (ungated[0] == pytest.approx(with_gate[0], abs=1e-9)) is not opened


@pytest.mark.parametrize("kind", ["each token", "mask"])
def test_what_is_decided_at_tokens_or_by_the_prompt_is_decided_here_too(steered, tmp_path, kind):
    lm = steered(None)
    context, continuation = lm.tok_encode(QUESTIONS[0]), lm.tok_encode(" yes, it")
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    (read,) = lm.lm.capture(QUESTIONS[0], [2], Positions.all(), chat=False)
    middle = float((read[Site(2)].double() @ direction.double()).median())
    gate = Threshold(Site(2), direction, middle, each_token=True)
    (neurons,) = lm.lm.capture(QUESTIONS[0], [Site(1, "neurons")], Positions.all(), chat=False)
    sizes = neurons[Site(1, "neurons")][1:].abs().amax(0).float()
    edit = {
        "each token": Edit(Site(2), Add(20 * direction), Positions.all(), gate=gate),
        "mask": Edit(Site(1, "neurons"), MaskNeurons(sizes.median().expand_as(sizes)), Positions.generated()),
    }[kind]
    file = tmp_path / "steering.safetensors"
    save(Steering((edit,)), file)
    whole = [*context, *continuation]
    choices = [Choice(whole[:n], len(context), (whole[n],)) for n in range(len(context), len(whole))]
    expected = sum(likelihood.logprobs[0] for likelihood in lm.lm.next_logprobs(choices, load(file)))
    requests = [(None, context, continuation)]
    results = [steered(path)._loglikelihood_tokens(requests, disable_tqdm=True)[0][0] for path in (str(file), None)]
    assert results[0] == pytest.approx(expected, abs=1e-6)
    assert results[1] != pytest.approx(expected, abs=1e-6)
    if kind == "each token":
        ungated = lm.lm.next_logprobs(choices, Steering((Edit(Site(2), Add(20 * direction), Positions.all()),)))
        assert results[0] != pytest.approx(sum(likelihood.logprobs[0] for likelihood in ungated), abs=1e-6)


def test_long_texts_are_read_in_windows(steered, added):
    lm = steered(f"{added}:2", max_length=8)
    text = "The sea is wide and blue. Write in capitals! A question, an answer"
    ids = lm.tok_encode(text)
    assert len(ids) > 16
    assert len(ids) % 8
    (total,) = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))], disable_tqdm=True)
    edits = (2.0 * load(added)).edits
    windows = [(lm.prefix_token_id, ids[:8])]
    windows += [(ids[at - 1], ids[at : at + 8]) for at in range(8, len(ids), 8)]
    last = len(ids) % 8
    expected = 0.0
    for n, (before, window) in enumerate(windows):
        whole = [before, *window]
        start = 1
        if n == len(windows) - 1:  # the last window is filled up from the left
            whole, start = ids[-9:], 9 - last
        logprobs = naive_logits(lm.lm, whole, start, edits).log_softmax(-1)
        expected += float(sum(logprobs[i - 1][whole[i]] for i in range(start, len(whole))))
    assert total == pytest.approx(expected, abs=1e-8)


def test_generated_is_what_the_textbook_generates(steered, steering):
    lm = steered()
    options = {"until": [], "max_gen_toks": 5}
    requests = [SimpleNamespace(args=(q, options)) for q in QUESTIONS]
    texts = lm.generate_until(requests, disable_tqdm=True)
    lm.lm.model.generation_config.eos_token_id = None
    for question, text in zip(QUESTIONS, texts, strict=True):
        ids, _ = naive_generate_ids(lm, question, 3.0 * load(steering), 5)
        ids = ids[: ids.index(0)] if 0 in ids else ids
        assert text == lm.tok_decode(ids)


def naive_generate_ids(lm, text, steering, count):
    encode = lm.lm.encode
    lm.lm.encode = lambda prompt: encode(prompt, chat=False)
    try:
        return naive_generate(lm.lm, text, steering, count)
    finally:
        lm.lm.encode = encode


@pytest.mark.smoke
def test_the_command(trimtab, tasks, model, steering, tmp_path):
    options = ["--model_args", f"pretrained={model},steer={steering}:3,dtype=float64", "--device", "cpu"]
    options += [
        "--tasks",
        "local_choice",
        "--include_path",
        tasks,
        "--batch_size",
        4,
        "--output_path",
        tmp_path / "out",
    ]
    ran = trimtab("eval", "lm-eval", *options)
    assert ran.code == 0
    assert "local_choice" in ran.out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    document = json.loads(file.read_text())
    assert document["config"]["model"] == "trimtab"
    assert document["config"]["steer"] == f"{steering}:3"
    assert len(document["config"]["steering"]) >= 16
    assert 0 <= document["results"]["local_choice"]["acc,none"] <= 1
    assert "steer=FILE" in trimtab("eval", "lm-eval", "--help").out


def test_bad_input(steered, steering, stranger, tmp_path):
    with pytest.raises(TrimtabError, match=r"none\.safetensors"):
        steered(str(tmp_path / "none.safetensors"))
    with pytest.raises(TrimtabError, match="'much' isn't a number"):
        steered(f"{steering}:much")
    with pytest.raises(TrimtabError, match="fixed batch size"):
        steered(batch_size="auto")
    file = tmp_path / "wide.safetensors"
    save(Steering((Edit(Site(1), Add(torch.ones(48))),)), file)
    with pytest.raises(TrimtabError, match="48"):
        steered(str(file))
    save(Steering((Edit(Site(1, "scores"), ScaleScores(), Positions.prompt()),)), file)
    with pytest.raises(UnsupportedError, match="attention scores"):
        steered(str(file))
    with pytest.raises(TrimtabError, match="0 tokens"):
        steered()._loglikelihood_tokens([(None, [1, 2], [])], disable_tqdm=True)
