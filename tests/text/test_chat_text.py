"""Chat text in every shape: begun answers, keywords of the template, and strings that are rendered already."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from tiny import direction, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from trimtab.errors import TrimtabError
from trimtab.lm import LM
from trimtab.methods.caa import learn_caa
from trimtab.steering import Add, Edit, Positions, Site, Steering
from trimtab.text.answers import encode_sides
from trimtab.text.chat import TemplateWarning, encode, render_messages, template_digest
from trimtab.text.pairs import Pair
from trimtab.text.spans import Part, find_spans, render
from trimtab.text.templates import keywords_of, parse_keywords, with_keywords
from trimtab.tune import at_nats

TEMPLATE = (
    "{{ bos_token }}{%- for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
    "{% set tone = tone if tone is defined else '' %}{{ tone }}{{ strftime_now('') if dated else '' }}"
)
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<pad>"]
USER, BEGUN = {"role": "user", "content": "Name three."}, {"role": "assistant", "content": "Sure! One,"}
HEADER = "<|im_start|>assistant\n"


def tokenizer(template: str | None = TEMPLATE, bos: bool = True) -> Any:
    """Of bytes, with special tokens; a `<s>` before every text if `bos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[1:3]})
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def token() -> Any:
    return tokenizer()


def text(token: Any, *arguments: Any, **options: Any) -> str:
    return str(token.decode(encode(token, *arguments, **options)))


# ---- begun answers -----------------------------------------------------------------------------------------------


def test_a_begun_answer_is_continued(token: Any) -> None:
    assert text(token, [USER, BEGUN]).endswith(f"{HEADER}Sure! One,")
    assert text(token, [USER, BEGUN], system="Be brief.").endswith(f"{HEADER}Sure! One,")
    assert text(token, [USER]).endswith(HEADER)
    assert text(token, [USER, BEGUN, USER]).endswith(f"Name three.<|im_end|>\n{HEADER}")
    assert render_messages(token, [USER, BEGUN]) == text(token, [USER, BEGUN])


def test_a_closed_answer_is_followed_by_another(token: Any) -> None:
    closed = text(token, [USER, BEGUN], template={"continue_final_message": False})
    assert closed.endswith(f"Sure! One,<|im_end|>\n{HEADER}")
    assert text(token, [USER, BEGUN], template={"continue_final_message": True}) == text(token, [USER, BEGUN])


def test_phrases_stand_in_a_begun_answer(token: Any) -> None:
    rendered = render(token, [USER, BEGUN])
    assert rendered.ids == tuple(encode(token, [USER, BEGUN]))
    for emphasis in ("Sure!", Part("assistant")):
        ((start, stop),) = find_spans(token, [USER, BEGUN], emphasis)
        assert token.decode(rendered.ids[start:stop]) == (emphasis if isinstance(emphasis, str) else "Sure! One,")


def test_what_can_not_be_continued(token: Any) -> None:
    loud = tokenizer("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    strict = tokenizer(
        "{% if messages[-1].role != 'user' %}{{ raise_exception('users only') }}{% endif %}{{ content }}"
    )
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (token, [USER], {"continue_final_message": True}, "continues the assistant's last message, but the last"),
        (token, [USER, {**BEGUN, "content": " "}], {}, "the assistant's last message is empty"),
        (loud, [USER, BEGUN], {}, "last message open"),
        (tokenizer("{{ messages[0].content }}"), [USER, BEGUN], {}, "last message open"),
        (strict, [USER, BEGUN], {}, "last message open: users only"),
    ]
    for model, messages, template, said in cases:
        with pytest.raises(TrimtabError, match=re.escape(said)):
            encode(model, messages, template=template)


def test_a_pair_whose_answer_is_begun(token: Any) -> None:
    pair = Pair(" two", " none", [USER, BEGUN], "answers")  # type: ignore[arg-type]
    for side, answer in zip(encode_sides(token, pair), (" two", " none"), strict=True):
        assert token.decode(side.ids).endswith(f"{HEADER}Sure! One,{answer}")
        assert token.decode(side.ids[side.start :]) == answer
    with pytest.raises(TrimtabError, match="the prompt ends with an unfinished answer"):
        Pair([BEGUN], " none", [USER, BEGUN], "answers")  # type: ignore[arg-type,list-item]


# ---- keywords ----------------------------------------------------------------------------------------------------


def test_the_keywords_of_a_template(token: Any) -> None:
    assert keywords_of(token) == ("dated", "enable_thinking", "tone")
    assert keywords_of(tokenizer(None)) == ()
    assert keywords_of(tokenizer("{{ messages }}")) == ()


def test_keywords_are_given_to_the_template(token: Any) -> None:
    off = {"enable_thinking": False}
    assert text(token, "Hi", template=off) == f"{text(token, 'Hi')}<think></think>"
    assert text(token, [USER], template={**off, "tone": "!"}) == f"{text(token, [USER])}<think></think>!"
    assert render(token, "Hi", template=off).text == text(token, "Hi", template=off)
    assert find_spans(token, "Hi", "<think>", template=off)
    assert text(token, [USER, BEGUN], template={"tone": ""}) == text(token, [USER, BEGUN])


def test_keywords_that_would_do_nothing(token: Any) -> None:
    with pytest.raises(TrimtabError, match=r"doesn't use 'enable_thoughts'.*it uses dated, enable_thinking, tone"):
        encode(token, "Hi", template={"enable_thoughts": False})
    with pytest.raises(TrimtabError, match="doesn't use 'messages'"):
        encode(token, "Hi", template={"messages": []})
    with pytest.raises(TrimtabError, match="it uses none"):
        encode(tokenizer("{{ messages[0].content }}"), "Hi", template={"tone": "!"})
    with pytest.raises(TrimtabError, match="a keyword of the template needs a chat template"):
        encode(token, "Hi", chat=False, template={"tone": "!"})
    with pytest.raises(TrimtabError, match="no chat template that could use 'tone'"):
        with_keywords(tokenizer(None), {"tone": "!"})
    with pytest.raises(TrimtabError, match="doesn't use 'continue_final_message'"):
        with_keywords(token, {"continue_final_message": False})
    with pytest.raises(TrimtabError, match="can't be read"):
        encode(tokenizer("{% for %}"), "Hi", template={"tone": "!"})


def test_keywords_for_everything_that_is_rendered(token: Any) -> None:
    fixed = with_keywords(token, {"enable_thinking": False})
    assert text(fixed, "Hi") == text(token, "Hi", template={"enable_thinking": False})
    assert text(fixed, "Hi", template={"enable_thinking": True}) == text(token, "Hi")
    assert text(token, "Hi") == f"{text(fixed, 'Hi')[: -len('<think></think>')]}"  # the other one is as it was
    assert template_digest(fixed) != template_digest(token) == template_digest(with_keywords(token, {}))
    (positive, _) = encode_sides(fixed, Pair("a", "b", "Hi", "answers"))
    assert "<think></think>a" in token.decode(positive.ids)


def test_keywords_among_the_options_of_generation(models_: tuple[LM, LM]) -> None:
    for name in ("enable_thinking", "continue_final_message", "chat_template_kwargs"):
        with pytest.raises(TrimtabError, match=rf"'{name}' isn't an option of generation.*: template="):
            models_[0].generate("Hi", **{name: True})


def test_keywords_on_the_command_line() -> None:
    keywords = ["enable_thinking=false", "tone=a=b", "n=3", "date=2026-11-29", "Yes=TRUE"]
    expected = {"enable_thinking": False, "tone": "a=b", "n": 3, "date": "2026-11-29", "Yes": True}
    assert parse_keywords(keywords) == expected
    assert parse_keywords(None) == {}
    for wrong, said in [(["thinking"], "write KEYWORD=VALUE"), (["=1"], "KEYWORD"), (["a=1", "a=2"], "'a' twice")]:
        with pytest.raises(TrimtabError, match=said):
            parse_keywords(wrong)


# ---- a model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models_() -> tuple[LM, LM]:
    """A tiny model of bytes, and the same one with thinking off."""
    small = tiny("llama")
    small.model.resize_token_embeddings(300, mean_resizing=False)
    torch.manual_seed(1)
    torch.nn.init.normal_(small.model.get_input_embeddings().weight, std=0.3)
    return LM(small.model, tokenizer()), LM(small.model, tokenizer(), template={"enable_thinking": False})


def test_a_model_goes_on_where_the_text_does(models_: tuple[LM, LM]) -> None:
    lm, off = models_
    steering = Steering((Edit(Site(1), Add(direction(0, 3.0)), Positions.from_last_prompt_token()),))
    written = lm.tokenizer.apply_chat_template([USER, BEGUN], continue_final_message=True, tokenize=False)
    (answer,) = lm.generate([USER, BEGUN], steering, max_new_tokens=6)
    (by_hand,) = lm.generate(written, steering, max_new_tokens=6, chat=False)
    assert answer.token_ids == by_hand.token_ids
    (other,) = lm.generate([USER, BEGUN], steering, max_new_tokens=6, template={"continue_final_message": False})
    assert other.prompt_tokens > answer.prompt_tokens == len(lm.encode([USER, BEGUN]))
    for keywords in ({}, {"template": {"tone": "?"}}):
        (read,) = lm.capture([USER, BEGUN], [1], Positions.all(), **keywords)
        assert len(read[Site(1)]) == len(lm.encode([USER, BEGUN], **keywords))
    thought = lm.generate("Hi", max_new_tokens=3, template={"enable_thinking": False})
    assert thought == off.generate("Hi", max_new_tokens=3) != lm.generate("Hi", max_new_tokens=3)
    assert lm.spans("Hi", "think", template={"enable_thinking": False}) == off.spans("Hi", "think")


def test_what_is_measured_follows_the_prompt_as_it_was_rendered(models_: tuple[LM, LM]) -> None:
    """Perplexities, divergences and projections with a template's keyword are those of a model that has it preset."""
    lm, off = models_
    steering = Steering((Edit(Site(1), Add(direction(0, 3.0)), Positions.from_last_prompt_token()),))
    how: dict[str, Any] = {"template": {"enable_thinking": False}}
    trying: dict[str, Any] = {"strengths": 0.1, "prompts": ["Hi", "Why?"], "max_new_tokens": 4, "guard": None}
    swept, preset = lm.sweep(steering, **trying, **how), off.sweep(steering, **trying)
    assert [row.perplexity for row in swept.rows] == [row.perplexity for row in preset.rows]
    assert swept.unsteered.perplexity == preset.unsteered.perplexity
    assert lm.divergence(steering, ["Hi"], tokens=3, **how) == off.divergence(steering, ["Hi"], tokens=3)
    assert lm.divergence(steering, ["Hi"], tokens=3, **how) != lm.divergence(steering, ["Hi"], tokens=3)
    dosed = at_nats(lm, steering, 0.1, ["Hi"], tokens=3, **how)
    assert dosed.factor == at_nats(off, steering, 0.1, ["Hi"], tokens=3).factor
    answered = [USER, {"role": "assistant", "content": "One."}]
    for words in ([USER], answered):
        assert lm.project(words, steering, **how).tokens == off.project(words, steering).tokens
    assert lm.project([USER], steering, **how).tokens != lm.project([USER], steering).tokens
    begun = lm.project(answered, steering, template={"continue_final_message": True})
    assert len(begun.tokens) < len(lm.project(answered, steering).tokens)
    with pytest.raises(TrimtabError, match="a keyword of the template needs a chat template"):
        lm.project("Hi", steering, template={"tone": "?"})
    with pytest.raises(TrimtabError, match="doesn't use 'enable_thoughts'"):
        lm.project(answered, steering, template={"enable_thoughts": True})


@pytest.mark.filterwarnings("ignore::trimtab.methods.caa.PairsWarning")
def test_what_is_learned_is_read_with_the_keywords(models_: tuple[LM, LM]) -> None:
    lm, off = models_
    pairs = [Pair("Yes", "No", f"Is it {word}?", "answers") for word in ("so", "late")]
    on, without = learn_caa(lm, pairs, [1]), learn_caa(off, pairs, [1])
    assert not torch.equal(on.edits[0].operation.direction, without.edits[0].operation.direction)  # type: ignore[attr-defined]


# ---- strings that are rendered already ---------------------------------------------------------------------------

MADE = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_rendered_string_is_noticed(token: Any) -> None:
    with pytest.warns(TemplateWarning, match=r"'<\|im_start\|>', '<\|im_end\|>'.*chat=False, --plain"):
        assert text(token, MADE).count("<|im_start|>user") == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(token, MADE, chat=False)
        encode(token, "What is <pad>?")  # the template doesn't write this one
        encode(token, [{"role": "user", "content": MADE}])  # these are said to be messages
        encode(tokenizer("{{ messages[0].content }}"), MADE)
    other = tokenizer("{{ messages[0].content }}")
    encode(other, MADE)
    other.chat_template = TEMPLATE  # it may be set at any time
    with pytest.warns(TemplateWarning):
        encode(other, MADE)
    pair = Pair("Yes<|im_end|>", "No", "Hi", "answers")
    with pytest.warns(TemplateWarning, match=r"the answer contains '<\|im_end\|>'.*remove them"):
        encode_sides(token, pair)
    picky = tokenizer(
        "{% if messages[0].role == 'user' %}{{ raise_exception('no') }}{% endif %}"
        "{{ messages[0].content }} {{ messages[1].content }}"
    )
    assert text(picky, "Hi", system="Be brief.") == "Be brief. Hi"


def test_no_second_first_token(token: Any) -> None:
    once = encode(token, "Hi", chat=False)
    assert token.decode(once) == "<s>Hi"
    assert encode(token, "<s>Hi", chat=False) == once
    assert encode(token, "<s><s>Hi", chat=False) == [0, *once]
    assert encode(tokenizer(bos=False), "<s>Hi", chat=False) == once
    assert encode(token, render_messages(token, [USER]), chat=False) == encode(token, [USER])
    ((start, stop),) = find_spans(token, "<s>Hi", "Hi", chat=False)
    assert token.decode(once[start:stop]) == "Hi"
