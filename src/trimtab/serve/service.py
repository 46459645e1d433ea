"""The server's parts, and how a request becomes tasks: checked against the policy, rendered, tokenized."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from trimtab.decoding.rejection import Rejection
from trimtab.engines.images import PromptImages
from trimtab.engines.transformers.attention import score_layers
from trimtab.engines.transformers.generate import check_request
from trimtab.engines.transformers.images import check_takes_images
from trimtab.engines.transformers.sampling import Sampling
from trimtab.errors import TrimtabError
from trimtab.lm import LM
from trimtab.serve.access import AccessLog
from trimtab.serve.audit import Audit
from trimtab.serve.bodies import body_limit
from trimtab.serve.choosing import SteeringSelector
from trimtab.serve.library import Library, LoadedSteering
from trimtab.serve.metrics import Metrics
from trimtab.serve.monitored import monitors_for, policy_monitors
from trimtab.serve.policy import Key, Policy
from trimtab.serve.refusals import Refusal
from trimtab.serve.scheduler import Scheduler
from trimtab.serve.schema import (
    ChatRequest,
    CompletionRequest,
    PartChoice,
    PhraseChoice,
    RejectionChoice,
    Steered,
)
from trimtab.serve.schema_output import AppliedSteering
from trimtab.serve.structured import Structured, structured_part
from trimtab.serve.tasks import Task
from trimtab.serve.tools import ANY, Shape, answer_shape, conversation
from trimtab.steering import ScaleScores, Steering, emphasis
from trimtab.steering.monitors import Monitor
from trimtab.text.chat import Prompt, Template
from trimtab.text.images import ImageLimits, has_images, load_images
from trimtab.text.spans import Emphasis, Part, Phrase, find_spans, render
from trimtab.text.templates import CONTINUE

ALIAS = "trimtab"
"""Another name of the served model, so that a client's configuration doesn't depend on which model it is."""


@dataclass(frozen=True)
class Limits:
    """The limits of one request: bytes of body, tokens of prompt and answer, number of answers, seconds.

    `total_bytes` is how many bytes all requests' bodies together may hold in memory. `rejecting_tokens` limits a prompt
    with rejection, which is read in one pass while everybody waits. `images` is the most images in a prompt, each of at
    most `pixels` pixels.
    """

    body: int = 1 << 20
    upload: int = 16 << 20
    prompt_tokens: int | None = None
    max_tokens: int = 512
    answers: int = 16
    seconds: float = 300.0
    total_bytes: int = 256 << 20
    rejecting_tokens: int = 2048
    images: int = 8
    pixels: int = 8_000_000


@dataclass(frozen=True)
class Service:
    """One server. `clean_cache` is the default for requests; `monitors` are those that requests may name."""

    lm: LM
    library: Library
    scheduler: Scheduler
    policy: Policy
    audit: Audit
    metrics: Metrics
    limits: Limits
    upload: bool = False
    learn: bool = False
    started: int = 0
    clean_cache: bool = False
    monitors: Mapping[str, Monitor] = field(default_factory=dict)
    access: AccessLog | None = None
    making_lock: threading.Lock = field(default_factory=threading.Lock)  # held while a steering is made
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)  # tokenizers keep settings between calls

    # ---- permissions ----------------------------------------------------------------------------------------

    @cached_property
    def selector(self) -> SteeringSelector:
        """The policy, applied to this server's steerings."""
        return SteeringSelector(self.policy, self.library.get, self.lm.check)

    def visible(self, key: Key) -> list[LoadedSteering]:
        """The steerings that a caller may name, and those that are always on."""
        return self.selector.visible(key, self.library.of(self.owner(key.name)))

    def owner(self, key: str) -> str | None:
        """The owner of what this key adds: the key itself; `None` if the policy has no keys."""
        return self.selector.owner(key)

    def select(
        self, key: Key, request: Steered, structured: Structured | None = None
    ) -> tuple[list[AppliedSteering], Steering | None]:
        """The steerings for a request, always-on ones included: as a list, and as one steering (`Choosing.chosen`)."""
        return self.selector.select(key, request.steering, structured)

    # ---- the guard's interface ------------------------------------------------------------------------------

    @property
    def draining(self) -> bool:
        """Whether the server accepts no more requests."""
        return self.scheduler.draining

    def body_limit(self, method: str, path: str, *, known: bool) -> int:
        """The most bytes that a request's body may have on this route. `known`: the sender's key is known."""
        return body_limit(self, method, path, known=known)

    def count(self, route: str, status: int, seconds: float) -> None:
        """Count a finished request in the metrics."""
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)

    def rejection(self, request: Steered, steering: Steering | None = None) -> Rejection | None:
        """The request's rejection. Raises `Refusal` if it would undo a steering that is always on.

        By default it is on if anything is emphasized. Unless the request chooses a ladder, a steering with too few
        layers to halve is weakened in strength instead.
        """
        choice = request.rejection
        wanted = bool(request.emphasize) if choice is None else choice is not False
        if not wanted:
            return None
        if self.policy.always:
            raise Refusal(
                403, "steerings that are always on can't be rejected; ask for rejection: false", param="rejection"
            )
        wish = choice if isinstance(choice, RejectionChoice) else RejectionChoice.model_validate({})
        few = steering is not None and not request.emphasize and len(steering.layers) < wish.min_layers
        if few and not {"ladder", "min_layers"} & wish.model_fields_set:
            return Rejection(wish.beta, ladder="strength")
        return Rejection(wish.beta, wish.min_layers, wish.ladder)

    @cached_property
    def always_on_monitors(self) -> tuple[Monitor, ...]:
        """The monitors that read every answer. Raises `TrimtabError` if the policy names one that doesn't exist."""
        return policy_monitors(self)

    def without_protected(self, loaded: LoadedSteering, param: str) -> Steering:
        """A steering at its own sites, without its component along the always-on directions. Raises `Refusal`."""
        return self.selector.without_protected(loaded.steering, param)[0]

    def clean(self, request: Steered) -> bool:
        """Whether to steer over a clean cache. Raises `Refusal` if that would change how always-on steerings act."""
        wanted = self.clean_cache if request.clean_cache is None else request.clean_cache
        if wanted != self.clean_cache and self.policy.always:
            raise Refusal(
                403,
                "this server has steerings that are always on, whose clean_cache can't be changed; leave clean_cache"
                " out",
                param="clean_cache",
            )
        return wanted

    # ---- tasks ---------------------------------------------------------------------------------------------

    def wrong_model_message(self) -> str:
        """The error message for a request for another model."""
        return f"this server's model is {self.lm.name}; requests may also call it {ALIAS}"

    def prepare(self, key: Key, request: ChatRequest | CompletionRequest) -> Prepared:
        """The tasks of a request; whoever submits them sets `deliver`. Raises `Refusal` for anything that can't run.

        May take a while: call it in a thread.
        """
        if request.model not in (self.lm.name, ALIAS):
            raise Refusal(404, self.wrong_model_message(), param="model", code="model_not_found")
        chat = isinstance(request, ChatRequest)
        count = request.n or 1
        template = _template(request)
        prompts: list[Any]
        if isinstance(request, ChatRequest):
            messages, keywords = conversation(self.lm.tokenizer, request)
            prompts, template = [messages], {**(template or {}), **keywords}
        else:
            prompts = _prompts(request.prompt)
        if count * len(prompts) > self.limits.answers:
            raise Refusal(400, f"a request can have at most {self.limits.answers} answers", param="n")
        structured = structured_part(self.lm.tokenizer, request) if isinstance(request, ChatRequest) else None
        steerings, steering = self.select(key, request, structured)
        rejection = self.rejection(request, steering)
        clean, monitors = self.clean(request), monitors_for(self, key, request)
        stop = _stop(request.stop)
        tasks, emphasized_tokens, lengths, shape = [], 0, [], ANY
        try:
            for prompt in prompts:
                if chat and has_images(prompt):
                    prompt = self._with_decoded_images(prompt)
                ids, images = self._encode(prompt, chat, template)
                lengths.append(len(ids))
                if isinstance(request, ChatRequest):
                    shape = answer_shape(self.lm.tokenizer, request, ids)
                matcher = None if shape.grammar is None else self.lm.matcher(shape.grammar)
                if rejection is not None and len(ids) > self.limits.rejecting_tokens:
                    raise Refusal(
                        400,
                        f"with rejection a prompt can have at most {self.limits.rejecting_tokens} tokens, but this"
                        f" one has {len(ids)}; shorten it, or ask for rejection: false",
                        code="context_length_exceeded",
                    )
                mine, tokens = self._emphasized(request, prompt, chat, steering, template)
                emphasized_tokens += tokens
                most = self._most(request, len(ids))
                for i in range(count):
                    task = Task(
                        tuple(ids),
                        lambda _event: None,
                        mine,
                        most,
                        _sampling(request, i),
                        _alternatives(request),
                        stop,
                        rejection,
                        self.policy.dose_cap(key),
                        self.limits.seconds,
                        clean,
                        monitors,
                        f"key {key.name}" if self.policy.keys else "anybody",
                        matcher=matcher,
                        shown=shape.shown,
                        images=images,
                    )
                    self.scheduler.check(task)
                    tasks.append(task)
        except TrimtabError as error:
            raise Refusal(400, str(error)) from None
        return Prepared(tasks, steerings, emphasized_tokens, lengths, shape)

    def count_of(self, phrase: str, prompt: Prompt, *, chat: bool) -> int:
        """The number of the prompt's tokens in occurrences of a phrase. Raises `TrimtabError` if it doesn't occur."""
        chat_kwargs: dict[str, Any] = {"chat": None if chat else False}
        with self._tokenizing:
            if phrase not in render(self.lm.tokenizer, prompt, **chat_kwargs).text:
                raise TrimtabError(_missing_phrase_message(phrase))
            spans = find_spans(self.lm.tokenizer, prompt, Phrase(phrase), **chat_kwargs)
        return sum(stop - start for start, stop in spans)

    def _with_decoded_images(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with decoded images. Decoding happens before the tokenizer's lock is taken."""
        self.lm.require("images")
        check_takes_images(self.lm.model)
        bounds = ImageLimits(self.limits.images, self.limits.body, self.limits.pixels, local=False)
        try:
            return load_images(messages, bounds)
        except TrimtabError as error:
            raise Refusal(400, str(error), param="messages") from None

    def _encode(self, prompt: Any, chat: bool, template: Template | None) -> tuple[list[int], PromptImages | None]:
        images = None
        if _is_ids(prompt):
            size = self.lm.model.get_input_embeddings().weight.shape[0]
            if max(prompt) >= size:
                raise Refusal(400, f"token ids must be below {size} for this model", param="prompt")
            ids = list(prompt)
        else:
            with self._tokenizing:
                chat_kwargs: dict[str, Any] = {"chat": None if chat else False, "template": template}
                ids, images = self.lm.encode_with_images(prompt, **chat_kwargs)
        most = self.limits.prompt_tokens
        if most is not None and len(ids) > most:
            raise Refusal(
                400, f"the prompt has {len(ids)} tokens; at most {most} are allowed", code="context_length_exceeded"
            )
        return ids, images

    def _most(self, request: ChatRequest | CompletionRequest, length: int) -> int:
        """The maximum number of tokens of the answer. Default: what the server allows and the context has room for."""
        requested = request.max_tokens
        if isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
            requested = request.max_completion_tokens
        if requested is not None and requested > self.limits.max_tokens:
            raise Refusal(400, f"max_tokens can be at most {self.limits.max_tokens} on this server", param="max_tokens")
        context = self.lm.layout.context
        room = self.limits.max_tokens if context is None else min(self.limits.max_tokens, context - length)
        wanted = max(1, room) if requested is None else requested
        try:
            check_request(self.lm.layout, [length], wanted, {})
        except TrimtabError as error:
            code = "context_length_exceeded" if length else None  # an empty prompt isn't too long
            raise Refusal(400, str(error), code=code) from None
        return wanted

    def _emphasized(
        self, request: Steered, prompt: Any, chat: bool, steering: Steering | None, template: Template | None
    ) -> tuple[Steering | None, int]:
        """The steering with the attention edits for the phrases added, and how many tokens the phrases have."""
        if not request.emphasize:
            return steering, 0
        if _is_ids(prompt):
            raise Refusal(400, "phrases can't be located in token ids; send text", param="emphasize")
        marks: list[Emphasis] = []
        with self._tokenizing:
            chat_kwargs: dict[str, Any] = {"chat": None if chat else False, "template": template}
            text = None if has_images(prompt) else render(self.lm.tokenizer, prompt, **chat_kwargs).text
            for i, choice in enumerate(request.emphasize):
                phrase = (
                    choice if isinstance(choice, str) else choice.text if isinstance(choice, PhraseChoice) else None
                )
                if phrase is not None and (not phrase.strip() or (text is not None and phrase not in text)):
                    raise Refusal(400, _missing_phrase_message(phrase), param=f"emphasize.{i}")
                if isinstance(choice, PhraseChoice):
                    marks.append(Phrase(choice.text, choice.occurrence))
                elif isinstance(choice, PartChoice):
                    marks.append(Part(choice.role, choice.index))
                else:
                    marks.append(Phrase(choice))
            spans = self.lm.spans(prompt, marks, **chat_kwargs)
        towards = emphasis(ScaleScores(), spans, score_layers(self.lm.layout), "directer")
        self.lm.check(towards)
        return (towards if steering is None else steering + towards), sum(stop - start for start, stop in spans)


@dataclass(frozen=True)
class Prepared:
    """A request's tasks, and what the response reports about the request. `lengths` are its prompts', in tokens.

    `shape` says how the answers to a chat are parsed.
    """

    tasks: list[Task]
    steerings: list[AppliedSteering]
    emphasized: int
    lengths: list[int]
    shape: Shape = ANY


def _missing_phrase_message(phrase: str) -> str:
    shown = phrase if len(phrase) <= 80 else f"{phrase[:79]}…"
    return f"the phrase {shown!r} isn't in the prompt; write it exactly as it is there"


def _template(request: ChatRequest | CompletionRequest) -> Template | None:
    """The chat template's keywords. A final assistant message is only continued if the request says so."""
    if not isinstance(request, ChatRequest):
        return None
    continues = bool(request.continue_final_message)
    if request.add_generation_prompt is not None and request.add_generation_prompt == continues:
        meant = "must be false" if continues else "can only be false"
        raise Refusal(
            400, f"add_generation_prompt {meant} with continue_final_message: true", param="add_generation_prompt"
        )
    if CONTINUE in (request.chat_template_kwargs or {}):
        raise Refusal(400, f"{CONTINUE} is a separate field", param="chat_template_kwargs")
    return {CONTINUE: continues}


def _prompts(prompts: Any) -> list[Any]:
    if isinstance(prompts, str) or _is_ids(prompts):
        return [prompts]
    return list(prompts)


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _stop(texts: str | list[str] | None) -> tuple[str, ...]:
    stop = (texts,) if isinstance(texts, str) else tuple(texts or ())
    if len(stop) > 4:
        raise Refusal(400, "at most 4 stop strings are allowed", param="stop")
    return stop


def _sampling(request: ChatRequest | CompletionRequest, number: int) -> Sampling:
    temperature = 1.0 if request.temperature is None else float(request.temperature)
    if 0 < temperature < 1e-4:  # dividing by it would overflow
        temperature = 0.0
    top_p = 1.0 if request.top_p is None else float(request.top_p)
    seed = None if request.seed is None else (request.seed + number) % 2**63
    assert math.isfinite(temperature)
    return Sampling(temperature, top_p, seed)


def _alternatives(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs is not None and not request.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None
