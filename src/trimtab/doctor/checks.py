"""The checks of a model: each runs one feature and compares it with the plain computation in `naive`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from trimtab.decoding.rejection import Rejection
from trimtab.doctor import naive
from trimtab.doctor.loaded import Rounding, devices, quantized, rounding_of
from trimtab.doctor.report import (
    PARTLY,
    REFUSED,
    WORKS,
    WRONG,
    WRONG_IN_TRANSFORMERS,
    Finding,
    Remark,
    WrongInTransformers,
    WrongResult,
)
from trimtab.engines.transformers.attention import check_attention, score_layers
from trimtab.engines.transformers.decode import GenerationBatch, GenerationRequest
from trimtab.engines.transformers.generate import _end_ids
from trimtab.engines.transformers.places import place
from trimtab.engines.transformers.read import Text, read_groups
from trimtab.engines.transformers.weights import input_device
from trimtab.errors import TrimtabError
from trimtab.lm import LM
from trimtab.steering import Add, Edit, Positions, ScaleScores, SetProjection, Site, Steering, emphasis
from trimtab.steering.gates import Threshold

NEW_TOKENS = 2
"""Tokens that are generated at a time."""
DECODE_TOKENS = 4
"""Tokens for checks of repeated decode steps."""
SPAN = (1, 4)
"""The tokens of a prompt that are emphasized."""
BETA = 0.2
TOLERANCE = {torch.float64: 1e-4, torch.float32: 3e-3}
"""How much log-probabilities may differ between two ways to compute them; a coarser dtype: `COARSE`."""
COARSE = 0.3
ROUNDINGS = 3
"""How many times the model's own rounding of activations is allowed."""
NOISE = 30
"""How many times the difference of transformers itself, unsteered, is allowed."""
ACTIVATION_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How much an activation may differ, relative to its largest element; a coarser dtype: `COARSE_ACTIVATION_TOLERANCE`.
"""
COARSE_ACTIVATION_TOLERANCE = 0.05


@dataclass(frozen=True)
class Answer:
    """Tokens and their log-probabilities."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class Checks:
    """The checks of one model, with three prompts of different lengths. They run in the order of `CHECKS`."""

    def __init__(self, lm: LM, prompts: Sequence[str]) -> None:
        self.lm = lm
        self.prompts: list[str] = list(prompts)
        self.ids: list[list[int]] = [lm.encode(prompt, chat=False) for prompt in prompts]
        self.running_layers: list[int] = self._find_running_layers()
        count = len(self.running_layers)
        self.low, self.middle = self.running_layers[min(1, count - 1)], self.running_layers[min(2, count - 1)]
        self.last: int = self.running_layers[-1]
        self.tolerance: float = TOLERANCE.get(lm.model.dtype, COARSE)
        self.activation_tolerance: float = ACTIVATION_TOLERANCE.get(lm.model.dtype, COARSE_ACTIVATION_TOLERANCE)
        self.near_ties = lm.model.dtype not in TOLERANCE
        self.allow_for(rounding_of(lm, self.ids))
        self.ends: set[int] = _end_ids(lm.model, {})

    def allow_for(self, rounding: Rounding) -> None:
        """Widen the tolerances to the differences between unsteered passes of different shapes."""
        self.near_ties |= NOISE * rounding.logprobs > self.tolerance
        self.tolerance = max(self.tolerance, min(COARSE, NOISE * rounding.logprobs))
        self.activation_tolerance = max(self.activation_tolerance, ROUNDINGS * rounding.activations)

    def with_equal_lengths(self) -> Checks:
        """The same checks with prompts of equal length, which need no padding."""
        shortest = min(map(len, self.ids))
        words = [self.lm.tokenizer.decode(ids[-shortest:]) for ids in self.ids]
        return Checks(self.lm, words)

    @torch.no_grad()
    def _find_running_layers(self) -> list[int]:
        """The layers that run in a pass over text; layers with cross-attention to images may not."""
        running: set[int] = set()
        blocks = enumerate(self.lm.layout.blocks)
        handles = [block.register_forward_hook(lambda *_, i=i: running.add(i)) for i, block in blocks]
        try:
            naive.logits(self.lm, self.ids[0])
        finally:
            for handle in handles:
                handle.remove()
        return sorted(running)

    # ---- helpers -----------------------------------------------------------------------------------------

    def direction(self, site: Site, seed: int) -> Tensor:
        """A direction whose norm is half the norm of an activation at this site."""
        size = place(self.lm.layout, site).size
        vector = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        norm = float(self.norms(site))
        return vector * (0.5 * max(norm, 0.1) / vector.norm())

    def norms(self, site: Site) -> Tensor:
        return naive.activations(self.lm, self.ids[0], [site])[site].double().norm(dim=-1).mean()

    def generate(self, prompts: Any, steering: Any, **more: Any) -> list[Any]:
        options = {"max_new_tokens": NEW_TOKENS, "logprobs": True, "chat": False, "transfer": True, **more}
        return list(self.lm.generate(prompts, steering, **options))

    def check_tokens(self, got: Any, ids: Sequence[int], expected: Callable[[list[int]], Tensor], what: str) -> None:
        """Check that each token is the argmax of `expected(text)` and has its log-probability, within the tolerance."""
        text = list(ids)
        for token, logprob in zip(got.token_ids, got.logprobs, strict=True):
            reference = expected(text).log_softmax(-1)
            off = abs(float(reference[token]) - logprob)
            short = float(reference.max() - reference[token])
            if not (off <= self.tolerance and short <= self.tolerance):
                raise WrongResult(f"{what}: log-probabilities are off by {max(off, short):.2g} at token {len(text)}")
            text.append(token)

    def check_close(self, got: Tensor, expected: Tensor, what: str) -> None:
        """Check that activations are the same up to rounding."""
        if got.shape != expected.shape:
            raise WrongResult(f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
        off = float((got.double() - expected.double()).abs().max())
        if not off <= self.activation_tolerance * max(1.0, float(expected.double().abs().max())):
            raise WrongResult(f"{what}: off by {off:.2g}")

    def unsteered_logits(self, text: list[int]) -> Tensor:
        return naive.logits(self.lm, text)

    def residual(self, layer: int, seed: int) -> Tensor:
        return self.direction(Site(layer), seed)

    @cached_property
    def steerings(self) -> list[Steering | None]:
        last, v = self.last, self.residual
        unit = v(self.middle, 2) / v(self.middle, 2).norm()
        return [
            Steering(
                (
                    Edit(Site(self.low), Add(v(self.low, 1)), Positions.all()),
                    Edit(Site(self.middle), SetProjection(unit, target=1.5), Positions.generated()),
                )
            ),
            None,
            Steering(
                (
                    Edit(Site(0), Add(v(0, 3)), Positions.from_last_prompt_token()),
                    Edit(Site(last), Add(v(last, 4)), Positions.generated()),
                )
            ),
        ]

    def expected(self, row: int) -> Callable[[list[int]], Tensor]:
        """The plain computation of a text's logits under the steering of this row."""
        steering, start = self.steerings[row], len(self.ids[row])

        def change(edit: Edit) -> naive.Change:
            first = {"all": 0, "generated": start, "from-last-prompt-token": start - 1}[str(edit.positions)]
            v: Any = edit.operation

            def apply(x: Tensor) -> Tensor:
                x = x.clone()
                u = v.direction.to(x.dtype).to(x.device)
                for t in range(first, len(x)):
                    x[t] = x[t] + (u if isinstance(v, Add) else (v.target - x[t] @ u) * u)
                return x

            return apply

        changes = {edit.site: change(edit) for edit in steering.edits} if steering else {}

        def run(text: list[int]) -> Tensor:
            with naive.changed(self.lm, changes):
                return naive.logits(self.lm, text)

        return run

    # ---- checks ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check_transformers(self, rows: Sequence[int]) -> float:
        """How far transformers' own `generate`, unsteered, differs from its model without a cache.

        Raises `WrongInTransformers` if that is more than rounding.
        """
        most = 0.0
        texts = [self.ids[row] for row in rows]
        width = max(map(len, texts))
        device = input_device(self.lm.model)
        ids = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts], device=device)
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=device)
        options = {
            "max_new_tokens": DECODE_TOKENS,
            "do_sample": False,
            "return_dict_in_generate": True,
            "output_logits": True,
        }
        output = self.lm.model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **options)
        for r, text in enumerate(texts):
            so_far = list(text)
            for t, token in enumerate(output.sequences[r, width:].tolist()):
                reference = self.unsteered_logits(so_far).log_softmax(-1)
                theirs = output.logits[t][r].to(reference).log_softmax(-1)
                off = float((theirs - reference).abs()[token])
                most = max(most, off)
                if not off <= self.tolerance:
                    how = "from its cache" if len(set(rows)) == 1 else "with left padding"
                    raise WrongInTransformers(f"transformers' own generate, unsteered, is wrong {how}")
                if token in self.ends:
                    break
                so_far.append(token)
        return most

    def cache(self) -> None:
        """Check that decoding from the cache gives the same as recomputing, unsteered.

        The difference shows what float32 parts cost in a float64 model; the tolerance for steering is widened to it.
        """
        self.tolerance = max(self.tolerance, NOISE * self.check_transformers([0, 0]))

    def padding(self) -> None:
        """Check that prompts of different lengths get the same answers in a batch as alone, unsteered."""
        self.check_transformers([0, 1, 2])

    def reading(self) -> str | None:
        sites = [Site(layer) for layer in self.running_layers]
        captured = self.lm.capture(self.prompts, sites, Positions.all(), chat=False)
        for row, ids in enumerate(self.ids):
            expected = naive.activations(self.lm, ids, sites)
            for site in sites:
                if site not in expected:
                    raise WrongResult(f"block {site.layer} didn't run")
                self.check_close(captured[row][site], expected[site], f"prompt {row + 1} at {site}")
        words = [self.ids[0], self.ids[1]]
        tails = [(self.ids[2][0], self.ids[2][1]), (self.ids[2][2],)]
        prefixes = [(head * 12)[: 11 + 3 * i] for i, head in enumerate(words)]
        groups = [[Text([*head, *tail], [len(head) - 1, len(head)]) for tail in tails] for head in prefixes]
        sites = [Site(self.low), Site(self.last)]
        for batch in read_groups(self.lm.layout, groups, sites):
            for n, g in enumerate(batch.groups):
                for m, text in enumerate(groups[g]):
                    expected = naive.activations(self.lm, text.ids, sites)
                    for site in sites:
                        where = list(text.positions)
                        self.check_close(
                            batch.values[site][n][m], expected[site][where], f"a shared beginning at {site}"
                        )
        if len(self.running_layers) == self.lm.layout.layers:
            return None
        return f"at layers {', '.join(map(str, self.running_layers))}, which run over text"

    def adding(self) -> None:
        site = Site(self.middle)
        v = self.direction(site, 1)
        every = [Site(layer) for layer in self.running_layers]
        (before,) = self.lm.capture(self.prompts[0], every, Positions.all(), chat=False)
        with self.lm.steered(Steering((Edit(site, Add(v), Positions.span(1, 3), 0.5),)), transfer=True):
            (after,) = self.lm.capture(self.prompts[0], every, Positions.all(), chat=False)
        for earlier in every[: every.index(site)]:
            if not torch.equal(before[earlier], after[earlier]):
                raise WrongResult(f"{earlier}, before the steered one, changed")
        expected = before[site].clone()
        expected[1:3] += 0.5 * v.to(expected)
        self.check_close(after[site], expected, f"an addition at {site}")
        for row in (0, 2):
            (got,) = self.generate(self.prompts[row], self.steerings[row], max_new_tokens=DECODE_TOKENS)
            self.check_tokens(got, self.ids[row], self.expected(row), f"steering {row + 1}, decoded from the cache")

    def nothing(self) -> None:
        nothing = 0.0 * Steering((Edit(Site(self.middle), Add(self.residual(self.middle, 1)), Positions.all()),))
        gate = Threshold(Site(0), self.residual(0, 2), 1e9)
        shut = Steering((Edit(Site(self.middle), Add(self.residual(self.middle, 1)), Positions.all()),)).when(gate)
        plain = self.generate(self.prompts, None)
        for what, steering in (("strength 0", nothing), ("a shut gate", shut)):
            got = self.generate(self.prompts, steering)
            if [(answer.token_ids, answer.logprobs) for answer in got] != [
                (answer.token_ids, answer.logprobs) for answer in plain
            ]:
                raise WrongResult(f"{what} changes the answer")

    def batches(self) -> None:
        got = self.generate(self.prompts, self.steerings)
        for row in range(3):
            self.check_tokens(got[row], self.ids[row], self.expected(row), f"row {row + 1} of a batch")

    def gates(self) -> None:
        gate = Threshold(Site(0), self.residual(0, 9), -1e9)
        gated = [steering.when(gate) if steering else None for steering in self.steerings]
        got = self.generate(self.prompts, gated)
        for row in range(3):
            self.check_tokens(got[row], self.ids[row], self.expected(row), f"row {row + 1} behind an open gate")

    def stepping(self) -> None:
        batch = GenerationBatch(self.lm.model, self.lm.tokenizer, self.lm.layout)
        responses: dict[int, list[Any]] = {}
        rows: dict[int, int] = {}
        with torch.no_grad():
            for row, limit in (
                (0, DECODE_TOKENS),
                (1, NEW_TOKENS),
                (2, DECODE_TOKENS),
            ):  # one at a time; the second leaves first
                request = GenerationRequest(tuple(self.ids[row]), self.steerings[row], limit, alternatives=0)
                rows[batch.insert(request)] = row
                for response in batch.step():
                    responses.setdefault(rows[response.key], []).append(response)
            while len(batch):
                for response in batch.step():
                    responses.setdefault(rows[response.key], []).append(response)
        for row, row_responses in responses.items():
            if problem := next((response.error for response in row_responses if response.error), None):
                raise problem
            got = Answer(
                tuple(response.token for response in row_responses),
                tuple(response.logprob for response in row_responses),
            )
            self.check_tokens(
                got, self.ids[row], self.expected(row), f"row {row + 1} of a batch that rows join and leave"
            )

    def check_site_kind(self, kind: str) -> str | None:
        """Check reading and adding at a kind of site. Returns why it is refused at some layers, if it is."""
        having, reasons = [], []
        for layer in self.running_layers:
            try:
                place(self.lm.layout, Site(layer, kind))
                having.append(layer)
            except TrimtabError as error:
                reasons.append(error)
        if not having:
            raise reasons[0]
        (captured,) = self.lm.capture(self.prompts[0], [Site(i, kind) for i in having], Positions.all(), chat=False)
        expected = naive.activations(self.lm, self.ids[0], list(captured))
        for site, x in captured.items():
            self.check_close(x, expected[site].reshape(x.shape), str(site))
        site = Site(having[min(1, len(having) - 1)], kind)
        v = self.direction(site, 5)
        steering = Steering((Edit(site, Add(v), Positions.from_last_prompt_token()),))
        got = self.generate(self.prompts, [steering, None, steering])
        for row, steered in enumerate((True, False, True)):
            start = len(self.ids[row]) - 1

            def change(x: Tensor, start: int = start) -> Tensor:
                return torch.cat([x[:start], x[start:] + v.to(x)])

            def run(text: list[int], change: Any = change, steered: bool = steered) -> Tensor:
                with naive.changed(self.lm, {site: change} if steered else {}):
                    return naive.logits(self.lm, text)

            self.check_tokens(got[row], self.ids[row], run, f"an addition at {site}, row {row + 1}")
        if not reasons:
            return None
        return f"at layers {', '.join(map(str, having))} of {self.lm.layout.layers}; elsewhere: {reasons[0]}"

    def emphasis(self) -> str | None:
        layers = score_layers(self.lm.layout)
        check_attention(self.lm.layout, layers)
        steering = emphasis(ScaleScores(), [SPAN], layers, "directer")
        factors = dict.fromkeys(layers, ScaleScores().factor(1.0))
        got = self.generate(self.prompts, [steering, None, steering])
        for row, steered in enumerate((True, False, True)):
            on = factors if steered else {}
            run = partial(_attended, self.lm, on)
            self.check_tokens(got[row], self.ids[row], run, f"emphasis, row {row + 1}")
        return (
            None
            if len(layers) == len(self.running_layers)
            else f"at layers {', '.join(map(str, layers))}, which have attention"
        )

    def rejection(self) -> None:
        layers = score_layers(self.lm.layout)
        check_attention(self.lm.layout, layers)
        order = layers[::-1]
        steering = emphasis(ScaleScores(), [SPAN], layers, "directer")
        factor = ScaleScores().factor(1.0)
        subsets, size = [order], len(order) // 2
        while size >= 1:
            subsets.append(order[:size])
            size //= 2
        candidate_logits = [
            lambda text, these=these: naive.logits_with_scaled_keys(
                self.lm, text, dict.fromkeys(these, factor), SPAN, True
            )
            for these in subsets
        ]
        for schedule, rows in (("fused", [0]), ("optimistic", [0, 1, 2])):
            settings = Rejection(beta=BETA, ranking=order, schedule=schedule, min_layers=1)
            got = self.generate([self.prompts[row] for row in rows], steering, rejection=settings)
            for row in rows:
                self.check_ladder(
                    got[row], self.ids[row], candidate_logits, f"emphasis with rejection ({schedule}), row {row + 1}"
                )
        self.generate(self.prompts[0], steering, rejection=Rejection(min_layers=1), max_new_tokens=1)

    def rejection_of_additions(self) -> None:
        site = Site(self.low)
        v = self.direction(site, 1)
        steering = Steering((Edit(site, Add(v), Positions.all()),))

        def candidate(strength: float) -> Callable[[list[int]], Tensor]:
            def change(x: Tensor) -> Tensor:
                return torch.cat([x[:-1], x[-1:] + strength * v.to(x)])

            def run(text: list[int]) -> Tensor:
                with naive.changed(self.lm, {site: change}):
                    return naive.logits(self.lm, text)

            return run

        got = self.generate(self.prompts, steering, rejection=Rejection(beta=BETA, ladder="strength"))
        candidate_logits = [candidate(0.5**n) for n in range(5)]
        for row in range(3):
            self.check_ladder(got[row], self.ids[row], candidate_logits, f"additions with rejection, row {row + 1}")

    def check_ladder(
        self, got: Any, ids: Sequence[int], candidates: Sequence[Callable[[list[int]], Tensor]], what: str
    ) -> None:
        """Check that each token is that of the first plausible candidate, or the unsteered model's."""
        if self.near_ties:
            return  # a near-tie can go either way and changes all later tokens
        text = list(ids)
        for token, logprob in zip(got.token_ids, got.logprobs, strict=True):
            raw = self.unsteered_logits(text)
            least = raw.max() + math.log(BETA)
            used = raw
            if raw.topk(2).values[1] >= least:
                logits = (candidate(text) for candidate in candidates)
                used = next((values for values in logits if raw[values.argmax()] >= least), raw)
            off = abs(float(used.log_softmax(-1)[token]) - logprob)
            if int(used.argmax()) != token or not off <= self.tolerance:
                raise WrongResult(f"{what}: token {len(text)} isn't the one that the ladder gives (off by {off:.2g})")
            text.append(token)


AS_LOADED = ("quantized", "devices")
"""Checks of how a model is loaded, not of what it is."""
CHECKS: dict[str, tuple[str, Callable[[Checks], str | None]]] = {
    "quantized": ("quantized weights, and what they mean for its answers", quantized),
    "devices": ("several devices, and weights that are fetched while they run", devices),
    "cache": ("transformers' own cache, unsteered, gives what recomputing gives", Checks.cache),
    "padding": ("transformers' own left padding, unsteered, changes nothing", Checks.padding),
    "reading": ("reading the residual stream", Checks.reading),
    "adding": ("adding to it and setting its projection, decoded from the cache", Checks.adding),
    "nothing": ("strength 0 and shut gates change no bit", Checks.nothing),
    "batches": ("rows of one batch, each with its own steering", Checks.batches),
    "gates": ("gates that read the prompt", Checks.gates),
    "stepping": ("rows that join and leave a running batch, as the server has them", Checks.stepping),
    "block_input": ("what enters a block", lambda checks: checks.check_site_kind("block_input")),
    "attention": ("what attention puts out", lambda checks: checks.check_site_kind("attention")),
    "mlp": ("what the MLP puts out", lambda checks: checks.check_site_kind("mlp")),
    "heads": ("attention heads", lambda checks: checks.check_site_kind("heads")),
    "neurons": ("MLP neurons", lambda checks: checks.check_site_kind("neurons")),
    "router": ("the logits of a mixture's router", lambda checks: checks.check_site_kind("router")),
    "emphasis": ("emphasizing a phrase (attention scores)", Checks.emphasis),
    "rejection": ("emphasis with rejection", Checks.rejection),
    "rejecting": ("additions with rejection", Checks.rejection_of_additions),
}


def _attended(lm: LM, factors: dict[int, float], text: list[int]) -> Tensor:
    return naive.logits_with_scaled_keys(lm, text, factors, SPAN, last=False)


def run_checks(lm: LM, prompts: Sequence[str], names: Sequence[str] = tuple(CHECKS)) -> tuple[Finding, ...]:
    """Run these checks on a model and return their findings."""
    checks = Checks(lm, prompts)
    findings: list[Finding] = []
    for name in names:
        what, check = CHECKS[name]
        findings.append(_run(checks, name, what, check))
    wrong_in_transformers = {finding.name for finding in findings if finding.state == WRONG_IN_TRANSFORMERS}
    if "cache" in wrong_in_transformers:
        return tuple(_attribute_to_cache(finding) for finding in findings)
    if "padding" in wrong_in_transformers and any(finding.state == WRONG for finding in findings):
        checks = checks.with_equal_lengths()
        findings = [
            _retry_without_padding(checks, finding) if finding.state == WRONG else finding for finding in findings
        ]
    return tuple(findings)


def _run(checks: Checks, name: str, what: str, check: Callable[[Checks], str | None]) -> Finding:
    try:
        partly = check(checks)
    except TrimtabError as error:
        return Finding(name, what, REFUSED, str(error))
    except WrongResult as error:
        return Finding(name, what, WRONG, str(error))
    except WrongInTransformers as error:
        return Finding(name, what, WRONG_IN_TRANSFORMERS, str(error))
    except Exception as error:  # any crash is a finding
        return Finding(name, what, WRONG, f"it crashes: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Finding(name, what, PARTLY if partly and not isinstance(partly, Remark) else WORKS, partly or "")


def _retry_without_padding(checks: Checks, finding: Finding) -> Finding:
    """Attribute to transformers a failure that is gone without padding, since its own left padding is wrong."""
    again = _run(checks, finding.name, finding.what, CHECKS[finding.name][1])
    if again.state == WRONG:
        return finding
    return Finding(
        finding.name,
        finding.what,
        WRONG_IN_TRANSFORMERS,
        f"transformers' own left padding is wrong, unsteered: {finding.reason}",
    )


def _attribute_to_cache(finding: Finding) -> Finding:
    """Attribute a wrong result to transformers, whose own cache is wrong, so no result could be right."""
    if finding.state != WRONG or finding.reason.startswith("it crashes"):
        return finding
    return Finding(
        finding.name,
        finding.what,
        WRONG_IN_TRANSFORMERS,
        f"transformers' own cache is wrong, unsteered: {finding.reason}",
    )
