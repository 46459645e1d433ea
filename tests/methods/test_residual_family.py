"""ActAdd, RepE, ICV, InferAligner, CAST, HPR and the random control, each against its formulas, over seven families."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import naive_sites as naive
import pytest
import tiny
import torch
from tiny import LAYERS, prompt
from torch import Tensor

from trimtab import LM, Positions, Site, Steering, Threshold, TrimtabError, load, save
from trimtab.learn.estimators import Estimator, mean_difference, pca, random_order, unit
from trimtab.methods import cast
from trimtab.methods.actadd import learn_actadd
from trimtab.methods.cast import learn_cast, learn_condition
from trimtab.methods.hpr import angle_between, fit_angles, fit_probe, learn_hpr
from trimtab.methods.icv import learn_icv
from trimtab.methods.inferaligner import learn_inferaligner
from trimtab.methods.random import learn_random
from trimtab.methods.repe import ReaderWarning, learn_repe
from trimtab.steering import RotatePredicted
from trimtab.steering.gates import ALWAYS
from trimtab.steering.rotations import predicted_angle
from trimtab.text.pairs import Pair

pytestmark = [
    pytest.mark.filterwarnings("ignore::trimtab.methods.repe.ReaderWarning", "ignore::trimtab.lm.DoseWarning"),
    # The formulas are tested here; how each family is read and steered, in tests/properties.
    pytest.mark.long_unless(lambda lm: lm in ("llama", "gemma3")),
]

FAMILIES = ("llama", "qwen3", "gemma3", "gpt2", "opt", "falcon", "olmo2")
PAIRS = [Pair(prompt(3 * i, 3 + i % 3), prompt(3 * i + 1, 4), prompt(200 + i, 5), "answers") for i in range(8)]
ON = [prompt(300 + i, 4 + i % 4) for i in range(8)]
OFF = [prompt(400 + i, 3 + i % 5) for i in range(8)]
PROMPTS = [prompt(seed, length) for seed, length in ((50, 5), (51, 9), (52, 6), (53, 12))]
NEW = 4


@pytest.fixture(scope="module", params=FAMILIES)
def lm(request: pytest.FixtureRequest) -> LM:
    return tiny.tiny(request.param)


def at(lm: LM, text: str, layer: int, kind: str = "residual") -> Tensor:
    return naive.activations(lm, lm.encode(text), kind, layer).double()


def sides(lm: LM, layer: int) -> tuple[Tensor, Tensor]:
    """Last-token activations `[pairs, width]` of the positives and of the negatives."""
    read = lambda pair, side: at(lm, f"{pair.prompt} {side}", layer)[-1]  # noqa: E731
    return (
        torch.stack([read(pair, pair.positive) for pair in PAIRS]),
        torch.stack([read(pair, pair.negative) for pair in PAIRS]),
    )


def runs_as_written(lm: LM, steering: Steering, tmp_path: Path) -> None:
    """In a padded batch with unsteered rows, with a cache, and from a file: as each prompt alone by the formulas."""
    save(steering, tmp_path / "s.safetensors")
    again = load(tmp_path / "s.safetensors")
    assert again == steering
    rows = [again, None, 0.5 * again, again]
    answers = lm.generate(PROMPTS, rows, max_new_tokens=NEW, logprobs=True)
    plain = lm.generate(PROMPTS, max_new_tokens=NEW, logprobs=True)
    assert answers[1].logprobs == plain[1].logprobs
    for i in (0, 2, 3):
        row = rows[i]
        assert row is not None
        acting = Steering(tuple(edit for edit in row.edits if opens(lm, PROMPTS[i], edit.gate)))
        assert bool(answers[i].applied.edits) == bool(acting.edits)
        tokens, logprobs = naive.generate(lm, PROMPTS[i], acting, NEW)
        assert list(answers[i].token_ids) == tokens
        assert answers[i].logprobs == pytest.approx(logprobs, abs=1e-4)
        if not acting.edits:
            assert answers[i].logprobs == plain[i].logprobs


def opens(lm: LM, text: str, gate: object) -> bool:
    """A threshold on a dot product, or always."""
    if not isinstance(gate, Threshold):
        return True
    x = at(lm, text, gate.site.layer)
    x = x[-1:] if gate.positions == Positions.last_prompt_token() else x
    if gate.pool == "unit-mean":
        x = x / x.norm(dim=-1, keepdim=True)
    return float(x.mean(0) @ gate.direction.double()) > gate.threshold


def test_actadd(lm: LM, tmp_path: Path) -> None:
    plus, minus = "w7 w8 w9", "w7 w11"
    steering = learn_actadd(lm, 2, positive=plus, negative=minus, coefficient=1.5)
    shorter = [*lm.encode(minus), lm.tokenizer.pad_token_id]
    h_plus = naive.activations(lm, lm.encode(plus), "residual", 1)  # the output of block 1 is the input of block 2
    h_minus = naive.activations(lm, shorter, "residual", 1)
    assert [str(edit.positions) for edit in steering.edits] == ["span:1:2", "span:2:3"]  # they begin alike
    for edit, row in zip(steering.edits, (h_plus - h_minus)[1:], strict=True):
        assert edit.strength == 1.5
        assert torch.allclose(edit.operation.direction.double(), row.double(), atol=1e-5)
    n = len(lm.encode(PROMPTS[1]))
    (before,) = lm.capture(PROMPTS[1], [Site(2, "block_input")], Positions.all())
    with lm.steered(steering):
        (after,) = lm.capture(PROMPTS[1], [Site(2, "block_input")], Positions.all())
    change = after[Site(2, "block_input")] - before[Site(2, "block_input")]
    assert torch.allclose(change[:3], 1.5 * (h_plus - h_minus).to(change), atol=1e-4)
    assert not change[3:].any()
    assert len(change) == n
    runs_as_written(lm, steering, tmp_path)
    back = learn_actadd(lm, 2, positive=plus, negative=minus, align="back")
    assert [edit.positions.resolve(9) for edit in back.edits] == [((7, 8),), ((8, 9),)]


@pytest.mark.parametrize("control", ["add", "sign"])
def test_repe(lm: LM, tmp_path: Path, control: str) -> None:
    steering = learn_repe(lm, PAIRS, [1, 2], coefficient=0.3, control=control)  # type: ignore[arg-type]
    for edit in steering.edits:
        plus, minus = sides(lm, edit.site.layer)
        middle = (plus + minus) / 2
        members = torch.cat([plus - middle, minus - middle])
        first = torch.linalg.eigh(members.T @ members).eigenvectors[:, -1]
        votes = sum(1 if float(p @ first) > float(m @ first) else -1 for p, m in zip(plus, minus, strict=True))
        v = edit.operation.direction.double()
        assert abs(float(v @ first)) == pytest.approx(1, abs=1e-5)
        if votes:
            assert float(v @ first) * votes > 0
        assert edit.strength == pytest.approx(0.3 * float(torch.cat([plus, minus]).norm(dim=-1).mean()), rel=1e-5)
    runs_as_written(lm, steering, tmp_path)


def test_icv(lm: LM, tmp_path: Path) -> None:
    steering = learn_icv(lm, PAIRS, scale=0.2)
    assert [edit.site for edit in steering.edits] == [Site(layer, "mlp") for layer in range(LAYERS)]
    for edit in steering.edits:
        plus, minus = sides(lm, edit.site.layer)
        v = (plus - minus).mean(0)
        assert torch.allclose(edit.operation.direction.double(), v / v.norm(), atol=1e-5)
    runs_as_written(lm, steering, tmp_path)
    single_pair = PAIRS[:1]
    same = [learn_icv(lm, single_pair, estimator=kind).edits for kind in ("mean", "pca")]  # type: ignore[arg-type]
    for a, b in zip(*same, strict=True):
        assert torch.allclose(a.operation.direction, b.operation.direction, atol=1e-5)


def test_inferaligner(lm: LM, tmp_path: Path) -> None:
    guide = tiny.tiny(lm.name.removeprefix("tiny-"), seed=5)
    steering = learn_inferaligner(lm, ON, [1, 2], harmless=OFF, guide=guide, alpha=0.7)
    for edit in steering.edits:
        layer = edit.site.layer
        own = [torch.stack([at(lm, p, layer)[-1] for p in texts]) for texts in (ON, OFF)]
        theirs = [torch.stack([at(guide, p, layer)[-1] for p in texts]) for texts in (ON, OFF)]
        s, theta = (side[0].mean(0) - side[1].mean(0) for side in (own, theirs))
        b = -float((torch.cat(own) @ s).mean())
        assert torch.allclose(edit.operation.direction.double(), theta, atol=1e-5)
        for text in (*ON, *OFF, *PROMPTS):
            assert opens(lm, text, edit.gate) == (float(at(lm, text, layer)[-1] @ s) + b > 0)
    runs_as_written(lm, steering, tmp_path)
    turned = learn_inferaligner(lm, OFF, [1, 2], harmless=ON)
    for a, b_edit in zip(learn_inferaligner(lm, ON, [1, 2], harmless=OFF).edits, turned.edits, strict=True):
        assert torch.allclose(a.operation.direction, -b_edit.operation.direction)
        assert opens(lm, PROMPTS[0], a.gate) != opens(lm, PROMPTS[0], b_edit.gate)


def test_cast_looks_for_its_condition_below_the_behaviour(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless next to nothing is below, where it looks in the first half of the blocks, or where it is told."""
    read: list[set[int]] = []
    pooled = cast.read_pooled

    def noted(lm: LM, prompts: Any, readings: Any, **keywords: Any) -> Any:
        read.append({reading.site.layer for reading in readings})
        return pooled(lm, prompts, readings, **keywords)

    monkeypatch.setattr(cast, "read_pooled", noted)
    for layers, options, expected in (([3], {}, {0, 1, 2}), ([1, 3], {}, {0, 1}), ([3], {"condition_layer": 3}, {3})):
        steering = learn_cast(lm, PAIRS, layers, when=ON, unless=OFF, **options)
        (gate,) = {edit.gate for edit in steering.edits}
        assert {reading.site.layer for reading in gate.readings} <= expected
        assert read.pop() == expected


def test_cast(lm: LM, tmp_path: Path) -> None:
    steering = learn_cast(lm, PAIRS, [2], when=ON, unless=OFF)
    (edit,) = steering.edits
    gate = edit.gate
    assert isinstance(gate, Threshold)
    pooled = []
    for texts in (ON[::2], OFF[::2]):
        rows = [at(lm, text, gate.site.layer) for text in texts]
        pooled.append(torch.stack([(x / x.norm(dim=-1, keepdim=True)).mean(0) for x in rows]).mean(0))
    c = pooled[0] - pooled[1]
    assert torch.allclose(gate.direction.double(), c / c.norm(), atol=1e-5)
    means = [[], []]  # type: ignore[var-annotated]
    for pair in PAIRS:
        for m, side in enumerate((pair.positive, pair.negative)):
            x = at(lm, f"{pair.prompt} {side}", 2)
            means[m].append(x[len(lm.encode(pair.prompt)) :].mean(0))
    expected = unit(pca(torch.stack(means[0]), torch.stack(means[1])))
    assert torch.allclose(edit.operation.direction.double(), expected, atol=1e-5)
    card = steering.card.measured["condition"]
    hits = sum(opens(lm, text, gate) for text in ON[1::2]) / 4
    alarms = sum(opens(lm, text, gate) for text in OFF[1::2]) / 4
    assert (card["chosen"]["hits"], card["chosen"]["false_alarms"]) == (hits, alarms)
    runs_as_written(lm, steering, tmp_path)


def test_the_papers_condition_is_blind_to_the_sign_and_ours_is_not() -> None:
    lm = tiny.tiny("llama")
    for measure in ("cast", "ratio", "cosine", "dot"):
        learned = learn_condition(lm, ON, OFF, measure=measure, pool="mean")
        assert learned.measured["area"] <= 1
    x, c = torch.randn(32, dtype=torch.float64), tiny.direction(1)
    for measure, blind in (("cast", True), ("ratio", True), ("cosine", False), ("dot", False)):
        along, against = (Threshold(Site(0), sign * c, 0.0, measure).value(x) for sign in (1, -1))
        assert (along == pytest.approx(against)) == blind


def test_hpr(lm: LM, tmp_path: Path) -> None:
    steering = learn_hpr(lm, PAIRS, [1, 2, 3], keep=2, epochs=1)
    assert len(steering.edits) == 2
    save(steering, tmp_path / "hpr.safetensors")
    assert load(tmp_path / "hpr.safetensors") == steering
    assert learn_hpr(lm, PAIRS, [1, 2, 3], keep=2, epochs=1) == steering
    accuracy = steering.card.measured["probe_accuracy"]
    dropped = {"1", "2", "3"} - {str(edit.site.layer) for edit in steering.edits}
    assert all(accuracy[layer] <= min(accuracy[str(e.site.layer)] for e in steering.edits) for layer in dropped)
    (edit,) = (e for e in steering.edits[-1:])
    operation = edit.operation
    assert isinstance(operation, RotatePredicted)
    layer, u = edit.site.layer, operation.direction.double()
    (before,) = lm.capture(PROMPTS[1], [layer], Positions.all())
    with lm.steered(Steering((edit,)).at(Positions.all())):
        (after,) = lm.capture(PROMPTS[1], [layer], Positions.all())
    for x, y in zip(before[Site(layer)].double(), after[Site(layer)].double(), strict=True):
        if float(x @ u) >= 0:
            assert torch.equal(x, y)
        else:
            assert float(y.norm()) == pytest.approx(float(x.norm()), rel=1e-5)
            angle = float(predicted_angle(x, operation.weights.double()))
            assert float(angle_between(x[None], y[None])) == pytest.approx(min(angle, 2 * math.pi - angle), abs=1e-4)


def test_hpr_finds_a_planted_plane_and_its_angles() -> None:
    draw = torch.Generator().manual_seed(0)
    u = tiny.direction(1)
    noise = lambda: torch.randn(400, 32, generator=draw, dtype=torch.float64)  # noqa: E731
    plus, minus = noise() + 4 * u, noise() - 4 * u
    assert float(fit_probe(plus, minus) @ u) > 0.98
    angles = angle_between(minus, plus)
    weights = fit_angles(minus, angles, epochs=20)
    off = (predicted_angle(minus.float(), weights)[:, 0] - angles).abs().mean()
    assert float(off) < float((angles - math.pi / 2).abs().mean()) / 2  # where an untrained one starts
    assert torch.equal(weights, fit_angles(minus, angles, epochs=20))


def test_readers_find_a_planted_direction_where_pca_of_differences_cannot() -> None:
    draw = torch.Generator().manual_seed(0)
    u, noise = tiny.direction(1), tiny.direction(2)
    shared = torch.randn(300, 32, generator=draw, dtype=torch.float64)

    def side(sign: float) -> Tensor:
        return shared + sign * 2 * u + torch.randn(300, 1, generator=draw, dtype=torch.float64) * noise

    plus, minus = side(1), side(-1)
    readers: list[Estimator] = [mean_difference, pca, random_order()]
    for reader in readers:
        assert float(unit(reader(plus, minus)) @ u) > 0.97
        assert float(unit(reader(minus, plus)) @ u) < -0.97
    differences = plus - minus
    defective = torch.linalg.svd(differences - differences.mean(0)).Vh[0]
    assert abs(float(defective @ u)) < 0.3


def test_random(lm: LM, tmp_path: Path) -> None:
    plain = learn_random(lm, [1, 2], length=3.0, seed=4)
    assert [float(e.operation.direction.norm()) for e in plain.edits] == pytest.approx([3.0, 3.0])
    assert plain == learn_random(lm, [1, 2], length=3.0, seed=4) != learn_random(lm, [1, 2], length=3.0, seed=5)
    runs_as_written(lm, plain, tmp_path)
    real = learn_icv(lm, PAIRS)
    control = learn_random(lm, [1], like=real)
    (edit,), (old,) = control.edits, real.only([1]).edits
    assert (edit.site, edit.strength, edit.positions) == (old.site, old.strength, old.positions)
    assert abs(float(edit.operation.direction @ old.operation.direction)) < 0.9


def test_bad_input() -> None:
    lm = tiny.tiny("llama")
    with pytest.raises(TrimtabError, match="two texts"):
        learn_actadd(lm, positive="w7")
    with pytest.raises(TrimtabError, match="same tokens"):
        learn_actadd(lm, positive="w7", negative="w7")
    late = learn_actadd(lm, positive="w7 w8 w9 w10 w11 w12", negative="w3")
    with pytest.raises(TrimtabError, match="which has 4 tokens"):
        lm.generate(prompt(1, 4), late, max_new_tokens=1)
    with pytest.raises(TrimtabError, match="estimators: pca, random-order, cluster-mean"):
        learn_repe(lm, PAIRS, reader="pca-diff")
    with pytest.raises(TrimtabError, match="one of the two is missing"):
        learn_inferaligner(lm, ON)
    with pytest.raises(TrimtabError, match="prompts on which to act"):
        learn_cast(lm, PAIRS)
    with pytest.raises(TrimtabError, match="at least two"):
        learn_condition(lm, ON[:1], OFF)
    with pytest.raises(TrimtabError, match="two pairs or more"):
        learn_hpr(lm, PAIRS[:1])
    with pytest.raises(TrimtabError, match="known: predicted"):
        learn_hpr(lm, PAIRS, turn="left")  # type: ignore[arg-type]
    other = tiny.tiny("llama")
    other.tokenizer.add_tokens(["w999"])
    with pytest.raises(TrimtabError, match="differ in vocabulary"):
        learn_inferaligner(lm, ON, harmless=OFF, guide=other)
    with pytest.raises(TrimtabError, match="from answers or texts"):
        learn_icv(lm, [Pair("w3", "w4", "", "prompts")])


def test_a_reader_far_from_the_mean_warns() -> None:
    """Differences of random texts have no direction in common: of a dozen models some part from it."""
    lms = [tiny.tiny("llama", seed=seed) for seed in range(12)]
    with pytest.warns(ReaderWarning, match="use more pairs, or reader cluster-mean"):
        [learn_repe(lm, PAIRS, [1], reader="random-order") for lm in lms]


def test_cast_at_blocks_inputs_as_released(lm: LM) -> None:
    """Both vectors are those of the block's output; they are checked and added one block earlier."""
    options: dict[str, Any] = {"when": ON, "unless": OFF, "measure": "cast", "pool": "mean", "condition_layer": 1}
    usual, theirs = (learn_cast(lm, PAIRS, [3], **options, at=place) for place in ("output", "input"))
    assert theirs.card.options["at"] == "input"
    (edit,), (own,) = theirs.edits, usual.edits
    assert (edit.site, edit.strength) == (Site(3, "block_input"), own.strength)
    assert torch.equal(edit.operation.direction, own.operation.direction)
    thresholds = [g.gate if hasattr(g, "gate") else g for g in (edit.gate, own.gate)]
    assert [t.site for t in thresholds] == [Site(1, "block_input"), Site(1)]
    assert torch.equal(thresholds[0].direction, thresholds[1].direction)
    c = thresholds[0].direction.double()

    def similarity(text: str) -> float:  # `_process_single_condition` of the released LeashLayer, with |c| = 1
        x = at(lm, text, 1, "block_input").mean(0)
        projected = torch.tanh(torch.outer(c, c) @ x)
        return float(torch.dot(x, projected) / (x.norm() * projected.norm()))

    for text in (*ON[:3], *OFF[:3]):
        open_ = (similarity(text) > thresholds[0].threshold) != hasattr(edit.gate, "gate")
        (answer,) = lm.generate(text, theirs, max_new_tokens=NEW, logprobs=True)
        shifted = Steering((replace(edit, site=Site(2), gate=ALWAYS),))  # block 3's input is block 2's output
        tokens, logprobs = naive.generate(lm, text, shifted if open_ else None, NEW)
        assert list(answer.token_ids) == tokens
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)
    with pytest.raises(TrimtabError, match="output or input, got 'middle'"):
        learn_cast(lm, PAIRS, [3], **options, at="middle")  # type: ignore[arg-type]
