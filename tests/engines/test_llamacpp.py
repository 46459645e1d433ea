"""The engine llamacpp against transformers, on the same tiny model in both programs' files."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands.conftest import save_model
from gguf_models import write_llama

from trimtab import (
    LM,
    Add,
    Card,
    DoseWarning,
    Edit,
    MismatchWarning,
    Phrase,
    Positions,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
    learn_bipo,
    learn_caa,
    learn_iti,
)
from trimtab.engines.llamacpp.context import Context
from trimtab.engines.request import AnsweredPrompt, Choice
from trimtab.report.tokens import token_cosines

if importlib.util.find_spec("xllamacpp") is None:
    pytest.skip("needs trimtab[llamacpp]", allow_module_level=True)

WIDTH, LAYERS = 32, 4
PROMPTS = ["What is the sea?", "Who are you? A question, an answer; (A) yes (B) no.", "Why?", "Is it blue or wide?"]
RULES = {
    "all": Positions.all(),
    "all but the first": Positions.all_but_first(),
    "prompt": Positions.prompt(),
    "generated": Positions.generated(),
    "from the last prompt token": Positions.from_last_prompt_token(),
    "last prompt token": Positions.last_prompt_token(),
    "opening": Positions.opening(3),
    "window": Positions.window(1, 4),
    "span": Positions.span(1, 3),
    "tokens": Positions.tokens([2, 0, -2]),
    "two": Positions.span(2, 4) | Positions.window(2, 3),
    "thinking": Positions.thinking("e", "s"),
    "answer or the prompt": Positions.answer("e", "s") | Positions.prompt(),
    "after and not at": Positions.after(" ") & ~Positions.at("e") | Positions.at("t"),
}
NEW = 8


def vector(seed: int, scale: float = 1.5) -> torch.Tensor:
    made = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return scale * made / made.norm()


def adding(*layers: int, positions: Positions = RULES["all"], strength: float = 1.0) -> Steering:
    return Steering(tuple(Edit(Site(i), Add(vector(i)), positions, strength) for i in layers))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def lm(folder: Path) -> LM:
    return LM.load(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def file(folder: Path) -> Path:
    return write_llama(folder, folder.parent / "tiny.gguf")


@pytest.fixture(scope="module")
def llama(file: Path) -> Iterator[Any]:
    made = LM.load(file, engine="llamacpp", cache="float32", threads=1)
    yield made
    made.close()


def agree(theirs: list, ours: list) -> None:
    """The same tokens, and their log-probabilities to what float32 sums in another order allow."""
    for a, b in zip(theirs, ours, strict=True):
        assert a.token_ids == b.token_ids
        assert a.text == b.text
        assert (a.finish_reason, a.prompt_tokens) == (b.finish_reason, b.prompt_tokens)
        assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)


def test_it_is_another_class_with_the_same_tokens(lm, llama):
    assert type(llama).__name__ == "LlamaCpp"
    assert repr(llama) == "LlamaCpp(tiny, 4 layers, width 32)"
    for prompt in (*PROMPTS, [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]):
        assert llama.encode(prompt) == lm.encode(prompt)
    assert llama.encode("sea ü €", chat=False) == lm.encode("sea ü €", chat=False)
    assert llama.encode("Why?", system="Write!") == lm.encode("Why?", system="Write!")
    ids = lm.encode("the sea ü €", chat=False)
    assert llama.tokenizer.decode(ids) == lm.tokenizer.decode(ids) == "the sea ü €"


def test_it_has_the_same_identity(lm, llama):
    ours, theirs = llama.identity, lm.identity
    assert (ours.fingerprint, ours.family, ours.width, ours.layers, ours.template, ours.name) == (
        theirs.fingerprint,
        "llama",
        WIDTH,
        LAYERS,
        theirs.template,
        "tiny",
    )


def test_unsteered_it_answers_alike(lm, llama):
    agree(
        llama.generate(PROMPTS, max_new_tokens=NEW, logprobs=True),
        lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True),
    )


@pytest.mark.parametrize("rule", RULES)
def test_steered_it_answers_alike(lm, llama, rule):
    """Two blocks and a negative strength, at every kind of positions: the control vector changes between tokens."""
    steering = adding(1, 3, positions=RULES[rule]) + adding(2, positions=Positions.generated(), strength=-0.8)
    ours = llama.generate(PROMPTS, steering, max_new_tokens=NEW, logprobs=True)
    agree(ours, lm.generate(PROMPTS, steering, max_new_tokens=NEW, logprobs=True))
    assert [a.applied.edits for a in ours] == [tuple(str(edit) for edit in steering.edits)] * len(PROMPTS)
    plain = llama.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
    assert any(a.logprobs != b.logprobs for a, b in zip(ours, plain, strict=True))


def test_tokens_are_told_as_they_come_and_an_answer_can_be_ended(llama):
    pieces: list[list[int]] = []

    class Streamer:
        def put(self, ids: torch.Tensor) -> None:
            pieces.append(ids.flatten().tolist())

        def end(self) -> None:
            pieces.append([])

    def third(ids: torch.Tensor, _scores: None) -> torch.Tensor:
        return torch.tensor([ids.shape[1] == len(llama.encode(PROMPTS[0])) + 3])

    (whole,) = llama.generate(PROMPTS[0], adding(1), max_new_tokens=NEW, streamer=Streamer())
    assert pieces == [llama.encode(PROMPTS[0]), *([token] for token in whole.token_ids), []]
    (ended,) = llama.generate(PROMPTS[0], adding(1), max_new_tokens=NEW, stopping_criteria=[third])
    assert ended.token_ids == whole.token_ids[:3]
    with pytest.raises(TrimtabError, match="one prompt at a time"):
        llama.generate(PROMPTS[:2], streamer=Streamer())


def test_an_answer_comes_in_pieces(llama):
    (whole,) = llama.generate(PROMPTS[0], adding(1), max_new_tokens=NEW)
    stream = llama.stream(PROMPTS[0], adding(1), max_new_tokens=NEW)
    assert "".join(stream) == whole.text
    assert stream.result == whole
    left = llama.stream(PROMPTS[0], adding(2, strength=3.0), max_new_tokens=100)
    for _ in left:
        break
    assert repr(left) == "Stream(stopped)"
    assert llama.generate(PROMPTS[0], adding(1), max_new_tokens=NEW) == [whole]
    with pytest.raises(UnsupportedError, match="the llamacpp engine doesn't support emphasis"):
        llama.stream(PROMPTS[0], emphasize="sea")
    with pytest.raises(TrimtabError, match="answers one prompt, got 4"):
        llama.stream(PROMPTS)


@pytest.mark.parametrize("pairs", [[("Why?", "So."), ("the sea", "a sea")], [("Why?", "So.", "the sea")]])
def test_it_learns_alike(lm, llama, pairs):
    ours, theirs = (learn_caa(model, pairs, range(LAYERS)) for model in (llama, lm))
    assert ours.card.data == theirs.card.data
    for mine, other in zip(ours.edits, theirs.edits, strict=True):
        v, w = mine.operation.direction, other.operation.direction
        assert (mine.site, mine.positions) == (other.site, other.positions)
        assert torch.cosine_similarity(v, w, dim=0) >= 0.9999


def test_next_tokens_are_as_likely(lm, llama):
    """Positions count from the prompt, also where some of the answer is there already."""
    choices, steerings = [], []
    for rule in ("all", "generated", "last-prompt-token"):
        for prompt in PROMPTS[:2]:
            ids = lm.encode(prompt)
            choices += [Choice([*ids, *ids[:beyond]], len(ids), (3, 4)) for beyond in (0, 2)]
            steerings += 2 * [adding(1, 3, positions=Positions.parse(rule))]
    ours, theirs = (model.next_logprobs(choices, steerings) for model in (llama, lm))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.logprobs == pytest.approx(other.logprobs, abs=2e-4)
        assert mine.applied.edits == other.applied.edits


def answered(lm: LM) -> list[AnsweredPrompt]:
    answers = lm.generate(PROMPTS, max_new_tokens=NEW)
    return [AnsweredPrompt(tuple(lm.encode(p)), a.token_ids) for p, a in zip(PROMPTS, answers, strict=True)]


@pytest.mark.parametrize("rule", RULES)
def test_the_probabilities_of_all_tokens_in_given_answers_agree(lm, llama, rule):
    """Each text under its own steering, including one that acts at the last block, and none."""
    texts = answered(lm)
    steering = adding(1, 3, positions=RULES[rule]) + adding(2, positions=Positions.generated(), strength=-0.8)
    steerings = [steering, None, -1 * steering, steering]
    ours, theirs = (model.answer_logits(texts, steerings) for model in (llama, lm))
    for text, mine, other in zip(texts, ours, theirs, strict=True):
        assert mine.shape == other.shape == (len(text.answer), len(lm.tokenizer))
        torch.testing.assert_close(mine.double().log_softmax(-1), other.double().log_softmax(-1), atol=2e-4, rtol=0)


def test_long_texts_are_read_in_parts(lm, llama, monkeypatch):
    texts, steering = answered(lm), adding(1, 3, positions=Positions.generated())
    whole = llama.answer_logits(texts, steering)
    monkeypatch.setattr(llama._cached_context, "batch", 3)
    for part, logits in zip(llama.answer_logits(texts, steering), whole, strict=True):
        torch.testing.assert_close(part, logits, atol=1e-4, rtol=0)


def test_divergences_and_perplexities_agree(lm, llama):
    steering = adding(1, 3)
    ours, theirs = (model.divergence(steering, PROMPTS, tokens=NEW) for model in (llama, lm))
    assert ours.mean > 0.01
    assert ours.nats == tuple(pytest.approx(row, rel=5e-3, abs=1e-5) for row in theirs.nats)
    assert llama.divergence(None, PROMPTS, tokens=2).p95 == 0
    texts = [(text.prompt, text.answer) for text in answered(lm)]
    assert llama.answer_nlls(texts) == pytest.approx(lm.answer_nlls(texts), abs=2e-4)
    swept = [model.sweep(steering, strengths=[1], prompts=PROMPTS, max_new_tokens=4) for model in (llama, lm)]
    assert swept[0].rows[0].perplexity == pytest.approx(swept[1].rows[0].perplexity, rel=1e-3)


def test_answers_that_cannot_be_read_say_why(llama):
    for texts, steering, why in (
        ([AnsweredPrompt((3,), ())], None, "text 1 has no answer to read"),
        ([AnsweredPrompt((3,), (4,) * 128)], None, "text 1 has 129 tokens, the model's context is 128"),
        ([AnsweredPrompt((3,), (4,))], [None, None], "2 steerings for 1 texts"),
        ([AnsweredPrompt((3,), (4,))], adding(1, positions=Positions.span(5, 9)), "which has"),
    ):
        with pytest.raises(TrimtabError, match=why):
            llama.answer_logits(texts, steering)


def test_what_it_hasnt_is_said_before_anything_runs(llama):
    with pytest.raises(UnsupportedError, match=r"support rejection .*; the transformers engine can"):
        llama.generate("Why?", rejection=True)
    with pytest.raises(UnsupportedError, match=r"learning with gradients .* what is learned there runs on this"):
        learn_bipo(llama, [("Why?", "So.", "the sea")])
    with pytest.raises(UnsupportedError, match=r"outputs only, not .*heads.*; the transformers engine can"):
        learn_iti(llama, [("Why?", "So.", "the sea"), ("When?", "Now.", "Never.")])
    assert llama.supports(adding(1), "streaming") is None
    assert "no gates" in llama.supports(adding(1).when(Threshold(Site(1), vector(1), 0.5)))
    with pytest.raises(TrimtabError, match="no feature 'speed'; features: emphasis"):
        llama.supports(None, "speed")


def test_how_tokens_lie_along_a_direction(lm, llama):
    ours, theirs = (token_cosines(model, adding(1, 3), "the sea ü") for model in (llama, lm))
    assert [cosines.layer for cosines in ours] == [1, 3]
    shown = llama.project("the sea", adding(1, 3))
    assert shown.cosines[3] == pytest.approx(lm.project("the sea", adding(1, 3)).cosines[3], abs=1e-4)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.cosines == pytest.approx(other.cosines, abs=1e-4)


def test_each_prompt_under_its_own(llama):
    """What runs before a prompt, and how, changes nothing about it: to the bit."""
    steerings = [adding(1), None, adding(2, strength=-1.0), adding(1, 3, positions=RULES["generated"])]
    together = llama.generate(PROMPTS, steerings, max_new_tokens=NEW, logprobs=True)
    for i in (3, 1, 0, 2):
        assert llama.generate(PROMPTS[i], steerings[i], max_new_tokens=NEW, logprobs=True) == [together[i]]


@pytest.mark.parametrize(
    "nothing", [None, Steering(), adding(1, 2, strength=0.0), Steering((Edit(Site(0), Add(vector(0)), strength=0.0),))]
)
def test_nothing_means_nothing(llama, nothing):
    plain = llama.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
    llama.generate(PROMPTS[0], adding(1), max_new_tokens=2)
    answers = llama.generate(PROMPTS, nothing, max_new_tokens=NEW, logprobs=True)
    for a, b in zip(answers, plain, strict=True):
        assert (a.token_ids, a.logprobs, a.applied.doses) == (b.token_ids, b.logprobs, ())


def test_activations_agree(lm, llama):
    """Before, at and after the steered block; the edit moves the block's output by itself."""
    steering = adding(2)
    everywhere = Positions.all()
    ours = llama.capture(PROMPTS, range(LAYERS), everywhere, steering=steering)
    with lm.steered(steering):
        theirs = lm.capture(PROMPTS, range(LAYERS), everywhere)
    plain = llama.capture(PROMPTS, [1, 2], everywhere)
    for a, b, c in zip(ours, theirs, plain, strict=True):
        for layer in range(LAYERS):
            assert torch.allclose(a[Site(layer)], b[Site(layer)], atol=1e-4)
        assert torch.equal(a[Site(1)], c[Site(1)])
        assert torch.allclose(a[Site(2)] - c[Site(2)], vector(2).expand_as(c[Site(2)]), atol=1e-5)
    (last,) = llama.capture(PROMPTS[0], [3])
    assert torch.equal(last[Site(3)], llama.capture(PROMPTS[0], [3], everywhere)[0][Site(3)][-1:])


def test_doses(lm, llama):
    steering = adding(1, 3)
    ours = llama.generate(PROMPTS, steering, max_new_tokens=1)
    for a, b in zip(ours, lm.generate(PROMPTS, steering, max_new_tokens=1), strict=True):
        assert {d.layer: d.tokens for d in a.applied.doses} == {d.layer: d.tokens for d in b.applied.doses}
        assert [d.ratio for d in a.applied.doses] == pytest.approx([d.ratio for d in b.applied.doses], rel=1e-3)
    assert llama.generate(PROMPTS[0], adding(1, positions=RULES["generated"]), max_new_tokens=2)[0].applied.doses == ()
    with pytest.warns(DoseWarning, match="at layer 2 the edit is"):
        llama.generate(PROMPTS[0], adding(2, strength=50.0), max_new_tokens=1)


def test_sampling(lm, llama):
    greedy = llama.generate(PROMPTS, max_new_tokens=NEW)
    assert llama.generate(PROMPTS, max_new_tokens=NEW, do_sample=True, top_k=1, seed=0) == greedy
    assert llama.generate(PROMPTS, max_new_tokens=NEW, do_sample=True, top_p=1e-9, seed=0) == greedy
    hot = {"max_new_tokens": NEW, "do_sample": True, "temperature": 3.0}
    assert llama.generate(PROMPTS, seed=1, **hot) == llama.generate(PROMPTS, seed=1, **hot)
    assert llama.generate(PROMPTS, seed=1, **hot) != llama.generate(PROMPTS, seed=2, **hot)
    end = greedy[0].text[:2]
    (stopped,) = llama.generate(PROMPTS[0], max_new_tokens=NEW, stop_strings=[end])
    assert stopped.finish_reason == "stop"
    assert end in stopped.text
    assert len(stopped.token_ids) < NEW


def test_samples_follow_the_probabilities():
    import numpy as np

    from trimtab.engines.llamacpp.sampling import Sampling

    shares = np.array([0.5, 0.3, 0.15, 0.05])
    logits, generator = np.log(shares).astype(np.float32), torch.Generator().manual_seed(0)
    for how, kept in ((Sampling(1.0), 4), (Sampling(1.0, top_k=2), 2), (Sampling(1.0, top_p=0.81), 3)):
        drawn = [how.pick(logits, generator) for _ in range(3000)]
        frequencies = np.bincount(drawn, minlength=4) / 3000
        expected = np.where(np.arange(4) < kept, shares, 0)
        assert frequencies == pytest.approx(expected / expected.sum(), abs=0.04)


REFUSED = {
    "only add directions, and": Steering((Edit(Site(1), SetProjection(vector(1, 1.0), 1.0)),)),
    "only add directions, and ": Steering((Edit(Site(1), Add(vector(1), keep_norm=True)),)),
    "no gates": adding(1).when(Threshold(Site(1), vector(1), 0.5)),
    "residual stream only": Steering((Edit(Site(1, "mlp"), Add(vector(1))),)),
    "can't steer block 0": adding(0),
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_it_cannot_do_is_refused(llama, words):
    with pytest.raises(UnsupportedError, match=words):
        llama.generate(PROMPTS, REFUSED[words])
    with pytest.raises(UnsupportedError, match=words):
        llama.capture(PROMPTS, [1], steering=REFUSED[words])


def test_what_makes_no_sense_is_refused(llama, folder):
    def ask(words, *arguments, **more):
        with pytest.raises(TrimtabError, match=words):
            llama.generate(*arguments, **{"max_new_tokens": 4, **more})

    ask("blocks are 0 to 3", PROMPTS, adding(4))
    ask("width 3", PROMPTS, Steering((Edit(Site(1), Add(torch.ones(3))),)))
    ask("2 steerings for 4 prompts", PROMPTS, [None, None])
    ask("no prompts", [])
    ask("is empty", "", chat=False)
    ask("which has", "Why?", adding(1, positions=Positions.span(100, 200)))
    ask("context is 128", "sea " * 200)
    ask("from 1 up, got 0", "Why?", max_new_tokens=0)
    ask("support emphasis", "Why?", emphasize=Phrase("Why"))
    ask("support rejection", "Why?", rejection=True)
    ask("no option 'num_beams'", "Why?", num_beams=2)
    ask("above 0", "Why?", do_sample=True, temperature=-1.0)
    ask("top_p in", "Why?", do_sample=True, top_p=1.5)
    ask("stop string is empty", "Why?", stop_strings=[""])
    for sites, words in (([Site(1, "mlp")], "outputs only"), ([9], "blocks are 0 to 3")):
        with pytest.raises(TrimtabError, match=words):
            llama.capture(PROMPTS, sites)
    with pytest.raises(TrimtabError, match="select no token"):
        llama.capture("Why?", [1], Positions.generated())


def test_another_models_steering_is_refused(lm, llama, tmp_path):
    here = lm.identity
    mine = Steering(adding(1).edits, Card("caa", here))
    llama.generate("Why?", mine, max_new_tokens=1)
    from dataclasses import replace

    other = replace(mine, card=Card("caa", replace(here, name="other", fingerprint="0" * 16)))
    with pytest.raises(TrimtabError, match="learned on other"):
        llama.generate("Why?", other)
    llama.generate("Why?", other, transfer=True, max_new_tokens=1)
    with pytest.warns(MismatchWarning, match="different weights"):
        llama.check(replace(mine, card=Card("caa", replace(here, fingerprint="0" * 16))))


def test_loading(folder, file, tmp_path, monkeypatch):
    def load(words, *arguments, **more):
        with pytest.raises(TrimtabError, match=words):
            LM.load(*arguments, **more)

    load("no engine 'onnx'; engines: transformers, .*llamacpp", file, engine="onnx")
    load("needs a .gguf file", folder, engine="llamacpp")
    load("there is no file", tmp_path / "nowhere.gguf", engine="llamacpp")
    load("has no option device", file, engine="llamacpp", device="cuda")
    load("has no option dtype", file, engine="llamacpp", dtype="bf16")
    load("unknown cache 'q4'", file, engine="llamacpp", cache="q4")
    load("not speed", file, engine="llamacpp", speed=9)
    data = file.read_bytes()
    for name, content in {"cut": data[: len(data) // 2], "empty": b"", "text": b"GGUF" + b"\xff" * 99}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        load("can't load", tmp_path / f"{name}.gguf", engine="llamacpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    from trimtab.engines.llamacpp.library import open_library

    open_library.cache_clear()
    load(r"pip install 'trimtab\[llamacpp\]'", file, engine="llamacpp")


def test_the_default_models_file_is_fetched_once(tmp_path, monkeypatch):
    from trimtab.engines.transformers import default_model

    fetched = []

    def fetch(work: Path) -> Path:
        (work / "some.gguf").write_bytes(b"GGUF")
        fetched.append(work)
        return work / "some.gguf"

    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(default_model, "_fetch", fetch)
    path = default_model.default_gguf()
    assert default_model.default_gguf() == path
    assert path.read_bytes() == b"GGUF"
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [path.name]
    assert len(fetched) == 1


def test_an_unknown_layout_is_refused(monkeypatch):
    from trimtab.engines.llamacpp import library

    known = library.open_library()
    model, context = known.llama_model_default_params(), known.llama_context_default_params()
    library._check_layout(model, context)
    for params, name, value in ((context, "type_k", 7), (context, "n_batch", 1), (model, "no_host", 9)):
        before = getattr(params, name)
        setattr(params, name, value)
        with pytest.raises(TrimtabError, match="incompatible parameter layout"):
            library._check_layout(model, context)
        setattr(params, name, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reaches into libstdc++'s layout of vectors and texts")
def test_llama_cpps_own_loader_reads_ours(tmp_path, file):
    """The function behind `--control-vector-scaled FILE:2` finds our vectors, twice as long."""
    import ctypes as c

    import numpy as np

    from trimtab import export
    from trimtab.engines.llamacpp.library import open_library

    load = open_library()._Z26common_control_vector_loadRKSt6vectorI31common_control_vector_load_infoSaIS0_EE

    class Text(c.Structure):  # what a std::string of the wheel's (older) kind points into
        _fields_ = [("size", c.c_size_t), ("room", c.c_size_t), ("owners", c.c_int), ("text", c.c_char * 1000)]

    class Info(c.Structure):
        _fields_ = [("strength", c.c_float), ("file", c.c_void_p)]

    class Vector(c.Structure):
        _fields_ = [("begin", c.c_void_p), ("end", c.c_void_p), ("limit", c.c_void_p)]

    class Data(c.Structure):
        _fields_ = [("width", c.c_int), ("values", Vector)]

    load.restype, load.argtypes = Data, [c.POINTER(Vector)]

    def read(path: Path) -> tuple[int, np.ndarray]:
        name = str(path).encode()
        held = Text(len(name), 999, 9, name)
        infos = (Info * 1)(Info(2.0, c.addressof(held) + Text.text.offset))
        start = c.addressof(infos)
        loaded = load(c.byref(Vector(start, start + c.sizeof(infos), start + c.sizeof(infos))))
        count = ((loaded.values.end or 0) - (loaded.values.begin or 0)) // 4
        values = (c.c_float * count).from_address(loaded.values.begin) if count else []
        return loaded.width, np.array(values, dtype=np.float32)

    export(adding(1, 3, strength=0.5), tmp_path / "v.gguf")
    width, values = read(tmp_path / "v.gguf")
    assert width == WIDTH
    assert values.reshape(-1, WIDTH).shape == (3, WIDTH)
    expected = np.stack([vector(1).numpy(), np.zeros(WIDTH, dtype=np.float32), vector(3).numpy()])
    assert np.allclose(values.reshape(-1, WIDTH), expected, atol=1e-6)
    export(adding(0, 1), tmp_path / "w.gguf", "repeng")  # with a direction.0, which it rejects: why ours leaves it out
    assert read(tmp_path / "w.gguf")[0] == -1


class Planted:
    """llama.cpp with a fault in some of its functions."""

    def __init__(self, library: Any, **faulty: Any) -> None:
        self._library, self._faulty = library, faulty

    def __getattr__(self, name: str) -> Any:
        return self._faulty.get(name, getattr(self._library, name))


def forgetting(real, after):
    """Decodes, and forgets the control vector after so many times."""
    left = [after]

    def decode(pointer, batch):
        left[0] -= 1
        if left[0] == 0:
            assert real.llama_set_adapter_cvec(pointer, None, 0, WIDTH, 0, 0) == 0
        return real.llama_decode(pointer, batch)

    return decode


def cvec(change):
    """Sets another control vector than it is given."""
    return lambda real: {"llama_set_adapter_cvec": lambda *arguments: change(real.llama_set_adapter_cvec, *arguments)}


def shifted(data, by):
    """The numbers from there on."""
    return data and ctypes.cast(ctypes.addressof(data.contents) + 4 * by, type(data))


FAULTS = {
    "not set": (cvec(lambda _put, *_arguments: 0), "block 2 doesn't add its vector"),
    "fewer layers": (
        cvec(lambda put, p, data, size, w, low, _high: put(p, data, size, w, low, low)),
        "block 3 doesn't add its vector",
    ),
    "one layer off": (
        cvec(lambda put, p, data, size, w, low, high: put(p, shifted(data, w), size - w, w, low, high)),
        "block 2 doesn't add its vector",
    ),
    "too short": (
        cvec(lambda put, p, data, _size, w, low, high: put(p, data, 2 * w, w, low, high)),
        "block 3 doesn't add its vector",
    ),
    "refused": (cvec(lambda _put, *_arguments: -1), "llama.cpp refuses the control vector"),
    "forgotten": (lambda real: {"llama_decode": forgetting(real, 5)}, "block 2 doesn't add its vector"),
    "no decoding": (lambda _real: {"llama_decode": lambda _pointer, _batch: 1}, "llama.cpp stopped with code 1"),
    "no logits": (lambda _real: {"llama_get_logits_ith": lambda _pointer, _i: None}, "llama.cpp returned no logits"),
    "no names": (lambda _real: {"ggml_get_name": lambda _pointer: b"node"}, "doesn't (apply|name)"),
    "other tensors": (lambda _real: {"ggml_get_name": named_alike(_real)}, "has an unknown layout"),
}


def named_alike(real):
    """Says of a block's output another name than is in memory."""

    def name(pointer):
        label = real.ggml_get_name(pointer)
        return label.replace(b"l_out-2", b"l_out-3") if label == b"l_out-2" else label

    return name


@pytest.mark.parametrize("where", ["all", "generated"])
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_raises(llama, file, fault, where):
    plant, why = FAULTS[fault]
    steering = adding(2, 3, positions=RULES[where])
    right = llama.generate(PROMPTS[0], steering, max_new_tokens=NEW)
    other = LM.load(file, engine="llamacpp", cache="float32", threads=1)
    real = other.weights.library
    other.weights.library = Planted(real, **plant(real))
    with pytest.raises(TrimtabError, match=why):
        other.generate(PROMPTS[0], steering, max_new_tokens=NEW)
    other.weights.library = real
    other._cached_context.library = real
    assert other.generate(PROMPTS[0], steering, max_new_tokens=NEW) == right
    other.close()


def test_a_vector_that_stays_is_noticed(file):
    """Unsteered prompts are run without the vectors of those before, or not at all."""
    lm = LM.load(file, engine="llamacpp", cache="float32", threads=1)
    lm.generate(PROMPTS[0], adding(2, positions=RULES["generated"]), max_new_tokens=4)
    real = lm.weights.library
    kept = Planted(real, llama_set_adapter_cvec=lambda _p, data, *_: 0)
    lm._cached_context.library = kept
    with pytest.raises(TrimtabError, match="block 2 still adds a vector that was removed"):
        lm.generate(PROMPTS[0], max_new_tokens=4)
    lm.close()


@pytest.mark.parametrize("call", [2, 3, 6, 7])
def test_a_swallowed_change_is_noticed(file, monkeypatch, call):
    """Where the engine itself forgets to set what a stretch of tokens is steered by, or sets it too late."""
    lm = LM.load(file, engine="llamacpp", cache="float32", threads=1)
    steer, calls = Context.steer, []

    def forgetful(self, vectors):
        calls.append(vectors)
        if len(calls) != call:
            steer(self, vectors)

    monkeypatch.setattr(Context, "steer", forgetful)
    with pytest.raises(TrimtabError, match=r"block 2 should have been steered at \d+ tokens, and was steered at \d+"):
        lm.generate(PROMPTS[0], adding(2, positions=Positions.span(2, 4) | Positions.window(1, 3)), max_new_tokens=6)
    lm.close()


def test_each_block_is_looked_at_again_and_again(file, monkeypatch):
    """After the first run under a vector one block a run, each in its turn."""
    lm = LM.load(file, engine="llamacpp", cache="float32", threads=1)
    looked = []
    compare = Context._compare
    monkeypatch.setattr(
        Context, "_compare", lambda self, block, *rest: (looked.append(block), compare(self, block, *rest))[1]
    )
    lm.generate(PROMPTS[0], adding(1, 2, positions=RULES["generated"]), max_new_tokens=7)
    assert looked == [1, 2, 1, 2, 1, 2, 1]
    looked.clear()
    lm.generate(PROMPTS[0], max_new_tokens=3)
    assert looked == [1, 2]  # that nothing is left of it
    lm.close()
