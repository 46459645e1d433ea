"""What people who come from other libraries write first: it does what they mean, or says what to write instead."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import tiny
import torch
import transformers
from tiny import LAYERS, direction, naive_generate, prompt

import trimtab
from trimtab import (
    LM,
    Add,
    Edit,
    Monitor,
    Positions,
    Rotate,
    SetProjection,
    Site,
    Steering,
    Threshold,
    TrimtabError,
)
from trimtab.engines.transformers import exclusive

TEXT = prompt(1, 5)
V = direction(1)
PUSH = Steering((Edit(Site(1), Add(12 * V), Positions.generated()),))
PAIRS = [("w5 w6", "w7 w8"), ("w9 w10", "w11 w12")]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def ids(lm: LM) -> torch.Tensor:
    return torch.tensor([lm.encode(TEXT)])


def inside(lm: LM, *args: Any, **options: Any) -> Any:
    with lm.steered(PUSH):
        return lm.model.generate(*args, max_new_tokens=2, **options)


def looped(lm: LM, steering: Steering, prompt_lengths: list[int] | None = None) -> list[int]:
    """A loop of one's own without a cache."""
    text = ids(lm)
    n = text.shape[1]
    with lm.steered(steering, prompt_lengths=prompt_lengths), torch.no_grad():
        for _ in range(4):
            text = torch.cat([text, lm.model(text, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return text[0, n:].tolist()


def packed(lm: LM, steering: Steering) -> torch.Tensor:
    """Two texts in one row, as trainers pack them."""
    with lm.steered(steering):
        return lm.model(torch.tensor([[5, 6, 7, 9]]), position_ids=torch.tensor([[0, 1, 0, 1]])).logits


def _answer(lm: LM) -> Any:
    return lm.generate(TEXT, max_new_tokens=1)[0]


def changed(lm: LM) -> None:
    steering = Steering((Edit(Site(1), Add(V)),))
    lm.check(steering)
    steering.edits[0].operation.direction.mul_(2)
    lm.check(steering)


REFUSED: dict[str, tuple[Callable[[LM], Any], str]] = {
    # as for vLLM and OpenAI's API
    "temperature": (lambda lm: lm.generate(TEXT, temperature=0.7), "decoding is greedy; add do_sample=True"),
    "top_p": (lambda lm: lm.stream(TEXT, top_p=0.9), "add do_sample=True, or leave top_p out"),
    "stop": (lambda lm: lm.generate(TEXT, stop=["w9"]), "it is stop_strings=[…]"),
    "n": (lambda lm: lm.generate(TEXT, n=2), "it is num_return_sequences"),
    "stream": (lambda lm: lm.generate(TEXT, stream=True), "lm.stream(prompt, …)"),
    "logit_bias": (lambda lm: lm.generate(TEXT, logit_bias={}), "sequence_bias={(token,): bias}"),
    "logprobs": (lambda lm: lm.generate(TEXT, logprobs=5), "logprobs is True or False, got 5"),
    "prefill": (lambda lm: lm.generate(TEXT, prefill="w9"), "end the messages with an assistant message"),
    # as for transformers
    "settings": (
        lambda lm: lm.generate(TEXT, generation_config=transformers.GenerationConfig(do_sample=True)),
        "give its settings as options",
    ),
    "greedy twice": (
        lambda lm: lm.generate(TEXT, max_new_tokens=2, num_return_sequences=2),
        "greedy answers to one prompt are all",
    ),
    "a function": (lambda lm: lm.generate(TEXT, stopping_criteria=lambda *_: False), "stopping_criteria=[…]"),
    "an end": (lambda lm: lm.generate(TEXT, eos_token_id="w9"), "stop_strings=[…]"),
    "early exit": (lambda lm: lm.generate(TEXT, assistant_early_exit=2), "drafts of the first layers"),
    "early exit, inside": (lambda lm: inside(lm, ids(lm), assistant_early_exit=2), "drafts of the first layers"),
    "guidance": (lambda lm: inside(lm, ids(lm), guidance_scale=1.5), "its second, unconditional pass"),
    "an encoding": (lambda lm: inside(lm, lm.tokenizer(TEXT, return_tensors="pt")), "model.generate(**inputs)"),
    "a text": (lambda lm: inside(lm, TEXT), "lm.generate takes texts"),
    "generate_batch": (
        lambda lm: lm.steered(PUSH)(lambda: lm.model.generate_batch([[5]]))(),
        "use model.generate, or give lm.generate(…) all prompts",
    ),
    "an encoded prompt": (lambda lm: lm.generate(lm.tokenizer(TEXT)), "inside lm.steered(…)"),
    "a head": (lambda lm: LM(lm.model.model, lm.tokenizer).generate(TEXT), "AutoModelForCausalLM"),
    "swapped": (lambda lm: LM(lm.tokenizer, lm.model), "the model first"),
    "a class": (lambda lm: LM(transformers.LlamaForCausalLM, lm.tokenizer), "is a class; LM.load loads one"),
    "any module": (lambda lm: LM(torch.nn.Linear(2, 2), lm.tokenizer), "Linear isn't a transformers model"),
    "a tokenizer": (lambda lm: LM(lm.model, "gpt2"), "AutoTokenizer.from_pretrained(…) returns, got str"),
    # a strength behind the steering, as in repeng and steering-vectors
    "a strength": (lambda lm: lm.generate(TEXT, PUSH, 2.0), "2 * steering"),
    "a strength, inside": (lambda lm: lm.steered(PUSH, 2.0), "2 * steering"),  # type: ignore[call-arg]
    "prompt": (lambda lm: lm.generate(prompt=TEXT), "did you mean prompts instead of prompt?"),  # type: ignore[call-arg]
    "aggregator": (lambda lm: trimtab.learn_caa(lm, PAIRS, aggregator="pca"), "it is estimator="),  # type: ignore[call-arg]
    "a progress bar": (lambda lm: trimtab.learn_caa(lm, PAIRS, progress=True), "called as progress(done, total)"),  # type: ignore[arg-type]
    "packed": (lambda lm: packed(lm, PUSH), "several texts are packed into it"),
    "changed in place": (lambda lm: changed(lm), "changed in place after it had been used"),
    "half a pair": (lambda lm: lm.generate("w5 \ud800"), "character 4 of the prompt is half a surrogate pair"),
    "no rows": (lambda lm: lm.steered([]), "the list of steerings is empty"),
    "a length": (lambda lm: lm.steered(PUSH, prompt_lengths=5), "one for each row, got 5"),  # type: ignore[arg-type]
    "no length": (lambda lm: lm.steered(PUSH, prompt_lengths=[0]), "from 1 up"),
    "lengths": (lambda lm: looped(lm, PUSH, [5, 5]), "2 prompt lengths for a batch of 1 rows"),
    "too long": (lambda lm: looped(lm, PUSH, [99]), "has 99 tokens, but 8 were computed"),
    # in a notebook
    "a table": (lambda lm: lm.generate(numpy.rec.array([(TEXT,)], names="q").view(_Table)), "its columns: 'q'"),
    "a set": (lambda lm: lm.generate({TEXT}), "sets have no order; give a list"),  # type: ignore[arg-type]
    "a seed": (lambda lm: lm.generate(TEXT, seed=2**80), "at most 64 bits"),
    "system": (lambda lm: lm.generate([TEXT] * 2, system=["a", "b"]), "system is a single text"),  # type: ignore[arg-type]
    "no sites": (lambda lm: lm.capture(TEXT, []), "Site(14, 'heads')], got []"),
    "layers": (lambda lm: lm.capture(TEXT, layers=[1]), "it is sites: 14"),  # type: ignore[call-arg]
    "a name": (lambda lm: lm.capture(TEXT, "all"), "sites must be one or more layers"),  # type: ignore[arg-type]
    "from the end": (lambda lm: lm.capture(TEXT, -1), "lm.layout.layers - 1"),
    "another layer": (lambda lm: lm.capture(TEXT, 1)[0][2], "no activations at 2; captured: residual[1]"),  # type: ignore[index]
    "supports": (lambda lm: lm.supports("rejection"), "isn't a steering"),  # type: ignore[arg-type]
    "the hook's name": (lambda lm: Site(1, "hook_resid_post"), "here it is 'residual'"),
    "a class of operations": (lambda lm: Edit(Site(1), Add), "got a type; write Add(direction)"),
    "nothing done": (lambda lm: Edit(Site(1), None), "got None; write Add(direction)"),
    "a list": (lambda lm: Add([0.5] * 32), "write torch.tensor(…)"),  # type: ignore[arg-type]
    "a row": (lambda lm: Add(V[None]), "give one of its rows"),
    "a slice": (lambda lm: PUSH[10:14], "steering.only(range(10, 14))"),  # type: ignore[index]
    "layers by slice": (lambda lm: PUSH.only(slice(0, 2)), "range(10, 15)"),  # type: ignore[arg-type]
    "nothing left": (lambda lm: PUSH - None, "got None; 2 * steering"),  # type: ignore[operator]
    "a quotient": (lambda lm: PUSH / 0, "can't be divided by 0"),
    "a gate's site": (lambda lm: Threshold(1, V, 0.1), "write Site(14)"),  # type: ignore[arg-type]
    "a monitor": (lambda lm: Monitor("x", PUSH), "Monitor.of makes one"),  # type: ignore[arg-type]
    "positions by name": (lambda lm: Positions("all"), "write Positions.parse('all')"),  # type: ignore[arg-type]
    "positions by number": (lambda lm: Positions([1, 2]), "Positions.tokens("),  # type: ignore[arg-type]
    "a sum of positions": (lambda lm: Positions.prompt() + Positions.generated(), "a | b (either)"),
    "tokens": (lambda lm: Positions.tokens(1, 2), "takes indices by position"),  # type: ignore[call-arg]
    "tokens from the end": (lambda lm: Positions.span(-3, -1), "Positions.tokens([-2, -1])"),
    "degrees": (lambda lm: Rotate(V, 90), "write math.radians(90)"),
    "a target": (lambda lm: SetProjection(V, "x"), "target is a finite number, got 'x'"),  # type: ignore[arg-type]
    "a steering to monitor": (lambda lm: lm.generate(TEXT, monitors=PUSH), "got Steering; Monitor.of(name, steering)"),  # type: ignore[arg-type]
    "a text to score": (lambda lm: lm.next_logprobs(TEXT), "text 1 is a str, not a Choice"),  # type: ignore[arg-type]
    "nothing to find": (lambda lm: lm.spans(TEXT, None), "a phrase of the prompt, or several, got None"),  # type: ignore[arg-type]
    "features": (lambda lm: trimtab.load_features("sae", [1]), "{1234: 40.0}, got [1]"),  # type: ignore[arg-type]
    "an idea": (lambda lm: trimtab.make(lm, 3), "an idea is a sentence"),  # type: ignore[arg-type]
    "push": (lambda lm: trimtab.push_to_hub("me/x", PUSH), "isn't a steering"),  # type: ignore[arg-type]
    "export": (lambda lm: trimtab.export("x.gguf", PUSH), "isn't a steering"),  # type: ignore[arg-type]
    "where to read": (lambda lm: trimtab.learn_caa(lm, PAIRS, layers=1, read_at=-1), "read_at is a text"),  # type: ignore[arg-type]
    # attributes of other libraries' models and vectors
    "device": (lambda lm: lm.device, "see lm.runs_in"),
    "eval": (lambda lm: lm.eval(), "lm.model.eval"),
    "run_with_cache": (lambda lm: lm.run_with_cache(TEXT), "lm.capture(prompts, [10, 14])"),
    "set_control": (lambda lm: lm.set_control(PUSH), "with lm.steered(steering)"),
    "from_pretrained": (lambda lm: lm.from_pretrained("gpt2"), "LM.load(…)"),
    "an answer's dose": (lambda lm: _answer(lm).dose, "it is answer.applied.dose"),
    "an answer's words": (lambda lm: _answer(lm).lower(), "it is answer.text.lower"),
    "the strength": (lambda lm: PUSH.strength, "each of steering.edits has its own strength"),
    "apply": (lambda lm: PUSH.apply(lm.model), "lm.generate(prompts, steering)"),
}


class _Table(numpy.recarray):
    """As pandas' tables are: to go through it is to go through the names of its columns."""

    @property
    def columns(self) -> list[str]:
        return list(self.dtype.names or ())


@pytest.mark.parametrize("habit", REFUSED)
def test_what_is_written_elsewhere_says_what_to_write_here(lm: LM, habit: str) -> None:
    write, why = REFUSED[habit]
    before = len(lm.model._forward_pre_hooks), lm.model.config.num_hidden_layers
    with pytest.raises(TrimtabError, match=re.escape(why)):
        write(lm)
    assert (len(lm.model._forward_pre_hooks), lm.model.config.num_hidden_layers) == before == (0, LAYERS)
    assert not {"generate", "generate_batch"} & vars(lm.model).keys()


TAKEN: dict[str, tuple[Callable[[LM], Any], Callable[[LM], Any]]] = {
    "temperature 0": (lambda lm: _said(lm, temperature=0, do_sample=True, top_p=0.9), lambda lm: _said(lm)),
    "not drawn": (lambda lm: _said(lm, do_sample=False, temperature=1.0), lambda lm: _said(lm)),
    "a pad": (lambda lm: _said(lm, pad_token_id=0), lambda lm: _said(lm)),
    "ends": (lambda lm: _said(lm, eos_token_id=torch.tensor([3, 4])), lambda lm: _said(lm, eos_token_id=[3, 4])),
    "a seed": (lambda lm: _said(lm, do_sample=True, seed=numpy.int64(1)), lambda lm: _said(lm, do_sample=True, seed=1)),
    "an array": (lambda lm: Add(V.numpy()), lambda lm: Add(V)),
    "half an array": (lambda lm: Add(V.half().numpy()), lambda lm: Add(V.half())),
    "a layer": (lambda lm: Site(numpy.int64(1)), lambda lm: Site(1)),  # type: ignore[arg-type]
    "of a steering": (lambda lm: PUSH[numpy.int64(1)], lambda lm: PUSH[1]),
    "only": (lambda lm: PUSH.only(torch.tensor(1)), lambda lm: PUSH.only(1)),  # type: ignore[arg-type]
    "a norm": (lambda lm: PUSH / torch.tensor(2.0), lambda lm: 0.5 * PUSH),  # type: ignore[operator]
    "tokens": (lambda lm: Positions.tokens(numpy.array([2, -1])), lambda lm: Positions.tokens([2, -1])),
    "offsets": (lambda lm: Positions.opening(numpy.int64(3)), lambda lm: Positions.opening(3)),  # type: ignore[arg-type]
    "a threshold": (
        lambda lm: Threshold(Site(1), V, numpy.float32(0.5)),  # type: ignore[arg-type]
        lambda lm: Threshold(Site(1), V, 0.5),
    ),
    "a line": (lambda lm: Threshold(Site(1), V, torch.tensor(0.5)), lambda lm: Threshold(Site(1), V, 0.5)),  # type: ignore[arg-type]
    "sites": (lambda lm: list(lm.capture(TEXT, numpy.arange(2))[0]), lambda lm: [Site(0), Site(1)]),  # type: ignore[arg-type]
    "rejections": (
        lambda lm: _said(lm, rejection=[False]),  # type: ignore[arg-type]
        lambda lm: _said(lm),
    ),
}


def _said(lm: LM, **options: Any) -> tuple[int, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the dose
        return lm.generate([TEXT], PUSH, max_new_tokens=4, **options)[0].token_ids


@pytest.mark.parametrize("habit", TAKEN)
def test_what_can_mean_one_thing_is_taken(lm: LM, habit: str) -> None:
    written, meant = TAKEN[habit]
    assert written(lm) == meant(lm)


@pytest.mark.parametrize("rule", ["generated", "prompt", "last-prompt-token", "all"])
def test_a_loop_without_a_cache_is_steered_as_said_or_not_run(lm: LM, rule: str) -> None:
    steering = PUSH.at(Positions.parse(rule))
    expected, _ = naive_generate(lm, TEXT, steering, 4)
    assert looped(lm, steering, [5]) == expected
    if rule == "all":
        assert looped(lm, steering) == expected
    else:
        with pytest.raises(TrimtabError, match=r"repeats the 5 tokens of the last one.*prompt_lengths"):
            looped(lm, steering)


def test_a_model_in_training_mode_answers_and_is_read_without_dropout() -> None:
    lm = tiny.tiny("gpt2")
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    steering = PUSH.at(Positions.all())
    wanted = lm.generate(TEXT, 0.1 * steering, max_new_tokens=4)[0].token_ids
    (read,) = lm.capture(TEXT, 2)
    learned = trimtab.learn_random(lm, layers=[1])
    lm.model.train()
    lm.model.training = False  # as of a wrapper around the one that was set
    lm.model.transformer.h[0].eval()  # kept as it is, too
    modes = [module.training for module in lm.model.modules()]
    assert lm.generate(TEXT, 0.1 * steering, max_new_tokens=4)[0].token_ids == wanted
    assert lm.generate(TEXT, 0.1 * steering, max_new_tokens=4, **tiny.by_transformers())[0].token_ids == wanted
    assert torch.equal(lm.capture(TEXT, 2)[0][Site(2)], read[Site(2)])
    assert trimtab.learn_random(lm, layers=[1]) == learned
    with lm.steered(steering):
        assert not torch.equal(lm.model(ids(lm)).logits, lm.model(ids(lm)).logits)  # it is the caller's to say
    assert [module.training for module in lm.model.modules()] == modes
    assert torch.equal(read[2], read[Site(2)])  # type: ignore[index]


def test_a_context_that_nobody_enters_warns_and_one_can_be_entered_again(lm: LM) -> None:
    with pytest.warns(RuntimeWarning, match=r"write with lm\.steered"):
        lm.steered(PUSH)
    context = lm.steered(PUSH.at(Positions.all()))
    seen = []
    for _ in range(2):
        with context:
            seen.append(lm.model(ids(lm)).logits)
    assert torch.equal(*seen)
    assert not torch.equal(seen[0], lm.model(ids(lm)).logits)


def test_threads_that_wait_for_each_other_say_so(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "PATIENCE", 0.01)
    said = threading.Event()
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: said.set())
    other = threading.Thread(target=lambda: lm.capture(TEXT, 1))
    with lm.steered(PUSH):
        lm.model(ids(lm))
        other.start()
        assert said.wait(30)
    other.join(30)
    assert not other.is_alive()


def test_packed_texts_are_steered_where_every_token_is(lm: LM) -> None:
    plain, steered = packed(lm, 0 * PUSH), packed(lm, PUSH.at(Positions.all()))
    assert ((plain - steered).abs().amax(-1) > 0).all()


def test_a_mask_in_floating_point_is_a_mask(lm: LM) -> None:
    tokens = torch.tensor([[0, 0, 5, 6], [5, 9, 11, 12]])
    outs = []
    for mask in (tokens != 0, (tokens != 0).double()):
        with lm.steered([PUSH, None]):
            outs.append(lm.model.generate(tokens, attention_mask=mask, max_new_tokens=4, do_sample=False))
    assert torch.equal(*outs)


def test_attributes_that_are_not_there_are_missing_to_everybody(lm: LM) -> None:
    assert not hasattr(lm, "device")
    assert getattr(PUSH, "strength", None) is None
    with pytest.raises(AttributeError, match="'LM' object has no attribute 'zzz'"):
        lm.zzz  # noqa: B018


def test_a_system_prompt_that_the_template_leaves_out_is_an_error(lm: LM) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}"
    )
    chat = LM(lm.model, tokenizer)
    assert chat.encode("w5 w6") == [5, 6]
    with pytest.raises(TrimtabError, match="drops system prompts"):
        chat.encode("w5 w6", system="w7")
