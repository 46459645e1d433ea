"""`LM` on vLLM: the same prompts, steerings and answers, with the model in vLLM's own processes."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from trimtab.engines.answer import Applied, Generation
from trimtab.engines.arguments import steerings_for
from trimtab.engines.contract import Sizes
from trimtab.engines.language_model import LanguageModel
from trimtab.engines.meanings import check_meanings
from trimtab.engines.request import AnsweredPrompt, Batch, Choice, Decoding, NextToken, Request, Text
from trimtab.engines.resolve import PositionsByRequest, Resolved, resolve
from trimtab.engines.transformers.compat import query_heads
from trimtab.engines.transformers.default_model import NAME, default_folder
from trimtab.engines.vllm.counting import FAILURE_PREFIX
from trimtab.engines.vllm.frontend import NAMES, Link, connect, drop_unused, send
from trimtab.engines.vllm.identity import identify
from trimtab.engines.vllm.memory import cpu_options
from trimtab.engines.vllm.reading import batches, check_readable, collect_readings, params_of
from trimtab.engines.vllm.rpc import run
from trimtab.engines.vllm.sampling import check_candidates, sampling_of, seed_at
from trimtab.engines.vllm.versions import check_version
from trimtab.engines.vllm.wire import RESOLVED_KEY, Part, Wire
from trimtab.errors import TrimtabError
from trimtab.steering import Edit, ModelId, Site, Steering
from trimtab.steering.conditional import without_conditional_operation
from trimtab.steering.gates import ALWAYS
from trimtab.steering.identity import check_learned_on
from trimtab.text.chat import Template
from trimtab.text.templates import with_keywords


class EngineDied(TrimtabError, RuntimeError):
    """The engine's processes have died, or one of its workers has; load it again."""


class VllmLM(LanguageModel):
    """A model in a vLLM engine that this process starts, steered per request.

    Created by `LM.load(name, engine="vllm", …)`. What `trimtab.LM` supports and this doesn't raises `UnsupportedError`.
    The engine makes its own batches, so `batch_size` has no effect.
    """

    engine = "vllm"
    cannot: ClassVar[Mapping[str, str]] = {
        "rejection": "a step computes one row of logits per request",
        "clean_cache": "its workers cache the keys and values that they compute, including steered ones",
        "monitors": "its workers don't expose activations while they decode",
        "streaming": "it returns whole answers here; use lm.generate(…), or vllm serve, which streams",
        "steered": "the model runs in separate processes",
        "training": "the model's weights are in separate processes",
        "modules": "the model's modules are in separate processes",
        "logits": "it returns those of a few tokens only",
        "doses": "it doesn't measure them",
        "grammar": "it has its own structured outputs; vllm serve takes response_format and tools",
        "images": "it receives prompts as tokens",
    }

    def __init__(self, llm: Any, name: str, *, template: Template | None = None) -> None:
        self.llm = llm
        self.name = name
        self.tokenizer: Any = with_keywords(llm.get_tokenizer(), template)
        self._engine = llm.llm_engine
        config = self._engine.vllm_config.model_config
        text = config.hf_text_config
        self.layout: Sizes = Sizes(text.num_hidden_layers, text.hidden_size, config.max_model_len, query_heads(text))
        self._link: Link = run(connect(self._engine), self._engine)

    @classmethod
    def load(
        cls,
        name: str | Path | None = None,
        *,
        template: Template | None = None,
        replicas: int | None = None,
        **options: Any,
    ) -> VllmLM:
        """Start an engine for a Hub id, a folder or, without a name, SmolLM2-135M-Instruct.

        On a CPU the KV cache gets a quarter of the available memory, unless `kv_cache_memory_bytes`,
        `gpu_memory_utilization` or `$VLLM_CPU_KVCACHE_SPACE` is set.

        Args:
            name: A Hub id or a folder.
            template: As for `LM`.
            replicas: Start this many engines on the machines of a Ray cluster, each with the whole model, and spread
                the requests over them.
            options: vLLM's engine arguments (`tensor_parallel_size`, `dtype`, `enforce_eager` …), under vLLM's names.

        Raises:
            TrimtabError: vLLM isn't installed, its version isn't supported, or its workers can't steer.
        """
        check_version()
        for option, instead in (
            ("device", "vLLM uses the device that it was built for"),
            ("layers", "it finds the layers by itself"),
        ):
            if options.pop(option, None) is not None:
                raise TrimtabError(f"the vllm engine can't take {option}: {instead}")
        if name is not None and Path(name).suffix == ".gguf":
            raise TrimtabError("the vllm engine reads a folder or a Hub id; convert the GGUF file first")
        if options.get("dtype") is None:
            options.pop("dtype", None)
        if replicas is not None:
            from trimtab.engines.vllm.replicated import ReplicatedLM

            return ReplicatedLM.start(name, replicas, template=template, **options)
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # vLLM's saved compiled model can't be loaded on a CPU
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            options |= cpu_options(options, os.environ)
        try:
            llm = LLM(model=str(default_folder() if name is None else name), **options)
        except (ValueError, OSError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise TrimtabError(f"vLLM can't load the model {str(name or NAME)!r}: {reason}") from error
        path = Path(name) if name is not None else None
        label = NAME if name is None else path.resolve().name if path is not None and path.is_dir() else str(name)
        return cls(llm, label, template=template)

    def __repr__(self) -> str:
        return f"VllmLM({self.name}, {self.layout.layers} layers, width {self.layout.width})"

    def close(self) -> None:
        """Stop the engine's processes."""
        core = self._engine.engine_core
        core.shutdown()

    # ---- identity ----------------------------------------------------------------------------------------

    @property
    def runs_in(self) -> dict[str, str]:
        """The `dtype` that the model computes in, and the kind of `device`."""
        return {"dtype": str(self._link.dtype), "device": str(self._engine.vllm_config.device_config.device_type)}

    @cached_property
    def identity(self) -> ModelId:
        """Equal to `LM.identity`; the fingerprint is computed from the weights in the workers."""
        with self._translate_errors():
            return run(identify(self._engine, self.name), self._engine)

    def check(self, steering: Steering, *, transfer: bool = False) -> None:
        """Raises `TrimtabError` if the steering doesn't fit this model, or if this engine can't run it."""
        check_learned_on(steering, self.identity, transfer=transfer)
        self._link.check(steering)
        check_meanings(steering, self.tokenizer)

    # ---- steerings by name -------------------------------------------------------------------------------

    def register(self, name: str, steering: Steering, *, transfer: bool = False) -> None:
        """Register a steering under a name that new requests can use, replacing any of the same name."""
        self.check(steering, transfer=transfer)
        NAMES.register(name, steering)
        self._send(steering)
        self._drop_unused()

    def unregister(self, name: str) -> None:
        """Remove a name; running requests keep their steering. Raises `TrimtabError` if it isn't registered."""
        NAMES.unregister(name)
        self._drop_unused()

    # ---- requests ----------------------------------------------------------------------------------------

    def _steerings_for(self, steering: Any, count: int) -> list[Any]:
        return [NAMES[item] if isinstance(item, str) else item for item in steerings_for(steering, count, named=True)]

    def admit(self, requests: Sequence[Request], decoding: Decoding) -> Decoding:
        """Raises `TrimtabError` for options that vLLM doesn't have. Options have transformers' names."""
        sampling_of(decoding.max_new_tokens, decoding.logprobs, decoding.seed, decoding.options)
        return decoding

    def run(
        self, requests: Sequence[Request], decoding: Decoding, indices: Sequence[int] | None = None
    ) -> list[list[Generation]]:
        """Answer checked requests, in order. Doses aren't measured.

        Each request is sampled with its own seed, which is derived from `decoding.seed` and its index: in this list, or
        in a longer one if `indices` has the indices.
        """
        resolved = self._resolved([request.steering for request in requests], [request.ids for request in requests])
        params = []
        for index, part in zip(indices or range(len(requests)), self._parts(resolved.edits), strict=True):
            seed = None if decoding.seed is None else seed_at(decoding.seed, index)
            sampling = sampling_of(decoding.max_new_tokens, decoding.logprobs, seed, decoding.options)
            if part is not None:
                sampling.extra_args = {RESOLVED_KEY: Wire((part,)).to_plain()}
            params.append(sampling)
        outputs = self._run([request.ids for request in requests], params, decoding.progress)
        return [
            [_answer(output, choice, names, len(request.ids)) for choice in output.outputs]
            for output, names, request in zip(outputs, resolved.names, requests, strict=True)
        ]

    def _next_logprobs(
        self, choices: Sequence[Choice], steerings: Sequence[Steering | None], batch_size: int, progress: Any
    ) -> list[NextToken]:
        check_candidates(choices)
        resolved = self._resolved(steerings, [list(choice.ids[: choice.prompt_length]) for choice in choices])
        params = []
        for choice, part in zip(choices, self._parts(resolved.edits), strict=True):
            sampling = sampling_of(1, False, None, {})
            sampling.logprob_token_ids = list(dict.fromkeys(int(token) for token in choice.candidates))
            if part is not None:
                sampling.extra_args = {RESOLVED_KEY: Wire((part,), prompt_length=choice.prompt_length).to_plain()}
            params.append(sampling)
        outputs = self._run([choice.ids for choice in choices], params, progress)
        next_tokens = []
        for choice, output, names in zip(choices, outputs, resolved.names, strict=True):
            (step,) = output.outputs[0].logprobs
            logprobs = tuple(float(step[int(token)].logprob) for token in choice.candidates)
            next_tokens.append(NextToken(logprobs, Applied(names, ())))
        return next_tokens

    def answer_nlls(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """As in `LanguageModel`; in float32, as vLLM computes log-probabilities."""
        params = []
        for _ in texts:
            sampling = sampling_of(1, False, None, {})
            sampling.prompt_logprobs = 0
            sampling.skip_reading_prefix_cache = True  # tokens in cached blocks wouldn't be scored
            params.append(sampling)
        nlls = []
        outputs = self._run([[*context, *answer] for context, answer in texts], params)
        for (context, answer), output in zip(texts, outputs, strict=True):
            steps = output.prompt_logprobs[len(context) :]
            total = math.fsum(-float(step[token].logprob) for step, token in zip(steps, answer, strict=True))
            if math.isnan(total):
                raise TrimtabError(f"{self.name} produces NaN logits; load it in float32 or bfloat16")
            nlls.append(total / len(answer))
        return nlls

    def _answer_logits(self, texts: Sequence[AnsweredPrompt], steerings: Sequence[Steering | None]) -> list[Tensor]:
        """Not supported: see `cannot`."""
        self.require("logits")
        raise AssertionError

    def _resolved(self, steerings: Sequence[Steering | None], prompts: Sequence[Sequence[int]]) -> Resolved:
        """What acts on each request; gates read the unsteered prompts."""

        def read(where: PositionsByRequest, sites: Sequence[Site], _tokens: int) -> dict[int, Mapping[Site, Any]]:
            check_readable(self._link, sites)
            activations = self._capture([Text(prompts[i], where[i]) for i in where], sites)
            return dict(zip(where, activations, strict=True))

        return resolve(steerings, [len(prompt) for prompt in prompts], read)

    def _parts(self, requests: Sequence[tuple[Edit, ...]]) -> list[Part | None]:
        """The parts that refer to each request's edits; their contents are sent to the workers."""
        parts = [self._send(Steering(_without_open_gates(edits))) if edits else None for edits in requests]
        self._drop_unused()
        return parts

    def _run(self, ids: Sequence[Sequence[int]], params: Sequence[Any], progress: Any = None) -> list[Any]:
        for tokens in ids:
            if self.layout.context is not None and len(tokens) >= self.layout.context:
                raise TrimtabError(
                    f"a text has {len(tokens)} tokens, and the context (max_model_len) holds {self.layout.context},"
                    " including one that is generated; shorten it"
                )
        prompts = [{"prompt_token_ids": list(tokens)} for tokens in ids]
        bar = False if progress is None else _bar(progress)
        with self._translate_errors():
            return self.llm.generate(prompts, list(params), use_tqdm=bar)

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        with self._translate_errors():
            return self._engine.collective_rpc(method, args=args)

    def _send(self, steering: Steering) -> Part:
        with self._translate_errors():
            return run(send(self._link, steering), self._engine)

    def _drop_unused(self) -> None:
        with self._translate_errors():
            run(drop_unused(self._link, NAMES), self._engine)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineDied(f"the vLLM engine of {self.name} has died: {error}; load it again") from error
        except RuntimeError as error:
            if FAILURE_PREFIX not in str(error):
                raise
            raise TrimtabError(str(error)) from error  # from a worker whose receipts the scheduler doesn't receive

    # ---- activations -------------------------------------------------------------------------------------

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raises `UnsupportedError` for sites that this engine can't read, and if it can't read activations at all."""
        check_readable(self._link, sites)

    def _read(
        self, groups: Sequence[Sequence[Text]], sites: Sequence[Site], tokens: int, steering: Steering | None
    ) -> Iterator[Batch]:
        for chosen in batches(groups, tokens):
            texts = [text for g in chosen for text in groups[g]]
            parts: list[Part | None] | None = None
            if steering is not None:
                parts = self._parts(self._resolved([steering] * len(texts), [text.ids for text in texts]).edits)
            activations = iter(self._capture(texts, sites, parts))
            members = [[next(activations) for _ in groups[g]] for g in chosen]
            yield Batch(chosen, {site: [[by_site[site] for by_site in group] for group in members] for site in sites})

    def _capture(
        self, texts: Sequence[Text], sites: Sequence[Site], parts: Sequence[Part | None] | None = None
    ) -> list[Mapping[Site, Any]]:
        """The activations `[positions, width]` of these texts at each site, each text steered by its part.

        Without parts, texts are only run up to the last position that is read.
        """
        if parts is None:
            texts = [Text(text.ids[: max(text.positions) + 1], text.positions) for text in texts]
            parts = [None] * len(texts)
        names, params = params_of(texts, sites, parts)
        self._run([text.ids for text in texts], params)
        return collect_readings(self._rpc("trimtab_take", names), sites)

    def steered(self, *_: Any, **__: Any) -> Any:
        """Not supported: the model runs in separate processes."""
        self.require("steered")


def _without_open_gates(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Edits that act, without their open gates, so that edits with the same effect are equal.

    A condition on each token is kept, in the gate as in a file.
    """
    return tuple(
        without_conditional_operation(edit) if edit.gate.token_sites else replace(edit, gate=ALWAYS) for edit in edits
    )


def _answer(output: Any, choice: Any, edits: tuple[str, ...], prompt_tokens: int) -> Generation:
    logprobs = None
    if choice.logprobs is not None:
        pairs = zip(choice.token_ids, choice.logprobs, strict=True)
        logprobs = tuple(float(step[token].logprob) for token, step in pairs)
    return Generation(
        text=choice.text,
        token_ids=tuple(choice.token_ids),
        finish_reason=choice.finish_reason,
        prompt_tokens=prompt_tokens,
        applied=Applied(edits, ()),
        logprobs=logprobs,
    )


def _bar(progress: Any) -> Any:
    """`progress(done, total)` as a progress bar class for vLLM, which instantiates it twice.

    One bar is for rendering the prompts, and one counts the requests.
    """
    from tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": StringIO()})
            self.counts = not args

        def update(self, n: float | None = 1) -> Any:
            done = super().update(n)
            if self.counts:
                progress(int(self.n), int(self.total))
            return done

    return Bar
