"""A provider of steered models for Inspect (inspect_ai): `trimtab/MODEL`. Needs `trimtab[inspect]`.

    inspect eval task.py --model trimtab/HuggingFaceTB/SmolLM2-135M-Instruct -M steer=shout.safetensors:2

Inspect finds it through `inspect_registry`. `trimtab/default` is trimtab's default model. A sample can have its own
steering: `extra_body={"steer": "FILE:2"}` of a `GenerateConfig`, or the registry's solver `steered`, which takes it
from the sample's metadata. Waiting requests are generated in one batch, each with its own steering.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.files.pick import parse_pick
from trimtab.lm import LM
from trimtab.steering import Positions, Steering

try:
    import anyio
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        GenerateConfig,
        Logprob,
        Logprobs,
        ModelAPI,
        ModelOutput,
        ModelUsage,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError as error:
    raise TrimtabError(f"Inspect isn't installed ({error}): pip install 'trimtab[inspect]'") from None

if TYPE_CHECKING:
    from trimtab.engines.answer import Generation

DEFAULT_MAX_TOKENS = 2048
"""The maximum number of tokens of an answer if the task sets none, reduced to what fits the model's context."""
GATHER_SECONDS = 0.05
"""Seconds without a new request after which the waiting ones are answered together."""
LOAD_OPTIONS = {"engine": str, "dtype": str, "device": str, "revision": str, "layers": str, "replicas": int}
UNSUPPORTED_SETTINGS = {
    "best_of": "answers aren't ranked",
    "frequency_penalty": "use repetition_penalty instead",
    "presence_penalty": "use repetition_penalty instead",
    "logit_bias": "it isn't supported",
    "response_schema": "structured output isn't supported",
    "top_logprobs": "only the log-probability of the chosen token is kept",
    "prompt_logprobs": "prompts are not scored",
    "cache": "Inspect's cache doesn't know the steering, and would mix up steered and unsteered answers",
}
"""Settings of Inspect's that would be silently ignored, and why they aren't supported."""


class SteeredModel(ModelAPI):
    """A trimtab model for Inspect.

    Args:
        model_name: A Hub id, a folder or a file, as `LM.load` takes them; `default` is the default model.
        base_url, api_key: Part of Inspect's interface; unused, since there is no server.
        config: Inspect's settings.
        steer: `FILE[@LAYERS][:STRENGTH]`, or several in a list: the steering of all samples that don't set their own.
        strength: A factor on the steering's strength.
        positions: A position rule such as `all` or `generated` that overrides the file's.
        transfer: Allow a steering learned on another model of the same width.
        batch_size: The maximum number of requests that are answered together.
        options: `engine`, `dtype`, `device`, `revision`, `layers` and `replicas`, as `LM.load` takes them.

    Raises:
        TrimtabError: An unknown argument, or a steering that can't be read or doesn't fit the model.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008 (as in Inspect's own)
        steer: str | list[str] | None = None,
        strength: float = 1.0,
        positions: str | None = None,
        transfer: bool = False,
        batch_size: int = 32,
        **options: Any,
    ) -> None:
        super().__init__(model_name=model_name, base_url=base_url, api_key=api_key, config=config)
        if unknown := sorted(set(options) - set(LOAD_OPTIONS)):
            known = ("steer", "strength", "positions", "transfer", "batch_size", *LOAD_OPTIONS)
            raise TrimtabError(f"trimtab's models have no argument {unknown[0]!r}; they have {', '.join(known)}")
        self.lm: LM = load_model(model_name, **{name: LOAD_OPTIONS[name](value) for name, value in options.items()})
        self.batch_size, self.transfer = int(batch_size), bool(transfer)
        self._strength, self._positions = float(strength), positions
        self.steering: Steering | None = self.steering_of(steer)
        self._requests = _request_queue(self.lm)

    def steering_of(self, steer: Any) -> Steering | None:
        """The steering that an argument or a sample names. Raises `TrimtabError` if it can't be read or doesn't fit."""
        named = [steer] if isinstance(steer, str) else list(steer or ())
        if odd := [entry for entry in named if not isinstance(entry, str)]:
            raise TrimtabError(f"steer is FILE[@LAYERS][:STRENGTH], or several in a list, got {odd[0]!r}")
        if not named:
            return None
        steering = self._strength * sum((_load_steering(entry) for entry in named), Steering())
        if self._positions is not None:
            steering = steering.at(Positions.parse(self._positions))
        self.lm.check(steering, transfer=self.transfer)
        return steering

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """One answer, generated together with those of other requests that arrive meanwhile.

        Raises:
            UnsupportedError: Tools, images, or settings that aren't supported.
            TrimtabError: A steering or a prompt that doesn't fit.
        """
        if tools:
            raise UnsupportedError(
                f"trimtab's models can't call tools here, but {tools[0].name!r} was offered; run a task without tools,"
                " or serve the model (trimtab serve) and access it through Inspect's openai-api provider"
            )
        check_config(config)
        prompt = [_message(message) for message in input]
        body = dict(config.extra_body or {})
        steering = self.steering_of(body.pop("steer")) if "steer" in body else self.steering
        if body:
            raise UnsupportedError(f"trimtab's models accept only 'steer' in extra_body, got {min(body)!r}")
        ids = self.lm.encode(prompt)
        most = config.max_tokens or DEFAULT_MAX_TOKENS
        if self.lm.layout.context is not None:
            most = min(most, max(1, self.lm.layout.context - len(ids)))
        request = _Request(
            self.lm, prompt, steering, most, sampling(config), config.seed, self.transfer, self.batch_size
        )
        self._requests.put(request)
        while not request.answers.done():
            await anyio.sleep(GATHER_SECONDS / 5)
        generations = request.answers.result()
        return ModelOutput(
            model=self.model_name,
            choices=[_choice(generation, config, self.model_name) for generation in generations],
            usage=ModelUsage(
                input_tokens=generations[0].prompt_tokens,
                output_tokens=sum(len(generation.token_ids) for generation in generations),
                total_tokens=generations[0].prompt_tokens
                + sum(len(generation.token_ids) for generation in generations),
            ),
            metadata={
                "edits": list(generations[0].applied.edits),
                "dose": _number(generations[0].applied.dose_if_measured),
            },
        )

    def max_tokens(self) -> int | None:
        """The maximum number of tokens of an answer if the task sets none."""
        return DEFAULT_MAX_TOKENS

    def max_connections(self) -> int:
        """The number of requests that are answered together."""
        return self.batch_size

    def connection_key(self) -> str:
        """All arms of a model share its connections, as they share the model."""
        return self.model_name

    def collapse_user_messages(self) -> bool:
        """Chat templates expect alternating turns."""
        return True

    def collapse_assistant_messages(self) -> bool:
        """Chat templates expect alternating turns."""
        return True


def check_config(config: GenerateConfig) -> None:
    """Raises `UnsupportedError` for a setting that would be silently ignored."""
    for name, why in UNSUPPORTED_SETTINGS.items():
        if getattr(config, name, None):
            raise UnsupportedError(f"trimtab's models don't take Inspect's {name}: {why}; leave it out")
    if (config.num_choices or 1) > 1 and not config.temperature:
        raise UnsupportedError("with greedy decoding all choices are the same; give a temperature above 0")


def sampling(config: GenerateConfig) -> dict[str, Any]:
    """Inspect's settings as options of `lm.generate`: greedy, unless there is a temperature above 0."""
    options: dict[str, Any] = {"logprobs": True} if config.logprobs else {}
    if not config.temperature:
        return options
    options |= {"do_sample": True, "temperature": config.temperature}
    options |= {name: value for name in ("top_p", "top_k") if (value := getattr(config, name)) is not None}
    if (config.num_choices or 1) > 1:
        options["num_return_sequences"] = config.num_choices
    return options


@cache
def load_model(name: str, **options: Any) -> LM:
    """The model, loaded once per process: all arms of an evaluation share it."""
    made: LM = LM.load(None if name == "default" else name, **options)
    return made


@cache
def _load_steering(named: str) -> Steering:
    return parse_pick(named, "steer").load()


# ---- answering together ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Request:
    """A request that waits to be answered together with others."""

    lm: LM
    prompt: list[dict[str, str]]
    steering: Steering | None
    tokens: int
    options: Mapping[str, Any]
    seed: int | None
    transfer: bool
    size: int
    answers: Future[list[Generation]] = field(default_factory=Future)

    @property
    def key(self) -> Hashable:
        """Requests with equal keys are answered together.

        A sampled request with a seed runs alone, so that concurrent requests don't change its random numbers.
        """
        alone = id(self) if "do_sample" in self.options and self.seed is not None else None
        return self.tokens, tuple(sorted(self.options.items())), self.transfer, alone


@cache
def _request_queue(lm: LM) -> queue.Queue[_Request]:
    """The queue of requests to a model, and a thread that answers them."""
    requests: queue.Queue[_Request] = queue.Queue()
    threading.Thread(target=_serve, args=(requests,), name="trimtab-inspect", daemon=True).start()
    return requests


def _serve(requests: queue.Queue[_Request]) -> None:
    while True:
        batch = [requests.get()]
        while len(batch) < batch[0].size:
            try:
                batch.append(requests.get(timeout=GATHER_SECONDS))
            except queue.Empty:
                break
        groups: dict[Hashable, list[_Request]] = {}
        for request in batch:
            groups.setdefault(request.key, []).append(request)
        for group in groups.values():
            _answer(group)


def _answer(group: list[_Request]) -> None:
    """Answer a group. If it fails as a whole, each request runs alone, so that one prompt doesn't fail the others."""
    first = group[0]
    try:
        generations = first.lm.generate(
            [request.prompt for request in group],
            [request.steering for request in group],
            max_new_tokens=first.tokens,
            seed=first.seed,
            batch_size=first.size,
            transfer=first.transfer,
            **first.options,
        )
    except BaseException as error:  # the error belongs to the request, not to this thread
        if len(group) == 1:
            first.answers.set_exception(error)
            return
        for request in group:
            _answer([request])
        return
    each = len(generations) // len(group)
    for n, request in enumerate(group):
        request.answers.set_result(generations[n * each : (n + 1) * each])


# ---- conversion -------------------------------------------------------------------------------------------------


def _message(message: ChatMessage) -> dict[str, str]:
    if message.role == "tool" or getattr(message, "tool_calls", None):
        raise UnsupportedError("trimtab's models can't call tools here, but the conversation has a call; leave it out")
    if isinstance(message.content, list) and any(part.type not in ("text", "reasoning") for part in message.content):
        raise UnsupportedError("trimtab's models take only text here, but a message has other content; leave it out")
    return {"role": message.role, "content": message.text}


def _choice(generation: Generation, config: GenerateConfig, name: str) -> ChatCompletionChoice:
    text, reason = generation.text, "stop" if generation.finish_reason == "stop" else "max_tokens"
    ends = [at for end in config.stop_seqs or () if (at := text.find(end)) >= 0]
    if ends:
        text, reason = text[: min(ends)], "stop"
    logprobs = None
    if config.logprobs and generation.logprobs is not None and generation.pieces is not None:
        each = zip(generation.pieces, generation.logprobs, strict=True)
        logprobs = Logprobs(content=[Logprob(token=piece, logprob=value) for piece, value in each])
    message = ChatMessageAssistant(content=text, model=name, source="generate")
    return ChatCompletionChoice(message=message, stop_reason=reason, logprobs=logprobs)  # type: ignore[arg-type]


def _number(value: float) -> float | None:
    return value if value == value else None
