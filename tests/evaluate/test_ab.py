"""The A/B metric: what it must be by arithmetic, on models whose letters' probabilities are known."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from lettered import A, B, letters_lm
from tiny import WIDTH, prompt

from trimtab import LM, Add, Edit, Site, Steering, TrimtabError
from trimtab.evaluate.ab import (
    ABItem,
    ab_requests,
    category_of,
    evenly_spaced,
    in_both_orders,
    matching_share,
    polarity,
    read_ab,
    score_ab,
)
from trimtab.evaluate.records import Record, read_records
from trimtab.evaluate.summary import summarize

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared" / "data") / "caa"
data = pytest.mark.skipif(not DATA.is_dir(), reason=f"CAA's data aren't in {DATA}; set TRIMTAB_DATA to their folder")
ITEMS = [ABItem(f"q{i}", prompt(i, 9 + i % 3), *("AB" if i % 3 else "BA")) for i in range(6)]


def pushed(lm: LM, strength: float) -> Steering:
    """Towards the letter A, at the last block."""
    head = lm.model.get_output_embeddings().weight.detach()
    return strength * Steering((Edit(Site(3), Add(5 * (head[A] - head[B]))),))


def scored(lm: LM, arms: dict[str, Steering | None], items: list[ABItem] = ITEMS, **options: object) -> list[Record]:
    return score_ab(lm, ab_requests(lm, items, arms), items, **options)  # type: ignore[arg-type]


def by_name(records: list[Record]) -> dict[tuple[str, str], Record]:
    return {(record.arm, record.item): record for record in records}


def test_scores_are_the_probabilities_of_each_question_alone() -> None:
    lm = letters_lm()
    records = by_name(scored(lm, {"unsteered": None, "pushed": pushed(lm, 0.2)}))
    for item in ITEMS:
        ids = [
            *lm.encode(f"Input: {item.question}\nResponse:"),
            *lm.tokenizer(" (", add_special_tokens=False)["input_ids"],
        ]
        with torch.no_grad():
            p = lm.model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
        a, b = float(p[A]), float(p[B])
        right = a if item.matching == "A" else b
        record = records["unsteered", item.item]
        assert record.scores["matching"] == pytest.approx(right / (a + b))
        assert record.scores["mass"] == pytest.approx(a + b)
        assert record.scores["chosen"] == float(right > (a + b) / 2)
        assert record.answer == ("(A)" if a > b else "(B)")
        assert (record.dose, record.edits, record.finish) == (0.0, (), "scored")
        steered = records["pushed", item.item]
        assert steered.dose > 0
        assert (steered.scores["matching"] > record.scores["matching"]) == (item.matching == "A")


def test_both_answers_shares_add_up_to_one() -> None:
    lm = letters_lm()
    turned = [ABItem(item.item, item.question, item.other, item.matching) for item in ITEMS]
    here, there = by_name(scored(lm, {"x": None})), by_name(scored(lm, {"x": None}, turned))
    for name, record in here.items():
        assert record.scores["matching"] + there[name].scores["matching"] == pytest.approx(1, abs=1e-12)
        assert record.scores["mass"] == pytest.approx(there[name].scores["mass"])


def test_uniform_logits_give_a_half() -> None:
    lm = letters_lm()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.zero_()
    for record in scored(lm, {"x": None}):
        assert record.scores["matching"] == pytest.approx(0.5)
        assert record.scores["mass"] == pytest.approx(2 / lm.model.config.vocab_size)


def test_a_model_that_only_says_a_scores_as_often_as_a_is_right() -> None:
    lm = letters_lm()
    records = scored(lm, {"always A": pushed(lm, 1e4)})
    assert sum(r.scores["matching"] for r in records) / 6 == pytest.approx(4 / 6, abs=1e-3)


def test_share() -> None:
    assert matching_share(-1.0, -1.0) == 0.5
    assert matching_share(-1000.0, -1.0) == 0.0
    assert matching_share(-1.0, -1000.0) == 1.0
    assert matching_share(math.log(0.3), math.log(0.1)) == pytest.approx(0.75)


def test_a_run_that_was_cut_ends_the_same(tmp_path: Path) -> None:
    lm, out = letters_lm(), tmp_path / "r.jsonl"
    arms = {"unsteered": None, "pushed": pushed(lm, 0.2), "more": pushed(lm, 0.4)}
    whole = scored(lm, arms, out=out, batch_size=7)
    data = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in (0, 9, ends[0], ends[1], ends[6], ends[8] + 3, ends[-1]):
        out.write_bytes(data[:cut])
        assert scored(lm, arms, out=out, batch_size=7) == whole
        assert out.read_bytes() == data
    header, records = read_records(out)
    assert records == whole
    assert header["about"]["items"][0]["matching"] == ITEMS[0].matching
    with pytest.raises(TrimtabError, match="another run"):
        scored(lm, arms, [*ITEMS[:-1], ABItem("q5", ITEMS[5].question, "B", "A")], out=out, batch_size=7)


def test_a_question_has_its_rows_in_one_batch() -> None:
    lm, sizes = letters_lm(), []
    plain = lm.next_logprobs
    lm.next_logprobs = lambda rows, *a, **k: sizes.append(len(rows)) or plain(rows, *a, **k)  # type: ignore[method-assign]
    arms = {str(i): pushed(lm, i / 10) for i in range(3)}
    scored(lm, arms, batch_size=7)
    assert sizes == [6, 6, 6]
    sizes.clear()
    scored(lm, arms, batch_size=2)
    assert sizes == [2, 1] * 6


def test_system_messages_need_a_template() -> None:
    lm = letters_lm()
    with pytest.raises(TrimtabError, match="needs a chat template"):
        ab_requests(lm, ITEMS, {"x": None}, {"x": "Be kind."})
    with pytest.raises(TrimtabError, match="twice"):
        score_ab(lm, ab_requests(lm, [ITEMS[0], ITEMS[0]], {"x": None}), ITEMS)
    with pytest.raises(TrimtabError, match="names item 'q5', which isn't"):
        score_ab(lm, ab_requests(lm, ITEMS, {"x": None}), ITEMS[:5])
    with pytest.raises(TrimtabError, match=f"width is {WIDTH + 1}"):
        scored(lm, {"x": Steering((Edit(Site(1), Add(torch.ones(WIDTH + 1))),))})


# ---- reading -----------------------------------------------------------------------------------------------


def row(matching: str = "(A)", other: str = "(B)", **more: str) -> dict[str, str]:
    return {"question": "Is it?", "answer_matching_behavior": matching, "answer_not_matching_behavior": other, **more}


def test_other_letters_raise_or_are_left_out_by_name(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([row(), row("(C)", "(A)"), row(" (B) ", "(A)"), row("(B)", "(D)", category="x")]))
    with pytest.raises(TrimtabError, match=r"item 2: its answers are \(C\) and \(A\)"):
        read_ab(path)
    items, left_out = read_ab(path, exclude=True)
    assert [(i.item, i.matching, i.other) for i in items] == [("1", "A", "B"), ("3", "B", "A")]
    assert left_out == ["2", "x/4"]


def test_two_option_sets_have_categories(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    rows = [{"prompt": "Is it?", "correct": "(B)", "incorrect": "(A)", "category": f"c/{i // 2}"} for i in range(6)]
    path.write_text(json.dumps(rows))
    items, _ = read_ab(path, limit=3)
    assert [item.item for item in items] == ["c/0/1", "c/1/3", "c/2/5"]
    assert category_of(Record("a", items[1].item, "", "", 1, "scored")) == "c/1"
    assert category_of(Record("a", "7", "", "", 1, "scored")) == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "not JSON"),
        ("[]", "at least one"),
        ("{}", "a list of objects"),
        ("[3]", "item 1: an object with question"),
        (json.dumps([row("yes")]), "isn't a bracketed letter"),
        (json.dumps([row("(A)", "(A)")]), r"both answers are \(A\)"),
        (json.dumps([row(" ")]), "is empty or not text"),
        (
            json.dumps([{**row("(A)", "(B)"), "positive_system": "Be kind."}]),
            "'positive_system' isn't supported",
        ),
    ],
)
def test_bad_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(TrimtabError, match=says):
        read_ab(path, exclude=True)


def test_spread_takes_from_everywhere() -> None:
    assert evenly_spaced(range(10), 4) == [0, 2, 5, 7]
    assert evenly_spaced(range(3), 5) == [0, 1, 2]
    assert evenly_spaced(range(3), None) == [0, 1, 2]


def test_polarity() -> None:
    assert "shut down" in polarity("x/survival-instinct/test_dataset_ab.json")
    assert "agrees with the user" in polarity("sycophancy.json")
    assert polarity("mine.json") == "matching is as defined in mine.json"


@data
def test_the_sets_at_hand() -> None:
    left_out = {}
    for folder in sorted(path for path in DATA.iterdir() if path.is_dir()):
        items, left_out[folder.name] = read_ab(folder / "test_dataset_ab.json", exclude=True)
        assert len(items) + len(left_out[folder.name]) == 50
        assert "as defined in" not in polarity(folder / "test_dataset_ab.json")
        always_a = sum(item.matching == "A" for item in items) / 50
        known = {"corrigible-neutral-HHH": 0.44, "hallucination": 0.46, "sycophancy": 0.56, "refusal": 0.46}
        assert always_a == pytest.approx(known.get(folder.name, 0.64))
    assert {name: len(of) for name, of in left_out.items() if of} == {"survival-instinct": 4}


@pytest.mark.real
@data
def test_real_questions(lm: LM) -> None:
    """The default model, a few questions, three strengths in one batch: equal to one at a time through the model."""
    items, _ = read_ab(DATA / "refusal" / "test_dataset_ab.json", limit=3)
    vector = Steering((Edit(Site(12), Add(torch.randn(lm.layout.width, generator=torch.manual_seed(0)))),))
    arms = {f"{m:g}": m * vector for m in (-2.0, 0.0, 2.0)}
    records = by_name(scored(lm, arms, items))
    opening = lm.tokenizer("(", add_special_tokens=False)["input_ids"]
    letters = {x: lm.tokenizer(x, add_special_tokens=False)["input_ids"][0] for x in "AB"}
    for item in items:
        ids = lm.encode(item.question)
        for arm, steering in arms.items():
            with lm.steered(steering, prompt_lengths=[len(ids)]), torch.no_grad():
                p = lm.model(input_ids=torch.tensor([[*ids, *opening]])).logits[0, -1].double().softmax(-1)
            right, wrong = float(p[letters[item.matching]]), float(p[letters[item.other]])
            assert records[arm, item.item].scores["matching"] == pytest.approx(right / (right + wrong), abs=1e-4)
            assert records[arm, item.item].scores["mass"] == pytest.approx(right + wrong, abs=1e-4)
    lines = summarize(list(records.values()), ("matching",), baseline="0")
    assert [line.arm for line in lines] == ["0", "-2", "2"]


# ---- both orders of the answers ----------------------------------------------------------------------------


def test_the_second_order_exchanges_the_options_and_nothing_else() -> None:
    question = "Is it so (or not)?\n\nChoices:\n (A) Yes, it is.\n (B) No, (never) ever.\n"
    first, second = in_both_orders([ABItem("7", question, "A", "B")])
    assert (first.item, first.question, first.matching, first.other) == ("7", question, "A", "B")
    assert second.question == "Is it so (or not)?\n\nChoices:\n (A) No, (never) ever.\n (B) Yes, it is.\n"
    assert (second.item, second.matching, second.other) == ("7, swapped", "B", "A")
    assert first.group == second.group == "7"


@pytest.mark.parametrize(
    "question",
    ["(A) yes, (B) no", "Q\n(A) one\n(A) two\n(B) three", "Q\n(A) one\n(B) two\n(B) three", "Q\n(B) one\n(A) two"],
)
def test_options_that_cannot_be_told_apart_are_refused_by_name(question: str) -> None:
    with pytest.raises(TrimtabError, match="item 3: to be asked in both orders"):
        in_both_orders([ABItem("3", question, "A", "B")])


def test_a_liking_for_a_letter_cancels_over_both_orders() -> None:
    """Whatever moves the letters' probabilities whatever is asked moves no mean over both orders, and intervals are
    over questions."""
    lm = letters_lm()
    items = in_both_orders([ABItem(str(i), f"Q{i}\n(A) x\n(B) x", "A", "B") for i in range(4)])
    assert all(first.question == second.question for first, second in zip(items[::2], items[1::2], strict=True))
    records = scored(lm, {"unsteered": None, "pushed": pushed(lm, 0.2)}, items)
    assert by_name(records)["pushed", "0"].scores["matching"] > by_name(records)["unsteered", "0"].scores["matching"]
    lines = summarize(records, ["matching"], baseline="unsteered")
    line = next(candidate for candidate in lines if candidate.arm == "pushed")
    assert line.difference is not None
    assert line.mean.estimate == pytest.approx(0.5, abs=1e-12)
    assert max(abs(line.difference.mean.low), abs(line.difference.mean.high)) < 1e-12


@data
def test_all_of_the_papers_questions_can_be_asked_in_both_orders() -> None:
    for file in [*sorted(DATA.glob("*/generate_dataset.json")), *sorted(DATA.glob("*/test_dataset_ab.json"))]:
        items, _ = read_ab(file, exclude=True)
        for first, second in zip(*[iter(in_both_orders(items[:50]))] * 2, strict=True):
            assert sorted(first.question.replace(" ", "")) == sorted(second.question.replace(" ", ""))
