"""`LM`: a transformers model with its tokenizer and layout. Generation and capture start here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from trimtab import engines
from trimtab.decoding.grammar import Grammar
from trimtab.engines.arguments import check_batch_size, steerings_for
from trimtab.engines.doses import DOSE_WARNING as DOSE_WARNING
from trimtab.engines.doses import DoseWarning as DoseWarning
from trimtab.engines.images import PromptImages
from trimtab.engines.language_model import LanguageModel
from trimtab.engines.meanings import check_meanings, meanings_of
from trimtab.engines.request import AnsweredPrompt, Batch, Choice, Decoding, NextToken, Request, Text
from trimtab.engines.resolve import active_edits, resolve
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.adapters import active_adapters, check_adapters
from trimtab.engines.transformers.attention import check_attention, head_count, score_layers
from trimtab.engines.transformers.batching_checks import check_batching
from trimtab.engines.transformers.clean import check_clean
from trimtab.engines.transformers.continuous import (
    BatchingSettings,
    check_answer_count,
    check_rejection_options,
    generate_answers,
)
from trimtab.engines.transformers.evaluating import evaluating
from trimtab.engines.transformers.exclusive import steered_here, steering_lock
from trimtab.engines.transformers.few_rows import few_rows
from trimtab.engines.transformers.following import check_rows_stay
from trimtab.engines.transformers.gate_checks import check_gates
from trimtab.engines.transformers.generate import Generation, _end_ids, check_options, check_request, check_stop_strings
from trimtab.engines.transformers.grammar import GrammarCompiler, Matcher, check_grammar_options, with_grammars
from trimtab.engines.transformers.identity import identify
from trimtab.engines.transformers.images import (
    check_decodes_from_cache,
    check_takes_images,
    decodes_from_cache,
    encode_with_images,
    load_processor,
    read_with_images,
    spans_with_images,
    with_template,
)
from trimtab.engines.transformers.layout import Layout, check_wrapped, find_layout
from trimtab.engines.transformers.likelihood import mean_nlls
from trimtab.engines.transformers.load import load
from trimtab.engines.transformers.next_token import in_batches, next_tokens
from trimtab.engines.transformers.plan import check_edits
from trimtab.engines.transformers.prefix_cache import PrefixCache, prefix_cache_of, use_prefix_cache
from trimtab.engines.transformers.read import check_sites, read_groups, reader, reader_of_pass
from trimtab.engines.transformers.sampling import seeded
from trimtab.engines.transformers.scores import (
    activation_edits,
    check_score_edits,
    is_score_edit,
    score_edits,
)
from trimtab.engines.transformers.session import FirstPass, Session, fixed_edits
from trimtab.engines.transformers.static_batches import answer_static_batch, split_batches
from trimtab.engines.transformers.steered_context import (
    SteeredContext,
    UncachedLoopCheck,
    parse_prompt_lengths,
    steerings_of,
)
from trimtab.engines.transformers.teacher_forced import in_batches as answer_batches
from trimtab.engines.transformers.teacher_forced import teacher_forced
from trimtab.engines.transformers.verify import check_rejection
from trimtab.engines.transformers.weights import device_of, input_device, vocabulary_size
from trimtab.engines.transformers.wrapped_generate import wrapped_generate
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.keywords import keywords
from trimtab.steering import Adapter, Edit, ModelId, Site, Steering
from trimtab.steering.identity import MismatchWarning as MismatchWarning
from trimtab.steering.identity import check_learned_on
from trimtab.text.chat import Message, Template
from trimtab.text.images import IMAGE_LIMITS, ImageLimits
from trimtab.text.pieces import pieces
from trimtab.text.templates import with_keywords

if TYPE_CHECKING:
    from trimtab.engines.llamacpp.model import LlamaCpp
    from trimtab.engines.vllm.lm import VllmLM


class LM(LanguageModel):
    """A transformers model that can be steered and whose activations can be read.

    `LM.load(…)` loads a model; `LM(model, tokenizer)` wraps one that is already loaded. The model isn't modified: hooks
    are attached only while it is steered or read.

    Args:
        model: A causal language model or an image-text model of transformers.
        tokenizer: The model's tokenizer.
        layers: The path of the list of blocks, such as `"model.layers"`, if it can't be found automatically.
        name: The name recorded in cards; by default the one in the model's configuration.
        template: Keyword arguments of the chat template, such as `{"enable_thinking": False}`. They apply to all
            prompts, including the training data of steerings.
        processor: The processor (transformers' `AutoProcessor`) that renders messages with images for an image-text
            model. `LM.load` finds it.

    Raises:
        TrimtabError: `model` or `tokenizer` has the wrong type, or the model's blocks can't be found.
        UnsupportedError: trimtab can't steer this kind of model, such as an encoder-decoder.
    """

    engine = "transformers"
    layout: Layout

    @keywords
    def __init__(
        self,
        model: Any,
        tokenizer: Any = ...,
        *,
        layers: str | None = None,
        name: str | None = None,
        template: Template | None = None,
        processor: Any = None,
    ) -> None:
        if isinstance(model, LM):
            raise TrimtabError("this is already an LM; LM(model, tokenizer) wraps a transformers model")
        check_wrapped(model, tokenizer)
        self.model = model
        self.tokenizer: Any = with_keywords(tokenizer, template)
        self._processor: Any = processor
        self._processor_of: tuple[str, dict[str, Any]] | None = None  # name and options to load the processor with
        compat.check_version()
        self.layout = find_layout(model, layers)
        check_adapters(model)
        self._identities: dict[tuple[Adapter, ...], ModelId] = {}
        self.name: str = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)

    @overload
    @classmethod
    def load(
        cls,
        name: str | Path | None = None,
        *,
        layers: str | None = None,
        engine: Literal["transformers"] = "transformers",
        **options: Any,
    ) -> LM: ...

    @overload
    @classmethod
    def load(
        cls, name: str | Path | None = None, *, layers: str | None = None, engine: Literal["vllm"], **options: Any
    ) -> VllmLM: ...

    @overload
    @classmethod
    def load(
        cls, name: str | Path | None = None, *, layers: str | None = None, engine: Literal["llamacpp"], **options: Any
    ) -> LlamaCpp: ...

    @overload
    @classmethod
    def load(
        cls, name: str | Path | None = None, *, layers: str | None = None, engine: str, **options: Any
    ) -> LanguageModel: ...

    @classmethod
    def load(
        cls,
        name: str | Path | None = None,
        *,
        layers: str | None = None,
        engine: str = "transformers",
        template: Template | None = None,
        **options: Any,
    ) -> Any:
        """Load a model from the Hub, a folder or a GGUF file.

        Args:
            name: A Hub id, a model folder or a GGUF file (which is dequantized). Without a name,
                SmolLM2-135M-Instruct is loaded.
            layers: The path of the list of blocks, as for `LM(…)`.
            engine: An engine of `trimtab.engines.ENGINES` or of an installed plugin. `"vllm"` starts a vLLM engine,
                `"llamacpp"` runs a GGUF file without dequantizing it. Each has its own options, and `load` returns
                its class.
            template: Keyword arguments of the chat template, as for `LM(…)`.
            options: `device` (default: CUDA if available, then MPS, then CPU), `dtype` (default `"auto"`: as stored),
                `revision`, `adapter` (the folder or Hub id of a LoRA to load into the model), and anything that
                `from_pretrained` takes.

        Raises:
            TrimtabError: The model can't be loaded.
        """
        if name is not None and not isinstance(name, (str, Path)):
            raise TrimtabError(
                f"LM.load takes a Hub id or a path, got {type(name).__name__}; LM(model, tokenizer) wraps a model"
            )
        if engine != "transformers":
            options |= {} if template is None else {"template": template}
            return engines.load(engine, name, {"layers": layers, **options})
        model, tokenizer, label = load(name, **options)
        lm = cls(model, tokenizer, layers=layers, name=label, template=template)
        lm._processor_of = None if name is None else (str(name), options)
        return lm

    def __repr__(self) -> str:
        return f"LM({self.name}, {self.layout.layers} layers, width {self.layout.width})"

    # ---- identity ----------------------------------------------------------------------------------------

    @property
    def runs_in(self) -> dict[str, str]:
        """The model's `dtype` and the type of its `device`."""
        parameter = next(self.model.parameters())
        return {"dtype": str(parameter.dtype), "device": device_of(self.model).type}

    @property
    def identity(self) -> ModelId:
        """Name, shape and a fingerprint of the weights, as recorded in a steering's card.

        It lists the adapters that are active now. The result is cached for each set of active adapters.
        """
        adapters = active_adapters(self.model)
        if adapters not in self._identities:
            self._identities[adapters] = identify(self.model, self.layout, self.tokenizer, self.name, adapters)
        return self._identities[adapters]

    @keywords
    def check(self, steering: Steering, *, transfer: bool = False) -> None:
        """Check that a steering fits this model.

        Args:
            steering: The steering. Its layers and width must fit the model.
            transfer: Also accept a steering that was learned on another model of the same width.

        Raises:
            TrimtabError: The steering doesn't fit; the message says what differs.

        Warns:
            MismatchWarning: The chat template, the revision or the weights differ.
        """
        check_learned_on(steering, self.identity, transfer=transfer)
        check_edits(steering, self.layout)
        check_gates(steering, self.layout)
        check_meanings(steering, self.tokenizer)
        if scores := score_edits(steering.edits):
            check_attention(self.layout, {edit.site.layer for edit in scores} & set(range(self.layout.layers)))
            check_score_edits(scores, self.layout.layers, head_count(self.layout))

    @property
    def bos_token_id(self) -> int | None:
        """The beginning-of-sequence token of the tokenizer or else of the model; `None` if neither has one."""
        by_model = self.model.config.get_text_config(decoder=True).bos_token_id
        return super().bos_token_id if super().bos_token_id is not None else by_model

    # ---- images ------------------------------------------------------------------------------------------

    @property
    def processor(self) -> Any:
        """The processor that renders messages with images.

        Raises:
            UnsupportedError: The model takes no images.
            TrimtabError: The processor can't be found or loaded.
        """
        check_takes_images(self.model)
        if self._processor is None:
            self._processor = load_processor(self._processor_of)
        return self._processor

    def _encode_images(
        self, prompt: Sequence[Message], system: str | None, template: Template | None, bounds: ImageLimits
    ) -> tuple[list[int], PromptImages]:
        how: dict[str, Any] = {"system": system, "template": template, "bounds": bounds}
        return encode_with_images(self.processor, self.tokenizer, self.model, prompt, **how)

    def _spans_with_images(
        self, prompt: Any, emphasize: Any, system: str | None, template: Template | None
    ) -> tuple[tuple[int, int], ...]:
        ids, _ = self._encode_images(prompt, system, template, IMAGE_LIMITS)
        tokenizer = with_template(self.tokenizer, self.processor)
        return spans_with_images(tokenizer, prompt, emphasize, ids, system=system, template=template)

    # ---- requests ----------------------------------------------------------------------------------------

    def admit(self, requests: Sequence[Request], decoding: Decoding) -> Decoding:
        """The decoding with the options to pass to transformers' `generate`.

        Raises:
            TrimtabError: A request or an option that this engine can't run.
        """
        options = {"do_sample": False, **decoding.options}
        options.pop("pad_token_id", None)  # callers pass it for models without one; answers never contain pads
        if isinstance(options.get("eos_token_id"), Tensor):
            options["eos_token_id"] = options["eos_token_id"].tolist()
        if not check_stop_strings(options.get("stop_strings")):
            options.pop("stop_strings", None)
        check_options(self.model, options)
        check_request(self.layout, [len(request.ids) for request in requests], decoding.max_new_tokens, options)
        if not options["do_sample"]:
            if compat.generation_option(self.model, options, "num_beams") in (None, 1):
                check_answer_count(options)
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        if any(request.steering is not None and meanings_of(request.steering.edits) for request in requests):
            check_rows_stay(self.model, options)
        with_rejection = [request for request in requests if request.rejection is not None]
        if with_rejection:
            check_rejection_options(self.model, options)
        for request in with_rejection:
            check_rejection(request.steering.edits if request.steering else (), len(request.ids))
        if any(request.grammar is not None for request in requests):
            check_grammar_options(options)
            options = {**options, "eos_token_id": sorted(self._grammars(options).ends)}
            self._matchers(requests, options)
        check_batching(self.model, self.tokenizer, self.layout, requests, replace(decoding, options=options))
        return replace(decoding, options=options)

    def require(self, *features: str) -> None:
        super().require(*features)
        if "clean_cache" in features:
            check_clean(self.layout)

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher at the start of a grammar, for one row of a batch session.

        Raises:
            TrimtabError: The grammar is invalid or too complex.
        """
        return self._grammars({}).matcher(grammar)

    def _matchers(self, requests: Sequence[Request], options: Mapping[str, Any]) -> list[Matcher | None]:
        """A matcher for each request with a grammar, else `None`. Raises `TrimtabError` for an invalid grammar."""
        grammars = [request.grammar for request in requests]
        return [None if grammar is None else self._grammars(options).matcher(grammar) for grammar in grammars]

    def _grammars(self, options: Mapping[str, Any]) -> GrammarCompiler:
        """The cached compiler of grammars for the end-of-sequence tokens of these options."""
        ends = frozenset(_end_ids(self.model, dict(options)))
        known: dict[frozenset[int], GrammarCompiler] = self.__dict__.setdefault("_compilers", {})
        if ends not in known:
            size = self.model.config.get_text_config(decoder=True).vocab_size
            known[ends] = GrammarCompiler(self.tokenizer, size, ends)
        return known[ends]

    def run(self, requests: Sequence[Request], decoding: Decoding) -> list[list[Generation]]:
        """Answer checked requests, in batches of similar length; the answers are in the order of the requests."""
        kwargs: dict[str, Any] = {"max_new_tokens": decoding.max_new_tokens, "logprobs": decoding.logprobs}
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].ids))
        size: Any = 32 if decoding.batch_size is None else decoding.batch_size
        check_batch_size(size)
        matchers = self._matchers(requests, decoding.options)
        answers: dict[int, list[Generation]] = {}

        def report_progress(done: int) -> None:
            if decoding.progress is not None:
                decoding.progress(len(answers) + done, len(order))

        def store_answers(chosen: Sequence[int], generations: list[Generation]) -> None:
            each = len(generations) // len(chosen)
            answers.update({i: generations[n * each : (n + 1) * each] for n, i in enumerate(chosen)})

        def by_steps(batching: BatchingSettings, chosen: Sequence[int]) -> list[Generation]:
            ids, steerings = [requests[i].ids for i in chosen], [requests[i].steering for i in chosen]
            rejections = [requests[i].rejection for i in chosen]
            keeping, images = [matchers[i] for i in chosen], [requests[i].images for i in chosen]
            arguments = (
                self.model,
                self.tokenizer,
                self.layout,
                batching,
                ids,
                steerings,
                rejections,
                keeping,
                images,
                chosen,
            )
            rows = 1 if batching.single_row else size
            more: dict[str, Any] = {"clean_cache": decoding.clean_cache, "monitors": decoding.monitors, **kwargs}
            return generate_answers(*arguments, rows=rows, seed=decoding.seed, progress=report_progress, **more)

        way = BatchingSettings.of(self.model, self.tokenizer, self.layout, dict(decoding.options))
        with self._exclusive(), few_rows(self.model), seeded(decoding.seed, input_device(self.model)):
            not_batchable = {i for i in order if not self._fits_batch(requests[i], decoding)}
            batched = [
                i for i in order if i not in not_batchable and (way is not None or requests[i].rejection is not None)
            ]
            unbatched = [i for i in order if i not in set(batched)]
            if batched:
                way = way or BatchingSettings.for_rejection(self.model, self.tokenizer, self.layout, decoding.options)
                store_answers(batched, by_steps(way, batched))
            with_images = [i for i in unbatched if requests[i].images is not None]
            text_only = [i for i in unbatched if requests[i].images is None]
            batches = split_batches(self.layout, text_only, [len(request.ids) for request in requests], size)
            model_arguments = self.model, self.tokenizer, self.layout
            for chosen in (*batches, *([i] for i in with_images)):
                ids, edited = [requests[i].ids for i in chosen], [requests[i].steering for i in chosen]
                options = with_grammars(decoding.options, [matchers[i] for i in chosen])
                images = requests[chosen[0]].images
                store_answers(
                    chosen, answer_static_batch(*model_arguments, ids, edited, {**kwargs, "options": options}, images)
                )
                report_progress(0)
        return [[self._with_pieces(generation) for generation in answers[i]] for i in range(len(requests))]

    def _fits_batch(self, request: Request, decoding: Decoding) -> bool:
        """Whether the request's images allow it to be decoded by continuous batching.

        Raises:
            UnsupportedError: They don't, and the request needs a feature that only continuous batching has.
        """
        images = request.images
        if images is None or decodes_from_cache(self.model, self.layout, request.ids, images):
            return True
        if request.rejection is not None or decoding.clean_cache or decoding.monitors:
            check_decodes_from_cache(self.model, self.layout, request.ids, images)
        return False

    def _emphasis_layers(self) -> Iterable[int]:
        return score_layers(self.layout)

    def _check_can_stream(self) -> None:
        super()._check_can_stream()
        with self._exclusive():
            pass  # raises inside lm.steered(…): the stream's thread would wait for that context to end

    def _next_logprobs(
        self, choices: Sequence[Choice], steerings: Sequence[Steering | None], batch_size: int, progress: Any
    ) -> list[NextToken]:
        edits_of = [steering.edits if steering else () for steering in steerings]
        results: dict[int, NextToken] = {}
        with self._exclusive(), few_rows(self.model):
            for chosen in in_batches(choices, edits_of, batch_size):
                prompts = [list(choices[i].ids[: choices[i].prompt_length]) for i in chosen]
                edits = self._resolve_edits([steerings[i] for i in chosen], prompts)
                session = Session(self.model, self.layout, fixed_edits(edits), tokenizer=self.tokenizer)
                batch_choices = [choices[i] for i in chosen]
                batch = next_tokens(self.model, self.layout, batch_choices, session, edits, prefix_cache_of(self.model))
                results |= dict(zip(chosen, batch, strict=True))
                if progress is not None:
                    progress(len(results), len(choices))
        return [results[i] for i in range(len(choices))]

    def _answer_logits(self, texts: Sequence[AnsweredPrompt], steerings: Sequence[Steering | None]) -> list[Tensor]:
        logits: dict[int, Tensor] = {}
        with self._exclusive(), few_rows(self.model):
            for chosen in answer_batches(texts, steerings, vocabulary_size(self.model)):
                batch = [texts[i] for i in chosen]
                edits = self._resolve_edits([steerings[i] for i in chosen], [list(text.prompt) for text in batch])
                residual = [activation_edits(row_edits) for row_edits in edits]
                session = Session(self.model, self.layout, fixed_edits(residual), tokenizer=self.tokenizer)
                rows = teacher_forced(self.model, self.layout, batch, session, edits, prefix_cache_of(self.model))
                logits |= {i: row.cpu() for i, row in zip(chosen, rows, strict=True)}
        return [logits[i] for i in range(len(texts))]

    def answer_nlls(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """See `LanguageModel.answer_nlls`. Raises `TrimtabError` while the model is being steered."""
        with self._exclusive():  # without hooks: the answers are scored by the unsteered model
            return mean_nlls(self.model, self.layout, self.name, texts, prefix_cache_of(self.model))

    # ---- steering ----------------------------------------------------------------------------------------

    def _with_pieces(self, answer: Generation) -> Generation:
        """Add the text of each token to an answer that has log-probabilities or a trace."""
        if answer.logprobs is None and answer.trace is None:
            return answer
        return replace(answer, pieces=tuple(pieces(self.tokenizer, answer.token_ids)))

    @keywords
    def steered(
        self,
        steering: Steering | Sequence[Steering | None],
        *,
        prompt_lengths: Sequence[int] | None = None,
        transfer: bool = False,
    ) -> AbstractContextManager[Session]:
        """Steer all forward passes of the model inside the context: `model.generate`, a pipeline or your own loop.

        When the context exits, normally or by an exception, the hooks are removed and the model is unchanged.

        Args:
            steering: One steering for all rows, or a list with one for each row of the batch.
            prompt_lengths: The length of each prompt in tokens, without padding, for your own decoding loop. By
                default the first forward pass over a text is taken to be its whole prompt. Calls of `model.generate`
                don't need it.
            transfer: Allow a steering learned on another model of the same width.

        Returns:
            A context manager that yields the session. The session's `doses(row)` are the doses of a row.

        Raises:
            TrimtabError: The steering doesn't fit. Inside the context, before the first token: the batch doesn't
                match the steerings or `prompt_lengths`. When the context exits: the model didn't run inside, or its
                text ended before the given prompt length.
            UnsupportedError: The steering edits attention scores.

        Warns:
            RuntimeWarning: The result was discarded without a `with` statement, so nothing was steered.
        """
        steerings, lengths = steerings_of(steering), parse_prompt_lengths(prompt_lengths)
        for each_steering in set(steerings):
            self.check(each_steering, transfer=transfer)
            if any(is_score_edit(edit) for edit in each_steering.edits):
                raise UnsupportedError("attention scores are steered by lm.generate(…), not inside lm.steered(…)")
        return SteeredContext(lambda: self._steered_context(steering, steerings, lengths, transfer))

    @contextmanager
    def _steered_context(
        self,
        steering: Steering | Sequence[Steering | None],
        steerings: tuple[Steering, ...],
        prompt_lengths: list[int] | None,
        transfer: bool,
    ) -> Iterator[Session]:
        """The context of `steered`, with checked arguments."""
        growing = UncachedLoopCheck([edit for each_steering in steerings for edit in active_edits(each_steering)])

        def decide(count: int, first: FirstPass) -> list[tuple[Edit, ...]]:
            for each_steering in set(steerings):  # checked again: adapters may have been switched since
                check_learned_on(each_steering, self.identity, transfer=transfer)
            if session.prompt_lengths is None:
                growing.check(first)
            chosen = steerings_for(steering, count)
            read = reader_of_pass(self.layout, count, session.prompt_lengths, first)
            repeat = len(first.lengths) // count
            return resolve(chosen, first.lengths[::repeat], read).edits

        session = Session(self.model, self.layout, decide, prompt_lengths, self.tokenizer)
        sites = sorted({edit.site for each_steering in steerings for edit in active_edits(each_steering)})
        stays = any(meanings_of(active_edits(each_steering)) for each_steering in steerings)
        # the caller runs the model, in training or evaluation mode
        with steering_lock(self.layout.decoder, user_held=True):
            with session.hooked(sites, any_thread=True), wrapped_generate(self.model, session, bool(sites), stays):
                yield session
            if sites and not session.ran:
                raise TrimtabError(
                    "nothing was steered inside lm.steered(…): this model didn't run there, or its hooks were"
                    " bypassed (a captured graph, a traced copy, another model)"
                )
            if prompt_lengths is not None:
                session.check_prompts_reached()

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the model for one run, in evaluation mode. Other threads wait, as hooks act on the passes of all."""
        decoder = self.layout.decoder
        with steering_lock(decoder), evaluating(self.model), evaluating(decoder):  # a wrapper may be in another mode
            yield

    def _caching_prefixes(self) -> AbstractContextManager[None]:
        """While open, this thread caches unsteered prefixes of the texts whose probabilities are computed."""
        return use_prefix_cache(prefix_cache_of(self.model) or PrefixCache(self.model, self.layout))

    def _resolve_edits(self, steerings: list[Steering | None], ids: list[list[int]]) -> list[tuple[Edit, ...]]:
        """Each request's edits as a session runs them: with gates, masks and per-token conditions resolved."""
        return resolve(steerings, [len(prompt) for prompt in ids], reader(self.layout, ids)).edits

    @property
    def is_steered(self) -> bool:
        """Whether this thread is inside `lm.steered(…)` of this `LM` or of another `LM` that wraps the same model."""
        return steered_here(self.layout.decoder)

    # ---- activations -------------------------------------------------------------------------------------

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raise `TrimtabError` if the model doesn't have one of the sites."""
        check_sites(self.layout, sites)

    def _read(
        self, groups: Sequence[Sequence[Text]], sites: Sequence[Site], tokens: int, steering: Steering | None
    ) -> Iterator[Batch]:
        plain = [g for g, group in enumerate(groups) if steering is None and all(text.images is None for text in group)]
        for batch in read_groups(self.layout, [groups[g] for g in plain], sites, tokens_per_batch=tokens):
            yield replace(batch, groups=[plain[g] for g in batch.groups])
        for g in sorted(set(range(len(groups))) - set(plain)):
            members = []
            for text in groups[g]:  # each text alone and whole, as positions are relative to the end of the prompt
                with nullcontext() if steering is None else self.steered(steering, transfer=True):
                    whole = self._read_text(text, sites)
                members.append({site: whole[site][list(text.positions)] for site in sites})
            yield Batch([g], {site: [[member[site] for member in members]] for site in sites})

    def _read_text(self, text: Text, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The activations `[tokens, width]` of a whole text at each site."""
        if text.images is not None:
            return read_with_images(self.model, self.layout, text.ids, text.images, sites)
        (batch,) = read_groups(self.layout, [[Text(text.ids, range(len(text.ids)))]], sites)
        return {site: batch.values[site][0][0] for site in sites}
