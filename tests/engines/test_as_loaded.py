"""Models as people have them: offloaded, spread over devices, compiled, moved, with a draft model beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from pretend_gpu import pretending, spread
from tiny import LAYERS, by_transformers, direction, prompt, tiny, tokenizer
from torch import Tensor

from trimtab import LM, Positions, Rejection, Site, Steering, Threshold, learn_caa
from trimtab.doctor import check_model
from trimtab.engines.request import Choice
from trimtab.engines.transformers.places import output_weight
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.evaluate.divergence import divergence
from trimtab.methods.loreft import learn_loreft
from trimtab.steering import Add, Edit, SetProjection
from trimtab.text.pairs import Pair

PROMPTS = [prompt(0, 7), prompt(1, 5)]
STEERING = Steering(
    (
        Edit(Site(1), Add(direction(1, 2.0)), Positions.from_last_prompt_token()),
        Edit(Site(3), SetProjection(direction(2), 1.0), Positions.all()),
        Edit(Site(2, "heads"), Add(direction(3)), Positions.generated()),
    )
)
PAIRS = [Pair("w5 w6 w7", "w8 w9"), Pair("w10 w11", "w12 w13 w14")]
HELD = [Pair("w3 w4", "w5", prompt="w6 w7", shape="answers")]
PARTS = ("model.embed_tokens", *(f"model.layers.{i}" for i in range(LAYERS)), "model.norm", "lm_head")


def offloaded(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, execution_device="cpu")


def on_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def partly(model: Any, folder: Path) -> Any:
    where = {part: "disk" if i % 2 else "cpu" for i, part in enumerate(PARTS)} | {"model.rotary_emb": "cpu"}
    return accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=str(folder))


OFFLOADED: dict[str, Callable[[Any, Path], Any]] = {"cpu": offloaded, "disk": on_disk, "partly": partly}


def answers(lm: LM) -> dict[str, Any]:
    """What a model gives in every way in which it is run."""

    def ids(prompts: Any, steering: Any = STEERING, **more: Any) -> list[Any]:
        generated = lm.generate(prompts, steering, max_new_tokens=4, logprobs=True, **more)
        return [(answer.token_ids, answer.logprobs) for answer in generated]

    gated = STEERING.when(Threshold(Site(0), direction(1), -1e9))
    with lm.steered(STEERING):
        by_hand = lm.model.generate(
            input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, pad_token_id=0
        ).tolist()
    choice = Choice(tuple(lm.encode(PROMPTS[0], chat=False)), 7, (3, 4))
    return {
        "steps": ids(PROMPTS, [STEERING, None]),
        "transformers": ids(PROMPTS, **by_transformers()),
        "emphasis": ids(PROMPTS[0], None, emphasize=" ".join(PROMPTS[0].split()[2:4])),
        "unrejected": ids(PROMPTS[0], None, emphasize=" ".join(PROMPTS[0].split()[2:4]), rejection=False),
        "rejected": ids(PROMPTS[0], rejection=Rejection(ladder="strength")),
        "gated": ids(PROMPTS, gated),
        "by hand": by_hand,
        "next": lm.next_logprobs([choice], STEERING),
        "perplexity": lm.answer_nlls([((5, 6, 7), (8, 9))]),
        "divergence": divergence(lm, STEERING, PROMPTS, tokens=2).nats,
        "learned": learn_caa(lm, PAIRS, layers=1).edits[0].operation.direction.tolist(),
    }


@pytest.fixture(scope="module")
def wanted() -> dict[str, Any]:
    return answers(tiny("llama"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", OFFLOADED)
def test_an_offloaded_model_answers_as_one_in_memory(kind: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    plain = tiny("llama")
    lm = LM(OFFLOADED[kind](tiny("llama").model, tmp_path), tokenizer(), name=plain.name)
    assert any(parameter.is_meta for parameter in lm.model.parameters())
    assert lm.identity == plain.identity
    assert lm.runs_in == plain.runs_in
    offloaded_answers = answers(lm)
    assert {name: offloaded_answers[name] == wanted[name] for name in wanted} == dict.fromkeys(wanted, True)
    assert torch.equal(output_weight(lm.layout, Site(1, "heads")), output_weight(plain.layout, Site(1, "heads")))
    assert any(parameter.is_meta for parameter in lm.model.parameters())  # and they are where they were


@pytest.mark.long
def test_the_doctor_says_what_is_fetched(tmp_path: Path) -> None:
    lm = LM(partly(tiny("llama").model, tmp_path), tokenizer(), name="tiny offloaded")
    report = check_model(lm)
    assert report.wrong == ()
    devices = report["devices"]
    assert (devices.state, devices.reason) == ("works", "blocks 0 to 3 on cpu, some of them fetched while they run")
    assert check_model(tiny("llama"))["devices"].reason == "on cpu"


@pytest.mark.long
def test_the_doctor_says_which_devices() -> None:
    lm = tiny("llama")
    rest: list[Any] = [*lm.layout.blocks[2:], lm.layout.decoder.norm, lm.model.lm_head]
    spread(lm.model, [(block, 0) for block in lm.layout.blocks[:2]] + [(part, 1) for part in rest])
    lm.name = "tiny on two"
    with pretending():
        report = check_model(lm)
    assert report.wrong == ()
    assert report["devices"].reason == "blocks 0 to 1 on cuda:0; blocks 2 to 3 on cuda:1"


def test_training_over_offloaded_weights(tmp_path: Path) -> None:
    options: dict[str, Any] = {"layers": [1], "steps": 2, "rank": 1, "held_out": HELD}
    sides = (("w8 w9", "w10", "w5 w6 w7"), ("w4 w9", "w11", "w7"))
    pairs = [Pair(yes, no, prompt=question, shape="answers") for yes, no, question in sides]
    want = learn_loreft(tiny("llama"), pairs, **options)
    lm = LM(on_disk(tiny("llama").model, tmp_path), tokenizer())
    learned = learn_loreft(lm, pairs, **options)
    for edit, other in zip(learned.edits, want.edits, strict=True):
        torch.testing.assert_close(edit.operation.read, other.operation.read)


def test_a_model_without_weights_is_refused() -> None:
    model = tiny("llama").model.to("meta")
    lm = LM(model, tokenizer())
    with pytest.raises(UnsupportedError, match=r"no values.*meta device"):
        lm.identity  # noqa: B018


def test_copies_of_a_model_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"model\.module"):
        LM(torch.nn.DataParallel(tiny("llama").model), tokenizer())


def test_a_model_that_is_moved_after_it_was_wrapped() -> None:
    lm = tiny("llama")
    first = lm.generate(PROMPTS, STEERING, max_new_tokens=4)
    identity = lm.identity
    lm.model.to(torch.float32)
    again = lm.generate(PROMPTS, STEERING, max_new_tokens=4, logprobs=True)
    fresh = tiny("llama", dtype=torch.float32).generate(PROMPTS, STEERING, max_new_tokens=4, logprobs=True)
    assert [(answer.token_ids, answer.logprobs) for answer in again] == [
        (answer.token_ids, answer.logprobs) for answer in fresh
    ]
    lm.model.to(torch.float64)
    assert lm.identity == identity
    moved = lm.generate(PROMPTS, STEERING, max_new_tokens=4)
    assert len(moved) == len(first)


def test_a_compiled_model_answers_as_it_does_uncompiled(wanted: dict[str, Any]) -> None:
    plain = tiny("llama")
    compiled: Any = torch.compile(plain.model, backend="eager")
    lm = LM(compiled, tokenizer(), name=plain.name)
    compiled_answers = answers(lm)
    assert {name: compiled_answers[name] == wanted[name] for name in wanted} == dict.fromkeys(wanted, True)


@pytest.mark.parametrize("how", ["draft model", "prompt lookup"])
def test_drafted_tokens_are_steered_exactly_or_refused(how: str) -> None:
    """What is drafted is verified by the steered model; `lm.generate` refuses a draft model, which nothing steers."""
    lm, draft = tiny("llama"), tiny("llama", seed=1)
    ids = torch.tensor([lm.encode(PROMPTS[0], chat=False) * 2])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    more = {"assistant_model": draft.model} if how == "draft model" else {"prompt_lookup_num_tokens": 3}
    if how == "draft model":
        with pytest.raises(TrimtabError, match="assistant_model"):
            lm.generate(PROMPTS[0], STEERING, **more)
    else:
        (drafted,), (plain,) = (lm.generate(PROMPTS[0], STEERING, max_new_tokens=8, **drafts) for drafts in (more, {}))
        assert drafted.token_ids == plain.token_ids
    with lm.steered(STEERING):
        expected: Tensor = lm.model.generate(input_ids=ids, **options)
    with lm.steered(STEERING):
        generated = lm.model.generate(input_ids=ids, **options, **more)
    assert generated.tolist() == expected.tolist()
    assert not torch.equal(expected, lm.model.generate(input_ids=ids, **options))
