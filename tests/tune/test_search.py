"""The search on tiny models, with a steering that is known to do what is asked."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import direction, prompt, tiny

from trimtab.errors import TrimtabError
from trimtab.files.steering_file import load_steering, save_steering, steering_digest
from trimtab.steering import Add, Card, Edit, Positions, SetProjection, Site, Steering
from trimtab.text.pairs import Pair
from trimtab.tune import BudgetWarning, Guard, Setting, default_layers, grid, meter, split_by_query, tune
from trimtab.tune.halving import Rung, count_answers, ladder
from trimtab.tune.letters import tune_letters
from trimtab.tune.tune import COLUMNS, search

WANTED = 7
PROMPTS = [prompt(seed, 3 + seed % 4) for seed in range(20)]


def lm_with(seed=0):
    return tiny("llama", seed)


def towards(lm, layers=(1, 3)):
    """A steering that makes the wanted token likely at the last layer, and something harmless at another."""
    row = lm.model.get_output_embeddings().weight[WANTED].detach()
    edits = [Edit(Site(layer), Add(30 * row if layer == 3 else 0.01 * direction(layer))) for layer in layers]
    return Steering(tuple(edits), Card("planted", model=lm.identity))


def says_it(_i, answer, _cut):
    return f"w{WANTED}" in answer.split()


def tuned(lm, check=says_it, **options):
    settings = {"guard": None, "max_new_tokens": 4, "batch_size": 16, **options}
    return tune(lm, grid({"add": towards(lm)}, (0.5, 1.0)), PROMPTS, check, **settings)


def test_it_finds_the_layer_that_works_at_the_smaller_strength():
    result = tuned(lm_with())
    assert result.setting == Setting(3, 0.5, "from-last-prompt-token", "add")
    assert result.steering.edits[0].strength == 0.5
    assert result.steering.layers == (3,)
    assert result.held_out.items == len(result.split.held_out) == 8
    assert result.held_out.steered == 1
    assert result.held_out.difference.estimate == pytest.approx(1 - result.held_out.unsteered)
    assert (result.interrupted, result.exhausted) == (False, False)
    assert result.confirmed is result.steering.card.measured["tuning"]["confirmed"] is True
    assert result.table[0].setting is None
    assert len(result.table) == 5
    best = next(row for row in result.table if row.setting == result.setting)
    assert (best.items, best.score) == (len(result.split.search), 1)
    assert best.unsteered == result.table[0].score
    assert best.dose > max(row.dose for row in result.table if row.setting and row.setting.layer == 1)


def test_nothing_is_generated_twice(monkeypatch):
    lm = lm_with()
    calls, original = [], lm.generate

    def generate(prompts, steering, **options):
        calls.extend(zip(prompts, steering, strict=True))
        return original(prompts, steering, **options)

    monkeypatch.setattr(lm, "generate", generate)
    seen = []
    result = tuned(lm, progress=lambda done, total: seen.append((done, total)))
    assert len(set(calls)) == len(calls) == result.answers == seen[-1][0] == seen[-1][1]
    assert len(calls) == count_answers(4, ladder(4, 12)) + 2 * 8
    assert seen == sorted(seen)
    assert result.tokens == 4 * len(calls)


def test_the_check_sees_its_own_prompt():
    lm, seen = lm_with(), {}

    def check(i, answer, cut):
        seen.setdefault(i, set()).add(answer)
        assert cut
        return 0.0

    tuned(lm, check)
    unsteered = lm.generate(PROMPTS, max_new_tokens=4)
    assert set(seen) == set(split_by_query(PROMPTS, held_out=0.4).search)
    for i, answers in seen.items():
        assert unsteered[i].text in answers


@pytest.mark.parametrize(
    "check", [lambda *_: 0.0, lambda *_: True, lambda *_: math.nan, lambda i, *_: i / 20], ids=["0", "1", "nan", "same"]
)
def test_what_changes_nothing_is_not_to_steer(check):
    result = tuned(lm_with(), check)
    assert (result.steering, result.setting, result.held_out) == (None, None, None)
    assert not result.confirmed
    assert "no candidate scored above not steering" in result.reason


def test_an_answer_that_is_broken_to_comply_is_not_chosen():
    result = tuned(lm_with(), guard=Guard())
    assert result.steering is None
    assert "broke the guard" in result.reason
    rows = {row.setting.layer: row.broken for row in result.table if row.setting}
    assert any("perplexity" in reason or "repeated" in reason for reason in rows[3])
    assert rows[1] == ()


def test_luck_on_the_prompts_searched_on_is_not_enough():
    searched = set(split_by_query(PROMPTS, held_out=0.4).search)
    result = tuned(lm_with(), lambda i, answer, cut: i in searched and says_it(i, answer, cut))
    assert result.steering is None
    assert result.held_out.difference.estimate == 0
    assert "can't be told from luck: 0.00 instead of 0.00 on 8 held-out prompts (0 better, 0 worse" in result.reason


def test_the_margin_is_what_must_be_exceeded():
    lm = lm_with()
    gain = tuned(lm).held_out.difference.estimate
    assert tuned(lm, margin=gain).steering is None
    assert tuned(lm, margin=gain - 0.01).steering is not None


def test_nothing_held_out_is_said():
    result = tuned(lm_with(), held_out=0)
    assert result.held_out is None
    assert result.setting.layer == 3
    assert "nothing was held out" in result.reason
    assert not result.confirmed


def test_groups_stay_together():
    groups = [i // 4 for i in range(20)]
    result = tuned(lm_with(), groups=groups)
    assert {groups[i] for i in result.split.search}.isdisjoint({groups[i] for i in result.split.held_out})


@pytest.mark.parametrize("after", [0, 10, 40, 60])
def test_an_interruption_keeps_the_best_so_far(after):
    calls = itertools.count()

    def check(i, answer, cut):
        if next(calls) == after:
            raise KeyboardInterrupt
        return says_it(i, answer, cut)

    result = tuned(lm_with(), check, batch_size=5, rungs=[Rung(4, 4), Rung(12, 4)])
    assert result.interrupted
    assert result.held_out is None
    if after == 0:
        assert result.steering is None
        assert "nothing was tried: interrupted" in result.reason
    else:
        assert result.setting.layer == 3
        assert "interrupted before it was confirmed" in result.reason
        assert result.confirmed is result.steering.card.measured["tuning"]["confirmed"] is False
        assert result.steering.card.measured["tuning"]["cut_short"] is True


def test_an_interruption_in_the_last_word_keeps_the_choice():
    lm, seen = lm_with(), []

    def interrupt(done, total):
        seen.append(done)
        if done > total - 8:
            raise KeyboardInterrupt

    result = tuned(lm, progress=interrupt)
    assert result.interrupted
    assert result.setting.layer == 3
    assert result.held_out is None


def test_budgets_are_kept():
    lm = lm_with()
    whole = tuned(lm).tokens
    result = tuned(lm, budget_tokens=whole - 1, batch_size=5)
    assert result.tokens < whole
    assert result.exhausted
    assert result.setting.layer == 3
    assert result.held_out.items == 8
    assert not tuned(lm, budget_tokens=whole).exhausted
    with pytest.raises(TrimtabError, match=r"a budget of 83 tokens .* 84 are needed, at 4 per answer"):
        tuned(lm, budget_tokens=83)
    late = tuned(lm, budget_seconds=0)
    assert (late.exhausted, late.answers, late.steering) == (True, 0, None)
    assert "the budget is spent" in late.reason


class Clock:
    """Seconds that pass with each answer, instead of time."""

    def __init__(self, monkeypatch, seconds_each):
        self.now, self.seconds_each = 0.0, seconds_each
        monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def trial(self, steerings, items, progress):
        self.now += self.seconds_each * len(items)
        return [meter.Outcome(float(steering is not None), 0.1, 1) for steering in steerings]


def timed(clock, budget_seconds, groups=range(40), rows=5):
    return search(
        grid({"add": towards(lm_with())}, (0.5, 1.0)),
        list(groups),
        clock.trial,
        guard=None,
        rows=rows,
        budget_seconds=budget_seconds,
    )


def test_a_time_budget_that_is_too_short_is_said_after_the_first_answers(monkeypatch):
    """Four candidates and not to steer on six prompts, at 2 s per answer, take a minute."""
    clock = Clock(monkeypatch, 2.0)
    with pytest.warns(BudgetWarning, match=r"at 2 s per answer, the budget of 0.5 minutes covers about 50% ") as seen:
        result = timed(clock, 30)
    assert len(seen) == 1
    assert "give 1 minutes or more, or try fewer layers or strengths" in str(seen[0].message)
    assert result.warnings == (str(seen[0].message),)
    assert result.exhausted


@pytest.mark.filterwarnings("error")
def test_a_first_round_that_is_complete_was_not_too_long(monkeypatch):
    """All of its answers are one batch, which isn't cut short."""
    result = timed(Clock(monkeypatch, 2.0), 30, rows=64)
    assert result.warnings == ()
    assert result.table[0].items == 6


@pytest.mark.parametrize("budget", [60, None])
@pytest.mark.filterwarnings("error")
def test_a_time_budget_that_covers_the_first_round_is_enough(monkeypatch, budget):
    assert timed(Clock(monkeypatch, 2.0), budget).warnings == ()


def test_the_card_tells_the_search_and_is_the_same_each_time(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        save_steering(tuned(lm_with(), guard=Guard(perplexity=None, certainty=None, repeated=None)).steering, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    loaded = load_steering(files[0])
    note = loaded.card.measured["tuning"]
    assert loaded.card.method == "planted"
    assert note["chosen"] == {"layer": 3, "strength": 0.5, "positions": "from-last-prompt-token", "operation": "add"}
    assert note["columns"] == list(COLUMNS)
    assert [row[2] for row in note["table"]] == [None, 1, 3, 1, 3]
    assert note["held_out"]["items"] == 8
    assert note["split"]["search"] != note["split"]["held_out"]
    assert note["guard"]["perplexity"] is None
    assert steering_digest(loaded) == steering_digest(load_steering(files[1]))


def test_contexts_are_what_answers_are_judged_after():
    lm = lm_with()
    rows = [tuned(lm, guard=Guard(), contexts=c).table[0].perplexity for c in (None, PROMPTS, PROMPTS[::-1])]
    assert rows[0] == rows[1] != rows[2]


def test_perplexities_follow_the_prompts_as_they_were_rendered(monkeypatch):
    """With the same system message and template as the answers."""
    lm, rendered, original = lm_with(), [], tiny("llama").encode
    monkeypatch.setattr(lm, "encode", lambda text, **how: rendered.append(how) or original(text))
    monkeypatch.setattr(lm, "encode_with_images", lambda text, **how: (lm.encode(text, **how), None))
    how = {"system": "w9", "chat": True, "template": {"enable_thinking": False}}
    tuned(lm, guard=Guard(), **how)
    assert rendered
    assert all(seen == how for seen in rendered)


def test_bad_input_is_named():
    lm = lm_with()
    for options, said in (
        ({"groups": [1]}, "1 groups for 20 prompts"),
        ({"contexts": ["w3"]}, "1 contexts for 20"),
        ({"rungs": [Rung(13, 1)]}, "the last round needs 13 prompts, but only 12"),
    ):
        with pytest.raises(TrimtabError, match=said):
            tuned(lm, **options)
    with pytest.raises(TrimtabError, match="no candidates"):
        tune(lm, [], PROMPTS, says_it)


# ---- candidates ----------------------------------------------------------------------------------------------


def test_a_grid_has_every_combination():
    add, project = (
        Steering(tuple(Edit(Site(layer), operation, Positions.all()) for layer in (1, 2)))
        for operation in (Add(direction(0, 3.0)), SetProjection(direction(1), 2.0))
    )
    candidates = grid({"add": add, "project": project}, {"add": [1, 2], "project": [0.5]})
    assert [str(entry.setting) for entry in candidates] == [
        "add at block 1, strength 1, all",
        "add at block 2, strength 1, all",
        "add at block 1, strength 2, all",
        "add at block 2, strength 2, all",
        "project at block 1, strength 0.5, all",
        "project at block 2, strength 0.5, all",
    ]
    for candidate in candidates:
        (edit,) = candidate.steering.edits
        assert (edit.site.layer, edit.strength) == (candidate.setting.layer, candidate.setting.strength)
    moved = grid({"add": add}, [1], [Positions.generated(), Positions.all_but_first()])
    assert [entry.setting.positions for entry in moved] == ["generated"] * 2 + ["all-but-first"] * 2
    assert {str(edit.positions) for entry in moved for edit in entry.steering.edits} == {"generated", "all-but-first"}


def test_a_grid_of_nothing_is_refused():
    add = Steering((Edit(Site(1), Add(direction(0))),))
    for arguments, said in (
        (({},), "nothing to try"),
        (({"add": add}, []), "nothing to try"),
        (({"add": add}, [0.0]), "leave it out"),
        (({"add": add}, [math.nan]), "finite number"),
    ):
        with pytest.raises(TrimtabError, match=said):
            grid(*arguments)


@pytest.mark.parametrize("count", [1, 2, 4, 12, 30, 32, 80])
def test_default_layers_lie_in_the_model(count):
    layers = default_layers(count)
    assert layers[0] == count // 5
    assert layers[-1] < count
    assert 1 <= len(layers) <= 10


# ---- letters -------------------------------------------------------------------------------------------------


def letters():
    """A tiny model whose tokenizer has brackets and letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    lm = lm_with()
    words = {**{f"w{i}": i for i in range(3, 80)}, "<pad>": 0, "<unk>": 2, "(": 80, "A": 81, "B": 82, ")": 83}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    split = [
        pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Split("(", "isolated"),
        pre_tokenizers.Split(")", "isolated"),
    ]
    inner.pre_tokenizer = pre_tokenizers.Sequence(split)
    lm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>")
    return lm


def test_letters_are_scored_by_their_probability():
    lm = letters()
    sides = [("(A)", "(B)"), ("(A)", "(B)"), ("(A)", "(B)"), ("(B)", "(A)")]
    pairs = [Pair(*sides[i % 4], prompt(i, 4 + i % 3), "letters") for i in range(64)]
    head = lm.model.get_output_embeddings().weight.detach()
    good = Steering((Edit(Site(3), Add(5 * (head[81] - head[82]))), Edit(Site(1), Add(1e-3 * direction(1)))))
    result = tune_letters(lm, grid({"add": good}, [1.0]), pairs, held_out=0.5, margin=0.0)
    assert result.setting.layer == 3

    ids = [[*lm.encode(f"Input: {pairs[i].prompt}\nResponse:"), 80] for i in result.split.held_out]
    shares = []
    for i, row in zip(result.split.held_out, ids, strict=True):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor([row])).logits[0, -1]
        a, b = logits[[81, 82]].softmax(-1).tolist()
        shares.append(a if pairs[i].positive == "(A)" else b)
    assert result.held_out.unsteered == pytest.approx(sum(shares) / len(shares))


def test_letters_need_letters():
    lm = lm_with()
    with pytest.raises(TrimtabError, match="pairs of texts"):
        tune_letters(lm, grid({"add": towards(lm)}), [Pair("a", "b")])


def test_each_round_is_told():
    rounds = []
    result = tuned(lm_with(), rungs=[Rung(3, 2), Rung(12, 1)], on_round=rounds.append)
    assert [(round_.number, round_.of, round_.candidates, round_.items) for round_ in rounds] == [
        (1, 2, 4, 3),
        (2, 2, 2, 12),
    ]
    best = next(row for row in result.table if row.setting == result.setting)
    assert (rounds[-1].best, rounds[-1].score, rounds[-1].unsteered) == (result.setting, best.score, best.unsteered)
    assert str(rounds[-1]).startswith("round 2 of 2: 2 candidates on 12 prompts; best so far 1.00, unsteered ")
    tuned(lm_with(), lambda *_: 0.0, rungs=[Rung(3, 2)], on_round=rounds.append)
    assert rounds[-1].best is None
    assert "none beats unsteered 0.00" in str(rounds[-1])
