"""Routers of mixtures of experts, steered and read: against routing written out as the papers have it, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from trimtab import LM, Edit, Pair, Positions, Rejection, Site, Steering, TrimtabError, UnsupportedError, load
from trimtab.doctor import check_model, tiny_lm, tiny_prompts
from trimtab.engines.request import Choice
from trimtab.engines.transformers.routers import chosen_experts, router_of
from trimtab.engines.vllm.admission import check_supported
from trimtab.methods.steermoe import learn_steermoe
from trimtab.steering import Add, RouteExperts

pytestmark = pytest.mark.filterwarnings("ignore")

SOFTMAX = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2")
LOGITS = ("gpt_oss", "granitemoe")
SIGMOID = ("deepseek_v3", "glm4_moe")
FAMILIES = (*SOFTMAX, *LOGITS, *SIGMOID, "llama4_text")
if Version(transformers.__version__) < Version("5.23"):  # these were other modules, whose textbook form isn't below
    FAMILIES = tuple(kind for kind in FAMILIES if kind not in ("granitemoe", "llama4_text"))
PROMPTS = tiny_prompts()
NEW = 3
Change = Callable[[Tensor], Tensor]


@lru_cache
def model(kind: str) -> LM:
    return tiny_lm(kind)


def last_router(lm: LM) -> Site:
    return Site.router(lm.layout.layers - 1)


def logits_of(router: Any, x: Tensor) -> Tensor:
    z = x @ router.weight.T.to(x.dtype)
    bias = getattr(router, "bias", None)
    return z if bias is None else z + bias


def softmax_routing(router: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights, experts = z.softmax(-1).topk(router.top_k)
    if getattr(router, "norm_topk_prob", "Mixtral" in type(router).__name__):
        weights = weights / weights.sum(-1, keepdim=True)
    return z, weights * getattr(router, "routed_scaling_factor", 1.0), experts


def logits_routing(router: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen, experts = z.topk(router.top_k)
    return z, chosen.softmax(-1), experts


def sigmoid_routing(router: Any, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek V3: groups by the sum of their two best, the best groups' best experts, weights without the bias."""
    weights, experts = [], []
    size = router.num_experts // router.num_group if hasattr(router, "num_group") else router.num_experts
    for token in z.sigmoid():
        biased = token + router.e_score_correction_bias.to(token)
        groups = biased.split(size)
        best = torch.stack([group.topk(2).values.sum() for group in groups]).topk(router.topk_group).indices.tolist()
        open_to = [e for e in range(len(token)) if e // size in best]
        chosen = sorted(open_to, key=lambda e: -float(biased[e]))[: router.top_k]
        w = token[chosen]
        experts.append(chosen)
        weights.append((w / w.sum() if router.norm_topk_prob else w) * router.routed_scaling_factor)
    return z, torch.stack(weights), torch.tensor(experts)


def llama4_routing(router: Any, z: Tensor) -> tuple[Tensor, Tensor]:
    kept = torch.full_like(z, -torch.inf)
    for row, token in zip(kept, z, strict=True):
        for e in token.topk(router.top_k).indices.tolist():
            row[e] = token[e]
    return kept.sigmoid(), z


def routing(kind: str) -> Callable[[Any, Tensor], Any]:
    if kind in SOFTMAX:
        return softmax_routing
    return logits_routing if kind in LOGITS else sigmoid_routing if kind in SIGMOID else llama4_routing


@contextmanager
def textbook(lm: LM, kind: str, layer: int, change: Change) -> Iterator[None]:
    """While open, the router of a layer is the textbook's, with this change `[tokens, experts]` of its logits."""
    router: Any = router_of(lm.layout, layer).module

    def forward(x: Tensor) -> Any:
        return routing(kind)(router, change(logits_of(router, x.reshape(-1, x.shape[-1]))))

    router.forward = forward
    try:
        yield
    finally:
        del router.forward


def plain(lm: LM, ids: list[int]) -> Tensor:
    return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().log_softmax(-1)


def bias(lm: LM, seed: int = 1) -> Tensor:
    experts = router_of(lm.layout, lm.layout.layers - 1).experts
    return 2 * torch.randn(experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def promoted(z: Tensor, signs: Tensor, strength: float = 1.0) -> Tensor:
    """The paper's formula, one number at a time."""
    new = z.clone()
    for token, out in zip(z.tolist(), new, strict=True):
        most, least = max(token), min(token)
        for e, sign in enumerate((strength * signs).tolist()):
            if sign > 0:
                out[e] += sign * (most + max(0.01, abs(most) / 128) - token[e])
            elif sign < 0:
                out[e] += -sign * (least - max(0.01, abs(least) / 128) - token[e])
    return new


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_edits_of_logits_are_those_of_the_textbook(kind: str) -> None:
    lm = model(kind)
    site, v = last_router(lm), bias(lm)
    signs = torch.zeros(len(v), dtype=torch.float64)
    signs[1], signs[2] = 1.0, -1.0
    cases: list[tuple[Steering | None, Change, Callable[[int], int]]] = [
        (Steering((Edit(site, Add(v), Positions.all()),)), lambda z: z + v, lambda n: 0),
        (None, lambda z: z, lambda n: 0),
        (
            Steering((Edit(site, RouteExperts(signs), Positions.from_last_prompt_token()),)),
            lambda z: promoted(z, signs),
            lambda n: n - 1,
        ),
        (
            Steering((Edit(site, RouteExperts(signs), Positions.generated(), -0.5),)),
            lambda z: promoted(z, signs, -0.5),
            lambda n: n,
        ),
    ]
    prompts = [*PROMPTS, PROMPTS[0]]
    answers = lm.generate(
        prompts, [steering for steering, _, _ in cases], max_new_tokens=NEW, logprobs=True, transfer=True, chat=False
    )
    for prompt, answer, (_, change, start) in zip(prompts, answers, cases, strict=True):
        text = lm.encode(prompt, chat=False)
        first = start(len(text))

        def at(z: Tensor, first: int = first, change: Change = change) -> Tensor:
            return torch.cat([z[:first], change(z[first:])]) if first < len(z) else z

        for token, logprob in zip(answer.token_ids, answer.logprobs or (), strict=True):
            with textbook(lm, kind, site.layer, at):
                expected = plain(lm, text)
            assert abs(float(expected[token]) - logprob) < 1e-4
            assert float(expected.max() - expected[token]) < 1e-4
            text.append(token)
    router = router_of(lm.layout, site.layer).module
    assert "forward" not in vars(router)
    assert not router._forward_hooks


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_logits_are_read_where_they_are_made_and_say_what_is_chosen(kind: str) -> None:
    lm = model(kind)
    site = last_router(lm)
    router: Any = router_of(lm.layout, site.layer).module
    routed: list[Any] = []
    handle = router.register_forward_hook(lambda _m, args, out: routed.append((args[0], out)))
    (activations,) = lm.capture(PROMPTS[2], site, Positions.all(), chat=False)
    plain(lm, lm.encode(PROMPTS[2], chat=False))
    handle.remove()
    x, out = routed[-1]
    torch.testing.assert_close(
        activations[site], logits_of(router, x.reshape(-1, x.shape[-1])).to(activations[site].dtype)
    )
    chosen = chosen_experts(lm.layout, site.layer, activations[site])
    assert "forward" not in vars(router)
    assert chosen.sum(1).tolist() == [router.top_k] * len(chosen)
    if kind == "llama4_text":
        assert torch.equal(chosen, out[0] > 0)
    else:
        assert [sorted(row.nonzero().flatten().tolist()) for row in chosen] == [sorted(row) for row in out[2].tolist()]


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in SIGMOID])
def test_promoted_experts_are_chosen_and_demoted_ones_are_not(kind: str) -> None:
    lm = model(kind)
    site = last_router(lm)
    (before,) = lm.capture(PROMPTS[0], site, Positions.all(), chat=False)
    count = before[site].shape[-1]
    for up, down in ((0, 1), (2, 3), (3, 0)):
        steering = Steering((Edit(site, RouteExperts.of(count, (up,), (down,)), Positions.all()),))
        for acting, wanted, other in ((steering, up, down), (-steering, down, up)):
            (after,) = lm.capture(PROMPTS[0], site, Positions.all(), chat=False, steering=acting, transfer=True)
            chosen = chosen_experts(lm.layout, site.layer, after[site])
            assert chosen[:, wanted].all()
            assert not chosen[:, other].any()
            left = [e for e in range(count) if e not in (up, down)]
            assert torch.equal(after[site][:, left], before[site][:, left])


def test_nothing_is_nothing_and_a_margin_survives_bfloat16() -> None:
    lm = model("mixtral")
    site = last_router(lm)
    steering = Steering((Edit(site, RouteExperts.of(4, (1,), (2,)), Positions.all()),))
    options: dict[str, Any] = {"max_new_tokens": NEW, "logprobs": True, "transfer": True, "chat": False}
    plain_answers = lm.generate(PROMPTS, None, **options)
    assert lm.generate(PROMPTS, 0.0 * steering, **options) == plain_answers
    assert [a.token_ids for a in lm.generate(PROMPTS, [None, steering, None], **options)][::2] == [
        a.token_ids for a in plain_answers
    ][::2]
    logits = (torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 30).bfloat16()
    kernel, row = RouteExperts.of(8, (1,), (2,)).call(1.0)
    moved = kernel(logits.float(), row).bfloat16()
    assert (moved[:, 1] > logits.max(-1).values).all()
    assert (moved[:, 2] < logits.min(-1).values).all()


def test_rejection_and_next_tokens_and_files(tmp_path: Path) -> None:
    lm = model("qwen3_moe")
    site = last_router(lm)
    steering = Steering(
        (Edit(site, RouteExperts.of(4, (1,), (2,)), Positions.all()), Edit(site, Add(bias(lm)), Positions.all()))
    )
    options: dict[str, Any] = {"max_new_tokens": NEW, "transfer": True, "chat": False}
    (steered,) = lm.generate(PROMPTS[0], steering, **options)
    (kept,) = lm.generate(PROMPTS[0], steering, rejection=Rejection(beta=1e-9, ladder="strength"), **options)
    assert steered.applied.doses[0].kind == "router"
    assert steered.applied.overall == 0  # logits don't add up in the residual stream
    assert len(kept.token_ids) == len(steered.token_ids)
    ids = lm.encode(PROMPTS[0], chat=False)
    (next_token,) = lm.next_logprobs([Choice(tuple(ids), len(ids), (steered.token_ids[0],))], steering, transfer=True)
    (generated,) = lm.generate(PROMPTS[0], steering, logprobs=True, **{**options, "max_new_tokens": 1})
    assert next_token.logprobs[0] == pytest.approx((generated.logprobs or (0.0,))[0], abs=1e-6)
    steering.save(tmp_path / "s.safetensors")
    assert load(tmp_path / "s.safetensors") == steering
    with pytest.raises(UnsupportedError, match=r"router\[3\] is inside a block"):
        check_supported(steering, layers=4, widths={"residual": 64})


def test_what_has_no_router_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, words in (("llama", "no router"), ("jetmoe", "[23] routers"), ("zaya", "0 weights")):
        lm = model(kind)
        with pytest.raises(UnsupportedError, match=words):
            lm.capture(PROMPTS[0], Site.router(0), chat=False)
    with pytest.raises(UnsupportedError, match="no layer whose experts can be steered"):
        learn_steermoe(model("llama"), PAIRS)
    lm = model("mixtral")
    with pytest.raises(TrimtabError, match="width at router"):
        lm.check(Steering((Edit(Site.router(0), RouteExperts.of(5, (1,))),)))
    router: Any = router_of(lm.layout, 0).module

    def einsum(self: Any, x: Tensor) -> Any:
        return softmax_routing(self, torch.einsum("td,ed->te", x.reshape(-1, x.shape[-1]), self.weight))

    monkeypatch.setattr(type(router), "forward", einsum)
    with pytest.raises(UnsupportedError, match="0 linear maps"):
        lm.capture(PROMPTS[0], Site.router(0), chat=False)
    assert "forward" not in vars(router)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RouteExperts.of(4, (4,)), "experts 0 to 3"),
        (lambda: RouteExperts.of(4, (1,), (1,)), "promoted and demoted"),
        (lambda: RouteExperts(torch.tensor([0.5, 0.0])), "another number"),
        (lambda: RouteExperts.of(4, (1,), margin=0.0), "above 0"),
    ],
)
def test_experts_that_cannot_be(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(TrimtabError, match=words):
        make()


@pytest.mark.parametrize("kind", ["mixtral", pytest.param("deepseek_v3", marks=pytest.mark.long)])
def test_the_doctor_finds_routers(kind: str) -> None:
    report = check_model(tiny_lm(kind))
    assert report["router"].state == ("works" if kind == "mixtral" else "partly")
    assert report.wrong == ()


# ---- SteerMoE ------------------------------------------------------------------------------------------------------

PAIRS = [
    Pair("w5 w6 w7", "w8 w9", prompt="w10 w11 w12", shape="answers"),
    Pair("w13 w14", "w15 w16 w17 w18", prompt="w19 w20", shape="answers"),
    Pair("w21 w22 w23 w24", "w25", prompt="w26 w27 w28 w29", shape="answers"),
]


@torch.no_grad()
def rates(lm: LM, layer: int, side: str) -> Tensor:
    """The share of a side's answer tokens that go to each expert, by a hook on the router's own choice."""
    router: nn.Module = router_of(lm.layout, layer).module
    counts, tokens = torch.zeros(4, dtype=torch.float64), 0
    for pair in PAIRS:
        prompt = lm.encode(pair.prompt, chat=False)
        ids = lm.encode(f"{pair.prompt} {getattr(pair, side)}", chat=False)
        seen: list[Any] = []
        handle = router.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out[2]))
        plain(lm, ids)
        handle.remove()
        for experts in seen[0][len(prompt) :].tolist():
            tokens += 1
            for e in experts:
                counts[e] += 1
    return counts / tokens


@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_steermoe_counts_as_the_paper_does(kind: str) -> None:
    lm = model(kind)
    layers = [layer for layer in range(lm.layout.layers) if kind != "deepseek_v3" or layer]
    risk = {layer: rates(lm, layer, "positive") - rates(lm, layer, "negative") for layer in layers}
    learned = learn_steermoe(lm, PAIRS, promote=3, demote=2)
    every = [(float(risk[layer][e]), layer, e) for layer in layers for e in range(4)]
    up = sorted(every, key=lambda entry: (-entry[0], entry[1:]))[:3]
    down = sorted(every, key=lambda entry: (entry[0], entry[1:]))[:2]
    got = {
        (edit.site.layer, e): sign
        for edit in learned.edits
        for e, sign in enumerate(edit.operation.direction.tolist())  # type: ignore[union-attr]
        if sign
    }
    assert got == {(layer, e): 1.0 for _, layer, e in up} | {(layer, e): -1.0 for _, layer, e in down}
    differences = learned.card.measured["risk_difference"]
    for difference, layer, e in (*up, *down):
        assert differences[f"{layer}.{e}"] == pytest.approx(difference, abs=1e-6)
    assert learned.card.measured["tokens"] == [9, 7]
    answers = lm.generate(PROMPTS, [learned, None, -learned], max_new_tokens=2, chat=False)
    assert len(answers) == 3


def test_steermoe_promotes_no_more_than_a_token_is_routed_to_and_says_what_it_cannot() -> None:
    lm = model("mixtral")
    (edit,) = learn_steermoe(lm, PAIRS, layers=2, promote=4, demote=0).edits
    assert int((edit.operation.direction > 0).sum()) <= 2  # type: ignore[union-attr]
    assert not (edit.operation.direction < 0).any()  # type: ignore[union-attr]
    same = [Pair("w5 w6", "w5 w6", prompt="w7", shape="answers")]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (same, {}, "equally often"),
        (PAIRS, {"promote": 0, "demote": 0}, "both 0"),
        (PAIRS, {"promote": -1}, "0 or more"),
        ([], {}, "no pairs"),
    ]
    for pairs, options, words in cases:
        with pytest.raises(TrimtabError, match=words):
            learn_steermoe(lm, pairs, **options)
