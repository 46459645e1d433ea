"""Engines as Ray's actors, each a whole one in one process, on whatever machine of the cluster Ray starts it.

The engine runs in the actor's own process. So an actor that is killed takes its engine with it, and leaves no process
that holds a GPU or memory.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.engines.contract import TOKENS_PER_BATCH, Sizes
from trimtab.engines.request import Batch, Choice, Decoding, NextToken, Request, Text
from trimtab.engines.vllm.memory import cpu_options
from trimtab.engines.vllm.replicas import LostEngine
from trimtab.engines.vllm.sampling import seed_at
from trimtab.engines.vllm.versions import check_version
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import ModelId, Site, Steering

PASSED_ON = ("TRIMTAB_", "VLLM_")
"""Variables of this process that begin so are those of every engine, on other machines too."""
SPREAD = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
STARTS = 3
"""So often a cluster is started on this machine: Ray gives it 30 seconds, which aren't enough for a busy one."""
PATIENCE = 60.0
"""Seconds after which the cluster is queried again whether there is room, while no engine runs."""


@dataclass(frozen=True)
class Hello:
    """What an engine is, for whoever asks it things; the same for all engines of a model but for `process`."""

    name: str
    identity: ModelId
    runs_in: dict[str, str]
    layout: Sizes
    tokenizer: Any
    link: Any
    process: str

    def check_same(self, other: Hello) -> None:
        """Raises `TrimtabError` where another engine's model isn't this one's."""
        for what in ("identity", "runs_in", "layout"):
            here, there = getattr(self, what), getattr(other, what)
            if here != there:
                raise TrimtabError(
                    f"the engines don't have the same model: {other.process} has {there}, {self.process} {here}; put"
                    " the same files on all machines of the cluster"
                )


@dataclass(frozen=True)
class Refused:
    """Instead of an answer: the error of ours that an engine raised. Ray would wrap it in a text of its own."""

    error: TrimtabError


class Replica:
    """What an actor does: it loads an engine when it is greeted, and then runs the calls that it gets."""

    def __init__(self, model: str | None, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        os.environ.update({**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
        self.model, self.options = model, dict(options)
        self.lm: Any = None

    def ask(self, method: str, arguments: Sequence[Any]) -> Any:
        """What comes of a method; `Refused` where it raises an error of trimtab's."""
        try:
            return getattr(self, method)(*arguments)
        except TrimtabError as error:
            return Refused(error)

    def hello(self) -> Hello:
        from trimtab.engines.vllm.lm import VllmLM

        self.lm = lm = VllmLM.load(self.model, **self.options)
        process = f"process {os.getpid()} on {socket.gethostname()}"
        tokenizer = lm.llm.get_tokenizer()
        return Hello(lm.name, lm.identity, lm.runs_in, lm.layout, tokenizer, lm._link, process)

    def run(self, requests: Sequence[Request], decoding: Decoding, places: Sequence[int]) -> Any:
        return self.lm.run(requests, decoding, places)

    def read(self, groups: Sequence[Sequence[Text]], sites: Sequence[Site], steering: Steering | None) -> list[Batch]:
        return list(self.lm._read(groups, sites, TOKENS_PER_BATCH, steering))

    def next_logprobs(
        self, choices: Sequence[Choice], steerings: Sequence[Steering | None], batch_size: int
    ) -> list[NextToken]:
        tokens: list[NextToken] = self.lm._next_logprobs(choices, steerings, batch_size, None)
        return tokens

    def answer_nlls(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        nlls: list[float] = self.lm.answer_nlls(texts)
        return nlls


class RayCluster:
    """The cluster that this process is connected to, or that `$RAY_ADDRESS` names or `ray start` made on this machine;
    otherwise one is started here. It ends with this process."""

    def __init__(self, model: str | None, count: int, options: Mapping[str, Any]) -> None:
        """Nothing is started yet. Raises `TrimtabError` for what can't be had."""
        check_version()
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise TrimtabError(f"the number of replicas is a whole number from 1 up, got {count!r}")
        for name in SPREAD:
            if options.get(name, 1) != 1:
                raise UnsupportedError(
                    f"each replica is an engine of one worker, so {name} can't be given with replicas; for a model that"
                    " is spread over GPUs use LM.load(…, engine='vllm', distributed_executor_backend='ray')"
                )
        if find_spec("ray") is None:
            raise TrimtabError("replicas need Ray, which isn't installed here: pip install ray")
        self.model = str(Path(model).resolve()) if model is not None and Path(model).exists() else model
        self.count = count
        self.options = dict(options)
        self.started = 0
        self.gpus: int | None = None  # how many an engine takes, once the cluster is known

    def connect(self) -> None:
        """Connect to the cluster, or start one. Raises `TrimtabError` where it can't, or hasn't room for all engines.

        Without GPUs an engine takes a core, and so many on one machine share its memory.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody requested reports on the use
        import ray

        for left in reversed(range(STARTS if not ray.is_initialized() else 0)):
            try:
                ray.init(log_to_driver=False, logging_level="ERROR")
                silence()
                break
            except Exception as error:  # a bare one where a cluster didn't start in time
                ray.shutdown()
                if not left or isinstance(error, ConnectionError):
                    raise TrimtabError(f"Ray can't be had: {_line(error)}") from error
        self.gpus = check_room(ray.cluster_resources(), self.count)

    def options_of(self, number: int) -> dict[str, Any]:
        """What an engine is loaded with; its own seed, or all would draw the same samples for unseeded requests."""
        options = self.options | {"seed": seed_at(self.options.get("seed") or 0, number) % 2**31}
        return options if self.gpus else options | cpu_options(options, os.environ, self.count)

    def start(self) -> Any:
        """An actor without its engine yet."""
        import ray

        if self.gpus is None:
            self.connect()
        options = self.options_of(self.started)
        self.started += 1
        environment = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
        actor = ray.remote(Replica).options(num_cpus=1, num_gpus=self.gpus, scheduling_strategy="SPREAD")
        return actor.remote(self.model, options, environment)

    def ask(self, engine: Any, method: str, arguments: Sequence[Any]) -> Any:
        return engine.ask.remote(method, arguments)

    def wait(self, answers: Sequence[Any]) -> Any:
        import ray

        while True:
            came, _ = ray.wait(list(answers), num_returns=1, timeout=PATIENCE)
            if came:
                return came[0]
            check_room(ray.cluster_resources(), 1)

    def take(self, answer: Any) -> Any:
        """Raises `LostEngine` for an engine that is gone, and `TrimtabError` for what it refused or failed with."""
        import ray

        from trimtab.engines.vllm.lm import EngineDied

        try:
            value = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise TrimtabError(f"an engine failed: {type(cause).__name__}: {_line(cause)}") from error
        except ray.exceptions.RayError as error:
            raise LostEngine(lost(error)) from error
        if isinstance(value, Refused):
            if isinstance(value.error, EngineDied):
                raise LostEngine(str(value.error))
            raise value.error
        return value

    def stop(self, engine: Any) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(engine, no_restart=True)


def silence() -> None:
    """No pages of Ray's on standard output, where results go, when an actor dies: it is said in our own words."""
    from ray._private import worker

    worker._worker_logs_enabled = False


def check_room(resources: Mapping[str, float], count: int) -> int:
    """How many GPUs an engine takes, of a cluster with these resources in all.

    Raises `TrimtabError` where it hasn't room for so many engines, for which Ray would wait for ever.
    """
    what = "GPU" if resources.get("GPU") else "CPU"
    if resources.get(what, 0) < count:
        raise TrimtabError(
            f"the Ray cluster has {resources.get(what, 0):g} {what}s, one for each replica, and {count} are requested"
        )
    return 1 if what == "GPU" else 0


def lost(error: Exception) -> str:
    """Why an engine is gone, from what Ray raises: by its class, since its texts are pages."""
    words = {
        "OutOfMemoryError": "its machine ran out of memory, and Ray ended it",
        "ActorUnavailableError": "its machine can't be reached",
        "NodeDiedError": "its machine is gone",
        "ObjectLostError": "what it answered is gone, with its machine",
    }
    return next((words[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in words), "its process ended")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
