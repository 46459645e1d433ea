"""A GGUF model that llama.cpp runs, steered: `LM.load("model.gguf", engine="llamacpp")`."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trimtab.engines.answer import Applied, Dose, Generation
from trimtab.engines.arguments import as_list, one_each
from trimtab.engines.doses import warn_of_doses
from trimtab.engines.llamacpp.context import CACHES, Context, Weights
from trimtab.engines.llamacpp.sampling import Sampling, sampling_of
from trimtab.engines.llamacpp.steer import NOTHING, Schedule, check_additions, check_counts, doses
from trimtab.engines.llamacpp.telling import Told
from trimtab.engines.llamacpp.tokens import GgufTokenizer
from trimtab.engines.streaming import Stream, Tell, one_request
from trimtab.engines.transformers import default_model
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.gguf_container import read_container
from trimtab.steering import ModelId, Positions, Site, Steering
from trimtab.steering.identity import check_learned_on, fingerprint, sampled_rows
from trimtab.text.chat import Prompt, Template, encode, template_digest
from trimtab.text.templates import with_keywords

LAST = Positions.last_prompt_token()


class LlamaCpp:
    """A GGUF model in llama.cpp, which answers as `LM` does where it can.

    Steerings that add directions to the residual stream are honoured, at any positions, each prompt under its own;
    others raise `UnsupportedError` before anything runs. Prompts run one after the other, so that an answer can't
    depend on its neighbours.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        name: str | None = None,
        threads: int | None = None,
        cache: str = "float16",
        gpu_layers: int = 0,
        template: Template | None = None,
    ) -> None:
        if cache not in CACHES:
            raise TrimtabError(f"unknown cache {cache!r}; use {', '.join(CACHES)}")
        self.path = Path(path)
        self.weights = Weights(self.path, gpu_layers)
        if self.weights.library.llama_model_has_encoder(self.weights.pointer):
            raise UnsupportedError(f"{self.path.name} has an encoder, and only decoders can be steered")
        self.name = name or self.path.stem
        self.threads = threads or torch.get_num_threads()
        self.cache = cache
        own = self.weights.metadata("tokenizer.chat_template")
        self.tokenizer = with_keywords(GgufTokenizer(self.weights.library, self.weights.vocabulary, own), template)
        self._kept: Context | None = None
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        name: str | Path | None = None,
        *,
        layers: str | None = None,
        device: Any = None,
        dtype: Any = "auto",
        revision: str | None = None,
        **options: Any,
    ) -> LlamaCpp:
        """Load a `.gguf` file or, without a name, SmolLM2-135M-Instruct as it is stored (Q4_1).

        Options: `template` (as for `LM`), `threads` (torch's number), `cache` of keys and values (`"float16"` or
        `"float32"`), `gpu_layers`, how many blocks a GPU holds. Raises `TrimtabError` for anything but a GGUF model
        that llama.cpp can load.
        """
        given = {"layers": layers, "revision": revision, "dtype": None if dtype == "auto" else dtype}
        given["device"] = None if device is None or str(device) == "cpu" else device
        for option, value in given.items():
            if value is not None:
                raise TrimtabError(f"the engine llamacpp takes no {option}: a GGUF file is run as it is stored")
        unknown = set(options) - {"threads", "cache", "gpu_layers", "template"}
        if unknown:
            raise TrimtabError(f"the engine llamacpp takes threads, cache and gpu_layers, not {sorted(unknown)[0]}")
        path = default_model.default_gguf() if name is None else Path(name)
        if path.suffix.lower() != ".gguf":
            raise TrimtabError(f"the engine llamacpp runs .gguf files, and {name} is none; leave --engine out for it")
        if not path.is_file():
            raise TrimtabError(f"there is no file {path}")
        return cls(path, name=default_model.NAME if name is None else None, **options)

    def __repr__(self) -> str:
        return f"LlamaCpp({self.name}, {self.weights.layers} layers, width {self.weights.width})"

    @cached_property
    def identity(self) -> ModelId:
        """Name, shape and a fingerprint of the weights, as they stand in a steering's card."""
        family = self.weights.metadata("general.architecture") or "unknown"
        return ModelId(
            name=self.name,
            revision=None,
            family=family,
            width=self.weights.width,
            layers=self.weights.layers,
            fingerprint=_fingerprint(self.path, family),
            template=template_digest(self.tokenizer),
        )

    def check(self, steering: Steering, *, transfer: bool = False) -> None:
        """Raises `TrimtabError` for a steering that doesn't fit this model, `UnsupportedError` for what it can't do."""
        check_learned_on(steering, self.identity, transfer=transfer)
        check_additions(steering, self.weights.layers, self.weights.width)

    def encode(
        self, prompt: Prompt, *, system: str | None = None, chat: bool | None = None, template: Template | None = None
    ) -> list[int]:
        """The token ids of a prompt (a string or messages), rendered and ending where the answer begins or goes on."""
        return encode(self.tokenizer, prompt, system=system, chat=chat, template=template)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        steering: Steering | Sequence[Steering | None] | None = None,
        *,
        max_new_tokens: int = 128,
        system: str | None = None,
        chat: bool | None = None,
        template: Template | None = None,
        logprobs: bool = False,
        batch_size: int = 1,
        seed: int | None = None,
        transfer: bool = False,
        emphasize: Any = None,
        rejection: Any = None,
        progress: Any = None,
        streamer: Any = None,
        stopping_criteria: Sequence[Any] = (),
        **options: Any,
    ) -> list[Generation]:
        """Answer prompts, each under its own steering (or one for all, or none), as `LM.generate` does.

        Greedy unless `do_sample=True`, with `temperature`, `top_k` and `top_p`; `stop_strings` end an answer. Prompts
        run one at a time, whatever `batch_size`. Doses are those of the prompt's tokens; where only generated ones are
        steered there are none.

        A `streamer` and `stopping_criteria` are called as transformers calls them, with `[1, tokens]` ids and no
        scores: the one is put the prompt and then each token of its answer, the others end an answer.

        Raises `UnsupportedError` for what only `LM` can do (gates, other operations, emphasis, rejection), and
        `TrimtabError` as it does, before anything runs.
        """
        del batch_size  # for the same signature
        return self._generate(
            prompts,
            steering,
            {"max_new_tokens": max_new_tokens, "logprobs": logprobs, "seed": seed},
            {"system": system, "chat": chat, "template": template},
            options,
            transfer=transfer,
            emphasize=emphasize,
            rejection=rejection,
            progress=progress,
            streamer=streamer,
            stopping_criteria=stopping_criteria,
        )

    def stream(
        self,
        prompt: Prompt,
        steering: Steering | None = None,
        *,
        max_new_tokens: int = 128,
        system: str | None = None,
        chat: bool | None = None,
        template: Template | None = None,
        logprobs: bool = False,
        seed: int | None = None,
        transfer: bool = False,
        emphasize: Any = None,
        rejection: Any = None,
        **options: Any,
    ) -> Stream:
        """As `LM.stream`: what `generate` gives for one prompt, piece by piece. Raises as `generate` does."""
        one = one_request(prompt, steering, rejection, options)

        def generate(tell: Tell) -> Generation:
            (answer,) = self._generate(
                [one],
                steering,
                {"max_new_tokens": max_new_tokens, "logprobs": logprobs, "seed": seed},
                {"system": system, "chat": chat, "template": template},
                options,
                transfer=transfer,
                emphasize=emphasize,
                rejection=rejection,
                tell=tell,
            )
            return answer

        return Stream(self.tokenizer, generate)

    def _generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        steering: Steering | Sequence[Steering | None] | None,
        limits: dict[str, Any],
        rendering: dict[str, Any],
        options: dict[str, Any],
        *,
        transfer: bool,
        emphasize: Any,
        rejection: Any,
        progress: Any = None,
        tell: Tell | None = None,
        streamer: Any = None,
        stopping_criteria: Sequence[Any] = (),
    ) -> list[Generation]:
        """`generate`, which tells tokens as they come where somebody listens."""
        max_new_tokens, logprobs, seed = limits["max_new_tokens"], limits["logprobs"], limits["seed"]
        if emphasize is not None or rejection not in (None, False):
            raise UnsupportedError("the engine llamacpp can't steer attention or reject tokens; use transformers")
        many = as_list(prompts)
        steerings = one_each(steering, len(many))
        for one in set(steerings) - {None}:
            assert one is not None
            self.check(one, transfer=transfer)
        if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise TrimtabError(f"max_new_tokens is a whole number from 1, got {max_new_tokens!r}")
        sampling = sampling_of(options)
        ids = [self.encode(prompt, **rendering) for prompt in many]
        if streamer is not None and len(ids) > 1:
            raise TrimtabError("a streamer takes one prompt at a time; give one, or leave the streamer out")
        for i, prompt in enumerate(ids):
            self._check_length(len(prompt), max_new_tokens, f"prompt {i + 1}")
        schedules = [Schedule.of(one, len(prompt)) for one, prompt in zip(steerings, ids, strict=True)]
        generator = torch.Generator().manual_seed(seed if seed is not None else torch.seed())
        if tell is not None:
            tell([])  # all checks have passed
        answers = []
        with self._lock:
            for prompt, schedule in zip(ids, schedules, strict=True):
                told = Told(streamer, tuple(stopping_criteria), tuple(prompt), tell)
                answers.append(self._answer(prompt, schedule, max_new_tokens, sampling, logprobs, generator, told))
                if progress is not None:
                    progress(len(answers), len(ids))
        warn_of_doses(answers, steerings)
        return answers

    def _answer(
        self,
        ids: list[int],
        schedule: Schedule,
        count: int,
        sampling: Sampling,
        logprobs: bool,
        random: torch.Generator,
        told: Told,
    ) -> Generation:
        context = self._context(len(ids) + count)
        felt: dict[int, tuple[float, int]] = {}
        if any(schedule.at(position) for position in range(len(ids))):
            logits, after = self._read(context, ids, schedule.layers(), schedule)
            felt = doses(after, schedule)
        else:
            context.clear()
            logits = _prefill(context, ids, schedule)
        told.begin()
        tokens: list[int] = []
        chances: list[float] = []
        text, stopped = "", False
        acts: tuple[int, ...] | None = None
        while True:
            tokens.append(sampling.pick(logits, random))
            if logprobs:
                shifted = logits.astype(np.float64) - logits.max()
                chances.append(float(shifted[tokens[-1]] - np.log(np.exp(shifted).sum())))
            stopped = self.tokenizer.is_end(tokens[-1])
            if sampling.stop_strings and not stopped:
                text = self.tokenizer.decode(tokens)
                stopped = any(end in text for end in sampling.stop_strings)
            over = told.token(tokens)
            if stopped or over or len(tokens) == count:
                break
            now = schedule.at(len(ids) + len(tokens) - 1)
            if now != acts:
                context.steer(schedule.vectors(now))
                acts = now
            logits = context.run(tokens[-1:])
        told.end()
        check_counts(context.steered, schedule, len(ids) + len(tokens) - 1)
        return Generation(
            text=self.tokenizer.decode(tokens),
            token_ids=tuple(tokens),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(ids),
            applied=Applied(
                tuple(str(edit) for edit in schedule.edits), tuple(Dose(block, *dose) for block, dose in felt.items())
            ),
            logprobs=tuple(chances) if logprobs else None,
        )

    def sweep(self, *_: Any, **__: Any) -> Any:
        """Not here: perplexities are the transformers engine's."""
        raise UnsupportedError("the llamacpp engine has no sweep; the transformers engine can (leave out engine=)")

    def project(self, *_: Any, **__: Any) -> Any:
        """Not here."""
        raise UnsupportedError("the llamacpp engine has no project; the transformers engine can (leave out engine=)")

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
        transfer: bool = False,
    ) -> list[dict[Site, Tensor]]:
        """The activations of prompts after blocks: for each prompt, `{site: [positions, width]}`, in float32.

        With a steering, those that it makes. Raises `UnsupportedError` for sites that aren't the residual stream.
        """
        wanted = [site if isinstance(site, Site) else Site(site) for site in sites]
        for site in wanted:
            if site.kind != "residual":
                raise UnsupportedError(f"the engine llamacpp reads blocks' outputs only, not {site}")
            if site.layer >= self.weights.layers:
                raise TrimtabError(f"{site} isn't there: this model's blocks are 0 to {self.weights.layers - 1}")
        if steering is not None:
            self.check(steering, transfer=transfer)
        found = []
        for i, prompt in enumerate(as_list(prompts)):
            ids = self.encode(prompt, system=system, chat=chat, template=template)
            self._check_length(len(ids), 0, f"prompt {i + 1}")
            spans = positions.resolve(len(ids))
            where = sorted({p for a, b in spans for p in range(a, len(ids) if b is None else min(b, len(ids)))})
            if not where:
                raise TrimtabError(f"positions {positions} hold no token of a prompt of {len(ids)} tokens")
            with self._lock:
                schedule, blocks = Schedule.of(steering, len(ids)), [site.layer for site in wanted]
                _, values = self._read(self._context(len(ids)), ids, blocks, schedule)
            found.append({site: torch.from_numpy(values[site.layer][where]) for site in wanted})
        return found

    def _read(
        self, context: Context, ids: list[int], blocks: Sequence[int], schedule: Schedule
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """A prompt's last logits, and the outputs of these blocks at its tokens."""
        context.clear()
        every = self.weights.layers - 1 in blocks  # the last block runs only where there are to be logits
        logits, values = context.read(blocks, lambda: _prefill(context, ids, schedule, every))
        check_counts(context.steered, schedule, len(ids))
        return logits, values

    def _context(self, size: int) -> Context:
        """The context; a larger one where it is too small, and a new one after a fault."""
        kept = self._kept
        if kept is None or kept.size < size or kept.failed:
            if kept is not None:
                kept.close()
            self._kept = kept = Context(self.weights, size, threads=self.threads, cache=self.cache)
        return kept

    def _check_length(self, length: int, new: int, what: str) -> None:
        if not length:
            raise TrimtabError(f"{what} is empty: there is no token to start from")
        if length + new > self.weights.context:
            raise TrimtabError(
                f"{what} has {length} tokens and {new} new ones are asked for, the model's context holds"
                f" {self.weights.context}"
            )

    def close(self) -> None:
        """Free llama.cpp's memory; the model can't be used any more."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        self.weights.close()


def _prefill(context: Context, ids: Sequence[int], schedule: Schedule, every: bool = False) -> np.ndarray:
    """Run a prompt, each stretch of it under the vectors that act there. The logits after its last token.

    What acts after it isn't set yet.
    """
    logits = np.empty(0)
    for start, stop, numbers in schedule.stretches(len(ids)):
        context.steer(schedule.vectors(numbers))
        logits = context.run(ids[start:stop], every)
    if not schedule.edits:
        return logits
    context.steer(NOTHING)
    return logits


def _fingerprint(path: Path, family: str) -> str:
    """The digest that transformers' engine has of the same weights, dequantized."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quant_shape_to_byte_shape

    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        place = read_container(data).tensors["token_embd.weight"]
        kind = GGMLQuantizationType(place.type)
        *_, size = quant_shape_to_byte_shape(place.shape, kind)
        size *= np.dtype(np.uint8).itemsize
        starts = [place.start + row * size for row in sampled_rows(place.shape[0])]
        raw = np.stack([np.frombuffer(data[start : start + size], dtype=np.uint8) for start in starts])
    return fingerprint(family, place.shape, torch.from_numpy(np.array(dequantize(raw, kind), dtype=np.float32)))
