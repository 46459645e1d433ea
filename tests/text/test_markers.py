"""Markers of thinking and tool calls, found in templates and vocabularies, and where a prompt's answer begins."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trimtab.engines.meanings import Follower, machine_of
from trimtab.errors import TrimtabError
from trimtab.steering import Positions
from trimtab.text.markers import answer_header

QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    "{# <tool_call></tool_call> #}"
)
DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<User>{{ m.content }}{% else %}<Assistant>"
    "{{ m.content.split('</think>')[-1] }}<end>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<Assistant><think>\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>"
    "{% endif %}{% endfor %}{# [TOOL_CALLS] #}"
)
CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> #}"
)
SPECIAL = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "</s>",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|call|>",
)


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """Of bytes, with special tokens that are one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    made.chat_template = template
    if template:
        made.add_special_tokens({"additional_special_tokens": [special for special in SPECIAL if special in template]})
    return made


def said(pretrained: Any, messages: list[dict[str, str]], answer: str, *rules: Positions, **keywords: Any) -> list[str]:
    """Of the answer the text at each of these positions."""
    text = pretrained.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **keywords)
    prompt, tokens = (
        pretrained.encode(text, add_special_tokens=False),
        pretrained.encode(answer, add_special_tokens=False),
    )
    meanings = [next(iter(rule.meanings)) for rule in rules]
    followed = Follower(pretrained, meanings, prompt).states_after(tokens)
    decoded = [pretrained.decode([token]) for token in tokens]
    return [
        "".join(text for text, state in zip(decoded, followed, strict=True) if meaning in state.holding)
        for meaning in meanings
    ]


ASK = [{"role": "user", "content": "Is </think> a tag? <tool_call>"}]
PARTS = (Positions.thinking(), Positions.answer(), Positions.outside_tools())


def test_markers_of_one_token_each() -> None:
    text = '<think>\nHm.</think>\n\nYes.<tool_call>{"a": 1}</tool_call> So.'
    assert said(tokenizer(QWEN), ASK, text, *PARTS) == [
        "\nHm.",
        '\n\nYes.<tool_call>{"a": 1}</tool_call> So.',
        "<think>\nHm.</think>\n\nYes. So.",
    ]


def test_thinking_that_the_template_has_ended() -> None:
    assert said(tokenizer(QWEN), ASK, "Yes.", *PARTS[:2], enable_thinking=False) == ["", "Yes."]


def test_thinking_that_the_template_has_begun_and_earlier_turns() -> None:
    deepseek = tokenizer(DEEPSEEK)
    talk = [*ASK, {"role": "assistant", "content": "<think>so"}, *ASK]
    assert said(deepseek, talk, "Hm.</think>Yes.", *PARTS[:2], Positions.after("Hm")) == [
        "Hm.",
        "Yes.",
        ".</think>Yes.",
    ]
    assert said(deepseek, talk, "</think>so", Positions.after("so"), Positions.at("so")) == ["", "o"]


def test_calls_to_the_end_of_the_answer() -> None:
    mistral = tokenizer(MISTRAL)
    assert answer_header(mistral) == "[/INST]"
    assert said(mistral, ASK, "Yes.[TOOL_CALLS][{}]</s>So", PARTS[2]) == ["Yes.[TOOL_CALLSSo"]


def test_channels() -> None:
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.f <|message|>{}"
        "<|call|><|start|>assistant<|channel|>final<|message|>Yes."
    )
    thinking, answer, outside = said(tokenizer(CHANNELS), ASK, text, *PARTS)
    assert (thinking, answer) == ("Hm.", "Yes.")
    assert "{}" not in outside
    assert "Hm." in outside
    assert outside.endswith("Yes.")


def test_a_begun_answer_counts_as_text_before() -> None:
    qwen = tokenizer(QWEN)
    text = "<|im_start|>user\nstop<|im_end|>\n<|im_start|>assistant\nI st"
    (meaning,) = Positions.after("stop").meanings
    followed = Follower(qwen, [meaning], qwen.encode(text)).states_after(qwen.encode("op it"))
    assert [bool(state.holding) for state in followed] == [False, False, True, True, True]


def test_plain_text_has_no_answer_yet() -> None:
    plain = tokenizer(None)
    rules = [Positions.after("so"), Positions.thinking("<t>", "</t>")]
    meanings = [next(iter(rule.meanings)) for rule in rules]
    followed = Follower(plain, meanings, plain.encode("so <t> so")).states_after(plain.encode("a"))
    assert [state.holding for state in followed] == [{meanings[1]}]


def test_what_a_model_hasnt_is_refused_by_name() -> None:
    plain = tokenizer(None)
    for rule, words in ((PARTS[0], "markers of thinking"), (PARTS[2], "markers of tool calls")):
        with pytest.raises(TrimtabError, match=words):
            machine_of(plain, next(iter(rule.meanings)))
