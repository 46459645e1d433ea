"""Which instructions are learned for IFEval's prompts, and what the steering for all of them is learned from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.following_distilled import PROMPTS, Instance, instance_of, kept_or_learned, prompts_of_all_types
from trimtab import Add, Edit, Site, Steering, TrimtabError
from trimtab.data.types import instruction_types
from trimtab.evaluate.ifeval import IFEvalItem, follows

torch = pytest.importorskip("torch")

STEERING = Steering((Edit(Site(1), Add(torch.ones(4))),))


def item(kind: str, **arguments: object) -> IFEvalItem:
    return IFEvalItem("1", "1", "prompt", (kind,), (arguments,), "prompt")


def test_prompts_with_the_same_instruction_share_a_steering() -> None:
    title = instance_of(item("detectable_format:title"))
    assert title == Instance("detectable_format:title", ())
    assert (title.name, title.file) == ("detectable_format:title", "detectable-format-title.safetensors")
    bullets = [instance_of(item("detectable_format:number_bullet_lists", num_bullets=n)) for n in (3, 3, 4)]
    assert bullets[0] == bullets[1] != bullets[2]
    assert len({bullet.file for bullet in bullets}) == 2


def test_more_highlights_than_asked_for_serve() -> None:
    kind = "detectable_format:number_highlighted_sections"
    values = [dict(instance_of(item(kind, num_highlights=n)).values)["n"] for n in (1, 3, 4, 5, 15)]
    assert values == [3, 3, 5, 5, 5]


def test_a_language_goes_by_its_name() -> None:
    (value,) = instance_of(item("language:response_language", language="sw")).values
    assert value == ("language", "Swahili")


def test_the_steering_for_all_is_learned_from_prompts_of_all_types() -> None:
    prompts = prompts_of_all_types(PROMPTS)
    assert len(prompts) == PROMPTS
    counts = Counter(kind for kind, _ in prompts.values())
    assert set(counts) == set(instruction_types()) - {"combination:repeat_prompt"}
    assert max(counts.values()) - min(counts.values()) <= 1
    for query, (kind, arguments) in prompts.items():
        assert isinstance(follows(kind, arguments, query, loose=True), bool)  # its arguments are those of the check


def test_what_was_learned_is_not_learned_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def learn() -> Steering:
        calls.append("")
        return STEERING

    path = tmp_path / "title.safetensors"
    first, second = kept_or_learned(path, learn), kept_or_learned(path, learn)
    assert first is not None
    assert second is not None
    assert (len(calls), first.edits[0].site) == (1, Site(1))
    assert torch.equal(first.edits[0].operation.direction, second.edits[0].operation.direction)


def test_what_could_not_be_learned_is_not_tried_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def nothing() -> None:
        calls.append("")

    def stopped() -> None:
        raise TrimtabError("stopped")

    path = tmp_path / "capital.safetensors"
    with pytest.raises(TrimtabError):
        kept_or_learned(path, stopped)
    assert kept_or_learned(path, nothing) is None
    assert kept_or_learned(path, nothing) is None
    assert len(calls) == 1
