"""Differentiable teacher forcing: forward passes over prompts and given answers, with an autograd graph.

Learned changes act from the last prompt token on. So the rest of the prompt is computed once, without a graph, into a
KV cache (for all texts with the same prompt, and for all passes, as far as memory allows), and a graph is built only
for the last prompt token and the answer. Models that cache anything other than keys and values run each text
separately and as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

from trimtab.engines.contract import TOKENS_PER_BATCH, check_length
from trimtab.engines.transformers.compat import DynamicCache
from trimtab.engines.transformers.evaluating import evaluating
from trimtab.engines.transformers.exclusive import steering_lock
from trimtab.engines.transformers.layout import Layout
from trimtab.engines.transformers.places import attach, place
from trimtab.engines.transformers.prefix_cache import PrefixCache
from trimtab.engines.transformers.read import can_share, check_read, inputs_of, padded
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError
from trimtab.steering import Site

TOKENS_PER_PASS = 320
LOGITS_PER_PASS = 48_000_000
"""The maximum number of answer tokens, and of logits, in one pass; the memory of the graph grows with both."""

Change = Callable[[Tensor], Tensor]
"""Maps activations `[tokens, width]` to what is added to them, `[tokens, width]`; differentiable."""


@dataclass(frozen=True)
class PromptAnswer:
    """The token ids of a prompt and of a teacher-forced answer. Both have at least one token."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.answer:
            raise TrimtabError("a prompt and its answer need at least one token each")


class _StopPass(BaseException):
    """Ends a pass early, once all wanted activations have been read. Raised only in the reading thread."""


@dataclass
class TeacherForcing:
    """Teacher-forced passes of a model with frozen weights and hooks in place; created by `teacher_forcing`."""

    model: Any
    layout: Layout
    sites: tuple[Site, ...]
    shares: bool
    prompts: PrefixCache
    _changes: Mapping[Site, Change] = field(default_factory=dict)
    _answering: Tensor | None = None  # the indices of the changed tokens in this pass, with the rows concatenated
    _factors: Tensor | None = None  # the factor of the change at each of these tokens
    _called: dict[Site, int] = field(default_factory=dict)
    _states: dict[Site, Tensor] | None = None
    _wanted: frozenset[Site] = frozenset()

    def logits(
        self, texts: Sequence[PromptAnswer], changes: Mapping[Site, Change], factors: Sequence[float] | None = None
    ) -> list[Tensor]:
        """For each text, the logits `[answer tokens, vocabulary]` that predict its answer, in float32 at least.

        Args:
            texts: Few enough that their graph fits into memory; `group_by_pass` splits a longer list.
            changes: What is added at each site, from the last prompt token on. Other sites stay unchanged.
            factors: A factor for each text's changes; default: 1.

        Raises:
            TrimtabError: A change is at a site without a hook, a site didn't run exactly once, a text is longer than
                the model's context, or the numbers of factors and texts differ.
        """
        if unknown := sorted(set(changes) - set(self.sites)):
            raise TrimtabError(f"there is no hook at {unknown[0]}")
        if factors is not None and len(factors) != len(texts):
            raise TrimtabError(f"each text has one factor, got {len(factors)} for {len(texts)} texts")
        for i, text in enumerate(texts):
            check_length(self.layout, len(text.prompt) + len(text.answer) - 1, f"text {i + 1}")
        each = [1.0] * len(texts) if factors is None else factors
        scales = [torch.full((len(text.answer),), factor) for text, factor in zip(texts, each, strict=True)]
        try:
            if self.shares:
                self._factors = None if factors is None else torch.cat(scales)
                return self._together(texts, changes)
            logits = []
            for text, scale in zip(texts, scales, strict=True):
                self._factors = None if factors is None else scale
                logits.append(self._whole(text, changes))
            return logits
        finally:
            self._factors = None

    @torch.no_grad()
    def states(
        self, texts: Sequence[PromptAnswer], changes: Mapping[Site, Change], sites: Sequence[Site]
    ) -> dict[Site, list[Tensor]]:
        """The activations `[answer tokens, width]` of each text at `sites`, before the change at the same site.

        The pass stops at the last of these sites. Raises as `logits` does.
        """
        if unknown := sorted({*sites, *changes} - set(self.sites)):
            raise TrimtabError(f"there is no hook at {unknown[0]}")
        by_site: dict[Site, list[Tensor]] = {site: [] for site in sites}
        for group in [texts] if self.shares else [[text] for text in texts]:
            self._states, self._wanted = {}, frozenset(sites)
            try:
                with suppress(_StopPass):
                    self.logits(group, changes)
                check_read(sites, self._states)
                for site, x in self._states.items():
                    by_site[site] += x.split([len(text.answer) for text in group])
            finally:
                self._states = None
        return by_site

    def _together(self, texts: Sequence[PromptAnswer], changes: Mapping[Site, Change]) -> list[Tensor]:
        cache = DynamicCache(config=self.layout.decoder.config)  # type: ignore[arg-type]
        device = input_device(self.model)
        before = [text.prompt[:-1] for text in texts]
        mask = torch.zeros(len(texts), 0, dtype=torch.long, device=device)
        self._answering = None
        if self.prompts.usable_for(before):
            cache, mask = self.prompts.cache_for(before)
        elif any(before):
            # a prompt of one token has nothing before its last: it becomes a row of pads, which are masked
            distinct = {prompt: n for n, prompt in enumerate(dict.fromkeys(before))}
            ids, mask = padded([list(prompt) for prompt in distinct], left=True, device=device)
            with torch.no_grad():
                self.layout.decoder(**inputs_of(self.layout.decoder, ids, mask, cache))
            if len(distinct) < len(texts):
                rows = torch.tensor([distinct[prompt] for prompt in before], device=device)
                cache.batch_select_indices(rows)
                mask = mask[rows]
        fed = [[text.prompt[-1], *text.answer[:-1]] for text in texts]
        ids, new = padded(fed, left=False, device=device)
        # indices rather than a mask, which would cause a device sync at every site
        places = [row * ids.shape[1] + column for row, text in enumerate(texts) for column in range(len(text.answer))]
        self._answering = torch.tensor(places, device=device)
        out = self._pass(inputs_of(self.model, ids, torch.cat([mask, new], 1), cache), changes)
        return [row[: len(text.answer)] for row, text in zip(out, texts, strict=True)]

    def _whole(self, text: PromptAnswer, changes: Mapping[Site, Change]) -> Tensor:
        device = input_device(self.model)
        ids, mask = padded([[*text.prompt, *text.answer[:-1]]], left=False, device=device)
        self._answering = torch.arange(len(text.prompt) - 1, ids.shape[1], device=device)
        out = self._pass(inputs_of(self.model, ids, mask, None), changes)
        return out[0, len(text.prompt) - 1 :]

    def _pass(self, inputs: dict[str, Any], changes: Mapping[Site, Change]) -> Tensor:
        self._changes, self._called = changes, dict.fromkeys(self.sites, 0)
        try:
            logits: Tensor = self.model(**inputs).logits
        finally:
            self._changes = {}
        if miscounted := [site for site, calls in self._called.items() if calls != 1]:
            raise TrimtabError(
                f"the part of the model at {miscounted[0]} ran {self._called[miscounted[0]]} times in one pass, not"
                " once, so edits there can't be learned; something bypasses the model's hooks"
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _at(self, owner: int, site: Site, x: Tensor) -> Tensor | None:
        if get_ident() != owner or self._answering is None:
            return None
        self._called[site] += 1
        change = self._changes.get(site)
        if change is None and self._states is None:
            return None
        flat = x.reshape(-1, x.shape[-1])  # some blocks run their MLP with rows and tokens flattened
        where = self._answering.to(x.device)
        selected = flat.index_select(0, where)
        if self._states is not None and site in self._wanted:
            self._states[site] = selected
            if len(self._states) == len(self._wanted):
                raise _StopPass
        if change is None:
            return None
        added = change(selected)
        if self._factors is not None:
            added = added * self._factors.to(added)[:, None]
        return flat.index_copy(0, where, selected + added.to(selected.dtype)).view(x.shape)


@contextmanager
def teacher_forcing(model: Any, layout: Layout, sites: Sequence[Site]) -> Iterator[TeacherForcing]:
    """Freeze the model's weights and install hooks at `sites`; both are undone when the context closes.

    While it is open, no other thread can steer or read the model, and the model is in evaluation mode.

    Raises:
        TrimtabError: The model doesn't have one of the sites, or is being steered.
    """
    required_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    run = TeacherForcing(model, layout, tuple(sorted(set(sites))), can_share(layout), PrefixCache(model, layout))
    places = [(site, place(layout, site)) for site in run.sites]
    with steering_lock(layout.decoder), evaluating(model, every_part=True), torch.enable_grad(), ExitStack() as hooks:
        try:
            for parameter in required_grad:
                parameter.requires_grad_(False)
            for site, where in places:
                hooks.callback(attach(where, partial(run._at, get_ident(), site)).remove)
            yield run
        finally:
            for parameter, before in required_grad.items():
                parameter.requires_grad_(before)


def group_by_pass(model: Any, texts: Sequence[PromptAnswer]) -> list[list[int]]:
    """Split texts into groups that fit one pass each, as lists of indices, in order; at least one text per group."""
    tokens = min(TOKENS_PER_PASS, LOGITS_PER_PASS // model.get_input_embeddings().weight.shape[0])
    groups: list[list[int]] = []
    answer = prompt = 0
    for i, text in enumerate(texts):
        answer, prompt = max(answer, len(text.answer)), max(prompt, len(text.prompt))
        rows = len(groups[-1]) + 1 if groups else 1
        if not groups or answer * rows > tokens or prompt * rows > TOKENS_PER_BATCH:
            groups.append([])
            answer, prompt = len(text.answer), len(text.prompt)
        groups[-1].append(i)
    return groups
