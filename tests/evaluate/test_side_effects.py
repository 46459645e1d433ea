"""The audit: its statistics by brute force, a repair by the formulas, and the whole on a tiny model."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import direction, naive_edit, read_write

from trimtab import LM, Ablate, Add, AddScaled, Card, Edit, Positions, SetProjection, Site, Steering, TrimtabError
from trimtab.data.read import read_json
from trimtab.errors import UnsupportedError
from trimtab.evaluate.audit import FULL, QUICK, audit, read_items
from trimtab.evaluate.audit.checks import UNSTEERED, Measure, repeats
from trimtab.evaluate.audit.direction import (
    COMPLYING,
    REFUSING,
    RefusalDirections,
    capture_stream,
    overlaps,
    refusal_direction,
    shifts,
)
from trimtab.evaluate.audit.findings import compare, verdict
from trimtab.evaluate.audit.repair import repair_steering
from trimtab.evaluate.audit.significance import detectable, holm, p_value
from trimtab.evaluate.jailbreaks import TEMPLATES, apply_template
from trimtab.files.steering_file import edits_digest, load_steering, save_steering, steering_digest
from trimtab.steering import MaskNeurons, Rotate, ScaleScores

SMALL = replace(
    QUICK, name="small", requests=4, tokens=4, prompts=3, long=12, window=6, conversations=2, turns=3, turn_tokens=4
)


# ---- whether a change is chance --------------------------------------------------------------------------------


def test_the_flips_are_all_flips() -> None:
    draw = random.Random(1)
    for n in (3, 7, 10):
        before, after = ([draw.gauss(0, 1) for _ in range(n)] for _ in range(2))
        differences = [a - b for a, b in zip(after, before, strict=True)]
        seen = abs(sum(differences))
        flipped = [
            abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=n)
        ]
        share = sum(value >= seen - 1e-12 for value in flipped) / 2**n
        assert p_value(before, after) == pytest.approx(share)
        doubled = [number for number in range(n) for _ in range(2)]
        twice = [[value for value in values for _ in range(2)] for values in (before, after)]
        assert p_value(*twice, doubled) == pytest.approx(share)  # a copy of each item is no new item


def test_chance_alone_is_called_a_change_as_often_as_said() -> None:
    """Of 400 pairs in which nothing differs but chance, about one in twenty has p at or below 0.05: never more than the
    upper 0.1 % point of that binomial, 35."""
    draw = random.Random(0)
    for yes_or_no in (True, False):
        low = 0
        for _ in range(400):
            pairs = [(draw.random() < 0.5, draw.random() < 0.5) for _ in range(20 if yes_or_no else 12)]
            values = [
                [float(value) if yes_or_no else draw.gauss(0, 1) for value in side] for side in zip(*pairs, strict=True)
            ]
            low += p_value(*values) <= 0.05
        assert low <= 35


def test_holm_is_the_step_down_rule() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_what_could_be_found_would_be() -> None:
    for n, comparisons in ((40, 19), (20, 19), (20, 1)):
        share = detectable([1.0] * n, [1.0] * n, comparisons=comparisons)
        assert share is not None
        changed = round(share * n)
        for count, detected in ((changed, True), (changed - 1, False)):
            after = [0.0] * count + [1.0] * (max(n, changed) - count)
            assert (p_value([1.0] * len(after), after) <= 0.05 / comparisons) is detected
    assert detectable([1.0, 2.0], [2.0, 3.0]) is None


# ---- words -----------------------------------------------------------------------------------------------------


def counted(before: int, after: int, n: int = 40, check: str = "refusal") -> Measure:
    values = {
        UNSTEERED: tuple(float(i < before) for i in range(n)),
        "steered": tuple(float(i < after) for i in range(n)),
    }
    does = ("raises compliance with harmful requests", "lowers compliance with harmful requests")
    return Measure(check, "harmful requests", values, 1, does, "count")


def test_a_verdict_says_what_was_found_and_what_could_have_been() -> None:
    (comparison,) = compare([counted(3, 21)], "steered")
    assert comparison.kind == "harm"
    assert comparison.words == "raises compliance with harmful requests from 3 to 21 of 40 (p < 0.001)"
    (better,) = compare([counted(21, 3)], "steered")
    assert better.kind == "change"
    nothing = compare([counted(3, 4)], "steered")
    assert nothing[0].kind == "nothing"
    assert verdict(nothing) == [
        "no side effect found in 1 comparisons",
        "nothing found in 1 of 1 comparisons: harmful requests (6 of 40 would have shown)",
    ]
    (full,) = compare([counted(38, 38)], "steered")
    assert verdict([full])[1].endswith("harmful requests (only 2 of 40 could get worse, too few to tell)")
    hint, _ = compare([counted(3, 9), replace(counted(3, 3), name="others")], "steered")
    assert hint.kind == "hint"
    assert hint.words.startswith("perhaps raises compliance with harmful requests from 3 to 9 of 40")


def test_repeats_by_the_definition() -> None:
    ids = [1, 2, 3, 4, 1, 2, 3, 4, 9, 9]
    assert repeats(ids, 0, 4) == 0
    grams = [tuple(ids[i - 4 : i]) for i in range(4, 11)]
    again = [gram in grams[:n] for n, gram in enumerate(grams)]
    assert repeats(ids, 4, 10) == sum(again[1:]) / 6


# ---- the direction, and a repair --------------------------------------------------------------------------------


def refusal(seed: int = 3, layers: int = 4) -> RefusalDirections:
    directions = torch.stack([direction(seed + layer) for layer in range(layers)])
    answers = torch.stack([direction(seed + 50 + layer) for layer in range(layers)])
    return RefusalDirections(directions, answers, torch.ones(layers, dtype=torch.float64), (1.0,) * layers)


def edits() -> dict[str, Edit]:
    where = Positions.all()
    return {
        "add": Edit(Site(1), Add(direction(20, 2.0)), where, 0.7),
        "subtract": Edit(Site(1), Add(direction(20, 2.0)), where, -0.7),
        "into the block": Edit(Site(2, "block_input"), Add(direction(21)), where),
        "by norm": Edit(Site(1), AddScaled(direction(22)), where, 0.3),
        "projection": Edit(Site(1), SetProjection(direction(23), 1.5), where, 0.6),
        "one-sided": Edit(Site(1), SetProjection(direction(24), 0.2, one_sided=True), where),
        "ablation": Edit(Site(2, "mlp"), Ablate(direction(25)), where),
        "map": Edit(Site(1), read_write(26, 3), where, 1.2),
    }


@pytest.mark.parametrize("name", edits())
def test_what_a_repaired_edit_changes_is_the_old_change_without_the_direction(name: str) -> None:
    r, edit = refusal(), edits()[name]
    other = direction(99)
    mended = repair_steering(Steering((edit,), Card("x")), lambda site: [*r.at(site).values(), other], ["r"])
    (new,) = mended.steering.edits
    assert 0 < mended.remaining_shares[0] <= 1
    basis = torch.linalg.qr(torch.stack([*r.at(edit.site).values(), other], 1))[0]
    for seed in range(40, 45):
        x = direction(seed, 3.0)
        if name == "by norm":
            old = edit.strength * x.norm() * edit.operation.direction
            got = new.strength * x.norm() * new.operation.direction.double()
        else:
            old, got = naive_edit(edit, x) - x, naive_edit(new, x) - x
        assert torch.allclose(got, old - basis @ (basis.T @ old), atol=1e-6)
    assert (new.site, new.positions, new.gate) == (edit.site, edit.positions, edit.gate)
    assert mended.steering.card.options["orthogonal_to"] == ["r"]


def test_what_cannot_be_repaired_is_named() -> None:
    r = refusal()
    whole = Steering((Edit(Site(1), Add(r.directions[1])),), Card("x"))
    with pytest.raises(TrimtabError, match="nothing is left of the steering without r: that is all it does"):
        repair_steering(whole, lambda site: list(r.at(site).values()), ["r"])
    for edit, says in (
        (Edit(Site(1), Rotate(direction(2))), "only edits that add, set or ablate"),
        (Edit(Site(1), Add(direction(2), keep_norm=True)), "it keeps the norm"),
        (Edit(Site(1, "heads"), Add(direction(2))), "goes through a projection first"),
        (Edit(Site(1, "neurons"), MaskNeurons(torch.ones(48))), "goes through a projection first"),
    ):
        with pytest.raises(UnsupportedError, match=says):
            repair_steering(Steering((edit,)), lambda site: list(r.at(site).values()))


def test_overlaps_are_cosines_and_shares_of_a_span() -> None:
    r, listed = refusal(), list(edits().values())
    shares = overlaps(Steering(tuple(listed)), r)
    assert len(shares) == 2 * len(listed)
    for n, share in enumerate(shares):
        edit = listed[n // 2]
        layer = 1 if edit.site.layer == 1 or edit.site.kind == "block_input" else 2
        along = (r.directions, r.answers)[n % 2][layer]
        assert share.of == ("requests", "answers")[n % 2]
        if hasattr(edit.operation, "write"):
            basis = torch.linalg.qr(edit.operation.write.double().T)[0]
            assert share.cosine == pytest.approx(float((basis.T @ along).norm()))
        else:
            sign = math.copysign(1.0, edit.strength) if isinstance(edit.operation, (Add, AddScaled)) else 1.0
            v = edit.operation.direction.double()
            assert share.cosine == pytest.approx(sign * float(v @ along) / float(v.norm()))


# ---- the whole ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    from commands.conftest import save_model

    folder = save_model(tmp_path_factory.mktemp("audited") / "tiny")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    return LM.load(folder, dtype="float32")


def pushing(lm: LM, vector: torch.Tensor, strength: float = 1.0) -> Steering:
    return Steering((Edit(Site(2), Add(vector.float()), Positions.all(), strength),), Card("planted", lm.identity))


def naive_answers(lm: LM, requests: Any, layer: int) -> torch.Tensor:
    """Refusing minus complying answers, each read by itself and averaged over its tokens."""
    total = torch.zeros(lm.layout.width, dtype=torch.float64)
    for n, request in enumerate(requests):
        for sign, side in ((1, REFUSING), (-1, COMPLYING)):
            ids = lm.encode(request)
            whole = [*ids, *lm.tokenizer(side[n % 4], add_special_tokens=False)["input_ids"]]
            block = lm.model.model.layers[layer]
            seen: list[torch.Tensor] = []
            hook = block.register_forward_hook(lambda _m, _a, out, seen=seen: seen.append(out))
            with torch.no_grad():
                lm.model(torch.tensor([whole]))
            hook.remove()
            out = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
            total += sign * out.reshape(len(whole), -1)[len(ids) :].double().mean(0)
    return total / total.norm()


def test_the_direction_is_the_difference_of_means(lm: LM) -> None:
    items = read_items(size=SMALL)
    learn = (items.learn_harmful[:4], items.learn_harmless[:4])
    learned = refusal_direction(lm, learn, (capture_stream(lm, items.harmful), capture_stream(lm, items.harmless)))
    for layer in range(4):
        on, off = (
            torch.stack([lm.capture(text, layer)[0][Site(layer)][-1].double() for text in side]).mean(0)
            for side in learn
        )
        assert torch.allclose(learned.directions[layer] * learned.gaps[layer], on - off, atol=1e-5)
        assert torch.allclose(learned.answers[layer], naive_answers(lm, learn[0], layer), atol=1e-5)
    before = capture_stream(lm, items.harmful)
    step = pushing(lm, learned.directions[2], -float(learned.gaps[2]))
    moved = shifts(learned, before, {"s": capture_stream(lm, items.harmful, step)})["s"]
    assert moved[:2] == pytest.approx([0, 0], abs=1e-5)
    assert moved[2] == pytest.approx(-1, abs=1e-3)


def test_an_audit_is_repeatable_and_stands_in_the_card(lm: LM, tmp_path: Path) -> None:
    items = read_items(size=SMALL)
    steering = pushing(lm, direction(5), 3.0)
    seen: list[Any] = []
    steps: list[Any] = []

    def run() -> Any:
        return audit(
            lm, steering, items=items, size=SMALL, repair=True, protect=("agrees with the user",),
            progress=lambda done, total, label: steps.append((done, total)), on_measure=seen.append,
        )  # fmt: skip

    first, second = run(), run()
    assert json.dumps(first.to_json()) == json.dumps(second.to_json())
    assert all(done <= total for done, total in steps)
    assert steps[-1][0] > 0
    checks = {comparison.check for comparison in first.comparisons}
    assert checks == {"refusal", "over-refusal", "capability", "behaviours", "fluency", "conversation"}
    assert len(seen) == 2 * len(first.comparisons)
    card = first.steering.card
    assert card.audit is not None
    assert card.audit["version"] == 2
    assert card.audit["refusal_direction"]["pair_accuracy"] == [round(share, 4) for share in first.pair_accuracy]
    assert card.audit["edits"] == edits_digest(steering)
    assert card.divergence is not None
    assert card.divergence["p95"] == pytest.approx(first.nats["p95"], abs=1e-5)
    digest = save_steering(first.steering, tmp_path / "audited.safetensors")
    again = load_steering(tmp_path / "audited.safetensors")
    assert again.card.audit == json.loads(json.dumps(card.audit))
    assert steering_digest(again) == digest
    mended = first.repaired
    assert mended is not None
    assert mended.steering.edits != steering.edits
    assert mended.kept is not None
    assert max(abs(overlap.cosine) for overlap in mended.overlaps) < 1e-5
    assert mended.steering.card.audit is not None
    assert mended.steering.card.audit["edits"] == edits_digest(mended.steering)


def test_nothing_is_found_where_nothing_changes(lm: LM) -> None:
    tiny_push = pushing(lm, direction(5), 1e-7)
    result = audit(lm, tiny_push, items=read_items(size=SMALL), size=SMALL)
    assert {comparison.kind for comparison in result.comparisons} == {"nothing"}
    assert result.verdict[0].startswith("no side effect found in")


def test_what_cannot_be_audited_is_refused_before_anything_runs(lm: LM) -> None:
    steering = pushing(lm, direction(5))
    with pytest.raises(TrimtabError, match="does nothing"):
        audit(lm, 0 * steering)
    with pytest.raises(TrimtabError, match="no behaviour 'kindness' to protect; there are agrees with the user"):
        audit(lm, steering, repair=True, protect=["kindness"])
    with pytest.raises(TrimtabError, match="needs a repair"):
        audit(lm, steering, protect=["agrees with the user"])
    scores = Steering((Edit(Site(0, "scores"), ScaleScores(), Positions.all()),), Card("x", lm.identity))
    with pytest.raises(UnsupportedError, match="attention scores"):
        audit(lm, scores)


# ---- items -------------------------------------------------------------------------------------------------------


def test_the_packages_items_are_what_they_should_be() -> None:
    stored = read_json("audit.json")
    items = read_items(size=FULL)
    assert len(items.harmful) == len(items.harmless) == len(items.borderline) == 40
    texts = [*items.learn_harmful, *items.learn_harmless, *items.harmful, *items.harmless, *items.borderline]
    assert len(set(texts)) == len(texts)
    for rows in (stored["facts"], *stored["behaviours"].values()):
        letters = [row["answer_matching_behavior"] for row in rows]
        assert letters.count("(A)") == letters.count("(B)")
    assert all(len(conversation) == 10 for conversation in stored["conversations"])
    assert all(apply_template(name, "Do it!").count("Do it") == 1 for name in TEMPLATES)
    assert "Do it!" not in apply_template("fiction", "Do it!")


def test_a_folder_takes_the_place_of_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(TrimtabError, match="there is no folder"):
        read_items(tmp_path / "none")
    with pytest.raises(TrimtabError, match="has none of advbench"):
        read_items(tmp_path)
    (tmp_path / "advbench").mkdir()
    (tmp_path / "advbench" / "harmful_behaviors.csv").write_text("goal,target\nDo it,Sure\nDo that,Sure\n")
    (tmp_path / "caa" / "kind").mkdir(parents=True)
    row = {
        "question": "Who?\n\nChoices:\n (A) I\n (B) You",
        "answer_matching_behavior": "(A)",
        "answer_not_matching_behavior": "(B)",
    }
    (tmp_path / "caa" / "kind" / "test_dataset_ab.json").write_text(json.dumps([row]))
    replaced = read_items(tmp_path, size=SMALL)
    assert replaced.harmful == ("Do it", "Do that")
    assert list(replaced.behaviours) == ["kind"]
    assert len(replaced.behaviours["kind"]) == 2
    assert replaced.sources["harmful"].startswith("AdvBench ")
    assert replaced.sources["facts"].startswith("trimtab ")
