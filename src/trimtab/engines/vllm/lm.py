"""`LM` on vLLM: the same prompts, steerings and answers, in an engine of its own processes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.answer import Applied, Generation
from trimtab.engines.arguments import as_list, one_each
from trimtab.engines.transformers.deciding import check_prompt, decided, read_gates_with, wanted
from trimtab.engines.transformers.default_model import NAME, default_folder
from trimtab.engines.vllm.counting import MARK
from trimtab.engines.vllm.frontend import NAMES, Link, connect, send, tidy
from trimtab.engines.vllm.identity import identify
from trimtab.engines.vllm.rpc import run
from trimtab.engines.vllm.sampling import sampling_of
from trimtab.engines.vllm.versions import check_version
from trimtab.engines.vllm.wire import RESOLVED, Part, Reading, Wire
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, ModelId, Positions, Site, Steering
from trimtab.steering.gates import ALWAYS
from trimtab.steering.identity import check_learned_on
from trimtab.text.chat import Prompt, Template, encode
from trimtab.text.templates import with_keywords

LAST = Positions.last_prompt_token()


class EngineDied(TrimtabError, RuntimeError):
    """The engine's processes are gone, a worker with them; load it again."""


@dataclass(frozen=True)
class Sizes:
    """What of a `Layout` can be said without the modules."""

    layers: int
    width: int
    context: int | None


class VllmLM:
    """A model in a vLLM engine that this process starts, steered request by request.

    `LM.load(name, engine="vllm", …)` makes one. What `trimtab.LM` can do and this can't raises `UnsupportedError`.
    """

    def __init__(self, llm: Any, name: str, *, template: Template | None = None) -> None:
        self.llm = llm
        self.name = name
        self.tokenizer = with_keywords(llm.get_tokenizer(), template)
        self._engine = llm.llm_engine
        config = self._engine.vllm_config.model_config
        self.layout = Sizes(
            config.hf_text_config.num_hidden_layers, config.hf_text_config.hidden_size, config.max_model_len
        )
        self._link: Link = run(connect(self._engine), self._engine)

    @classmethod
    def load(cls, name: str | Path | None = None, *, template: Template | None = None, **options: Any) -> VllmLM:
        """Start an engine for a Hub id, a folder or, without a name, SmolLM2-135M-Instruct.

        `template` is as for `LM`. `options` are vLLM's engine arguments (`tensor_parallel_size`, `dtype`,
        `enforce_eager` …), under its names. Raises `TrimtabError` where vLLM isn't there, is of another version, or its
        workers can't steer.
        """
        check_version()
        for given, instead in (("device", "vLLM takes the device that it was built for"), ("layers", "it finds them")):
            if options.pop(given, None) is not None:
                raise TrimtabError(f"the vllm engine can't take {given}: {instead}")
        if name is not None and Path(name).suffix == ".gguf":
            raise TrimtabError("the vllm engine reads a folder or a Hub id; convert the GGUF file first")
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")  # what vLLM keeps of it can't be loaded again on a CPU
        from vllm import LLM

        if options.get("dtype") is None:
            options.pop("dtype", None)
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

    # ---- who this is -------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> ModelId:
        """As `LM.identity`; the weights are looked at where they are, in the workers."""
        with self._alive():
            return run(identify(self._engine, self.name), self._engine)

    def check(self, steering: Steering, *, transfer: bool = False) -> None:
        """Raises `TrimtabError` when the steering doesn't fit this model, or this engine can't run it."""
        check_learned_on(steering, self.identity, transfer=transfer)
        self._link.check(steering)

    # ---- steerings by name -------------------------------------------------------------------------------

    def register(self, name: str, steering: Steering, *, transfer: bool = False) -> None:
        """Let requests name this steering: new ones, from now on. One that had the name before is replaced."""
        self.check(steering, transfer=transfer)
        NAMES.register(name, steering)
        self._send(steering)
        self._tidy()

    def unregister(self, name: str) -> None:
        """Forget a name; requests that run keep their steering. Raises `TrimtabError` where there is none."""
        NAMES.unregister(name)
        self._tidy()

    # ---- text --------------------------------------------------------------------------------------------

    def encode(
        self, prompt: Prompt, *, system: str | None = None, chat: bool | None = None, template: Template | None = None
    ) -> list[int]:
        """The token ids of a prompt (a string or messages), rendered and ending where the answer begins or goes on."""
        return encode(self.tokenizer, prompt, system=system, chat=chat, template=template)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        steering: Steering | str | Sequence[Steering | str | None] | None = None,
        *,
        max_new_tokens: int = 128,
        system: str | None = None,
        chat: bool | None = None,
        template: Template | None = None,
        logprobs: bool = False,
        batch_size: int | None = None,
        seed: int | None = None,
        transfer: bool = False,
        emphasize: Any = None,
        rejection: Any = None,
        progress: Any = None,
        **options: Any,
    ) -> list[Generation]:
        """As `LM.generate`; a steering may also be the name of a registered one.

        The engine makes batches by itself, so `batch_size` does nothing. Of transformers' options those that vLLM has
        too are taken, under transformers' names (see `sampling`). Doses aren't measured.
        """
        if emphasize is not None:
            raise UnsupportedError("emphasis steers attention scores, which the vllm engine doesn't give out")
        if rejection not in (None, False):
            raise UnsupportedError("the vllm engine has no rejection: a step has one row of logits a request")
        many = as_list(prompts)
        steerings = [NAMES[one] if isinstance(one, str) else one for one in one_each(steering, len(many), named=True)]
        for one in {one for one in steerings if one is not None}:
            self.check(one, transfer=transfer)
        ids = [self.encode(prompt, system=system, chat=chat, template=template) for prompt in many]
        for one, tokens in zip(steerings, ids, strict=True):
            for edit in one.edits if one else ():
                edit.positions.resolve(len(tokens))
            check_prompt(one, len(tokens))
        self._check_lengths(ids, max_new_tokens)
        asked = [wanted(one) for one in steerings]
        readings = read_gates_with(lambda numbers, sites: self._read(ids, numbers, sites), [len(i) for i in ids], asked)
        acting = [decided(one, found) for one, found in zip(steerings, readings, strict=True)]
        parts = [self._send(Steering(_open(edits))) if edits else None for edits in acting]
        self._tidy()
        params = []
        for part in parts:
            one_params = sampling_of(max_new_tokens, logprobs, seed, options)
            if part is not None:
                one_params.extra_args = {RESOLVED: Wire((part,)).to_plain()}
            params.append(one_params)
        outputs = self._run(ids, params, progress)
        return [
            _answer(output, choice, tuple(str(edit) for edit in edits), len(tokens))
            for output, edits, tokens in zip(outputs, acting, ids, strict=True)
            for choice in output.outputs
        ]

    def _check_lengths(self, ids: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise TrimtabError(f"max_new_tokens is a whole number from 1, got {max_new_tokens!r}")
        context = self.layout.context
        for i, tokens in enumerate(ids, 1):
            if not tokens:
                raise TrimtabError(f"prompt {i} has no tokens")
            if context is not None and len(tokens) + max_new_tokens > context:
                raise TrimtabError(
                    f"prompt {i} has {len(tokens)} tokens and {max_new_tokens} new ones are asked for, the engine's"
                    f" context (max_model_len) holds {context}; ask for at most {context - len(tokens)}"
                )

    def _run(self, ids: Sequence[Sequence[int]], params: Sequence[Any], progress: Any = None) -> list[Any]:
        prompts = [{"prompt_token_ids": list(tokens)} for tokens in ids]
        bar = False if progress is None else _bar(progress)
        with self._alive():
            return self.llm.generate(prompts, list(params), use_tqdm=bar)

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        with self._alive():
            return self._engine.collective_rpc(method, args=args)

    def _send(self, steering: Steering) -> Part:
        with self._alive():
            return run(send(self._link, steering), self._engine)

    def _tidy(self) -> None:
        with self._alive():
            run(tidy(self._link, NAMES), self._engine)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            yield
        except EngineDeadError as error:
            raise EngineDied(f"the vLLM engine of {self.name} has died: {error}; load it again") from error
        except RuntimeError as error:
            if MARK not in str(error):
                raise
            raise TrimtabError(str(error)) from error  # a worker's that the scheduler doesn't hear

    # ---- activations -------------------------------------------------------------------------------------

    def capture(
        self,
        prompts: Prompt | Sequence[Prompt],
        sites: Sequence[Site | int],
        positions: Positions = LAST,
        *,
        system: str | None = None,
        chat: bool | None = None,
        template: Template | None = None,
        steering: Steering | None = None,
    ) -> list[dict[Site, Tensor]]:
        """As `LM.capture`, of the residual stream: `{site: [positions, width]}` for each prompt, in float32.

        With `steering` it is what that makes of the activations.
        """
        wanted_sites = [site if isinstance(site, Site) else Site(site) for site in sites]
        ids = [self.encode(prompt, system=system, chat=chat, template=template) for prompt in as_list(prompts)]
        self._check_lengths(ids, 1)
        where = []
        for tokens in ids:
            spans = positions.resolve(len(tokens))
            here = sorted({p for a, b in spans for p in range(a, len(tokens) if b is None else min(b, len(tokens)))})
            if not here:
                raise TrimtabError(f"positions {positions} hold no token of a prompt of {len(tokens)} tokens")
            where.append(here)
        return self._capture(ids, [wanted_sites] * len(ids), where, steering)

    def _read(
        self, ids: Sequence[Sequence[int]], numbers: Sequence[int], sites: Sequence[Site]
    ) -> dict[int, dict[Site, Tensor]]:
        """These prompts' activations, unsteered, at all of their tokens."""
        found = self._capture(
            [ids[i] for i in numbers], [list(sites)] * len(numbers), [list(range(len(ids[i]))) for i in numbers]
        )
        return dict(zip(numbers, found, strict=True))

    def _capture(
        self,
        ids: Sequence[Sequence[int]],
        sites: Sequence[Sequence[Site]],
        positions: Sequence[Sequence[int]],
        steering: Steering | None = None,
    ) -> list[dict[Site, Tensor]]:
        if not ids:
            return []
        if self._link.static:
            raise UnsupportedError(
                "this engine replays captured graphs, from which activations can't be read (by gates, too); start it"
                " with enforce_eager=True, or with compilation_config={'cudagraph_mode': 'NONE'}"
            )
        for site in {site for one in sites for site in one}:
            if site.kind != "residual" or site.layer >= self.layout.layers:
                raise UnsupportedError(
                    f"the vllm engine reads the residual stream after layers 0 to {self.layout.layers - 1}, not {site}"
                )
        parts: tuple[Part, ...] = ()
        if steering is not None:
            self.check(steering)
            parts = (self._send(steering),)
        names = [uuid.uuid4().hex for _ in ids]
        params = []
        for name, one, where in zip(names, sites, positions, strict=True):
            reading = Reading(name, tuple(sorted({site.layer for site in one})), tuple(where))
            plain = sampling_of(1, False, None, {})
            plain.skip_reading_prefix_cache = True  # what a block holds isn't computed again
            plain.extra_args = {RESOLVED: Wire(parts, reading).to_plain()}
            params.append(plain)
        self._run(ids, params)
        taken = self._rpc("trimtab_take", names)
        found = []
        for i, one in enumerate(sites):
            layers = {int(layer): value for worker in taken for layer, value in worker[i].items()}
            found.append({site: _tensor(*layers[site.layer]) for site in one})
        return found

    # ---- what it can't -----------------------------------------------------------------------------------

    def steered(self, *_: Any, **__: Any) -> Any:
        """Not here: the model runs in processes of its own."""
        raise UnsupportedError("lm.steered(…) wraps a model in this process; the vllm engine has it in others")

    def stream(self, *_: Any, **__: Any) -> Any:
        """Not here: the engine is run for whole answers."""
        raise UnsupportedError(
            "the vllm engine gives whole answers here; lm.generate(…) has them, and vllm serve and the transformers"
            " engine (leave out engine=) stream"
        )

    def sweep(self, *_: Any, **__: Any) -> Any:
        """Not here: perplexities are the transformers engine's."""
        raise UnsupportedError("the vllm engine has no sweep; the transformers engine can (leave out engine=)")

    def project(self, *_: Any, **__: Any) -> Any:
        """Not here."""
        raise UnsupportedError("the vllm engine has no project; the transformers engine can (leave out engine=)")

    def next_logprobs(self, *_: Any, **__: Any) -> Any:
        """Not here yet."""
        raise UnsupportedError("the vllm engine has no next_logprobs; the transformers engine can (leave out engine=)")


def _open(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Edits that act, without the gates that let them, so that what does the same is the same."""
    return tuple(edit if edit.gate.token_sites else replace(edit, gate=ALWAYS) for edit in edits)


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
    """`progress(done, total)` as a kind of bar for vLLM to make: one over prompts to render, and one that counts."""
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


def _tensor(shape: Sequence[int], data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(*shape)
