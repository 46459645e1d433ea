"""Perplexity against the textbook formula, on many families; and what else is told of an answer."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import FAMILIES, direction, prompt, tiny

from trimtab.engines.transformers import likelihood
from trimtab.engines.transformers.generate import Applied, Generation
from trimtab.errors import TrimtabError
from trimtab.evaluate.fluency import distinct_n, fluencies, perplexities
from trimtab.steering import Add, Edit, Positions, Site, Steering


def naive(lm, context, answer):
    """One text alone, all logits at once."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([[*context, *answer]]), use_cache=False).logits[0].double()
    logprobs = logits.log_softmax(-1)
    total = sum(float(logprobs[len(context) + i - 1, token]) for i, token in enumerate(answer))
    return math.exp(-total / len(answer))


def ids(seed, length):
    return torch.randint(3, 80, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


TEXTS = [(ids(1, 5), ids(2, 7)), (ids(3, 9), ids(4, 1)), (ids(5, 1), ids(6, 12)), (ids(7, 3), ids(8, 4))]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_textbook_formula(family, monkeypatch):
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 90 * 3)  # three tokens' logits at a time
    lm = tiny(family)
    results = perplexities(lm, TEXTS, tokens_per_batch=30)
    close = 1e-3 if lm.model.dtype == torch.float32 else 1e-9
    assert results == pytest.approx([naive(lm, *text) for text in TEXTS], rel=close)
    assert "forward" not in vars(lm.layout.decoder)


def test_neither_order_nor_batches_matter():
    lm = tiny("llama")
    alone = [perplexities(lm, [text])[0] for text in TEXTS]
    assert perplexities(lm, TEXTS[::-1], tokens_per_batch=1) == pytest.approx(alone[::-1], rel=1e-12)
    assert perplexities(lm, TEXTS) == pytest.approx(alone, rel=1e-12)


def test_logits_never_exist_for_all_tokens_at_once(monkeypatch):
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 90 * 4)
    lm, rows = tiny("llama"), []
    lm.model.get_output_embeddings().register_forward_hook(lambda _m, _a, out: rows.append(out.shape[:-1].numel()))
    perplexities(lm, TEXTS)
    assert max(rows) <= 4
    assert sum(rows) == sum(len(answer) for _, answer in TEXTS)


def test_the_same_text_is_computed_once():
    lm, passes = tiny("llama"), []
    lm.layout.blocks[0].register_forward_hook(lambda _m, args, _out: passes.append(args[0].shape[0]))
    results = perplexities(lm, [TEXTS[0]] * 5)
    assert sum(passes) == 1
    assert len(set(results)) == 1


def test_short_and_empty_answers_have_no_nan():
    lm = tiny("llama")
    short, none, alone = perplexities(lm, [(ids(1, 4), [7]), (ids(1, 4), []), ([], [7])])
    assert short == pytest.approx(naive(lm, ids(1, 4), [7]))
    assert none == math.inf
    assert alone == pytest.approx(naive(lm, [1], [7]))  # the configuration's start token


def test_certain_and_impossible_tokens():
    lm = tiny("llama")
    head = torch.nn.Linear(32, 90, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.fill_(-math.inf)
        head.bias[5] = 0
    lm.model.set_output_embeddings(head)
    assert perplexities(lm, [([1], [5, 5]), ([1], [6])]) == [1.0, math.inf]


def test_bad_input_is_named():
    lm = tiny("llama")
    with pytest.raises(TrimtabError, match="text 1 has 200 tokens"):
        perplexities(lm, [(ids(1, 100), ids(2, 100))])
    edit = Edit(Site(1), Add(direction(0)), Positions.all())
    with lm.steered(Steering((edit,))):
        with pytest.raises(TrimtabError, match="being steered already"):
            perplexities(lm, TEXTS)
        lm.model(torch.ones(1, 3, dtype=torch.long))
    with torch.no_grad():
        lm.model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(TrimtabError, match="NaN logits"):
        perplexities(lm, TEXTS)
    lm.model.config.bos_token_id = None
    with pytest.raises(TrimtabError, match="no token for the start"):
        perplexities(lm, [([], [3])])


def test_distinct_pairs():
    assert distinct_n("one two three") == 1
    assert distinct_n("a b a b a") == pytest.approx(2 / 4)
    assert distinct_n("word") == distinct_n("") == 1
    assert distinct_n("a a a a", n=1) == 1 / 4


def test_what_is_told_of_an_answer():
    lm = tiny("llama")
    question = prompt(1, 6)

    def answer(text, tokens, finish):
        return Generation(text, tuple(tokens), finish, 6, Applied((), ()))

    answers = [answer("w4 w5 w6", [4, 5, 6], "length"), answer(" ", [7, 0], "stop"), answer("", [0], "stop")]
    cut, blank, none = fluencies(lm, [question] * 3, answers)
    assert cut.perplexity == pytest.approx(naive(lm, lm.encode(question), [4, 5, 6]))
    assert (cut.tokens, cut.empty, cut.cut, cut.repeated, cut.distinct) == (3, False, True, 0, 1)
    assert blank.perplexity == pytest.approx(naive(lm, lm.encode(question), [7]))
    assert (blank.tokens, blank.empty, blank.cut) == (1, True, False)
    assert (none.tokens, none.empty, none.perplexity) == (0, True, math.inf)
    with pytest.raises(ValueError, match="zip"):
        fluencies(lm, [question], answers)
