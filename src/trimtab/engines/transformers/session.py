"""Hooks that steer the forward passes of a model while a session is open, and are removed without a trace.

A pre-hook of the decoder determines the absolute positions that the pass computes, and with them the state of each
token (see `plan`). A hook at each steered site applies the site's stages. In steady decoding the states don't change
from step to step, and the hook of a site that only adds or only scales is one in-place addition of, or multiplication
by, a prepared tensor.

Doses are measured at all prompt tokens. In decoding they are measured at the first token of a state and at every
`STRIDE`-th token after it, each of which counts for all tokens since the previous one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.engines.answer import Dose
from trimtab.engines.folding import Prepared, States, apply_all, apply_in_place
from trimtab.engines.transformers import compat
from trimtab.engines.transformers.following import TrackedTexts
from trimtab.engines.transformers.hooks import Attach, Hooks
from trimtab.engines.transformers.layout import Layout, stream_dtype
from trimtab.engines.transformers.places import Place, attach, place
from trimtab.engines.transformers.plan import Plan, activity, compile_plan
from trimtab.engines.transformers.positions import (
    ForwardPass,
    check_not_packed,
    count_pads,
    count_steered,
    last_column,
    read_pass,
    states_of,
)
from trimtab.engines.transformers.steered_pass import Steady, SteeredPass, norm, norm_into
from trimtab.errors import TrimtabError, UnsupportedError
from trimtab.steering import Edit, Positions, Site

STRIDE = 8
"""In steady decoding, doses are measured at every `STRIDE`-th token."""


@dataclass(frozen=True)
class FirstPass:
    """The first pass over a text, for gate decisions: the decoder's inputs, and each row's length and last column."""

    inputs: dict[str, Any]
    lengths: list[int]
    last: list[int]


Tally = dict[Site, tuple[float, float, int]]
"""By site: the sum of the measured ratios, the number of tokens they count for, and the number of steered tokens."""

Decide = Callable[[int, FirstPass], Sequence[tuple[Edit, ...]]]


def fixed_edits(edits: list[tuple[Edit, ...]]) -> Decide:
    """A `decide` function that returns these edits."""
    return lambda _requests, _first: edits


class Session:
    """The state of one steered run: the compiled plan, the position of each request, and the doses so far.

    It verifies that steering is complete: every pass must begin where the last one ended, call the hook of every site
    once, and give it the activations of exactly these tokens; otherwise the run raises `TrimtabError`. At the end,
    `check_reached` verifies that all passes were seen.

    Args:
        model: The whole model.
        layout: Its layout.
        decide: Called as `decide(requests, first)` at the first pass over a text, with the number of requests. Returns
            the effective edits of each request.
        prompt_lengths: The requests' prompt lengths in tokens. `None` takes each first pass to be the whole prompt; a
            further pass of more than one token then raises `TrimtabError`.
        tokenizer: The tokenizer, for edits at positions by meaning.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        decide: Decide,
        prompt_lengths: Sequence[int] | None = None,
        tokenizer: Any = None,
    ) -> None:
        self.model = model
        self.layout = layout
        self.decide = decide
        self.tokenizer = tokenizer
        self.plan: Plan | None = None
        self.ran: bool = False  # whether any pass was seen
        self._dtype = stream_dtype(layout)
        self._owner: int | None = None  # the thread whose passes are steered; `None`: any
        self._places: dict[Site, Place] = {}
        self._hooked: dict[Site, int] = {}  # site -> the index of its hook
        self._hooks: Hooks | None = None  # the hooks at these sites and on the decoder
        self._nothing: list[Steady | None] = []  # a `None` for each hook
        self._steady_edits: list[Steady | None] = []  # each hook's edits in this pass, if it needs nothing else
        self._called: list[int] = []  # how often each hook was called in this pass
        self._paused = False
        self._logit_columns = 0  # the number of last columns for which logits are computed
        self._step: SteeredPass | None = None
        self._pass: ForwardPass | None = None
        self._measures = True
        self._steady: int | None = None  # from this column on the rows' states don't change
        self._live: Tensor | None = None
        self._outer_ids: Tensor | None = None
        self._outer_mask: Any = None
        self._outer_seen = False
        self._pads: list[int] = []  # the padding columns of each row so far
        self._texts: TrackedTexts | None = None  # the rows' texts, if edits have positions by meaning
        self._first: list[int] = []  # the first position of each row that this session saw
        self.expect(prompt_lengths)

    def expect(
        self,
        prompt_lengths: Sequence[int] | None,
        columns: int | None = None,
        ends: Sequence[int] = (),
        *,
        resumed: bool = False,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Expect a new batch.

        Args:
            prompt_lengths: The lengths of its prompts; `None` if they aren't known.
            columns: The width of the prompts, if they are left-padded.
            ends: The end tokens. A row has ended once one of them is its input: later tokens don't count in its doses.
            resumed: The next pass continues from a cache of tokens that no edit affects.
            prompts: The requests' tokens; by default those of the passes.
        """
        self._resumed = resumed
        self._prompts = prompts
        self._ends = torch.tensor(list(ends), dtype=torch.long)
        self.prompt_lengths = prompt_lengths
        self._columns = columns
        self._fresh = True
        self._computed_columns: int | None = None  # the number of columns computed by passes that were seen

    def pause(self, still: bool) -> None:
        """Leave passes unsteered until this is called with `False`."""
        self._paused = still

    def resume(self) -> None:
        """The next pass continues from a cache of tokens that no edit affects; all else is as set by `expect`."""
        self._resumed = True

    def check_reached(self, columns: int) -> None:
        """Raise `TrimtabError` unless the hooks saw all passes up to this column."""
        if self._hooked and (self._computed_columns or 0) < columns:
            raise TrimtabError(
                f"{columns} columns of tokens were computed, but only {self._computed_columns or 0} of them in passes"
                " that trimtab saw: the others weren't steered, so the text is discarded. Something bypasses the"
                " model's hooks (a captured graph, a replaced forward)"
            )

    def check_prompts_reached(self) -> None:
        """Raise `TrimtabError` if the current text is shorter than one of the given prompt lengths."""
        if self._fresh or self.prompt_lengths is None or self._computed_columns is None:
            return
        repeat = len(self._pads) // len(self.prompt_lengths)
        for request, length in enumerate(self.prompt_lengths):
            computed = self._computed_columns - self._pads[request * repeat]
            if computed < length:
                raise TrimtabError(
                    f"prompt_lengths says that the prompt of row {request + 1} has {length} tokens, but {computed}"
                    " were computed: generated tokens were steered as if they belonged to the prompt"
                )

    # ---- before the decoder's forward --------------------------------------------------------------------

    def _in_other_thread(self) -> bool:
        """Whether the current forward pass belongs to another thread that runs the same model."""
        return self._owner is not None and get_ident() != self._owner

    def model_pre_hook(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The pre-hook of the whole model. It notes the padding mask, which some models convert for their decoder."""
        if self._in_other_thread():
            return
        arguments = compat.bind_arguments(model, args, kwargs)
        self._outer_mask = arguments.get("attention_mask")
        self._outer_ids = arguments.get("input_ids")
        self._outer_seen = True

    def decoder_pre_hook(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The decoder's pre-hook: determines the states of the pass from its inputs."""
        if self._in_other_thread():
            return
        if torch.compiler.is_compiling():
            raise UnsupportedError("a forward that is being compiled or exported can't be steered")
        self.ran = True
        self._steady_edits = self._nothing
        arguments = compat.bind_arguments(decoder, args, kwargs)
        resumed = self._fresh and self._resumed
        forward_pass = read_pass(decoder, arguments, self._outer_mask, self._computed_columns)
        if self._paused:
            self._pass = forward_pass
            return
        step = self._enter(forward_pass, arguments, forward_pass.past == 0 or resumed)
        self._pass = forward_pass
        kept = arguments.get("logits_to_keep")
        self._logit_columns = kept if isinstance(kept, int) and 0 < kept < forward_pass.length else forward_pass.length
        self._called = [0] * len(self._hooked)
        self._measures = forward_pass.length > 1 or step.passes % STRIDE == 0
        step.passes += 1
        if step.steady and not self._measures and not torch.is_grad_enabled():
            self._steady_edits = step.steady
        if self._measures:
            self._live = self._live_rows(
                forward_pass.ids if forward_pass.ids is not None else self._outer_ids, forward_pass.past
            )

    def _enter(self, forward_pass: ForwardPass, arguments: dict[str, Any], begins: bool) -> SteeredPass:
        """The `SteeredPass` of this pass. `begins`: it is the first pass over a text that this session steers."""
        if not begins and self._computed_columns is not None and forward_pass.past > self._computed_columns:
            raise TrimtabError(
                f"columns {self._computed_columns} to {forward_pass.past - 1} were computed by passes that trimtab"
                " didn't see, so they weren't steered; something bypasses the model's hooks"
            )
        if forward_pass.length > 1 or begins:
            unseen = self._outer_mask if self._outer_seen else arguments.get("attention_mask")
            self._pads = count_pads(forward_pass, unseen, self.prompt_lengths, self._columns)
        if begins:
            self._begin(forward_pass, arguments)
        elif self._fresh or self.plan is None:
            raise TrimtabError("steering began in the middle of a text, over a cache of unsteered tokens; start again")
        elif self.prompt_lengths is None and forward_pass.length > 1:
            raise TrimtabError(
                f"a second pass of {forward_pass.length} tokens over one cache: is it more of the prompt, or generated"
                " text? Say so with lm.steered(…, prompt_lengths=[…])"
            )
        if (
            forward_pass.length > 1
            or self._steady is None
            or forward_pass.past < self._steady
            or forward_pass.rows != len(self._pads)
        ):
            self._update_states(forward_pass)
        assert self._step is not None
        return self._step

    def _live_rows(self, ids: Tensor | None, past: int) -> Tensor | None:
        """`[rows]`: whether a row hasn't ended yet; `None` if unknown or irrelevant."""
        if past == 0 or not len(self._ends) or ids is None:
            return None
        self._ends = self._ends.to(ids.device)
        live = ~torch.isin(ids[:, -1], self._ends)
        return live if self._live is None else live & self._live

    def _begin(self, forward_pass: ForwardPass, arguments: dict[str, Any]) -> None:
        if self._fresh or self.prompt_lengths is None:
            counts = [forward_pass.length - pads for pads in self._pads]
            lengths = counts if self.prompt_lengths is None else self.prompt_lengths
            if len(counts) % len(lengths):
                raise TrimtabError(
                    f"{len(lengths)} prompt lengths for a batch of {len(counts)} rows; give one for each"
                )
            ends = [forward_pass.length - 1] * len(counts)
            if forward_pass.mask is not None:
                ends = [last_column(row) for row in forward_pass.mask.tolist()]
            self._paused = True
            try:
                edits = self.decide(len(lengths), FirstPass(arguments, counts, ends))
            finally:
                self._paused = False
            if self.prompt_lengths is None and any(edit.positions != Positions.all() for row in edits for edit in row):
                check_not_packed(forward_pass, arguments.get("position_ids"))
            self.plan = compile_plan(edits, lengths, self._dtype)
            self.sites: list[Site] = sorted(self.plan.stages)
            if unknown := sorted(set(self.sites) - self._hooked.keys()):
                raise TrimtabError(f"there is no hook at {unknown[0]}, where this steering acts")
            self._row = {site: i for i, site in enumerate(self.sites)}
            self._sums = torch.zeros(2, len(self.sites), len(lengths), device=forward_pass.device)
            self._active = activity(self.plan).to(forward_pass.device)
            self._step = None
            self._steady = None
            self._fresh = False
            self._first = [forward_pass.past - pads for pads in self._pads]
            self._texts = None
            if self.plan.uses_meanings:
                rows = len(self._pads)
                self._texts = TrackedTexts(self.plan, edits, lengths, rows, self.tokenizer, self._prompts)

    def _update_states(self, forward_pass: ForwardPass) -> None:
        assert self.plan is not None
        segments = self.plan.segments
        if forward_pass.rows % len(segments) or forward_pass.rows != len(self._pads):
            raise TrimtabError(
                f"the model runs {forward_pass.rows} rows for {len(segments)} requests; give one steering per request"
            )
        texts, ids = self._texts, forward_pass.ids if forward_pass.ids is not None else self._outer_ids
        states = (
            states_of(segments, forward_pass, self._pads)
            if texts is None
            else texts.states(forward_pass, self._pads, ids)
        )
        if self._step is None or self._step.states != states or self._step.index.device != forward_pass.device:
            first = min(
                (next((i for i, s in enumerate(row) if s), forward_pass.length - 1) for row in states), default=0
            )
            tokens = States.of(torch.tensor([row[first:] for row in states]), forward_pass.device)
            self._step = SteeredPass(states, first, tokens, frozenset(s for row in states for s in row))
            dtype = torch.promote_types(self._dtype, torch.float32)
            self._norms = torch.ones(2, len(self.sites), *tokens.index.shape, dtype=dtype, device=forward_pass.device)
        marks = [bound for row in segments for start, stop, _ in row for bound in (start, stop) if bound is not None]
        settled = max(marks, default=0) + max(self._pads, default=0)
        steady = forward_pass.length == 1 and forward_pass.past >= settled and texts is None
        self._steady = forward_pass.past + 1 if steady else None

    # ---- the hook of a site ------------------------------------------------------------------------------

    def edit(self, site: Site, activations: Tensor) -> Tensor | None:
        """Apply the site's stages to its activations, in place if the old ones aren't needed.

        Returns:
            The tensor that replaces the activations; `None` if there is nothing to edit or it was done in place.
        """
        step, plan = self._step, self.plan
        if self._paused or step is None or plan is None or site not in plan.stages:
            return None
        absent = len(step.states[0]) - self._logit_columns
        if absent > 0 and activations.dim() == 3 and activations.shape[:2] == (len(step.states), self._logit_columns):
            # the layer only computes the last columns
            whole = torch.cat([activations[:, :1].expand(-1, absent, -1), activations], 1)
            new = self.edit(site, whole)
            return (whole if new is None else new)[:, absent:]
        if activations.numel() != len(step.states) * len(step.states[0]) * activations.shape[-1]:
            raise TrimtabError(
                f"at {site} the model computes {tuple(activations.shape[:-1])} activations in a pass of"
                f" {len(step.states)} rows and {len(step.states[0])} tokens; which belongs to which can't be determined"
            )
        if step.present.isdisjoint(plan.effective_states[site]):
            return None
        own = site.kind == "block_input"  # the previous block's output or the caller's embeddings
        if own and not activations.requires_grad:
            activations = activations.clone()
        # some blocks run their MLP over the tokens of all rows as one list
        whole = activations if activations.dim() == 3 else activations.view(len(step.states), -1, activations.shape[-1])
        if not whole.requires_grad and self._apply_steady(site, step, whole):
            return activations if own else None
        x = whole[:, step.first :] if step.first else whole
        lengths, edits = self._norms[:, self._row[site]]
        prepared = step.prepared.get(site)
        if prepared is None:
            prepared = self._prepare(site, step, x)
            if step.index.shape[1] == 1:
                step.prepared[site] = prepared
        if whole.requires_grad:
            new = apply_all(prepared, x)
            if self._measures:
                lengths.copy_(norm(x))
                edits.copy_(norm(new - x))
            new = torch.cat([whole[:, : step.first], new], 1) if step.first else new
            return new.reshape(activations.shape)
        if self._measures:
            norm_into(lengths, x)
        lasting = step.index.shape[1] == 1 and not step.first and lengths.device == x.device
        if lasting and not own and x is activations:
            step.steady = step.steady or list(self._nothing)
            step.steady[self._hooked[site]] = x.shape, prepared
        if len(prepared) == 1 and prepared[0][0].only_adds:
            x += prepared[0][1]["vector"]
            if lasting:
                step.adds[site] = prepared[0][1]["vector"], lengths
        elif len(prepared) == 1 and prepared[0][0].in_place:
            factor = prepared[0][1]["factor"]
            if self._measures:
                norm_into(edits, torch.addcmul(x, x, factor, value=-1))
            x *= factor
            if lasting:
                step.scales[site] = factor, lengths, edits
        elif self._measures:
            new = apply_all(prepared, x)
            norm_into(edits, new - x)
            if not step.first:
                return new.view(activations.shape)
            x.copy_(new)
        else:
            for stage, rows, active in prepared:
                apply_in_place(stage, rows, active, x)
        return activations if own else None

    def _prepare(self, site: Site, step: SteeredPass, x: Tensor) -> Prepared:
        """Prepare the edits of a site for these activations of the pass's tokens."""
        assert self.plan is not None
        tokens = step.tokens.to(x.device)
        prepared = [(stage, *stage.prepare(tokens, x.dtype)) for stage in self.plan.stages[site]]
        if len(prepared) == 1 and prepared[0][0].only_adds:  # the edits' norms are known in advance
            self._norms[1, self._row[site]].copy_(norm(prepared[0][1]["vector"]))
        return prepared

    def _apply_steady(self, site: Site, step: SteeredPass, x: Tensor) -> bool:
        """Apply the site's addition or multiplication if it is prepared. Returns whether it was."""
        ready = step.adds.get(site)
        if ready is not None:
            if self._measures:
                torch.linalg.vector_norm(x, dim=-1, dtype=ready[1].dtype, out=ready[1])
            x += ready[0]
            return True
        scaled = step.scales.get(site)
        if scaled is None:
            return False
        factor, lengths, edits = scaled
        if self._measures:
            torch.linalg.vector_norm(x, dim=-1, dtype=lengths.dtype, out=lengths)
            norm_into(edits, torch.addcmul(x, x, factor, value=-1))
        x *= factor
        return True

    def decoder_hook(self, *_: Any) -> None:
        """The decoder's forward hook: checks that every site was edited, and adds this pass's doses to the sums."""
        step, forward_pass = self._step, self._pass
        if self._in_other_thread() or forward_pass is None:
            return
        self._outer_mask, self._outer_seen, self._pass = None, False, None
        self._steady_edits = self._nothing
        self._computed_columns = forward_pass.stop
        if self._paused or step is None:
            return
        if self._called.count(1) != len(self._called):
            self._raise_for_hook_calls()
        if not self._measures or step.present == {0}:
            return
        if step.steered is None:
            step.steered = self._active[:, step.index]
        steered = step.steered
        if self._live is not None:
            steered = steered & self._live[:, None]
        ratio = torch.where(steered, self._norms[1] / self._norms[0], 0)
        shape = (len(self.sites), self._sums.shape[2], -1)
        weight = self._weight(step)
        self._sums[0] += weight * ratio.reshape(shape).sum(-1)
        self._sums[1] += weight * steered.reshape(shape).sum(-1)

    def _weight(self, step: SteeredPass) -> Tensor | int:
        """The number of tokens that each token of this pass counts for in the doses: one number, or one per row."""
        return STRIDE if step.passes > STRIDE and len(step.states[0]) == 1 else 1

    def _raise_for_hook_calls(self) -> None:
        """Raise if a site with edits in this pass ran more or less than once. Called at the end of the pass."""
        assert self.plan is not None
        assert self._step is not None
        for site, calls in zip(self._hooked, self._called, strict=True):
            if calls != 1 and not self._step.present.isdisjoint(self.plan.effective_states.get(site, frozenset())):
                what = "didn't run" if not calls else f"ran {calls} times"
                raise TrimtabError(
                    f"the part of the model at {site} {what} in a pass that steers there (or its hook was taken away):"
                    " the result isn't what was requested, so it is discarded"
                )

    def doses(self, request: int, tokens: int | None = None) -> tuple[Dose, ...]:
        """The doses of a request at each site where it was steered.

        Args:
            request: The index of the request.
            tokens: The length of its text that counts, including the prompt; by default all computed tokens.
        """
        return doses_of(self.tally(request, tokens))

    def tally(self, request: int, tokens: int | None = None) -> Tally:
        """The sums behind `doses`, which can be added to those of another session for the same request."""
        if self.plan is None:
            return {}
        row = request * (len(self._pads) // len(self.plan.segments))
        stop = (self._computed_columns or 0) - self._pads[row]
        stop = stop if tokens is None else min(stop, tokens)
        sums, counts = self._sums[:, :, request].tolist()
        tally: Tally = {}
        for site, total, measured in zip(self.sites, sums, counts, strict=True):
            of_site = self.plan.effective_states[site], self._first[row], stop
            steered = (
                count_steered(self.plan.segments[request], *of_site)
                if self._texts is None
                else self._texts.steered(row, *of_site)
            )
            if measured and steered:
                tally[site] = (total, measured, steered)
        return tally

    # ---- hooks -------------------------------------------------------------------------------------------

    @contextmanager
    def hooked(self, sites: Sequence[Site], *, any_thread: bool = False) -> Iterator[None]:
        """Attach the hooks on the decoder and at these sites within the context.

        Passes of other threads aren't steered, unless `any_thread` is true.
        """
        self._owner = None if any_thread else get_ident()
        if self._hooks is None or list(self._hooked) != list(sites):
            self._hooks = self._hooks_at(sites)
        with self._hooks.open():
            yield

    def _hooks_at(self, sites: Sequence[Site]) -> Hooks:
        """Create the hooks on the decoder and at these sites, and reset the bookkeeping of hooks to them."""
        places = [(site, self._place(site)) for site in sites]
        self._hooked = {site: i for i, site in enumerate(sites)}
        self._steady_edits = self._nothing = [None] * len(places)
        if self._step is not None:
            self._step.steady = []
        decoder = self.layout.decoder
        around: list[Attach] = []
        if places:
            if self.model is not decoder:
                around.append(lambda: self.model.register_forward_pre_hook(self.model_pre_hook, with_kwargs=True))
            around.append(lambda: decoder.register_forward_pre_hook(self.decoder_pre_hook, with_kwargs=True))
            around.append(lambda: decoder.register_forward_hook(self.decoder_hook))
        here = [partial(attach, where, self._hook(i, site)) for i, (site, where) in enumerate(places)]
        return Hooks([*around, *here])

    def _place(self, site: Site) -> Place:
        if site not in self._places:
            self._places[site] = place(self.layout, site)
        return self._places[site]

    def _hook(self, number: int, site: Site) -> Callable[[Tensor], Tensor | None]:
        """Create a site's hook. In steady decoding it applies the prepared edits directly, else it calls `_at_site`."""

        def hook(activations: Tensor) -> Tensor | None:
            steady = self._steady_edits[number]
            if steady is None or steady[0] != activations.shape or self._owner not in (None, get_ident()):
                return self._at_site(number, site, activations)
            self._called[number] += 1
            for stage, rows, active in steady[1]:
                if stage.only_adds:
                    activations += rows["vector"]
                elif stage.in_place:
                    activations *= rows["factor"]
                else:
                    apply_in_place(stage, rows, active, activations)
            return None

        return hook

    def _at_site(self, number: int, site: Site, activations: Tensor) -> Tensor | None:
        """Count the call of a site's hook, and edit."""
        if self._in_other_thread():
            return None
        if self._pass is not None and not self._paused:
            self._called[number] += 1
        elif self._pass is None and not torch.is_grad_enabled():  # with gradients: a checkpointed block may run again
            raise TrimtabError(
                f"the part of the model at {site} ran outside of a pass of the decoder: something bypasses trimtab's"
                " hooks (a captured graph, a replaced forward)"
            )
        return self.edit(site, activations)


def doses_of(tally: Tally) -> tuple[Dose, ...]:
    """The doses for one request's tally."""
    each = (Dose(site.layer, total / measured, n, site.kind) for site, (total, measured, n) in tally.items())
    return tuple(sorted(each, key=lambda dose: (dose.layer, dose.kind)))
