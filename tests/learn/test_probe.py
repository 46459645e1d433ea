"""Probes for monitors: they find a planted direction, and their line keeps to the share of false alarms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import prompt

from trimtab import LM, Monitor, Pair, TrimtabError, learn_probe, load, save
from trimtab.engines.request import Text
from trimtab.text.pairs import read_pairs


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny.tiny("llama")


def pairs(count: int) -> list[Pair]:
    """The positive sides have more of some words in them than the negative ones."""
    made = []
    for n in range(count):
        numbers = [int(word[1:]) for word in prompt(n, 12).split()]
        sides = [" ".join(f"w{3 + i % 36 + at * 36}" for i in numbers) for at in (0, 1)]
        made.append(Pair(positive=sides[0], negative=sides[1]))
    return made


class TestProbe:
    def test_it_finds_what_differs(self, lm: LM) -> None:
        probe = learn_probe(lm, pairs(48), [0, 1])
        measured = probe.card.measured
        assert measured["area"] > 0.9
        assert measured["hits"] > 0.5
        assert measured["false_alarms"] <= 0.1
        monitor = Monitor.of("m", probe)
        assert monitor.is_probability
        assert monitor.threshold == pytest.approx(measured["threshold"], abs=1e-6)

    def test_the_figures_are_those_of_the_answers_held_out(self, lm: LM) -> None:
        examples = pairs(32)
        probe = learn_probe(lm, examples, [1], false_alarms=0.25)
        monitor, measured = Monitor.of("m", probe), probe.card.measured
        held = list(range(1, 32, 2))[1::2]
        assert measured["held_out"] == len(held) == 8
        beyond = {}
        for side in ("positive", "negative"):
            count = 0
            for i in held:
                ids = lm.encode(getattr(examples[i], side), chat=False)
                (batch,) = lm.read([[Text(ids, range(len(ids)))]], [monitor.site])
                count += any(monitor.fires(float(v)) for v in monitor.values(batch.values[monitor.site][0][0]))
            beyond[side] = count / len(held)
        assert (measured["hits"], measured["false_alarms"]) == (beyond["positive"], beyond["negative"])
        assert beyond["negative"] <= 0.25

    def test_the_same_data_give_the_same_file(self, lm: LM, tmp_path: Path) -> None:
        digests = [save(learn_probe(lm, pairs(16), [1]), tmp_path / "p.safetensors") for _ in range(2)]
        assert digests[0] == digests[1]
        again = Monitor.of("m", load(tmp_path / "p.safetensors"))
        assert again.condition.measure == "probability"

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"pairs": pairs(7)}, "8 pairs"), ({"false_alarms": 2}, "share from 0 to 1"), ({"layers": [9]}, "layer")],
    )
    def test_refusals(self, lm: LM, options: dict[str, Any], message: str) -> None:
        with pytest.raises(TrimtabError, match=message):
            learn_probe(lm, options.pop("pairs", pairs(12)), options.pop("layers", [1]), **options)


def test_the_command(trimtab: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from commands.conftest import save_model

    folder = save_model(tmp_path_factory.mktemp("probed") / "tiny")
    rows = tmp_path / "pairs.csv"
    lines = [f"the sea is {a},the sea is {b}" for a, b in zip(range(10, 22), range(30, 42), strict=True)]
    rows.write_text("\n".join(["positive,negative", *lines]))
    assert len(read_pairs(rows)) == 12
    out = tmp_path / "probe.safetensors"
    ran = trimtab("learn", "probe", "--pairs", rows, "--out", out, "--model", folder, "--layers", "1,2", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["method"] == "probe"
    assert 0 <= ran.json["measured"]["area"] <= 1
    assert Monitor.of("m", load(out)).threshold is not None
    ran = trimtab("learn", "probe", "--pairs", rows, "--out", out, "--model", folder)
    assert "area under the curve" in ran.out
    assert "--monitor probe=" in ran.err
    assert "held-out" in trimtab("learn", "probe", "--help").out
