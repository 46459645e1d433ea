"""`LM` on several vLLM engines, each with the whole model: requests are spread over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trimtab.engines.answer import Generation
from trimtab.engines.request import Batch, Choice, Decoding, NextToken, Request, Text
from trimtab.engines.vllm.frontend import NAMES
from trimtab.engines.vllm.lm import VllmLM
from trimtab.engines.vllm.on_ray import EngineInfo, RayCluster
from trimtab.engines.vllm.reading import batches
from trimtab.engines.vllm.replicas import Cluster, Replicas, split_indices
from trimtab.errors import TrimtabError
from trimtab.steering import ModelId, Site, Steering
from trimtab.text.chat import Template
from trimtab.text.templates import with_keywords


class ReplicatedLM(VllmLM):
    """A model in several vLLM engines, on the machines of a Ray cluster: `LM.load(name, engine="vllm", replicas=8)`.

    Answers are those of `VllmLM`, regardless of which engine computes them: each request is sampled with its own seed,
    and what is read together depends only on the texts. A lost engine is replaced, and its call is repeated.
    """

    def __init__(self, cluster: Cluster, count: int, *, template: Template | None = None) -> None:
        self._first: EngineInfo | None = None
        self._replicas = Replicas(cluster, count, self._check_engine)
        self._replicas.open()
        assert self._first is not None
        self.name = self._first.name
        try:
            self.tokenizer = with_keywords(self._first.tokenizer, template)
        except TrimtabError:
            self.close()
            raise
        self.layout = self._first.layout
        self._link = self._first.link

    def _check_engine(self, engine_info: EngineInfo) -> None:
        if self._first is None:
            self._first = engine_info
        self._first.check_same(engine_info)

    @classmethod
    def start(
        cls, name: str | Path | None, replicas: int, *, template: Template | None = None, **options: Any
    ) -> ReplicatedLM:
        """Start the engines. Raises `TrimtabError` as `VllmLM.load` does, and if the cluster has no room."""
        cluster = RayCluster(None if name is None else str(name), replicas, options)
        cluster.connect()
        return cls(cluster, replicas, template=template)

    def __repr__(self) -> str:
        size = f"{self.layout.layers} layers, width {self.layout.width}"
        return f"ReplicatedLM({self.name}, {size}, {self._replicas.count} replicas)"

    def close(self) -> None:
        self._replicas.close()

    @property
    def _engine_info(self) -> EngineInfo:
        assert self._first is not None
        return self._first

    @property
    def runs_in(self) -> dict[str, str]:
        """The `dtype` that the model computes in, and the kind of `device`."""
        return self._engine_info.runs_in

    @property
    def identity(self) -> ModelId:
        """Equal to `LM.identity`; each engine has computed it from its weights, and all have the same."""
        return self._engine_info.identity

    def register(self, name: str, steering: Steering, *, transfer: bool = False) -> None:
        """Like `VllmLM.register`; the engines receive a steering with the requests that name it."""
        self.check(steering, transfer=transfer)
        NAMES.register(name, steering)

    def unregister(self, name: str) -> None:
        NAMES.unregister(name)

    # ---- requests ----------------------------------------------------------------------------------------

    def run(
        self, requests: Sequence[Request], decoding: Decoding, indices: Sequence[int] | None = None
    ) -> list[list[Generation]]:
        """Like `VllmLM.run`. `decoding.progress` is called as portions of the requests are completed."""
        quiet = replace(decoding, progress=None)
        numbers = range(len(requests)) if indices is None else indices
        return self._spread(
            "run",
            len(requests),
            lambda part: ([requests[i] for i in part], quiet, [numbers[i] for i in part]),
            decoding.progress,
        )

    def _next_logprobs(
        self, choices: Sequence[Choice], steerings: Sequence[Steering | None], batch_size: int, progress: Any
    ) -> list[NextToken]:
        return self._spread(
            "next_logprobs",
            len(choices),
            lambda part: ([choices[i] for i in part], [steerings[i] for i in part], batch_size),
            progress,
        )

    def answer_nlls(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        return self._spread("answer_nlls", len(texts), lambda part: ([texts[i] for i in part],))

    def _spread(
        self, method: str, count: int, portion: Callable[[range], tuple[Any, ...]], progress: Any = None
    ) -> list[Any]:
        """The results of `count` requests, in order; `portion` returns a call's arguments for some of the requests."""
        parts = split_indices(count, self._replicas.count)
        done = 0

        def on_result(number: int) -> None:
            nonlocal done
            done += len(parts[number])
            if progress is not None:
                progress(done, count)

        values: dict[int, Any] = {}
        answers = self._replicas.run_portions(method, [portion(part) for part in parts], on_result)
        for part, answer in zip(parts, answers, strict=True):
            values.update(zip(part, answer, strict=True))
        return [values[i] for i in range(count)]

    def _read(
        self, groups: Sequence[Sequence[Text]], sites: Sequence[Site], tokens: int, steering: Steering | None
    ) -> Iterator[Batch]:
        """Read in batches that depend only on the texts, in a fixed order, so that sums are equal bit for bit."""
        chosen = list(batches(groups, tokens, 1))
        portions = [([groups[g] for g in part], sites, steering) for part in chosen]
        for part, answer in zip(chosen, self._replicas.run_portions("read", portions), strict=True):
            for batch in answer:
                yield Batch([part[g] for g in batch.groups], batch.values)
