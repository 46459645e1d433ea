"""Nothing is silently unsteered: whatever keeps hooks from acting is either steered right or an error.

Each entry point is run over models that were compiled, wrapped, given other caches or shared, and over planted faults
(see `faults`): a module whose hooks don't fire, a pass that is swallowed, an attention that doesn't ask the interface.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import faults
import pytest
import tiny
import torch
from tiny import FAMILIES, by_transformers, direction, prompt

from trimtab import (
    LM,
    Add,
    Edit,
    Positions,
    Rejection,
    ScaleScores,
    Site,
    Steering,
    Threshold,
    TrimtabError,
    UnsupportedError,
)
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest
from trimtab.engines.transformers.next_token import Choice
from trimtab.engines.transformers.sampling import GREEDY
from trimtab.steering import emphasis

NEW = 6
PROMPTS = [prompt(1, 5), prompt(2, 9)]
GENERATED = Steering((Edit(Site(1), Add(direction(1, 3.0)), Positions.generated()),))
ALL = Steering((Edit(Site(1), Add(direction(1, 3.0)), Positions.all()),))
MIXED = Steering(
    (
        Edit(Site(0), Add(direction(1, 2.0)), Positions.all()),
        Edit(Site(2, "mlp"), Add(direction(2, 2.0)), Positions.from_last_prompt_token()),
        Edit(Site(3, "attention"), Add(direction(3, 2.0)), Positions.generated()),
    )
)
EMPHASIS = emphasis(ScaleScores(), [(1, 3)], range(tiny.LAYERS), "directer")


@pytest.fixture
def lm() -> LM:
    return tiny.tiny("llama")


def ids_of(lm: LM, text: str) -> torch.Tensor:
    return torch.tensor([lm.encode(text)])


# ---- ways to run a model -----------------------------------------------------------------------------------------


def generated(lm: LM, steering: Steering | None) -> Any:
    return [lm.generate(text, steering, max_new_tokens=NEW)[0].token_ids for text in PROMPTS]


def in_one_batch(lm: LM, steering: Steering | None) -> Any:
    return [answer.token_ids for answer in lm.generate(PROMPTS, steering, max_new_tokens=NEW)]


def inside_steered(lm: LM, steering: Steering | None) -> Any:
    answers = []
    for text in PROMPTS:
        ids = ids_of(lm, text)
        with lm.steered(steering or 0.0 * ALL):
            out = lm.model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False)
        answers.append(tuple(out[0, ids.shape[1] :].tolist()))
    return answers


def streamed(lm: LM, steering: Steering | None) -> Any:
    """As transformers' documentation streams: `generate` in a thread of its own."""
    answers = []
    for text in PROMPTS:
        ids, out = ids_of(lm, text), []

        def work(ids: torch.Tensor = ids, out: list[Any] = out) -> None:
            try:
                out.append(lm.model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False))
            except TrimtabError as error:
                out.append(error)

        with lm.steered(steering or 0.0 * ALL):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        if isinstance(out[0], Exception):
            raise out[0]
        answers.append(tuple(out[0][0, ids.shape[1] :].tolist()))
    return answers


def stepped(lm: LM, steering: Steering | None) -> Any:
    batch = GenerationBatch(lm.model, lm.tokenizer, lm.layout)
    keys = [batch.insert(GenerationRequest(tuple(lm.encode(text)), steering, NEW, GREEDY)) for text in PROMPTS]
    tokens: dict[int, list[int]] = {key: [] for key in keys}
    while len(batch):
        for response in batch.step():
            if response.error is not None:
                raise response.error
            tokens[response.key].append(response.token)
    return [tuple(tokens[key]) for key in keys]


def by_beams(lm: LM, steering: Steering | None) -> Any:
    """As with all options that transformers' own loop is left to."""
    return [answer.token_ids for answer in lm.generate(PROMPTS, steering, max_new_tokens=NEW, num_beams=2)]


def by_transformers_alone(lm: LM, steering: Steering | None) -> Any:
    more = by_transformers()
    return [answer.token_ids for answer in lm.generate(PROMPTS, steering, max_new_tokens=NEW, **more)]


@torch.no_grad()
def called(lm: LM, steering: Steering | None) -> Any:
    logits = []
    for text in PROMPTS:
        with lm.steered(steering or 0.0 * ALL):
            logits.append(lm.model(ids_of(lm, text)).logits)
    return logits


def scored(lm: LM, steering: Steering | None) -> Any:
    choices = [Choice(lm.encode(text), 3, [5, 7]) for text in PROMPTS]
    return [result.logprobs for result in lm.next_logprobs(choices, steering)]


def rejected(lm: LM, steering: Steering | None) -> Any:
    rejection = Rejection(beta=0.0, ladder="strength") if steering else None
    return [lm.generate(text, steering, max_new_tokens=NEW, rejection=rejection)[0].token_ids for text in PROMPTS]


def captured(lm: LM, steering: Steering | None) -> Any:
    with lm.steered(steering or 0.0 * ALL):
        return [activations[Site(3)] for activations in lm.capture(PROMPTS, [3], Positions.all())]


DECODING = {
    "lm.generate": generated,
    "a batch": in_one_batch,
    "model.generate in lm.steered": inside_steered,
    "a thread in lm.steered": streamed,
    "the stepping batch": stepped,
    "transformers' own loop": by_transformers_alone,
    "beams": by_beams,
}
SINGLE_PASSES = {"a call in lm.steered": called, "next_logprobs": scored}
RUNS = {**DECODING, **SINGLE_PASSES}
ALL_RUNS = {**RUNS, "rejection": rejected, "capture in lm.steered": captured}


def same(result: Any, wanted: Any) -> bool:
    if isinstance(result, torch.Tensor):
        return torch.allclose(result, wanted, atol=1e-6)
    if isinstance(result, (list, tuple)):
        return len(result) == len(wanted) and all(same(x, y) for x, y in zip(result, wanted, strict=True))
    return bool(result == pytest.approx(wanted))


# ---- models that people have -------------------------------------------------------------------------------------


def compiled(model: Any, what: str) -> Any:
    """The model, compiled and warm: traced unsteered, before anybody steers."""
    run = model
    if what == "a wrapper":
        run = torch.compile(model, backend="eager")
    elif what == "the model":
        model.compile(backend="eager")
    elif what == "its forward":
        model.forward = torch.compile(model.forward, backend="eager")
    elif what == "the decoder":
        model.get_decoder().compile(backend="eager")
    elif what == "the decoder's forward":
        decoder = model.get_decoder()
        decoder.forward = torch.compile(decoder.forward, backend="eager")
    else:
        for block in model.get_decoder().layers:
            block.compile(backend="eager")
    with torch.no_grad():
        for length in (1, 5, 9):
            run(torch.ones(1, length, dtype=torch.long))
    return run


COMPILED = ("a wrapper", "the model", "its forward", "the decoder", "the decoder's forward", "the blocks")


class TestCompiledModels:
    @pytest.mark.slow
    @pytest.mark.long_unless(lambda what: what == "the blocks")
    @pytest.mark.parametrize("what", COMPILED)
    def test_are_steered_like_others(self, what: str) -> None:
        wanted = {name: run(tiny.tiny("llama"), MIXED) for name, run in ALL_RUNS.items()}
        plain = {name: run(tiny.tiny("llama"), None) for name, run in ALL_RUNS.items()}
        torch._dynamo.reset()
        own = tiny.tiny("llama").model
        lm = LM(compiled(own, what), tiny.tokenizer(), name="tiny-llama")
        for name, run in ALL_RUNS.items():
            assert not same(wanted[name], plain[name]), name
            assert same(run(lm, MIXED), wanted[name]), name
            assert same(run(lm, None), plain[name]), name

    @pytest.mark.long
    @torch.no_grad()
    def test_a_wrapper_that_nobody_told_trimtab_of(self, lm: LM) -> None:
        wrapper = compiled(lm.model, "a wrapper")
        (wanted, _), (plain, _) = called(lm, ALL), called(lm, None)
        with lm.steered(ALL):
            steered = wrapper(ids_of(lm, PROMPTS[0])).logits
        assert torch.equal(steered, wanted)
        assert torch.equal(wrapper(ids_of(lm, PROMPTS[0])).logits, plain)

    def test_is_compiled_again_afterwards(self, lm: LM) -> None:
        traced: list[int] = []

        def backend(graph: Any, _inputs: Any) -> Any:
            traced.append(1)
            return graph.forward

        wrapper = torch.compile(lm.model, backend=backend)
        lm.generate(PROMPTS[0], ALL, max_new_tokens=2)
        with torch.no_grad():
            wrapper(torch.ones(1, 4, dtype=torch.long))
        assert traced


class TestWrappedModels:
    def test_a_lora(self, lm: LM) -> None:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        model = peft.get_peft_model(lm.model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        wrapped = LM(model.eval(), lm.tokenizer, name="tiny-llama")
        merged = LM(model.merge_and_unload(), lm.tokenizer, name="tiny-llama")
        wanted = {name: run(merged, MIXED) for name, run in ALL_RUNS.items()}
        lm = tiny.tiny("llama")
        torch.manual_seed(0)
        model = peft.get_peft_model(lm.model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        wrapped = LM(model.eval(), lm.tokenizer, name="tiny-llama")
        for name, run in ALL_RUNS.items():
            assert same(run(wrapped, MIXED), wanted[name]), name

    def test_data_parallel_is_refused_in_words(self, lm: LM) -> None:
        with pytest.raises(UnsupportedError, match=r"DataParallel.*LM\(model.module, tokenizer\)"):
            LM(torch.nn.DataParallel(lm.model), lm.tokenizer)


class TestOtherCaches:
    @staticmethod
    @cache
    def by_default(family: str) -> list[Any]:
        lm = tiny.tiny(family)
        return [lm.generate(text, MIXED, max_new_tokens=NEW)[0] for text in PROMPTS]

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
    @pytest.mark.parametrize("kind", ["static", "hybrid", "sliding_window"])
    @pytest.mark.parametrize("where", ["options", "generation_config"])
    def test_are_steered_like_the_default(self, family: str, kind: str, where: str) -> None:
        lm, wanted = tiny.tiny(family), self.by_default(family)
        options = {}
        if where == "options":
            options = {"cache_implementation": kind}
        else:
            lm.model.generation_config.cache_implementation = kind
        for answers in (
            [lm.generate(text, MIXED, max_new_tokens=NEW, **options)[0] for text in PROMPTS],
            lm.generate(PROMPTS, MIXED, max_new_tokens=NEW, **options),
        ):
            assert [x.token_ids for x in answers] == [x.token_ids for x in wanted]
            counted = [[dose.tokens for dose in x.applied.doses] for x in answers]
            assert counted == [[dose.tokens for dose in x.applied.doses] for x in wanted]

    def test_a_gate_read_deeper_than_its_edit(self, lm: LM) -> None:
        gated = ALL.at(Positions.from_last_prompt_token()).when(Threshold(Site(3), direction(4), -1e9))
        wanted = generated(lm, gated)
        lm.model.generation_config.cache_implementation = "static"
        assert generated(lm, gated) == wanted

    def test_emphasis_over_a_static_cache_is_refused_in_words(self, lm: LM) -> None:
        with pytest.raises(UnsupportedError, match="from cache_implementation"):
            lm.generate(PROMPTS[1], EMPHASIS, max_new_tokens=NEW, cache_implementation="static")

    @pytest.mark.parametrize("name", list(DECODING))
    def test_without_a_cache(self, lm: LM, name: str) -> None:
        wanted = DECODING[name](lm, MIXED)
        lm.model.generation_config.use_cache = False
        assert DECODING[name](lm, MIXED) == wanted

    @torch.no_grad()
    def test_a_token_whose_position_cant_be_told(self, lm: LM) -> None:
        with lm.steered(ALL):
            lm.model(ids_of(lm, PROMPTS[0]))
            with pytest.raises(TrimtabError, match="no cache of the tokens before it that trimtab can find"):
                lm.layout.decoder(torch.tensor([[5]]), position_ids=torch.tensor([[5]]))
            with pytest.raises(TrimtabError, match="one token after 5 others, without a cache, a mask or position ids"):
                lm.layout.decoder(torch.tensor([[5]]))


class TestSharedModels:
    def test_two_lms_over_one_model_take_turns(self, lm: LM) -> None:
        other = LM(lm.model, lm.tokenizer, name="tiny-llama")
        with lm.steered(ALL):
            (wanted,) = lm.capture(PROMPTS[0], [3])
            (activations,) = other.capture(PROMPTS[0], [3])
            with pytest.raises(TrimtabError, match="steered already"):
                other.generate(PROMPTS[0], ALL, max_new_tokens=2)
        assert torch.equal(activations[Site(3)], wanted[Site(3)])

    def test_one_thread_captures_while_another_generates(self, lm: LM) -> None:
        other = LM(lm.model, lm.tokenizer, name="tiny-llama")
        wanted, read = in_one_batch(lm, MIXED), lm.capture(PROMPTS, [1, 3])
        failures: list[str] = []
        stop = threading.Event()

        def capture(which: LM) -> None:
            while not stop.is_set():
                for x, y in zip(which.capture(PROMPTS, [1, 3]), read, strict=True):
                    if not all(torch.equal(x[site], y[site]) for site in y):
                        failures.append("another activation was read")

        def guarded(which: LM) -> None:
            try:
                capture(which)
            except BaseException as error:
                failures.append(repr(error))

        threads = [threading.Thread(target=guarded, args=(which,)) for which in (lm, other)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(10):
                assert in_one_batch(lm, MIXED) == wanted
                assert stepped(lm, MIXED) == wanted
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert not failures

    @torch.no_grad()
    def test_a_thread_that_calls_the_model_itself_is_left_alone(self, lm: LM) -> None:
        """Neither steered by another thread's `lm.generate`, nor ended by another's `lm.capture`."""
        ids = ids_of(lm, PROMPTS[0])
        wanted = lm.model(ids).logits
        steered, read = in_one_batch(lm, MIXED), lm.capture(PROMPTS[0], [1])
        emphasized = [lm.generate(text, EMPHASIS, max_new_tokens=3)[0].token_ids for text in PROMPTS]
        differences: list[float] = []
        stop = threading.Event()

        @torch.no_grad()
        def call() -> None:
            while not stop.is_set():
                differences.append(float((lm.model(ids).logits - wanted).abs().max()))

        thread = threading.Thread(target=call)
        thread.start()
        try:
            for _ in range(10):
                assert in_one_batch(lm, MIXED) == steered
                assert torch.equal(lm.capture(PROMPTS[0], [1])[0][Site(1)], read[0][Site(1)])
                assert [lm.generate(text, EMPHASIS, max_new_tokens=3)[0].token_ids for text in PROMPTS] == emphasized
        finally:
            stop.set()
            thread.join()
        assert differences
        assert max(differences) < 1e-9

    def test_learning_and_its_like_wait_for_their_turn(self, lm: LM) -> None:
        """`read_groups` is under all of `learn_*`; it must not run while another thread steers."""
        entered, done = threading.Event(), threading.Event()
        order: list[str] = []

        def read() -> None:
            entered.set()
            lm.capture(PROMPTS[0], [1])
            order.append("read")
            done.set()

        with lm.steered(ALL):
            thread = threading.Thread(target=read)
            thread.start()
            entered.wait()
            assert not done.wait(0.2)
            lm.model(ids_of(lm, PROMPTS[0]))
            order.append("steered")
        thread.join()
        assert order == ["steered", "read"]


# ---- planted faults ----------------------------------------------------------------------------------------------


class TestPlantedFaults:
    @pytest.mark.parametrize("name", list(RUNS))
    def test_a_decoder_whose_hooks_dont_fire(self, lm: LM, name: str) -> None:
        with faults.deaf(lm.layout.decoder), pytest.raises(TrimtabError, match=r"hooks|didn't run"):
            ALL_RUNS[name](lm, ALL)

    @pytest.mark.parametrize("name", [*RUNS, "rejection", "capture"])
    @pytest.mark.parametrize("kind", ["residual", "block_input", "mlp", "attention", "heads", "neurons"])
    def test_a_site_whose_hook_doesnt_fire(self, lm: LM, name: str, kind: str) -> None:
        from trimtab.engines.transformers.places import place

        where = place(lm.layout, Site(2, kind))
        vector = torch.ones(where.size, dtype=torch.float64)
        steering = Steering((Edit(Site(2, kind), Add(vector), Positions.all()),))
        run = ALL_RUNS[name] if name != "capture" else lambda lm, _: lm.capture(PROMPTS, [Site(2, kind)])
        run(lm, steering)
        with faults.deaf(where.module), pytest.raises(TrimtabError, match="didn't run"):
            run(lm, steering)

    @pytest.mark.parametrize("name", list(DECODING))
    @pytest.mark.parametrize("which", [1, 3, NEW - 1])
    def test_a_step_that_is_swallowed(self, lm: LM, name: str, which: int) -> None:
        """One pass runs past the hooks, in the midst of an answer or at its end."""
        DECODING[name](lm, ALL)
        with faults.deaf(lm.layout.decoder, range(which, which + 1)), pytest.raises(TrimtabError, match="hooks"):
            DECODING[name](lm, ALL)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_a_step_that_is_swallowed_in_every_family(self, family: str) -> None:
        lm = tiny.tiny(family)
        generated(lm, GENERATED)
        with faults.deaf(lm.layout.decoder, range(2, 3)), pytest.raises(TrimtabError, match="hooks"):
            generated(lm, GENERATED)
        with faults.deaf(lm.layout.blocks[1]), pytest.raises(TrimtabError, match="didn't run"):
            generated(lm, GENERATED)

    def test_a_hook_that_somebody_takes_away(self, lm: LM) -> None:
        block: Any = lm.layout.blocks[1]
        with lm.steered(ALL):
            lm.model(ids_of(lm, PROMPTS[0]))
            block._forward_hooks.clear()
            with pytest.raises(TrimtabError, match=r"hook was taken away"):
                lm.model(ids_of(lm, PROMPTS[0]))

    def test_a_part_that_runs_twice(self, lm: LM) -> None:
        block: Any = lm.layout.blocks[1]
        generated(lm, ALL)
        lm.layout.decoder.layers[2] = block
        with pytest.raises(TrimtabError, match="ran 2 times"):
            lm.generate(PROMPTS[0], ALL, max_new_tokens=2)

    def test_a_part_that_computes_other_tokens(self, lm: LM) -> None:
        block: Any = lm.layout.blocks[1]
        own = block.forward
        generated(lm, ALL)
        block.forward = lambda x, *args, **kwargs: own(x, *args, **kwargs)[:, :-1]
        with pytest.raises(TrimtabError, match="which belongs to which can't be determined"):
            lm.generate(PROMPTS[0], ALL, max_new_tokens=2)

    def test_nothing_at_all_ran(self, lm: LM) -> None:
        other = tiny.tiny("llama", seed=1)
        with pytest.raises(TrimtabError, match="nothing was steered inside"), lm.steered(ALL):
            other.model(ids_of(lm, PROMPTS[0]))

    def test_an_error_of_ones_own_is_told_as_it_is(self, lm: LM) -> None:
        with pytest.raises(ZeroDivisionError), lm.steered(ALL):
            raise ZeroDivisionError

    @pytest.mark.parametrize("rejection", [False, True])
    def test_an_attention_that_doesnt_ask_the_interface(self, lm: LM, rejection: bool) -> None:
        attention: Any = lm.layout.blocks[2].self_attn
        rejects = Rejection(beta=0.0) if rejection else False
        lm.generate(PROMPTS[0], EMPHASIS, max_new_tokens=3, rejection=rejects)
        with faults.own_attention(attention), pytest.raises(TrimtabError, match="attention of layer 2"):
            lm.generate(PROMPTS[0], EMPHASIS, max_new_tokens=3, rejection=rejects)

    def test_emphasis_in_the_stepping_batch(self, lm: LM) -> None:
        stepped(lm, EMPHASIS)
        with faults.own_attention(lm.layout.blocks[2].self_attn), pytest.raises(TrimtabError, match="layer 2"):
            stepped(lm, EMPHASIS)

    def test_emphasis_over_a_decoder_whose_hooks_dont_fire(self, lm: LM) -> None:
        with faults.deaf(lm.layout.decoder), pytest.raises(TrimtabError, match="bypassed trimtab's hooks"):
            lm.generate(PROMPTS[0], EMPHASIS, max_new_tokens=3)

    @pytest.mark.parametrize("schedule", ["optimistic", "fused"])
    def test_rejection_over_a_cache_that_isnt_written_to(self, lm: LM, schedule: str) -> None:
        rejection = Rejection(beta=0.0, schedule=schedule)
        lm.generate(PROMPTS[0], EMPHASIS, max_new_tokens=3, rejection=rejection)
        with faults.forgetful(lm.model), pytest.raises(TrimtabError, match="cache"):
            lm.generate(PROMPTS[0], EMPHASIS, max_new_tokens=3, rejection=rejection)

    def test_gates_that_arent_read(self, lm: LM) -> None:
        deeper = ALL.at(Positions.from_last_prompt_token()).when(Threshold(Site(3), direction(4), -1e9))
        before = ALL.when(Threshold(Site(0), direction(4), -1e9))
        for steering, block in ((deeper, 3), (before, 0)):
            generated(lm, steering)
            for run in (generated, stepped, inside_steered):
                with faults.deaf(lm.layout.blocks[block]), pytest.raises(TrimtabError, match="didn't run"):
                    run(lm, steering)


# ---- what is told ------------------------------------------------------------------------------------------------


class TestCounts:
    @pytest.mark.parametrize("new", [1, 2, 9, 20])
    def test_doses_count_the_tokens_that_were_steered(self, lm: LM, new: int) -> None:
        length = len(lm.encode(PROMPTS[1]))
        rules = {
            Positions.all(): length + new - 1,
            Positions.generated(): new - 1,
            Positions.from_last_prompt_token(): new,
            Positions.all_but_first(): length + new - 2,
            Positions.opening(3): min(3, new),
            Positions.prompt(): length,
        }
        for rule, wanted in rules.items():
            steering = Steering((Edit(Site(1), Add(direction(1, 0.1)), rule),))
            (alone,) = lm.generate(PROMPTS[1], steering, max_new_tokens=new)
            assert [dose.tokens for dose in alone.applied.doses] == ([wanted] if wanted else []), rule
            (other,) = lm.generate(PROMPTS[1], steering, max_new_tokens=new, **by_transformers())
            assert [dose.tokens for dose in other.applied.doses] == ([wanted] if wanted else []), rule

    def test_a_row_that_has_ended_counts_no_more(self, lm: LM) -> None:
        answers = lm.generate(PROMPTS, ALL, max_new_tokens=20)
        end = answers[0].token_ids[3]
        lm.model.generation_config.eos_token_id = end
        for answer, text in zip(lm.generate(PROMPTS, ALL, max_new_tokens=20), PROMPTS, strict=True):
            wanted = len(lm.encode(text)) + len(answer.token_ids) - 1
            assert [dose.tokens for dose in answer.applied.doses] == [wanted]


def test_a_seed_is_of_one_call(lm: LM) -> None:
    """Sampling with a seed leaves the caller's random numbers as they were."""
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    first = lm.generate(PROMPTS, ALL, max_new_tokens=NEW, do_sample=True, seed=7)
    assert torch.equal(torch.rand(3), wanted)
    again = lm.generate(PROMPTS, ALL, max_new_tokens=NEW, do_sample=True, seed=7)
    assert [x.token_ids for x in first] == [x.token_ids for x in again]
