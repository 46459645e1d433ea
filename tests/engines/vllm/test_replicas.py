"""Work spread over engines that are lost now and then: what comes back, in which order, and when it is given up.

Neither Ray nor vLLM: engines are tiny models of transformers', on a cluster that answers and loses in an order of its
own.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from batches import steering
from tiny import LAYERS, WIDTH, direction

from trimtab import LM, Add, Pair, Positions, Site, Steering, TrimtabError, UnsupportedError, learn_caa
from trimtab.engines.contract import Sizes
from trimtab.engines.request import Choice, Decoding, Request, Text
from trimtab.engines.vllm import on_ray, replicas
from trimtab.engines.vllm.frontend import Link
from trimtab.engines.vllm.memory import cpu_options
from trimtab.engines.vllm.on_ray import EngineInfo, RayCluster, Replica, gpus_per_engine
from trimtab.engines.vllm.replicas import AHEAD, RETRIES, LostEngine, LostEngineWarning, Replicas, split_indices
from trimtab.engines.vllm.replicated import ReplicatedLM
from trimtab.engines.vllm.sampling import seed_at

Do = Callable[[str, Sequence[Any]], Any]


@dataclass
class Shaky:
    """A cluster whose answers come in a random order, and whose engines are lost when `loses` says so.

    `loses(method, arguments, engine)` is called for everything that is asked; `do` makes the answer.
    """

    do: Do
    loses: Callable[[str, Sequence[Any], int], bool] = lambda *_: False
    seed: int = 0
    running: set[int] = field(default_factory=set)
    most: int = 0  # engines at a time
    started: int = 0
    interrupt: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.answers: dict[int, Any] = {}

    def start(self) -> int:
        self.started += 1
        self.running.add(self.started)
        self.most = max(self.most, len(self.running))
        return self.started

    def ask(self, engine: int, method: str, arguments: Sequence[Any]) -> int:
        assert engine in self.running
        number = len(self.answers)
        arguments = pickle.loads(pickle.dumps(arguments))  # as on its way to another process
        try:
            lost = self.loses(method, arguments, engine)
            self.answers[number] = LostEngine("its process ended") if lost else self.do(method, arguments)
        except TrimtabError as error:
            self.answers[number] = error
        return number

    def wait(self, answers: Sequence[int]) -> int:
        if self.interrupt:
            self.interrupt = False
            raise KeyboardInterrupt
        return self.random.choice(answers)

    def take(self, answer: int) -> Any:
        value = self.answers[answer]
        if isinstance(value, Exception):
            raise value
        return value

    def stop(self, engine: int) -> None:
        self.running.discard(engine)


def squares(method: str, arguments: Sequence[Any]) -> Any:
    if method == "hello":
        return "hello"
    if arguments[0] < 0:
        raise UnsupportedError(f"{arguments[0]} is below 0")
    return arguments[0] ** 2


@pytest.fixture
def numbers() -> list[tuple[int]]:
    return [(n,) for n in range(30)]


@pytest.mark.filterwarnings("ignore::trimtab.engines.vllm.replicas.LostEngineWarning")
class TestReplicas:
    @pytest.mark.parametrize("seed", range(6))
    def test_everything_is_answered_in_order_whoever_is_lost(self, seed: int, numbers: list[tuple[int]]) -> None:
        chance = random.Random(seed + 100)
        cluster = Shaky(squares, lambda method, *_: method != "hello" and chance.random() < 0.25, seed)
        engines, came = Replicas(cluster, 3), list[int]()
        got = []
        for value in engines.run_portions("square", numbers, came.append):
            got.append(value)
            assert len(set(came)) - len(got) < AHEAD * 3
        assert got == [n**2 for n in range(30)]
        assert sorted(came) == list(range(30))
        assert cluster.most == 3
        assert engines.lost == cluster.started - len(cluster.running) > 0
        engines.close()
        assert not cluster.running

    def test_what_loses_every_engine_is_given_up(self, numbers: list[tuple[int]]) -> None:
        tries = []

        def loses(method: str, arguments: Sequence[Any], _engine: int) -> bool:
            if bad := method == "square" and arguments == (7,):
                tries.append(arguments)
            return bad

        engines = Replicas(Shaky(squares, loses), 2)
        with pytest.raises(
            TrimtabError, match=r"part 8 of 30 was lost with its engine 4 times; the last time its proc"
        ):
            list(engines.run_portions("square", numbers))
        assert len(tries) == RETRIES + 1
        assert list(engines.run_portions("square", numbers[:3])) == [0, 1, 4]  # the others go on

    def test_engines_that_never_start(self, numbers: list[tuple[int]]) -> None:
        cluster = Shaky(squares, lambda *_: True)
        with pytest.raises(
            TrimtabError, match=r"engines in a row were lost as they started; the last time its process"
        ):
            Replicas(cluster, 2).open()
        assert cluster.started <= RETRIES + 2
        assert not cluster.running
        flaky = Shaky(squares, lambda _method, _arguments, engine: engine > 1)  # one starts, and none beside it
        assert list(Replicas(flaky, 3).run_portions("square", numbers)) == [n**2 for n in range(30)]
        assert flaky.started <= 2 * (RETRIES + 3)

    def test_a_refusal_is_the_engines_own_and_ends_nothing(self, numbers: list[tuple[int]]) -> None:
        cluster = Shaky(squares)
        engines = Replicas(cluster, 2)
        with pytest.raises(UnsupportedError, match="-4 is below 0"):
            list(engines.run_portions("square", [(1,), (-4,), (2,)]))
        assert list(engines.run_portions("square", numbers)) == [n**2 for n in range(30)]
        assert cluster.started == 2

    def test_an_interrupt_ends_the_engines(self, numbers: list[tuple[int]]) -> None:
        """While it waits, and while somebody hears of what came."""

        def interrupt(_number: int) -> None:
            raise KeyboardInterrupt

        cluster = Shaky(squares)
        engines = Replicas(cluster, 2)
        dealt = engines.run_portions("square", numbers)
        assert next(dealt) == 0
        cluster.interrupt = True
        with pytest.raises(KeyboardInterrupt):
            list(dealt)
        assert not cluster.running
        with pytest.raises(KeyboardInterrupt):
            list(engines.run_portions("square", numbers, interrupt))
        assert not cluster.running
        assert list(engines.run_portions("square", numbers)) == [n**2 for n in range(30)]  # on new ones

    def test_answers_reach_who_wanted_them(self, numbers: list[tuple[int]]) -> None:
        """Two pieces of work at a time, one of which is left in the middle."""
        engines = Replicas(Shaky(squares), 2)
        left, whole = engines.run_portions("square", numbers), engines.run_portions("square", numbers[::-1])
        assert [next(left), next(whole), next(left)] == [0, 29**2, 1]
        left.close()
        assert list(whole) == [n**2 for n in range(28, -1, -1)]

    def test_one_that_differs_is_refused(self) -> None:
        def check(hello: str) -> None:
            raise TrimtabError(f"{hello} differs")

        cluster = Shaky(squares)
        with pytest.raises(TrimtabError, match="hello differs"):
            Replicas(cluster, 2, check).open()
        assert not cluster.running

    def test_a_loss_is_said(self) -> None:
        lost = iter([False, True, False, False])
        engines = Replicas(Shaky(squares, lambda *_: next(lost)), 1)
        with pytest.warns(LostEngineWarning, match=r"an engine was lost \(its process ended\)"):
            assert list(engines.run_portions("square", [(3,)])) == [9]


def test_portions() -> None:
    for count in (0, 1, 5, 256, 257, 1000):
        for several in (1, 2, 7):
            parts = split_indices(count, several)
            assert sorted(i for part in parts for i in part) == list(range(count))
            assert len(parts) >= min(count, several)
            sizes = [len(part) for part in parts] or [0]
            assert max(sizes) <= replicas.PORTION
            assert max(sizes) - min(sizes) <= 1


def test_seeds_are_a_requests_own() -> None:
    """The first is the one that was named; no two are alike, not even of lists with seeds that follow each other."""
    assert seed_at(5, 0) == 5
    seeds = {seed_at(seed, place) for seed in range(4) for place in range(50)}
    assert len(seeds) == 200
    assert max(seeds) < 2**63


PAIRS = [Pair(tiny.prompt(i, 4 + i % 3), tiny.prompt(i + 50, 5), "", "texts") for i in range(8)]


@pytest.fixture(scope="module")
def alone() -> LM:
    return tiny.tiny("llama")


@pytest.mark.filterwarnings("ignore::trimtab.engines.vllm.replicas.LostEngineWarning")
class TestReplicatedLM:
    """The whole: engines are one tiny model, whose `run` is told each request's place."""

    @pytest.fixture
    def places(self) -> list[tuple[int, int | None]]:
        """Of each request that was run, and its seed."""
        return []

    @pytest.fixture
    def spread(self, alone: LM, places: list[Any], monkeypatch: pytest.MonkeyPatch) -> Any:
        """`spread(count)` is the model over so many engines, one of which is lost at the third thing that is asked."""
        monkeypatch.setattr(replicas, "PORTION", 3)
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # which a worker sets

        def run(requests: Sequence[Request], decoding: Decoding, each: Sequence[int]) -> Any:
            places.extend((place, decoding.seed) for place in each)
            return alone.run(requests, replace(decoding, options={"do_sample": False}))

        link = Link(8, LAYERS, WIDTH, static=False, dtype=torch.float64)
        layout = Sizes(LAYERS, WIDTH, None)
        hello = EngineInfo("tiny", alone.identity, alone.runs_in, layout, alone.tokenizer, link, "process 1 on here")
        parts = {name: getattr(alone, name) for name in ("_read", "_next_logprobs", "answer_nlls")}
        worker = Replica(None, {}, {})
        worker.lm = SimpleNamespace(run=run, **parts)

        def do(method: str, arguments: Sequence[Any]) -> Any:
            return hello if method == "hello" else worker.ask(method, arguments)

        def make(count: int) -> ReplicatedLM:
            calls = iter(range(10**6))
            return ReplicatedLM(Shaky(do, lambda method, *_: method != "hello" and next(calls) == 2, count), count)

        return make

    def test_it_answers_as_the_model_alone(self, spread: Any, alone: LM, places: list[Any]) -> None:
        edited = steering((1, Add(direction(1, 4.0)), Positions.all()))
        requests = [Request(alone.encode(tiny.prompt(i, 3 + i)), edited if i % 2 else None) for i in range(11)]
        said: list[tuple[int, int]] = []
        lm = spread(2)
        decoding = Decoding(4, seed=7, batch_size=4, progress=lambda *done: said.append(done))
        assert lm.run(requests, decoding) == alone.run(requests, Decoding(4, options={"do_sample": False}))
        assert {place for place, _ in places} == set(range(11))
        assert {seed for _, seed in places} == {7}
        assert [total for _, total in said] == [11] * len(said)
        assert said[-1][0] == 11
        assert [done for done, _ in said] == sorted({done for done, _ in said})
        assert lm._replicas.lost == 1
        choices = [Choice(wanted.ids, len(wanted.ids), (5, 6)) for wanted in requests]
        for mine, other in zip(lm.next_logprobs(choices, edited), alone.next_logprobs(choices, edited), strict=True):
            assert mine.logprobs == pytest.approx(other.logprobs)
        texts = [(wanted.ids, [5, 6, 7]) for wanted in requests]
        assert lm.answer_nlls(texts) == pytest.approx(alone.answer_nlls(texts))

    @pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning")
    def test_what_is_learned_is_the_same_to_the_bit_over_any_number(self, spread: Any, alone: LM) -> None:
        texts = [[Text(alone.encode(tiny.prompt(i, 3 + i % 5)), (0, 2))] for i in range(12)]
        read = [list(spread(count).read(texts, [Site(1)], tokens_per_batch=9)) for count in (1, 2, 3)]
        assert [[batch.groups for batch in each] for each in read] == [[batch.groups for batch in read[0]]] * 3
        assert sorted(g for batch in read[0] for g in batch.groups) == list(range(12))
        assert len(read[0]) > 3
        learned = [learn_caa(spread(count), PAIRS, [1, 2]) for count in (1, 2, 3)]
        by_itself = learn_caa(alone, PAIRS, [1, 2])
        for other in learned:
            assert same(other, learned[0])
            for edit, wanted in zip(other.edits, by_itself.edits, strict=True):
                torch.testing.assert_close(edit.operation.direction, wanted.operation.direction)

    def test_it_says_what_it_cant_do(self, spread: Any, alone: LM) -> None:
        lm = spread(2)
        assert "support rejection" in lm.supports(None, "rejection")
        assert lm.supports(steering((1, Add(direction(1)), Positions.all()))) is None
        with pytest.raises(TrimtabError, match="layers"):
            lm.check(steering((LAYERS, Add(direction(1)), Positions.all())))
        with pytest.raises(UnsupportedError, match="reads the residual stream"):
            lm.read([[Text([5, 6], (0,))]], [Site(1, "heads")])
        lm.register("shout", steering((1, Add(direction(1)), Positions.all())))
        assert lm._steerings_for("shout", 1)[0].edits
        lm.unregister("shout")


def same(left: Steering, right: Steering) -> bool:
    return all(a.operation.direction.equal(b.operation.direction) for a, b in zip(left.edits, right.edits, strict=True))


class TestOnRay:
    def test_what_is_refused_before_anything_starts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(on_ray, "check_version", lambda: "0.32.0")
        monkeypatch.setattr(on_ray, "find_spec", lambda name: name)
        for count in (0, -1, True, 2.0, "2"):
            with pytest.raises(TrimtabError, match="whole number from 1 up, got"):
                RayCluster(None, count, {})  # type: ignore[arg-type]
        seeds = [RayCluster(None, 4, {"seed": 5}).options_of(number)["seed"] for number in range(4)]
        assert seeds[0] == 5
        assert len(set(seeds)) == 4  # of samples that are drawn without a seed of their own
        with pytest.raises(UnsupportedError, match="tensor_parallel_size can't be given with replicas"):
            RayCluster(None, 2, {"tensor_parallel_size": 2})
        monkeypatch.setattr(on_ray, "find_spec", lambda name: None)
        with pytest.raises(TrimtabError, match="need Ray, which isn't installed here: pip install ray"):
            RayCluster(None, 2, {})

    def test_room(self) -> None:
        with pytest.raises(TrimtabError, match="has 2 CPUs, and 3 replicas need one each"):
            gpus_per_engine({"CPU": 2.0}, 3)
        assert gpus_per_engine({"CPU": 1.0, "GPU": 8.0}, 3) == 1
        assert gpus_per_engine({"CPU": 4.0, "GPU": 0.0}, 3) == 0
        shares = [cpu_options({}, {}, count)["kv_cache_memory_bytes"] for count in (1, 4)]
        assert shares[1] == pytest.approx(shares[0] / 4, rel=0.2)  # the machine's free memory moves meanwhile

    def test_other_weights_on_another_machine_are_refused(self, alone: LM) -> None:
        layout, identity = Sizes(LAYERS, WIDTH, None), alone.identity
        here = EngineInfo("m", identity, {"dtype": "float32"}, layout, None, None, "process 1 on a")
        here.check_same(replace(here, process="process 2 on b"))
        other = replace(here, process="process 2 on b", identity=replace(identity, fingerprint="another"))
        with pytest.raises(TrimtabError, match=r"don't have the same model: process 2 on b has .*another"):
            here.check_same(other)

    def test_why_an_engine_is_gone(self) -> None:
        kinds = {name: type(name, (Exception,), {}) for name in ("ActorDiedError", "OutOfMemoryError", "NodeDiedError")}
        assert [on_ray.loss_reason(kind("pages")) for kind in kinds.values()] == [
            "its process ended",
            "its machine ran out of memory, and Ray ended it",
            "its machine is gone",
        ]

    @pytest.mark.parametrize("command", [("generate", "--prompt", "Hi"), ("eval", "inspect", "task.py")])
    def test_replicas_of_another_engine(self, trimtab: Any, command: Sequence[str]) -> None:
        ran = trimtab(*command, "--replicas", "2")
        assert ran.code == 2
        assert "--replicas spreads work over engines of vLLM, not of transformers; add --engine vllm" in ran.err
