"""The interface that users hold, on every engine: prompts go in, answers and activations come out.

Whatever doesn't depend on the engine happens here, once: rendering prompts, checking and matching steerings, finding
phrases, comparing lengths. Anything that an engine can't do is refused here, before anything runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from trimtab.decoding.grammar import Grammar, Schema
from trimtab.decoding.rejection import Rejection
from trimtab.engines.answer import Generation
from trimtab.engines.arguments import (
    as_list,
    check_logprobs_and_system,
    emphasis_for,
    grammars_for,
    rejections_for,
    sampling_for,
    seed_for,
    steerings_for,
)
from trimtab.engines.captured import Captured, sites_of
from trimtab.engines.contract import (
    FEATURES,
    TOKENS_PER_BATCH,
    Shape,
    check_answered_prompts,
    check_answers,
    check_choices,
    check_length,
    check_texts,
)
from trimtab.engines.doses import warn_of_doses
from trimtab.engines.images import PromptImages
from trimtab.engines.request import AnsweredPrompt, Batch, Choice, Decoding, NextToken, Request, Text
from trimtab.engines.resolve import check_prompt
from trimtab.engines.streaming import ReportTokens, Stream, TokenReporter, stream_prompt
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.keywords import check_arguments, method_keywords
from trimtab.steering import ModelId, Positions, ScaleScores, ScoreOperation, Site, Steering, emphasis
from trimtab.steering.attributes import LM_HINTS, raise_missing_attribute
from trimtab.steering.monitors import Monitor, check_monitors
from trimtab.steering.steering import check_steering
from trimtab.text.chat import Message, Prompt, Template, encode
from trimtab.text.images import IMAGE_LIMITS, ImageLimits, has_images
from trimtab.text.spans import Emphasis, find_spans
from trimtab.text.templates import check_no_keywords

if TYPE_CHECKING:
    from trimtab.evaluate.divergence import Divergence
    from trimtab.report.projections import Projections
    from trimtab.tune.sweep import Sweep

LAST = Positions.last_prompt_token()
LEARNED = ", and what is learned there runs on this engine if it supports the operations"


@method_keywords("encode", "encode_with_images", "spans", "next_logprobs", "project", "capture", "read")
class LanguageModel(ABC):
    """A model that can be steered and read. Its implementations are `LM`, `VllmLM` and `LlamaCpp`.

    Attributes:
        engine: The engine's name, as in `LM.load(engine=…)`.
        cannot: The `contract.FEATURES` that the engine doesn't support, and why.
        name: The model's name.
        tokenizer: A tokenizer with the interface of transformers.
        layout: The number of blocks, the width of the residual stream, the context length in tokens, and the number of
            query heads per layer.
    """

    engine: ClassVar[str]
    cannot: ClassVar[Mapping[str, str]] = {}

    name: str
    tokenizer: Any
    layout: Shape

    # ---- implemented by engines -------------------------------------------------------------------------

    @property
    @abstractmethod
    def identity(self) -> ModelId:
        """Name, shape and a fingerprint of the weights, as recorded in a steering's card."""

    @property
    @abstractmethod
    def runs_in(self) -> dict[str, str]:
        """The `dtype` that the model computes in, and the kind of `device`."""

    @abstractmethod
    def check(self, steering: Steering, *, transfer: bool = False) -> None:
        """Check that the engine can run a steering on this model.

        Args:
            steering: The steering. It must have been learned on this model, unless `transfer` is true.
            transfer: Allow a steering learned on another model of the same width.

        Raises:
            TrimtabError: The steering doesn't fit this model.
            UnsupportedError: The engine can't run it.
        """

    @abstractmethod
    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raises `TrimtabError` for a site that the model lacks, `UnsupportedError` for one that can't be read."""

    @abstractmethod
    def admit(self, requests: Sequence[Request], decoding: Decoding) -> Decoding:
        """The decoding options with the engine's defaults. Raises `TrimtabError` for anything that it can't do."""

    @abstractmethod
    def run(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Generation]]:
        """Answer checked requests, in order, each with as many answers as the options say."""

    @abstractmethod
    def _read(
        self, groups: Sequence[Sequence[Text]], sites: Sequence[Site], tokens: int, steering: Steering | None
    ) -> Iterator[Batch]:
        """The implementation of `read`; its arguments are already checked."""

    @abstractmethod
    def _next_logprobs(
        self, choices: Sequence[Choice], steerings: Sequence[Steering | None], batch_size: int, progress: Any
    ) -> list[NextToken]:
        """The implementation of `next_logprobs`; its arguments are already checked."""

    @abstractmethod
    def answer_nlls(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """The mean negative log-probability per token of each answer under the unsteered model, in nats, in one batch.

        Args:
            texts: Pairs of `(context ids, answer ids)`, neither of them empty.

        Raises:
            UnsupportedError: The engine can't compute perplexities.
        """

    @abstractmethod
    def _answer_logits(self, texts: Sequence[AnsweredPrompt], steerings: Sequence[Steering | None]) -> list[Tensor]:
        """The implementation of `answer_logits`; its arguments are already checked."""

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            return raise_missing_attribute(self, "an LM", name, LM_HINTS)

    @property
    def bos_token_id(self) -> int | None:
        """The token that texts begin with; `None` if the model has none."""
        token = self.tokenizer.bos_token_id
        return token if isinstance(token, int) else None

    @property
    def is_steered(self) -> bool:
        """Whether the current thread is inside `lm.steered(…)`."""
        return False

    # ---- supported features -----------------------------------------------------------------------------

    def supports(self, steering: Steering | None = None, *features: str) -> str | None:
        """Why this engine can't run a steering, or lacks one of the features, as a sentence; `None` if it can do all.

        Args:
            steering: Checked as by `check`, except for the model that it was learned on.
            features: Names from `trimtab.engines.contract.FEATURES`, such as `"rejection"`.

        Raises:
            TrimtabError: There is no such feature.
        """
        if steering is not None:
            check_steering(steering)
        try:
            self.require(*features)
            if steering is not None:
                self.check(Steering(steering.edits))
        except UnsupportedError as error:
            return str(error)
        except TrimtabError as error:
            if unknown := set(features) - set(FEATURES):
                raise TrimtabError(f"there is no feature {min(unknown)!r}; features: {', '.join(FEATURES)}") from None
            return str(error)
        return None

    def require(self, *features: str) -> None:
        """Raises `UnsupportedError`, with the reason and an alternative, if the engine doesn't support one of the
        features."""
        for feature in features:
            if feature not in FEATURES:
                raise TrimtabError(f"there is no feature {feature!r}; features: {', '.join(FEATURES)}")
            if feature in self.cannot:
                raise UnsupportedError(
                    f"the {self.engine} engine doesn't support {FEATURES[feature]}: {self.cannot[feature]}; the"
                    " transformers engine can (leave out engine=, or"
                    f" --engine){LEARNED if feature in ('training', 'modules') else ''}"
                )

    # ---- text --------------------------------------------------------------------------------------------

    def encode(
        self, prompt: Prompt, *, system: str | None = None, chat: bool | None = None, template: Template | None = None
    ) -> list[int]:
        """The token ids of a prompt (a string or messages), rendered up to where the answer begins or continues."""
        return encode(self.tokenizer, prompt, system=system, chat=chat, template=template)

    def encode_with_images(
        self,
        prompt: Prompt,
        *,
        system: str | None = None,
        chat: bool | None = None,
        template: Template | None = None,
        bounds: ImageLimits = IMAGE_LIMITS,
    ) -> tuple[list[int], PromptImages | None]:
        """The token ids of a prompt, as from `encode`, and its images; the ids contain the images' placeholder tokens.

        An image is a part of a message's content: `{"type": "image", "image": …}` with a Pillow image, a path, the
        bytes of a file or a `data:` URL, or OpenAI's `{"type": "image_url", "image_url": {"url": "data:…"}}`.

        Args:
            prompt: A string or messages.
            system: A system message before the prompt.
            chat: Whether a string is the user's message or plain text; `None` asks the tokenizer.
            template: Keywords of the chat template.
            bounds: Limits on the number and the size of the images.

        Raises:
            TrimtabError: An image can't be read.
            UnsupportedError: The engine or the model takes no images.
        """
        if not has_images(prompt):
            return self.encode(prompt, system=system, chat=chat, template=template), None
        self.require("images")
        if isinstance(prompt, str) or chat is False:
            raise TrimtabError("chat=False with a list of messages: give plain text")
        return self._encode_images(prompt, system, template, bounds)

    def _encode_images(
        self, prompt: Sequence[Message], system: str | None, template: Template | None, bounds: ImageLimits
    ) -> tuple[list[int], PromptImages]:
        """The implementation of `encode_with_images` for messages that contain images."""
        raise UnsupportedError(f"the {self.engine} engine takes no images")

    def spans(
        self,
        prompt: Prompt,
        emphasize: Emphasis | Sequence[Emphasis],
        *,
        system: str | None = None,
        chat: bool | None = None,
        template: Template | None = None,
    ) -> tuple[tuple[int, int], ...]:
        """The token positions `(start, stop)` of phrases in the rendered prompt. Raises as `find_spans` does."""
        if not has_images(prompt):
            return find_spans(self.tokenizer, prompt, emphasize, system=system, chat=chat, template=template)
        return self._spans_with_images(prompt, emphasize, system, template)

    def _spans_with_images(
        self, prompt: Any, emphasize: Any, system: str | None, template: Template | None
    ) -> tuple[tuple[int, int], ...]:
        """The implementation of `spans` for messages that contain images."""
        raise UnsupportedError(f"the {self.engine} engine takes no images")

    @check_arguments
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
        batch_size: int | None = 32,
        seed: int | None = None,
        transfer: bool = False,
        emphasize: Emphasis | Sequence[Emphasis | Sequence[Emphasis] | None] | None = None,
        rejection: Rejection | Sequence[Rejection | None] | bool | None = None,
        clean_cache: bool = False,
        monitors: Monitor | Sequence[Monitor] = (),
        json_schema: Schema | Grammar | Sequence[Schema | Grammar | None] | None = None,
        progress: Any = None,
        **options: Any,
    ) -> list[Generation]:
        """Answer prompts, each under its own steering (or one for all, or none).

        Args:
            prompts: A string, a list of chat messages, or a list of either. If the last message is the assistant's, it
                is continued. For image-text models, messages may contain images; see `encode_with_images`.
            steering: One for all prompts, or a list with one per prompt (`None`: unsteered). The vLLM engine also takes
                the names of registered steerings.
            max_new_tokens: Maximum tokens per answer.
            system: A system message before each prompt.
            chat: Whether a string is the user's message or plain text; `None` asks the tokenizer.
            template: Keywords of the chat template, such as `{"enable_thinking": False}`.
            logprobs: Return the log-probability of each token.
            batch_size: On the transformers engine, the number of prompts that are answered at the same time, longest
                first; rows leave the batch as they finish, and the next prompts take their places. Other engines choose
                their own batches.
            seed: Makes samples repeatable. Each answer has its own random numbers, determined by its index in the list.
            transfer: Allow a steering learned on another model of the same width.
            emphasize: What the model should follow: a phrase that every prompt contains, or a list with one item per
                prompt (several phrases as a list, `None` for none); see `trimtab.text.spans`. It steers attention as
                DIRECTER does.
            rejection: Weaken or reject any steering where its token is implausible; the answers then have a `trace`.
                Default: on with `emphasize`, otherwise off.
            clean_cache: Steer over the unsteered model's KV cache: the cached text isn't influenced by the steering,
                and only the pass over the newest token, which chooses the next one, is steered. This costs a second row
                per prompt. Rejection always works this way.
            monitors: Directions that are read at each token. They can end the answer or switch a steering on; the
                answers' `monitors` contain what they read.
            json_schema: Constrain each answer to JSON that matches this schema, under any steering: tokens that would
                break it are never chosen. One for all prompts, or a list with one per prompt (`None`: any text). An
                answer that reaches `max_new_tokens` may be cut off; its `finish_reason` is then `"length"`.
            progress: `progress(done, total)` is called as prompts are answered.
            options: Options of transformers' `generate`. Decoding is greedy unless `do_sample=True`; without it,
                sampling options such as `temperature` are refused (except temperature 0). Other engines take the ones
                that they support, under the same names. Rejection, and options that choose tokens by anything other
                than `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty`, `min_new_tokens` and `eos_token_id`
                (beams, other logits processors or stopping criteria), use transformers' own `generate`, with static
                batches. So does a model whose rows can't share a continuous batch.

        Returns:
            The answers in the prompts' order, `num_return_sequences` for each.

        Raises:
            TrimtabError: Before anything runs, for a steering, prompt or option that doesn't fit.
            UnsupportedError: Before anything runs, for what this engine can't do.
        """
        check_no_keywords(self.tokenizer, options)
        check_logprobs_and_system(logprobs, system)
        seed, options = seed_for(seed), sampling_for(options)
        watching = check_monitors(monitors)
        self._check_features(emphasize, rejection, clean_cache, watching)
        many = as_list(prompts)
        steerings = self._steerings_for(steering, len(many))
        marked = emphasis_for(emphasize, len(many))
        for i, marks in enumerate(marked):
            if marks is not None:
                spans = self.spans(many[i], marks, system=system, chat=chat, template=template)
                towards = emphasis(ScaleScores(), spans, self._emphasis_layers(), "directer")
                steerings[i] = towards if steerings[i] is None else steerings[i] + towards
        rejections = rejections_for(rejection, marked)
        if json_schema is not None:
            self.require("grammar")
        grammars = grammars_for(json_schema, len(many))
        for each_steering in {
            each_steering
            for each_steering in (*steerings, *(each.steering for each in watching))
            if each_steering is not None
        }:
            self.check(each_steering, transfer=transfer)
        seen = [self.encode_with_images(prompt, system=system, chat=chat, template=template) for prompt in many]
        ids, images = [tokens for tokens, _ in seen], [prompt_images for _, prompt_images in seen]
        requests = [Request(*each) for each in zip(ids, steerings, rejections, grammars, images, strict=True)]
        decoding = Decoding(max_new_tokens, logprobs, seed, batch_size, options, progress, clean_cache, watching)
        decoding = self.admit(requests, decoding)
        check_answers(self.layout, [len(tokens) for tokens in ids], max_new_tokens)
        for request in requests:
            check_prompt(request.steering, len(request.ids))
        done = [answer for answers in self.run(requests, decoding) for answer in answers]
        warn_of_doses(done, steerings)
        return done

    @check_arguments
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
        emphasize: Emphasis | Sequence[Emphasis] | None = None,
        rejection: Rejection | bool | None = None,
        clean_cache: bool = False,
        monitors: Monitor | Sequence[Monitor] = (),
        json_schema: Schema | Grammar | None = None,
        **options: Any,
    ) -> Stream:
        """Answer one prompt, and yield its text piece by piece while it is generated.

        The text is the one that `generate` returns for this prompt alone under the same options. The model runs in a
        separate thread; other callers wait for it as they do for `generate`.

        Args:
            prompt: A string, or a list of chat messages.
            steering: The answer's steering.
            max_new_tokens: Maximum tokens per answer.
            system: A system message before the prompt.
            chat: Whether a string is the user's message or plain text; `None` asks the tokenizer.
            template: Keywords of the chat template.
            logprobs: Return log-probabilities in the result.
            seed: The seed of a sampled answer.
            transfer: Allow a steering learned on another model of the same width.
            emphasize: One phrase of the prompt, or several.
            rejection: As in `generate`.
            clean_cache: As in `generate`.
            monitors: As in `generate`; what they read is in the result.
            json_schema: As in `generate`.
            options: As in `generate`.

        Returns:
            An iterator over pieces of text, whose `result` is the `Generation` after the last one. Leaving the loop
            early or calling `close()` stops the generation.

        Raises:
            TrimtabError: As in `generate`, before anything runs; for several prompts, beams or answers; and inside
                `lm.steered(…)`.
        """
        self.require("streaming")
        single_prompt = stream_prompt(prompt, steering, rejection, options)
        self._check_can_stream()

        def generate(tell: ReportTokens) -> Generation:
            (answer,) = self.generate(
                [single_prompt],
                steering,
                max_new_tokens=max_new_tokens,
                system=system,
                chat=chat,
                template=template,
                logprobs=logprobs,
                seed=seed,
                transfer=transfer,
                emphasize=None if emphasize is None else [emphasize],
                rejection=rejection,
                clean_cache=clean_cache,
                monitors=monitors,
                json_schema=json_schema,
                **{**options, "streamer": TokenReporter(tell)},
            )
            return answer

        return Stream(self.tokenizer, generate)

    def next_logprobs(
        self,
        choices: Sequence[Choice],
        steering: Steering | Sequence[Steering | None] | None = None,
        *,
        batch_size: int = 32,
        transfer: bool = False,
        progress: Any = None,
    ) -> list[NextToken]:
        """The log-probabilities of candidate next tokens after each text, each text under its own steering.

        Nothing is generated: a row costs one forward pass, and the unsteered prefix that rows of the same text share is
        computed once for all of them. Rows are sorted so that those with a common prefix are in the same batch.

        Args:
            choices: The texts and their candidate tokens.
            steering: One for all texts, or a list with one per text (`None`: unsteered).
            batch_size: Rows per batch.
            transfer: Allow a steering learned on another model of the same width.
            progress: `progress(done, total)` is called after each batch.

        Returns:
            One result per text, in the order of `choices`.

        Raises:
            TrimtabError: Before anything runs, for a steering or a text that doesn't fit.
            UnsupportedError: Before anything runs, for a steering of attention scores, or one that the engine can't
                run.
        """
        steerings = steerings_for(steering, len(choices))
        for each_steering in {each_steering for each_steering in steerings if each_steering is not None}:
            if any(isinstance(edit.operation, ScoreOperation) for edit in each_steering.edits):
                raise UnsupportedError("attention scores are steered by lm.generate(…), not by lm.next_logprobs(…)")
            self.check(each_steering, transfer=transfer)
        check_choices(self.layout, choices)
        for choice, each_steering in zip(choices, steerings, strict=True):
            check_prompt(each_steering, choice.prompt_length)
        return self._next_logprobs(choices, steerings, batch_size, progress)

    def answer_logits(
        self, texts: Sequence[AnsweredPrompt], steering: Steering | Sequence[Steering | None] | None = None
    ) -> list[Tensor]:
        """The logits before each token of given answers (teacher forcing), each text under its own steering.

        Args:
            texts: The prompts and their answers.
            steering: One for all texts, or a list with one per text (`None`: unsteered). The caller has to `check` it.

        Returns:
            For each text a tensor `[answer tokens, vocabulary]` on the CPU. An engine may return log-probabilities
            instead: `log_softmax` of either are the log-probabilities.

        Raises:
            TrimtabError: A text is empty or too long, or the numbers of steerings and texts differ.
            UnsupportedError: The engine doesn't return all tokens' probabilities.
        """
        self.require("logits")
        steerings = [steering] * len(texts) if steering is None or isinstance(steering, Steering) else list(steering)
        if len(steerings) != len(texts):
            raise TrimtabError(f"{len(steerings)} steerings for {len(texts)} texts; give one for each, or one for all")
        check_answered_prompts(self.layout, texts)
        for text, each_steering in zip(texts, steerings, strict=True):
            check_prompt(each_steering, len(text.prompt))
        return self._answer_logits(texts, steerings)

    # ---- looking at a steering --------------------------------------------------------------------------

    def project(
        self,
        text: Prompt,
        steering: Steering,
        layers: int | Iterable[int] | None = None,
        *,
        template: Template | None = None,
        transfer: bool = False,
    ) -> Projections:
        """How each token's activation projects onto a steering's directions: what the steering would read in a text.

        Args:
            text: A string, read as it is, or messages. If the last message is the assistant's, nothing is rendered
                after it.
            steering: The steering with the directions. A direction that is added with negative strength is reversed.
            layers: A selection of the steering's layers; by default all.
            template: Keywords of the chat template, for messages.
            transfer: Allow a steering learned on another model of the same width.

        Returns:
            The tokens, with cosines and projections by layer; notebooks display it as colored text.

        Raises:
            TrimtabError: An empty text, a layer with no direction or with several, or a steering from another model.
        """
        from trimtab.report.projections import project

        return project(self, text, steering, layers, template=template, transfer=transfer)

    def divergence(
        self, steering: Steering | Sequence[Steering | None] | None, prompts: Prompt | Sequence[Prompt], **options: Any
    ) -> Divergence:
        """Measure the divergence between the unsteered and the steered model at each token of the unsteered answers.

        Args:
            steering: Any steering, including gated ones, edits at certain positions, and edits of attention scores; or
                one per prompt.
            prompts: The prompts.
            options: `tokens` (the maximum number of tokens per unsteered answer, default 32), `system`, `chat`,
                `template` and `transfer`.

        Returns:
            The `mean` and `p95` (95th percentile) in nats per token, and the `nats` of each token.

        Raises:
            TrimtabError: The steering doesn't fit, or there are no prompts.
            UnsupportedError: The engine can't run the steering, or doesn't return all tokens' probabilities.
        """
        self.require("logits")
        from trimtab.evaluate.divergence import divergence

        return divergence(self, steering, prompts, **options)

    @check_arguments
    def sweep(
        self,
        steering: Steering,
        *,
        layers: int | Iterable[int] | None = None,
        strengths: float | Iterable[float] = (0.5, 1.0, 1.5),
        prompts: Prompt | Sequence[Prompt] | None = None,
        check: Callable[[str], bool | float] | None = None,
        max_new_tokens: int = 48,
        **options: Any,
    ) -> Sweep:
        """Try a steering at each of its layers separately, at several strengths, as rows of shared batches.

        Args:
            steering: A learned steering, preferably with several layers.
            layers: A selection of the steering's layers; by default all.
            strengths: Multiples of the steering.
            prompts: The prompts; by default eight of the package's queries.
            check: A function of an answer's text that returns whether it passes: a boolean or a number.
            max_new_tokens: Maximum tokens per answer.
            options: `batch_size` (64), `system`, `chat`, `template`, `transfer`, `progress`, `guard` (the limits of
                `trimtab.tune.Guard`, or `None`), and the options of `generate`.

        Returns:
            One row per layer and strength: the share that passes, the dose, the share of repeated four-grams, and the
            perplexity under the unsteered model. `best()` returns one of the rows; its `steering` is ready to use.

        Raises:
            TrimtabError: A layer that isn't in the steering, a strength of 0, a check that returns neither a boolean
                nor a number, and as in `generate`.
        """
        self.require("perplexity")
        from trimtab.tune.sweep import sweep

        kwargs: dict[str, Any] = {"layers": layers, "strengths": strengths, "prompts": prompts, "check": check}
        return sweep(self, steering, **kwargs, max_new_tokens=max_new_tokens, **options)

    # ---- activations -------------------------------------------------------------------------------------

    def capture(
        self,
        prompts: Prompt | Sequence[Prompt],
        sites: Site | int | Sequence[Site | int],
        positions: Positions = LAST,
        *,
        system: str | None = None,
        chat: bool | None = None,
        template: Template | None = None,
        steering: Steering | None = None,
        transfer: bool = False,
    ) -> list[dict[Site, Tensor]]:
        """The activations of prompts: for each prompt, `{site: [positions, width]}`.

        They are in the model's dtype on the transformers engine, in float32 on others.

        Args:
            prompts: A string, a list of chat messages, or a list of either.
            sites: Where to read. An integer is the residual stream after that block; a single site needs no list.
            positions: The tokens to read; by default the last prompt token.
            system: A system message before each prompt.
            chat: Whether a string is the user's message or plain text; `None` asks the tokenizer.
            template: Keywords of the chat template.
            steering: Read the activations under this steering. Inside `lm.steered(…)` they are read under its steering.
            transfer: Allow a steering learned on another model of the same width.

        Raises:
            TrimtabError: A prompt that has no token at these positions, a site that the model doesn't have, or a
                steering that doesn't fit.
            UnsupportedError: The engine can't read this.
        """
        wanted = sites_of(sites)
        if not isinstance(positions, Positions):
            raise TrimtabError(f"positions must be a Positions object, got {positions!r}; write Positions.parse('all')")
        if steering is not None:
            self.check(steering, transfer=transfer)
        texts = []
        for i, prompt in enumerate(as_list(prompts)):
            ids, images = self.encode_with_images(prompt, system=system, chat=chat, template=template)
            check_length(self.layout, len(ids), f"prompt {i + 1}")
            where = positions.in_prompt(len(ids))
            if not where:
                raise TrimtabError(f"positions {positions} select no token of a prompt of {len(ids)} tokens")
            check_prompt(steering, len(ids))
            texts.append(Text(ids, where, images))
        activations: dict[int, dict[Site, Tensor]] = {}
        for batch in self.read([[text] for text in texts], wanted, steering=steering):
            for n, i in enumerate(batch.groups):
                activations[i] = Captured((site, batch.values[site][n][0]) for site in wanted)
        return [activations[i] for i in range(len(texts))]

    def read(
        self,
        groups: Sequence[Sequence[Text]],
        sites: Sequence[Site],
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        steering: Steering | None = None,
    ) -> Iterator[Batch]:
        """Read every text of every group at every site, batch by batch, in an order that the engine chooses.

        Args:
            groups: Texts that belong together, such as the two sides of a pair; a group is never split over batches.
            sites: Where to read. All engines can read the residual stream after a block.
            tokens_per_batch: Approximate number of tokens that are read together and whose activations are in memory.
            steering: The steering of the texts, each of which is then a whole prompt. The caller has to `check` it.

        Raises:
            TrimtabError: A site that the model doesn't have, an empty text, or one longer than the model's context.
            UnsupportedError: A site that the engine can't read.
        """
        self.check_sites(sites)
        check_texts(self.layout, groups)
        return self._read(groups, sites, tokens_per_batch, steering)

    # ---- where engines differ ----------------------------------------------------------------------------

    def _check_features(self, emphasize: Any, rejection: Any, clean_cache: Any, monitors: Sequence[Monitor]) -> None:
        if monitors:
            self.require("monitors")
        if not isinstance(clean_cache, bool):
            raise TrimtabError(f"clean_cache is True or False, got {clean_cache!r}")
        if clean_cache:
            self.require("clean_cache")
        if emphasize is not None:
            self.require("emphasis")
        if emphasize is not None and rejection is None and "rejection" in self.cannot:
            raise UnsupportedError(
                f"emphasis comes with rejection of implausible tokens, which the {self.engine} engine doesn't support:"
                f" {self.cannot['rejection']}; pass rejection=False"
            )
        if rejection not in (None, False):
            self.require("rejection")

    def _check_can_stream(self) -> None:
        """Raises `TrimtabError` if a stream can't start now."""
        return

    def _caching_prefixes(self) -> AbstractContextManager[None]:
        """While open, an engine may cache unsteered prefixes of the texts whose probabilities are computed."""
        return nullcontext()

    def _emphasis_layers(self) -> Iterable[int]:
        """The layers at which emphasis acts."""
        return range(self.layout.layers)

    def _steerings_for(self, steering: Any, count: int) -> list[Any]:
        """The steering of each request."""
        return steerings_for(steering, count)
