"""A GGUF model run and steered by llama.cpp: `LM.load("model.gguf", engine="llamacpp")`."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from trimtab.engines.answer import Applied, Dose, Generation
from trimtab.engines.contract import Sizes
from trimtab.engines.language_model import LanguageModel
from trimtab.engines.llamacpp.context import CACHES, Context, Weights
from trimtab.engines.llamacpp.listener import Listener
from trimtab.engines.llamacpp.sampling import Sampling, sampling_of
from trimtab.engines.llamacpp.steer import NO_VECTORS, Schedule, check_additions, check_counts, doses
from trimtab.engines.llamacpp.tokens import GgufTokenizer
from trimtab.engines.meanings import check_meanings
from trimtab.engines.request import AnsweredPrompt, Batch, Choice, Decoding, NextToken, Request, Text
from trimtab.engines.transformers import default_model
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.gguf_container import read_container
from trimtab.steering import ModelId, Site, Steering
from trimtab.steering.identity import check_learned_on, fingerprint, sampled_rows
from trimtab.text.chat import Template, template_digest
from trimtab.text.templates import with_keywords

ROWS = 64
"""The number of rows of logits whose probabilities are computed together."""
LISTENER_OPTIONS = ("streamer", "stopping_criteria")
"""Options that receive tokens as they are generated, without affecting how they are chosen."""


class LlamaCpp(LanguageModel):
    """A GGUF model in llama.cpp, with the interface of `LM`.

    It runs steerings that add directions to the residual stream, at any positions, each prompt with its own; others
    raise `UnsupportedError` before anything runs. Prompts run one after the other, regardless of `batch_size`, so an
    answer can't depend on its neighbors. The supported options of `generate` are `do_sample`, `temperature`, `top_k`,
    `top_p`, `stop_strings`, and `streamer` and `stopping_criteria`, which are called as transformers calls them, with
    `[1, tokens]` ids and no scores. Doses are measured at the prompt's tokens; if only generated tokens are steered,
    there are none.
    """

    engine = "llamacpp"
    cannot: ClassVar[Mapping[str, str]] = {
        "emphasis": "llama.cpp doesn't expose attention scores",
        "rejection": "a step computes one row of logits",
        "clean_cache": "a control vector acts on every token that is computed",
        "monitors": "llama.cpp doesn't expose activations while it decodes",
        "steered": "the model runs inside llama.cpp",
        "training": "llama.cpp has no gradients, and its weights are packed",
        "modules": "the model runs inside llama.cpp",
        "grammar": "its tokens are chosen outside of llama.cpp's own samplers",
        "images": "its binding takes tokens only",
    }

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
        self.path: Path = Path(path)
        self.weights: Weights = Weights(self.path, gpu_layers)
        if self.weights.library.llama_model_has_encoder(self.weights.pointer):
            raise UnsupportedError(f"{self.path.name} has an encoder, and only decoders can be steered")
        self.layout: Sizes = Sizes(self.weights.layers, self.weights.width, self.weights.context)
        self.name: str = name or self.path.stem
        self.threads: int = threads or torch.get_num_threads()
        self.cache = cache
        self.gpu_layers = gpu_layers
        own = self.weights.metadata("tokenizer.chat_template")
        self.tokenizer: Any = with_keywords(GgufTokenizer(self.weights.library, self.weights.vocabulary, own), template)
        self._cached_context: Context | None = None
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

        Args:
            name: The path of the file.
            layers: Not supported.
            device: Only `None` or `"cpu"`.
            dtype: Only `None` or `"auto"`.
            revision: Not supported.
            options: `template` (as for `LM`), `threads` (default: torch's number), `cache`, the dtype of the KV cache
                (`"float16"` or `"float32"`), and `gpu_layers`, the number of blocks on a GPU.

        Raises:
            TrimtabError: The file isn't a GGUF model that llama.cpp can load, or an option isn't supported.
        """
        settings = {"layers": layers, "revision": revision, "dtype": None if dtype == "auto" else dtype}
        settings["device"] = None if device is None or str(device) == "cpu" else device
        for option, value in settings.items():
            if value is not None:
                raise TrimtabError(f"the llamacpp engine has no option {option}: a GGUF file is run as it is stored")
        unknown = set(options) - {"threads", "cache", "gpu_layers", "template"}
        if unknown:
            raise TrimtabError(f"the llamacpp engine takes threads, cache and gpu_layers, not {sorted(unknown)[0]}")
        path = default_model.default_gguf() if name is None else Path(name)
        if path.suffix.lower() != ".gguf":
            raise TrimtabError(f"the llamacpp engine needs a .gguf file, got {name}; leave out --engine")
        if not path.is_file():
            raise TrimtabError(f"there is no file {path}")
        return cls(path, name=default_model.NAME if name is None else None, **options)

    def __repr__(self) -> str:
        return f"LlamaCpp({self.name}, {self.weights.layers} layers, width {self.weights.width})"

    @property
    def runs_in(self) -> dict[str, str]:
        """The `dtype` of the KV cache, since weights are used as they are stored, and the kind of `device`."""
        return {"dtype": self.cache, "device": "cpu" if self.gpu_layers == 0 else "gpu"}

    @cached_property
    def identity(self) -> ModelId:
        """Name, shape and a fingerprint of the weights, as recorded in a steering's card."""
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
        """Raises `TrimtabError` for a steering that doesn't fit this model, `UnsupportedError` if it can't be run."""
        check_learned_on(steering, self.identity, transfer=transfer)
        check_additions(steering, self.weights.layers, self.weights.width)
        check_meanings(steering, self.tokenizer)

    def admit(self, requests: Sequence[Request], decoding: Decoding) -> Decoding:
        """Raises `TrimtabError` for invalid option values, `UnsupportedError` for options that don't exist here."""
        sampling_of(_sampling_options(decoding))
        if decoding.options.get("streamer") is not None and len(requests) > 1:
            raise TrimtabError("a streamer takes one prompt at a time; give one, or leave the streamer out")
        return decoding

    def run(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Generation]]:
        """Answer checked requests, one after the other."""
        sampling = sampling_of(_sampling_options(decoding))
        seed = decoding.seed if decoding.seed is not None else torch.seed()
        generator = torch.Generator().manual_seed(seed)
        listener_arguments = decoding.options.get("streamer"), tuple(decoding.options.get("stopping_criteria") or ())
        answers: list[list[Generation]] = []
        with self._lock:
            for request in requests:
                schedule, listener = (
                    Schedule.of(request.steering, request.ids, self.tokenizer),
                    Listener(*listener_arguments, tuple(request.ids)),
                )
                answers.append([self._answer(request.ids, schedule, decoding, sampling, generator, listener)])
                if decoding.progress is not None:
                    decoding.progress(len(answers), len(requests))
        return answers

    def _answer(
        self,
        ids: list[int],
        schedule: Schedule,
        decoding: Decoding,
        sampling: Sampling,
        random: torch.Generator,
        listener: Listener,
    ) -> Generation:
        count, logprobs = decoding.max_new_tokens, decoding.logprobs
        context = self._context(len(ids) + count)
        listener.begin()
        measured_doses: dict[int, tuple[float, int]] = {}
        if any(schedule.edits_at(position) for position in range(len(ids))):
            logits, activations = self._pass(context, ids, schedule.layers(), schedule)
            measured_doses = doses(activations, schedule)
        else:
            context.clear()
            logits = _prefill(context, ids, schedule)[-1]
        tokens: list[int] = []
        token_logprobs: list[float] = []
        text, stopped = "", False
        current_edits: tuple[int, ...] | None = None
        while True:
            tokens.append(sampling.pick(logits, random))
            if logprobs:
                token_logprobs.append(float(_log_softmax(logits)[tokens[-1]]))
            stopped = self.tokenizer.is_end(tokens[-1])
            if sampling.stop_strings and not stopped:
                text = self.tokenizer.decode(tokens)
                stopped = any(end in text for end in sampling.stop_strings)
            stop_requested = listener.token(tokens)
            if stopped or stop_requested or len(tokens) == count:
                break
            schedule.advance(tokens[-1:])
            next_edits = schedule.edits_at(len(ids) + len(tokens) - 1)
            if next_edits != current_edits:
                context.steer(schedule.vectors(next_edits))
                current_edits = next_edits
            logits = context.run(tokens[-1:])[-1]
        listener.end()
        check_counts(context.steered, schedule, len(ids) + len(tokens) - 1)
        return Generation(
            text=self.tokenizer.decode(tokens),
            token_ids=tuple(tokens),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(ids),
            applied=Applied(
                tuple(str(edit) for edit in schedule.edits),
                tuple(Dose(block, *dose) for block, dose in measured_doses.items()),
            ),
            logprobs=tuple(token_logprobs) if logprobs else None,
        )

    def _next_logprobs(
        self, choices: Sequence[Choice], steerings: Sequence[Steering | None], batch_size: int, progress: Any
    ) -> list[NextToken]:
        results = []
        for choice, steering in zip(choices, steerings, strict=True):
            ids, n = list(choice.ids), choice.prompt_length
            schedule = Schedule.of(steering, ids[:n], self.tokenizer)
            schedule.advance(ids[n:])
            with self._lock:
                context = self._context(len(choice.ids))
                context.clear()
                logits = _prefill(context, choice.ids, schedule)[-1]
                check_counts(context.steered, schedule, len(choice.ids))
            logprobs = _log_softmax(logits)[list(choice.candidates)]
            edits = tuple(str(edit) for edit in schedule.edits)
            results.append(NextToken(tuple(logprobs.tolist()), Applied(edits, ())))
            if progress is not None:
                progress(len(results), len(choices))
        return results

    def answer_nlls(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """As in `LanguageModel`, in float64."""
        answered = [AnsweredPrompt(tuple(context), tuple(answer)) for context, answer in texts]
        nlls = []
        for text in answered:  # one at a time, since its logits are its tokens times the vocabulary
            (logits,) = self._answer_logits([text], [None])
            parts = zip(logits.split(ROWS), torch.tensor(text.answer).split(ROWS), strict=True)
            logprobs = torch.cat([x.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for x, ids in parts])
            if logprobs.isnan().any():
                raise TrimtabError(f"{self.name} produces NaN logits; convert it to another GGUF type")
            nlls.append(-float(logprobs.mean()))
        return nlls

    def _answer_logits(
        self, texts: Sequence[AnsweredPrompt], steerings: Sequence[Steering | None]
    ) -> list[torch.Tensor]:
        results = []
        for text, steering in zip(texts, steerings, strict=True):
            ids, count = [*text.prompt, *text.answer[:-1]], len(text.answer)
            schedule = Schedule.of(steering, text.prompt, self.tokenizer)
            schedule.advance(text.answer[:-1])
            with self._lock:
                context = self._context(len(ids))
                context.clear()
                logits = _prefill(context, ids, schedule, keep=count)
                check_counts(context.steered, schedule, len(ids))
            results.append(torch.from_numpy(logits))
        return results

    def steered(self, *_: Any, **__: Any) -> Any:
        """Not supported: the model runs inside llama.cpp."""
        self.require("steered")

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raises `UnsupportedError` for sites other than block outputs, `TrimtabError` for blocks that don't exist."""
        for site in sites:
            if site.kind != "residual":
                raise UnsupportedError(
                    f"the llamacpp engine reads blocks' outputs only, not {site}; the transformers engine can (leave"
                    " out engine=)"
                )
            if site.layer >= self.weights.layers:
                raise TrimtabError(f"there is no {site}: this model's blocks are 0 to {self.weights.layers - 1}")

    def _read(
        self, groups: Sequence[Sequence[Text]], sites: Sequence[Site], tokens: int, steering: Steering | None
    ) -> Iterator[Batch]:
        blocks = [site.layer for site in sites]
        for g, group in enumerate(groups):
            activations: dict[Site, list[torch.Tensor]] = {site: [] for site in sites}
            for text in group:
                ids = list(text.ids if steering is not None else text.ids[: max(text.positions) + 1])
                with self._lock:
                    schedule = Schedule.of(steering, ids, self.tokenizer)
                    _, values = self._pass(self._context(len(ids)), ids, blocks, schedule)
                for site in sites:
                    activations[site].append(torch.from_numpy(values[site.layer][list(text.positions)]))
            yield Batch([g], {site: [members] for site, members in activations.items()})

    def _pass(
        self, context: Context, ids: list[int], blocks: Sequence[int], schedule: Schedule
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The logits `[vocabulary]` after a prompt, and the outputs of these blocks at its tokens."""
        context.clear()
        every = self.weights.layers - 1 in blocks  # the last block only runs for tokens whose logits are requested
        logits, values = context.read(blocks, lambda: _prefill(context, ids, schedule, every))
        check_counts(context.steered, schedule, len(ids))
        return logits[-1], values

    def _context(self, size: int) -> Context:
        """The context; it is replaced if it is too small, or after a fault."""
        context = self._cached_context
        if context is None or context.size < size or context.failed:
            if context is not None:
                context.close()
            self._cached_context = context = Context(self.weights, size, threads=self.threads, cache=self.cache)
        return context

    def close(self) -> None:
        """Free llama.cpp's memory. The model can't be used afterwards."""
        if self._cached_context is not None:
            self._cached_context.close()
            self._cached_context = None
        self.weights.close()


def _sampling_options(decoding: Decoding) -> dict[str, Any]:
    return {name: value for name, value in decoding.options.items() if name not in LISTENER_OPTIONS}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def _prefill(
    context: Context, ids: Sequence[int], schedule: Schedule, every: bool = False, keep: int = 1
) -> np.ndarray:
    """Run a text, each range of tokens with the vectors that act there, and return the logits after the last tokens.

    These are `[keep, vocabulary]`, after the last `keep` tokens. The vectors of the generated tokens aren't set yet.
    """
    logits: list[np.ndarray] = []
    for start, stop, numbers in schedule.edit_ranges(len(ids)):
        context.steer(schedule.vectors(numbers))
        logits.append(context.run(ids[start:stop], every, min(stop - start, max(0, stop - len(ids) + keep))))
    if schedule.edits:
        context.steer(NO_VECTORS)
    return logits[0] if len(logits) == 1 else np.concatenate(logits)


def _fingerprint(path: Path, family: str) -> str:
    """The fingerprint that the transformers engine computes for the same weights, dequantized."""
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
