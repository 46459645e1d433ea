"""A language model: the model, its tokenizer, and where its blocks are. Generation and capture start here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import Tensor

from trimtab import engines
from trimtab.decoding.rejection import Rejection
from trimtab.engines.arguments import as_list, batches_of, marks_for, of_equal_length, one_each, rejections_for
from trimtab.engines.doses import DOSE_WARNING as DOSE_WARNING
from trimtab.engines.doses import DoseWarning as DoseWarning
from trimtab.engines.doses import warn_of_doses
from trimtab.engines.streaming import Stream, Tell, TokenTeller, one_request
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.anatomy import positions_of
from trimtab.engines.transformers.attention import attending, check_attention, head_count, score_layers
from trimtab.engines.transformers.continuous import Continuous, answer
from trimtab.engines.transformers.deciding import (
    check_gates,
    check_prompt,
    conditionals,
    decided,
    read_gates,
    read_gates_with,
    wanted,
)
from trimtab.engines.transformers.exclusive import steering as steering_of
from trimtab.engines.transformers.few_rows import few_rows
from trimtab.engines.transformers.generate import Generation, check_options, check_request, generate_batch
from trimtab.engines.transformers.layout import find_layout
from trimtab.engines.transformers.load import load
from trimtab.engines.transformers.next_token import Choice, NextToken, check_choices, first_steered, next_tokens
from trimtab.engines.transformers.plan import check_edits
from trimtab.engines.transformers.prefill import OTHERS, Prefill, decides_at_prefill
from trimtab.engines.transformers.read import Text, check_length, read_groups, run_decoder
from trimtab.engines.transformers.rejecting import RejectingLoop, Request, check_rejection
from trimtab.engines.transformers.sampling import seeded
from trimtab.engines.transformers.scores import check_score_edits, is_score_edit
from trimtab.engines.transformers.session import Decide, FirstPass, Session
from trimtab.engines.transformers.settle import Read, read_prompts, settle
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, ModelId, Positions, ScaleScores, Site, Steering, emphasis
from trimtab.steering.identity import MismatchWarning as MismatchWarning
from trimtab.steering.identity import check_learned_on, fingerprint, sampled_rows
from trimtab.steering.steering import check_steering
from trimtab.text.chat import Prompt, Template, encode, template_digest
from trimtab.text.pieces import pieces
from trimtab.text.spans import Emphasis, find_spans
from trimtab.text.templates import check_no_keywords, with_keywords

if TYPE_CHECKING:
    from trimtab.engines.llamacpp.model import LlamaCpp
    from trimtab.engines.vllm.lm import VllmLM
    from trimtab.report.projections import Projections
    from trimtab.tune.sweep import Sweep

LAST = Positions.last_prompt_token()


class LM:
    """A model that can be steered and read.

    `LM.load(…)` loads one; `LM(model, tokenizer)` wraps what you have. Nothing about the model changes: hooks
    are there only while something is steered or read. `layers` names the list of blocks (`"model.layers"`)
    where it can't be found. `template` holds keywords of the chat template, such as `{"enable_thinking": False}`, with
    which all prompts are rendered, those that are learned from too.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = ...,
        *,
        layers: str | None = None,
        name: str | None = None,
        template: Template | None = None,
    ) -> None:
        if isinstance(model, (str, Path)):
            raise TrimtabError(f"LM(model, tokenizer) wraps a loaded model; LM.load({str(model)!r}) loads one")
        if isinstance(model, LM):
            raise TrimtabError("this is an LM already; LM(model, tokenizer) wraps a model of transformers")
        if tokenizer is ...:
            raise TrimtabError("LM(model, tokenizer) needs the model's tokenizer as well")
        self.model = model
        self.tokenizer = with_keywords(tokenizer, template)
        compat.check_version()
        self.layout = find_layout(model, layers)
        self.name = name or str(getattr(model.config, "_name_or_path", "") or type(model).__name__)

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
    def load(cls, name: str | Path | None = None, *, layers: str | None = None, engine: str, **options: Any) -> Any: ...

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
        """Load a Hub id, a folder, a GGUF file (dequantized) or, without a name, SmolLM2-135M-Instruct.

        Options: `device` (CUDA, then MPS, then CPU), `dtype` (`"auto"`: as stored), `revision`, and anything that
        `from_pretrained` takes. `template` holds keywords of the chat template, as for `LM(…)`. Raises `TrimtabError`
        where the model can't be had.

        `engine` is another of `trimtab.engines.ENGINES`, with options of its own, whose class it then gives: `"vllm"`
        starts a vLLM engine, `"llamacpp"` runs a GGUF file as it is stored. Or it is one that another installed
        distribution brings.
        """
        if name is not None and not isinstance(name, (str, Path)):
            raise TrimtabError(
                f"LM.load takes a Hub id or a path, got {type(name).__name__}; LM(model, tokenizer) wraps a model"
            )
        if engine != "transformers":
            options |= {} if template is None else {"template": template}
            return engines.engine(engine).load(name, layers=layers, **options)
        model, tokenizer, label = load(name, **options)
        return cls(model, tokenizer, layers=layers, name=label, template=template)

    def __repr__(self) -> str:
        return f"LM({self.name}, {self.layout.layers} layers, width {self.layout.width})"

    # ---- who this is -------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> ModelId:
        """Name, shape and a fingerprint of the weights, as they stand in a steering's card."""
        config = self.model.config
        family = str(config.get_text_config(decoder=True).model_type)
        weight = self.model.get_input_embeddings().weight
        return ModelId(
            name=self.name,
            revision=getattr(config, "_commit_hash", None),
            family=family,
            width=self.layout.width,
            layers=self.layout.layers,
            fingerprint=fingerprint(family, weight.shape, weight.detach()[sampled_rows(weight.shape[0])]),
            template=template_digest(self.tokenizer),
        )

    def check(self, steering: Steering, *, transfer: bool = False) -> None:
        """Raises `TrimtabError` when the steering doesn't fit this model, saying precisely what differs.

        Layers and width must fit. It must also have been learned on this model, unless `transfer` is true; a
        different chat template or revision is warned about.
        """
        check_learned_on(steering, self.identity, transfer=transfer)
        check_edits(steering, self.layout)
        check_gates(steering, self.layout)
        if scores := [edit for edit in steering.edits if is_score_edit(edit)]:
            check_attention(self.layout, {edit.site.layer for edit in scores} & set(range(self.layout.layers)))
            check_score_edits(scores, self.layout.layers, head_count(self.layout))

    # ---- text --------------------------------------------------------------------------------------------

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
        batch_size: int = 32,
        seed: int | None = None,
        transfer: bool = False,
        emphasize: Emphasis | Sequence[Emphasis | Sequence[Emphasis] | None] | None = None,
        rejection: Rejection | Sequence[Rejection | None] | bool | None = None,
        progress: Any = None,
        **options: Any,
    ) -> list[Generation]:
        """Answer prompts, each under its own steering (or one for all, or none).

        A prompt is a string or a list of chat messages, of which a last one of the assistant's is continued. `template`
        holds keywords of the chat template, such as `{"enable_thinking": False}`. `options` go to transformers'
        `generate`; decoding is greedy unless they say `do_sample=True`, with `seed` for repeatable samples: each answer
        has random numbers of its own, which its place in the list decides. `batch_size` prompts are answered at a time,
        longest first; rows leave the batch as they end, and the next prompts take their places. The answers come in
        the prompts' order, `num_return_sequences` each. `progress(done, total)` is called as prompts are done.
        `transfer=True` allows a steering learned on another model of the same width.

        `emphasize` names what the model should heed: a phrase of every prompt, or one item for each prompt (several
        phrases as a list, `None` for none); see `trimtab.text.spans`. It steers attention as DIRECTER does.
        `rejection` weakens or rejects steering, of whatever kind, where its token is implausible, and the answers
        then have a `trace`; with `emphasize` it is on unless it is `False`.

        Rejection, and options that choose tokens otherwise than by `temperature`, `top_k`, `top_p`, `min_p`,
        `repetition_penalty`, `min_new_tokens` and `eos_token_id` (beams, further processors or criteria), go through
        transformers' own `generate`, in batches that stay whole. So does a model whose rows can't share such a batch.

        Raises `TrimtabError` before anything runs for a steering or prompt that doesn't fit.
        """
        check_no_keywords(self.tokenizer, options)
        many = as_list(prompts)
        steerings = one_each(steering, len(many))
        marked = marks_for(emphasize, len(many))
        for i, marks in enumerate(marked):
            if marks is not None:
                spans = find_spans(self.tokenizer, many[i], marks, system=system, chat=chat, template=template)
                towards = emphasis(ScaleScores(), spans, score_layers(self.layout), "directer")
                steerings[i] = towards if steerings[i] is None else steerings[i] + towards
        rejections = rejections_for(rejection, marked)
        for one in set(steerings) - {None}:
            assert one is not None
            self.check(one, transfer=transfer)
        ids = [self.encode(prompt, system=system, chat=chat, template=template) for prompt in many]
        options = {"do_sample": False, **options}
        check_options(self.model, options)
        check_request(self.layout, [len(i) for i in ids], max_new_tokens, options)
        for i, one in enumerate(steerings):
            for edit in one.edits if one else ():
                edit.positions.resolve(len(ids[i]))
            check_prompt(one, len(ids[i]))
        if not options["do_sample"]:
            options = {"temperature": None, "top_p": None, "top_k": None, **options}
        order = sorted(range(len(many)), key=lambda i: -len(ids[i]))
        batches = batches_of(order, batch_size, steerings, rejections)
        continuous = Continuous.of(self.model, self.layout, options)
        if continuous is not None and not any(rejections):
            batches = [order]
        elif len({len(i) for i in ids}) > 1 and not positions_of(self.layout).ignores_pads:
            batches = [alike for chosen in batches for alike in of_equal_length(chosen, [len(i) for i in ids])]
        answers: dict[int, list[Generation]] = {}
        requests = [
            Request(len(i), s.edits if s else (), r) for i, s, r in zip(ids, steerings, rejections, strict=True)
        ]
        check_rejection([request for request in requests if request.rejection is not None], options)
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "logprobs": logprobs}

        def tell(done: int) -> None:
            if progress is not None:
                progress(len(answers) + done, len(order))

        with self._exclusive(), few_rows(self.model), seeded(seed, self.model.device):
            for chosen in batches:
                prompts_of, steerings_of = [ids[i] for i in chosen], [steerings[i] for i in chosen]
                rejections_of = [rejections[i] for i in chosen]
                by_steps = continuous is not None and not any(rejections_of)
                if by_steps:
                    assert continuous is not None
                    found = answer(
                        self.model, self.tokenizer, self.layout, continuous, prompts_of, steerings_of, chosen,
                        rows=batch_size, seed=seed, progress=tell, **given,
                    )  # fmt: skip
                else:
                    found = self._answer(prompts_of, steerings_of, rejections_of, {**given, "options": options})
                each = len(found) // len(chosen)
                answers |= {i: found[n * each : (n + 1) * each] for n, i in enumerate(chosen)}
                if not by_steps:
                    tell(0)
        done = [self._with_pieces(answer) for i in range(len(many)) for answer in answers[i]]
        warn_of_doses(done, steerings)
        return done

    def stream(
        self,
        prompt: Prompt,
        steering: Steering | None = None,
        *,
        max_new_tokens: int = 128,
        system: str | None = None,
        chat: bool | None = None,
        logprobs: bool = False,
        seed: int | None = None,
        transfer: bool = False,
        emphasize: Emphasis | Sequence[Emphasis] | None = None,
        rejection: Rejection | bool | None = None,
        **options: Any,
    ) -> Stream:
        """Answer one prompt, and give its text piece by piece while it is generated.

        What comes is what `generate` gives for the prompt alone, under the same options. The model runs in a thread of
        its own, and others wait for it as for `generate`.

        Args:
            prompt: A string, or a list of chat messages.
            steering: What steers the answer.
            max_new_tokens: Tokens at most.
            system: A system message before the prompt.
            chat: Whether a string is the user's message or plain text; `None` asks the tokenizer.
            logprobs: Let the result have log-probabilities.
            seed: Of a sampled answer.
            transfer: Allow a steering learned on another model of the same width.
            emphasize: One phrase of the prompt, or several.
            rejection: As `generate` has it.
            options: They go to transformers' `generate`.

        Returns:
            An iterator of pieces, whose `result` is the `Generation` after the last one. Leaving its loop early or
            `close()` stops the generation.

        Raises:
            TrimtabError: As `generate` does, before anything runs; for several prompts, beams or answers; and inside
                `lm.steered(…)`.
        """
        one = one_request(prompt, steering, rejection, options)
        with self._exclusive():
            pass  # it raises inside of lm.steered(…), whose end the thread would wait for

        def generate(tell: Tell) -> Generation:
            (answer,) = self.generate(
                [one],
                steering,
                max_new_tokens=max_new_tokens,
                system=system,
                chat=chat,
                logprobs=logprobs,
                seed=seed,
                transfer=transfer,
                emphasize=None if emphasize is None else [emphasize],
                rejection=rejection,
                **{**options, "streamer": TokenTeller(tell)},
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
        """How likely each text's candidate tokens are to come next, each text under its own steering.

        Nothing is generated: a row costs one pass, and what rows of the same text have in common before anything is
        steered runs once for all of them. Rows are sorted so that such ones meet in a batch of `batch_size`; the
        results come in the order of `choices`. `progress(done, total)` is called after each batch.

        Raises `TrimtabError` before anything runs for a steering or a text that doesn't fit.
        """
        steerings = one_each(steering, len(choices))
        for one in set(steerings) - {None}:
            assert one is not None
            if any(is_score_edit(edit) for edit in one.edits):
                raise UnsupportedError("attention scores are steered by lm.generate(…), not by lm.next_logprobs(…)")
            self.check(one, transfer=transfer)
        check_choices(self.layout, choices)
        reach = []
        for choice, one in zip(choices, steerings, strict=True):
            reach.append(len(choice.ids) - first_steered(one.edits if one else (), choice))
        order = sorted(range(len(choices)), key=lambda i: (-len(choices[i].ids), tuple(choices[i].ids), reach[i], i))
        found: dict[int, NextToken] = {}
        with self._exclusive(), few_rows(self.model):
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                prompts = [list(choices[i].ids[: choices[i].prompt_length]) for i in chosen]
                edits = self._ready([steerings[i] for i in chosen], prompts)
                session = Session(self.model, self.layout, _always(edits))
                batch = next_tokens(self.model, self.layout, [choices[i] for i in chosen], session, edits)
                found |= dict(zip(chosen, batch, strict=True))
                if progress is not None:
                    progress(min(start + batch_size, len(order)), len(order))
        return [found[i] for i in range(len(choices))]

    def spans(
        self,
        prompt: Prompt,
        emphasize: Emphasis | Sequence[Emphasis],
        *,
        system: str | None = None,
        chat: bool | None = None,
        template: Template | None = None,
    ) -> tuple[tuple[int, int], ...]:
        """The token positions `(start, stop)` of phrases in the rendered prompt; raises as `find_spans` does."""
        return find_spans(self.tokenizer, prompt, emphasize, system=system, chat=chat, template=template)

    def _with_pieces(self, answer: Generation) -> Generation:
        """The answer with the text of each token, where something is known of each."""
        if answer.logprobs is None and answer.trace is None:
            return answer
        return replace(answer, pieces=tuple(pieces(self.tokenizer, answer.token_ids)))

    def _steer(
        self, ids: list[list[int]], edits: list[tuple[Edit, ...]], names: list[tuple[str, ...]], given: dict[str, Any]
    ) -> list[Generation]:
        """The answers to one batch, steered at every token."""
        residual = [tuple(edit for edit in one if not is_score_edit(edit)) for one in edits]
        session = Session(self.model, self.layout, _always(residual))
        sites = sorted({edit.site for one in residual for edit in one})
        scores = [tuple(edit for edit in one if is_score_edit(edit)) for one in edits]
        with attending(self.layout, scores, [len(prompt) for prompt in ids]):
            return generate_batch(self.model, self.tokenizer, ids, session, sites, names, **given)

    def _answer(
        self,
        ids: list[list[int]],
        steerings: list[Steering | None],
        rejections: list[Rejection | None],
        given: dict[str, Any],
    ) -> list[Generation]:
        """The answers to one batch by transformers' own `generate`, in the way that suits it."""
        options = given["options"]
        if not any(rejections):
            held = {name: compat.generation_option(self.model, options, name) for name in ("use_cache", *OTHERS)}
            if decides_at_prefill(self.layout, steerings, [len(prompt) for prompt in ids], held):
                return self._steer_from_prefill(ids, steerings, given)
        edits = self._decide(steerings, ids)
        names = [tuple(str(edit) for edit in one) for one in edits]
        edits = conditionals(settle(edits, read_prompts(self.layout, ids)))
        if any(rejections):
            return self._reject(ids, edits, rejections, names, given)
        return self._steer(ids, edits, names, given)

    def _steer_from_prefill(
        self, ids: list[list[int]], steerings: list[Steering | None], given: dict[str, Any]
    ) -> list[Generation]:
        """The answers to one batch, whose gates the pass over its prompts decides."""
        prefill = Prefill(self.model, self.layout, steerings, [len(prompt) for prompt in ids])
        session = Session(self.model, self.layout, prefill.decide)
        with prefill.watching(session):
            return generate_batch(self.model, self.tokenizer, ids, session, prefill.sites, prefill.names, **given)

    def _reject(
        self,
        ids: list[list[int]],
        edits: list[tuple[Edit, ...]],
        rejections: list[Rejection | None],
        names: list[tuple[str, ...]],
        given: dict[str, Any],
    ) -> list[Generation]:
        """The answers to one batch, steered where that is plausible."""
        requests = [Request(len(i), e, r) for i, e, r in zip(ids, edits, rejections, strict=True)]
        streamer = given["options"].get("streamer")
        loop = RejectingLoop(self.model, self.layout, requests, streamer)
        given = {**given, "options": {**given["options"], "custom_generate": loop.decode}}
        with loop.open():
            session = Session(self.model, self.layout, _always([() for _ in ids]))
            found = generate_batch(self.model, self.tokenizer, ids, session, [], names, **given)
        traces = loop.traces()
        return [
            replace(answer, trace=replace(trace, steps=trace.steps[: len(answer.token_ids)]))
            for answer, trace in zip(found, traces, strict=True)
        ]

    @contextmanager
    def steered(
        self,
        steering: Steering | Sequence[Steering | None],
        *,
        prompt_lengths: Sequence[int] | None = None,
        transfer: bool = False,
    ) -> Iterator[Session]:
        """Steer whatever runs the model inside the context: `model.generate`, a pipeline, your own loop.

        One steering for every row, or one for each row of the batch. For calls of `model.generate` the prompts'
        lengths are known; in your own loop the first pass over a text is taken for its whole prompt, unless
        `prompt_lengths` (in tokens, without pads) says otherwise. Yields the session, whose `doses(row)` tell how
        hard each row was pushed. The model is as it was when the context is left, however it is left.

        Raises `TrimtabError` for a steering that doesn't fit, and inside, before the first token, for a batch
        that doesn't match.
        """
        if not isinstance(steering, (list, tuple)):
            check_steering(steering)
        listed = None if isinstance(steering, Steering) else list(steering)
        for one in {steering} if listed is None else set(listed) - {None}:
            self.check(one, transfer=transfer)  # type: ignore[arg-type]
            if any(is_score_edit(edit) for edit in one.edits):  # type: ignore[union-attr]
                raise UnsupportedError("attention scores are steered by lm.generate(…), not inside lm.steered(…)")

        def decide(count: int, first: FirstPass) -> list[tuple[Edit, ...]]:
            chosen = one_each(steering, count)
            read = self._prompts_of_pass(count, session.prompt_lengths, first)
            repeat = len(first.lengths) // count
            readings = read_gates_with(read, first.lengths[::repeat], [wanted(one) for one in chosen])
            edits = [decided(one, found) for one, found in zip(chosen, readings, strict=True)]
            return conditionals(settle(edits, read))

        session = Session(self.model, self.layout, decide, prompt_lengths)
        everything = (steering,) if listed is None else tuple(one for one in listed if one is not None)
        sites = sorted({edit.site for one in everything for edit in _possible(one)})  # type: ignore[arg-type]
        with self._exclusive():
            with session.hooked(sites, any_thread=True), _known_prompts(self.model, session, bool(sites)):
                yield session
            if sites and not session.ran:
                raise TrimtabError(
                    "nothing was steered inside lm.steered(…): this model didn't run there, or ran past its hooks (a"
                    " captured graph, a traced copy, another model)"
                )

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One steered run at a time: hooks sit on the model that all threads share."""
        with steering_of(self.layout.decoder):
            yield

    def _decide(self, steerings: list[Steering | None], ids: list[list[int]]) -> list[tuple[Edit, ...]]:
        """Each request's effective edits; gates that read activations read the unsteered prompt."""
        readings = read_gates(self.layout, ids, [wanted(steering) for steering in steerings])
        return [decided(steering, found) for steering, found in zip(steerings, readings, strict=True)]

    def _ready(self, steerings: list[Steering | None], ids: list[list[int]]) -> list[tuple[Edit, ...]]:
        """Each request's edits as a session runs them: gates decided, masks settled, conditions on tokens put in."""
        return conditionals(settle(self._decide(steerings, ids), read_prompts(self.layout, ids)))

    def _prompts_of_pass(self, count: int, lengths: Sequence[int] | None, first: FirstPass) -> Read:
        """Reads the prompts' activations in a first pass over them."""

        def read(numbers: Sequence[int], sites: Sequence[Site]) -> dict[int, dict[Site, Tensor]]:
            inputs = {**compat.without_cache(first.inputs), "use_cache": False}
            activations = run_decoder(self.layout, inputs, sites)
            repeat = len(first.lengths) // count
            found = {}
            for request in numbers:
                row = request * repeat
                if lengths is not None and first.lengths[row] != lengths[request]:
                    raise TrimtabError(
                        "a gate or mask can't be decided from a part of the prompt; prefill it in one pass"
                    )
                stop = first.last[row] + 1
                columns = slice(stop - first.lengths[row], stop)
                found[request] = {site: x[row, columns] for site, x in activations.items()}
            return found

        return read

    def project(
        self,
        text: Prompt,
        steering: Steering,
        layers: int | Iterable[int] | None = None,
        *,
        transfer: bool = False,
    ) -> Projections:
        """How each token's activation lies along a steering's directions: what the steering reads in a text.

        The text is read unsteered, each direction where the steering acts (the output of a block, mostly).

        Args:
            text: A string, which is read as it is, or messages, which the chat template renders; where these end with
                the assistant's, nothing comes after it.
            steering: What has the directions. What is added with a negative strength is turned round.
            layers: Of the steering's layers, these; by default all.
            transfer: Allow a steering learned on another model of the same width.

        Returns:
            Tokens, with cosines and projections by layer; in a notebook the coloured text.

        Raises:
            TrimtabError: An empty text, a layer without a direction or with several, a steering of another model.
        """
        from trimtab.report.projections import project

        return project(self, text, steering, layers, transfer=transfer)

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
        """Try a steering at each of its layers alone, at several strengths, as rows of shared batches.

        Args:
            steering: What was learned, best at several layers at once.
            layers: Of the steering's layers, these; by default all.
            strengths: Multiples of the steering.
            prompts: What is asked; by default eight of the package's queries.
            check: A function of an answer's text that says whether it passes: yes or no, or a number.
            max_new_tokens: Tokens of an answer at most.
            options: `batch_size` (64), `system`, `chat`, `transfer`, `progress`, `guard` (the limits of
                `trimtab.tune.Guard`, or `None`), and what `generate` takes besides.

        Returns:
            A row for each layer and strength: the share that passes, the dose, the repeated share and the perplexity
            under the unsteered model. `best()` is one of them, whose `steering` is ready to use.

        Raises:
            TrimtabError: A layer that the steering hasn't, a strength of 0, a check that says neither, and as
                `generate` does.
        """
        from trimtab.tune.sweep import sweep

        given: dict[str, Any] = {"layers": layers, "strengths": strengths, "prompts": prompts, "check": check}
        return sweep(self, steering, **given, max_new_tokens=max_new_tokens, **options)

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
    ) -> list[dict[Site, Tensor]]:
        """The activations of prompts: for each prompt, `{site: [positions, width]}`, in the model's dtype.

        An integer site is the residual stream after that block; one site needs no list. Works inside
        `lm.steered(…)` too, and then reads what the steering made of the activations.
        """
        listed = [sites] if isinstance(sites, (int, Site)) else sites
        wanted = [site if isinstance(site, Site) else Site(site) for site in listed]
        if not isinstance(positions, Positions):
            raise TrimtabError(f"positions are Positions, got {positions!r}; write Positions.parse('all'), say")
        texts = []
        for i, prompt in enumerate(as_list(prompts)):
            ids = self.encode(prompt, system=system, chat=chat, template=template)
            check_length(self.layout, len(ids), f"prompt {i + 1}")
            spans = positions.resolve(len(ids))
            where = sorted({p for a, b in spans for p in range(a, len(ids) if b is None else min(b, len(ids)))})
            if not where:
                raise TrimtabError(f"positions {positions} hold no token of a prompt of {len(ids)} tokens")
            texts.append(Text(ids, where))
        found: dict[int, dict[Site, Tensor]] = {}
        for batch in read_groups(self.layout, [[text] for text in texts], wanted):
            for n, i in enumerate(batch.groups):
                found[i] = {site: batch.values[site][n][0] for site in wanted}
        return [found[i] for i in range(len(texts))]


def _possible(steering: Steering) -> tuple[Edit, ...]:
    """The edits that may act: all but those of strength 0."""
    return tuple(edit for edit in steering.edits if edit.strength != 0)


@contextmanager
def _known_prompts(model: Any, session: Session, steers: bool) -> Iterator[None]:
    """While open, `model.generate` tells the session how long its prompts are."""
    if not steers:
        yield
        return
    original = model.generate
    outside = session.prompt_lengths

    def generate(inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        session.ran = True  # or it raises here, or finds at its end that the passes weren't seen
        tokens = next(
            (t for t in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None), None
        )
        mask = kwargs.get("attention_mask")
        if tokens is None:
            raise TrimtabError("model.generate inside lm.steered(…) needs input_ids or inputs_embeds")
        if mask is None and tokens.dim() == 2 and len(tokens) > 1:
            raise TrimtabError("model.generate with several rows needs its attention_mask, to tell pads from text")
        lengths = [tokens.shape[1]] * tokens.shape[0] if mask is None else mask.sum(-1).tolist()
        left = mask is None or bool((mask[:, 1:] >= mask[:, :-1]).all())
        session.expect([int(n) for n in lengths], tokens.shape[1] if left else None)
        try:
            output = original(inputs, *args, **{"disable_compile": True, **kwargs})
            sequences = output if isinstance(output, Tensor) else getattr(output, "sequences", None)
            if isinstance(sequences, Tensor):  # the last token isn't fed to the model
                before = 0 if tokens.dim() == 2 else tokens.shape[1]
                session.check_reached(before + sequences.shape[1] - 1)
            return output
        finally:
            session.expect(outside)

    own = vars(model).get("generate")  # somebody may have put one there before
    model.generate = generate
    try:
        yield
    finally:
        del model.generate
        if own is not None:
            model.generate = own


def _always(edits: list[tuple[Edit, ...]]) -> Decide:
    return lambda _requests, _first: edits
