"""Many prompts over many engines: Ray Data hands them out, and answers come back in the prompts' order.

Each worker has a whole engine of its own, on whatever machine of the cluster Ray starts it. A model that needs several
GPUs is for vLLM's own Ray executor instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.engines.answer import Applied, Generation
from trimtab.engines.transformers.default_model import NAME
from trimtab.engines.vllm.versions import check_version
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.steering_file import steering_from_bytes, steering_to_bytes
from trimtab.steering import Steering
from trimtab.text.chat import Prompt


@dataclass(frozen=True)
class RayEngines:
    """So many engines of a model, which start when something is generated and end when it is done.

    `options` are those of `VllmLM.load`. The cluster is the one that this process is connected to, or that
    `$RAY_ADDRESS` names or `ray start` made on this machine; otherwise one is started here.
    """

    model: str | None
    workers: int
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_version()
        if find_spec("ray") is None:
            raise TrimtabError("spreading prompts over engines needs Ray: pip install 'ray[data]'")
        if isinstance(self.workers, bool) or not isinstance(self.workers, int) or self.workers < 1:
            raise TrimtabError(f"the number of engines is a whole number from 1 up, got {self.workers!r}")
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"):
            if self.options.get(name, 1) != 1:
                raise UnsupportedError(
                    f"each engine has one worker here, so {name} can't be given; for a model that is spread over GPUs"
                    " use LM.load(…, engine='vllm', distributed_executor_backend='ray')"
                )

    @property
    def name(self) -> str:
        """The model's, as its answers name it."""
        if self.model is None:
            return NAME
        return Path(self.model).resolve().name if Path(self.model).is_dir() else self.model

    def generate(
        self,
        prompts: Sequence[Prompt],
        steering: Steering | None = None,
        *,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
        **given: Any,
    ) -> list[Generation]:
        """As `VllmLM.generate`, of one steering for all; an engine takes `batch_size` prompts at a time."""
        import ray
        from ray.data import ActorPoolStrategy

        if not ray.is_initialized():
            ray.init(log_to_driver=False)
        gpus = self.check_room(ray.cluster_resources())
        rows = [{"number": i, "prompt": json.dumps(prompt)} for i, prompt in enumerate(prompts)]
        size = max(1, min(batch_size, math.ceil(len(rows) / self.workers)))
        data = ray.data.from_items(rows, override_num_blocks=math.ceil(len(rows) / size))
        answered = data.map_batches(
            Answers,
            fn_constructor_args=(self.model, self.options, steering and steering_to_bytes(steering), given),
            compute=ActorPoolStrategy(size=self.workers),
            batch_size=size,
            batch_format="numpy",
            num_cpus=1,
            num_gpus=gpus,
        )
        found: dict[int, Generation] = {}
        for row in answered.iter_rows():
            found[int(row["number"])] = answer_from(row["answer"])
            if progress is not None:
                progress(len(found), len(rows))
        return [found[i] for i in range(len(rows))]

    def check_room(self, cluster: Mapping[str, float]) -> int:
        """How many GPUs an engine takes. Raises `TrimtabError` where Ray would wait for room for ever."""
        what = "GPU" if cluster.get("GPU") else "CPU"
        if cluster.get(what, 0) < self.workers:
            raise TrimtabError(
                f"the Ray cluster has {cluster.get(what, 0):g} {what}s, one for each engine, and {self.workers} engines"
                " are asked for"
            )
        return 1 if what == "GPU" else 0


class Answers:
    """What a worker of Ray's does: it starts an engine, and answers one batch after the other."""

    def __init__(
        self, model: str | None, options: dict[str, Any], steering: bytes | None, given: dict[str, Any]
    ) -> None:
        from trimtab.engines.vllm.lm import VllmLM

        self.given = given
        self.refused: str = ""
        try:
            self.lm = VllmLM.load(model, **options)
            self.steering: Steering | None = None if steering is None else steering_from_bytes(steering, "the steering")
        except TrimtabError as error:
            self.refused = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        prompts = [json.loads(prompt) for prompt in batch["prompt"]]
        try:
            if self.refused:
                raise TrimtabError(self.refused)
            answers = [asdict(one) for one in self.lm.generate(prompts, self.steering, **self.given)]
        except TrimtabError as error:  # Ray would wrap it in a text of its own
            answers = [{"refused": str(error)}] * len(prompts)
        return {"number": batch["number"], "answer": [json.dumps(answer) for answer in answers]}


def answer_from(text: str) -> Generation:
    """The answer that a worker wrote. Raises `TrimtabError` with the reason where it refused."""
    plain = json.loads(text)
    if "refused" in plain:
        raise TrimtabError(plain["refused"])
    logprobs, applied = plain["logprobs"], plain["applied"]
    plain |= {
        "token_ids": tuple(plain["token_ids"]),
        "applied": Applied(tuple(applied["edits"]), ()),
        "logprobs": None if logprobs is None else tuple(logprobs),
    }
    return Generation(**plain)
