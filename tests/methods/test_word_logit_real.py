"""A word by its own logit, on the default model: one of several tokens, and one that the answer would have."""

from __future__ import annotations

import pytest

from trimtab import LM
from trimtab.methods.word_logit import learn_word_logit

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.long]
ASKED = "Why is the sky blue?"


def test_words_come_and_go(lm: LM) -> None:
    steerings = [None, learn_word_logit(lm, "Tianjin"), learn_word_logit(lm, "light", exclude=True)]
    bare, put_in, kept_out = (answer.text for answer in lm.generate([ASKED] * 3, steerings, max_new_tokens=56))
    assert "Tianjin" not in bare
    assert put_in.count("Tianjin") == 1
    assert "light" in bare.split()
    assert "light" not in kept_out.lower().replace(",", " ").replace(".", " ").split()
