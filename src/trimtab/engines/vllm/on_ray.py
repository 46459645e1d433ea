"""Engines as Ray actors: each is a complete engine in one process, on any machine of the cluster.

The engine runs in the actor's own process. If an actor is killed, its engine dies with it, and no process is left that
holds a GPU or memory.
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

FORWARDED_PREFIXES = ("TRIMTAB_", "VLLM_")
"""Environment variables with these prefixes are passed on to every engine, including those on other machines."""
SPREAD = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")
STARTS = 3
"""How often starting a cluster on this machine is tried: Ray allows 30 seconds, which a busy machine can exceed."""
CHECK_INTERVAL = 60.0
"""While no call returns, the cluster is checked at this interval, in seconds, for room for at least one engine."""


@dataclass(frozen=True)
class EngineInfo:
    """The description of an engine for its callers; the same for all engines of a model, except for `process`."""

    name: str
    identity: ModelId
    runs_in: dict[str, str]
    layout: Sizes
    tokenizer: Any
    link: Any
    process: str

    def check_same(self, other: EngineInfo) -> None:
        """Raises `TrimtabError` if another engine has a different model."""
        for what in ("identity", "runs_in", "layout"):
            here, there = getattr(self, what), getattr(other, what)
            if here != there:
                raise TrimtabError(
                    f"the engines don't have the same model: {other.process} has {there}, {self.process} {here}; put"
                    " the same files on all machines of the cluster"
                )


@dataclass(frozen=True)
class RemoteError:
    """Returned instead of a result: the `TrimtabError` that an engine raised, which Ray would wrap in its own text."""

    error: TrimtabError


class Replica:
    """The actor: it loads an engine when `hello` is called, and then runs the calls that it receives."""

    def __init__(self, model: str | None, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        os.environ.update({**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
        self.model, self.options = model, dict(options)
        self.lm: Any = None

    def ask(self, method: str, arguments: Sequence[Any]) -> Any:
        """The result of a method; `RemoteError` if it raises a `TrimtabError`."""
        try:
            return getattr(self, method)(*arguments)
        except TrimtabError as error:
            return RemoteError(error)

    def hello(self) -> EngineInfo:
        from trimtab.engines.vllm.lm import VllmLM

        self.lm = lm = VllmLM.load(self.model, **self.options)
        process = f"process {os.getpid()} on {socket.gethostname()}"
        tokenizer = lm.llm.get_tokenizer()
        return EngineInfo(lm.name, lm.identity, lm.runs_in, lm.layout, tokenizer, lm._link, process)

    def run(self, requests: Sequence[Request], decoding: Decoding, indices: Sequence[int]) -> Any:
        return self.lm.run(requests, decoding, indices)

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
    """The Ray cluster that the engines run on.

    It is the cluster that this process is connected to, or that `$RAY_ADDRESS` names or `ray start` created on this
    machine; otherwise one is started here, which ends with this process.
    """

    def __init__(self, model: str | None, count: int, options: Mapping[str, Any]) -> None:
        """Store the options, without starting anything. Raises `TrimtabError` for ones that aren't supported."""
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
        self.gpus: int | None = None  # per engine, once the cluster is known

    def connect(self) -> None:
        """Connect to the cluster, or start one.

        Without GPUs, an engine takes one core, and engines on one machine share its memory.

        Raises:
            TrimtabError: There is no cluster and none can be started, or it doesn't have room for all engines.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage reports unless the user enables them
        import ray

        for left in reversed(range(STARTS if not ray.is_initialized() else 0)):
            try:
                ray.init(log_to_driver=False, logging_level="ERROR")
                silence()
                break
            except Exception as error:  # a plain `Exception` if a cluster doesn't start in time
                ray.shutdown()
                if not left or isinstance(error, ConnectionError):
                    raise TrimtabError(f"can't connect to Ray: {_line(error)}") from error
        self.gpus = gpus_per_engine(ray.cluster_resources(), self.count)

    def options_of(self, number: int) -> dict[str, Any]:
        """An engine's options. Seeds differ, or all engines would draw the same samples for unseeded requests."""
        options = self.options | {"seed": seed_at(self.options.get("seed") or 0, number) % 2**31}
        return options if self.gpus else options | cpu_options(options, os.environ, self.count)

    def start(self) -> Any:
        """An actor that hasn't loaded its engine yet."""
        import ray

        if self.gpus is None:
            self.connect()
        options = self.options_of(self.started)
        self.started += 1
        environment = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED_PREFIXES)}
        actor = ray.remote(Replica).options(num_cpus=1, num_gpus=self.gpus, scheduling_strategy="SPREAD")
        return actor.remote(self.model, options, environment)

    def ask(self, engine: Any, method: str, arguments: Sequence[Any]) -> Any:
        return engine.ask.remote(method, arguments)

    def wait(self, answers: Sequence[Any]) -> Any:
        import ray

        while True:
            ready, _ = ray.wait(list(answers), num_returns=1, timeout=CHECK_INTERVAL)
            if ready:
                return ready[0]
            gpus_per_engine(ray.cluster_resources(), 1)

    def take(self, answer: Any) -> Any:
        """Raises `LostEngine` if the engine is gone, and `TrimtabError` if it refused the call or failed."""
        import ray

        from trimtab.engines.vllm.lm import EngineDied

        try:
            value = ray.get(answer)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise TrimtabError(f"an engine failed: {type(cause).__name__}: {_line(cause)}") from error
        except ray.exceptions.RayError as error:
            raise LostEngine(loss_reason(error)) from error
        if isinstance(value, RemoteError):
            if isinstance(value.error, EngineDied):
                raise LostEngine(str(value.error))
            raise value.error
        return value

    def stop(self, engine: Any) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(engine, no_restart=True)


def silence() -> None:
    """Keep Ray's messages about dead actors off standard output, which is for results; trimtab reports them itself."""
    from ray._private import worker

    worker._worker_logs_enabled = False


def gpus_per_engine(resources: Mapping[str, float], count: int) -> int:
    """The number of GPUs per engine, for a cluster with these total resources.

    Raises `TrimtabError` if there isn't room for `count` engines; Ray would wait forever for it.
    """
    what = "GPU" if resources.get("GPU") else "CPU"
    if resources.get(what, 0) < count:
        raise TrimtabError(
            f"the Ray cluster has {resources.get(what, 0):g} {what}s, and {count} replicas need one each"
        )
    return 1 if what == "GPU" else 0


def loss_reason(error: Exception) -> str:
    """Why an engine is gone, by the class of Ray's exception, since its messages are pages long."""
    words = {
        "OutOfMemoryError": "its machine ran out of memory, and Ray ended it",
        "ActorUnavailableError": "its machine can't be reached",
        "NodeDiedError": "its machine is gone",
        "ObjectLostError": "its results were lost with its machine",
    }
    return next((words[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in words), "its process ended")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
