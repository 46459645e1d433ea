"""An idea written out by a model: system prompts for and against it, and questions on which it can show.

This follows Chen et al., arXiv 2507.21509, appendix A, where a large model writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from trimtab.engines.language_model import LanguageModel
from trimtab.errors import TrimtabError
from trimtab.evaluate.judge import Judge, LocalJudge, Reply
from trimtab.making.idea import LEARN, TEST, Idea
from trimtab.text.chat import Message, has_template
from trimtab.text.markers import THINKING_PAIRS

TRIES = 3
SIDE = 5
MAX_TOKENS = 2048
"""The maximum length of a reply of a loaded model, in tokens; what is asked for is shorter."""
LEAST_TOKENS = 512
"""The minimum that has to fit into its context besides the request."""
ASK = """Somebody wants an assistant that behaves like this:
<wish>
{wish}
</wish>

Write what is needed to teach it. Reply with one JSON object and nothing else, with these keys:
"name": one to three words for the trait,
"positive": a list of {side} different system prompts, one or two sentences each, that bring the behaviour about,
"negative": a list of {side} system prompts of the same length and manner that bring its opposite about,
"questions": a list of {questions} different everyday messages of a user, on which the behaviour would show. They \
don't mention it, and have 5 to 25 words each."""
INSTEAD = "leave the writer out, and the sentence itself is put into system prompts"


def idea_from_writer(writer: Judge | LanguageModel, sentence: str) -> Idea:
    """Have a model write out the idea of a sentence.

    Args:
        writer: The model that writes: an `Endpoint`, which can have a large one, or a loaded model (`LM`), such as the
            one that is to be steered. A small model may not manage it.
        sentence: What is wanted.

    Raises:
        TrimtabError: The reply can't be used, three times in a row, or there is no reply; or a loaded model has no chat
            template, or too small a context.
    """
    ask = ASK.format(wish=sentence.strip(), side=SIDE, questions=LEARN + TEST)
    problem, request = "it was empty", ask
    for _ in range(TRIES):
        reply = _reply(writer, [{"role": "user", "content": request}])
        if reply.text is None:
            problem = reply.problem or problem
            continue
        try:
            return _read(reply.text, sentence)
        except TrimtabError as error:
            problem = str(error)
            request = f"{ask}\n\nAn earlier reply of yours couldn't be used: {problem}."  # decoding is greedy
    raise TrimtabError(
        f"the writer's answer was unusable {TRIES} times: {problem}; {INSTEAD}, or have a larger model write"
    )


def _reply(writer: Judge | LanguageModel, messages: list[Message]) -> Reply:
    replies: list[Reply] = []
    if isinstance(writer, LanguageModel):
        writer = LocalJudge(writer, max_tokens=_room(writer, messages))
    writer.ask([messages], lambda _, reply: replies.append(reply))
    return replies[0] if replies else Reply(None)


def _room(lm: LanguageModel, messages: list[Message]) -> int:
    """The number of tokens for the reply of a loaded model."""
    if not has_template(lm.tokenizer):
        raise TrimtabError(f"{lm.name} has no chat template, so it can't be asked to write prompts; {INSTEAD}")
    length, context = len(lm.encode(messages)), lm.layout.context
    if context is not None and context - length < LEAST_TOKENS:
        raise TrimtabError(
            f"the context of {lm.name} holds {context} tokens: too few for the request of {length}, and a reply of"
            f" {LEAST_TOKENS} or more; {INSTEAD}, or have another model write"
        )
    return MAX_TOKENS if context is None else min(MAX_TOKENS, context - length)


def _read(text: str, sentence: str) -> Idea:
    for _, end_of_thinking in THINKING_PAIRS:
        text = text.rpartition(end_of_thinking)[2]
    match = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        parsed: Any = json.loads(match[0] if match else text)
    except (ValueError, RecursionError):
        raise TrimtabError("it isn't a JSON object") from None
    if not isinstance(parsed, dict):
        raise TrimtabError("it isn't a JSON object")
    lists = {name: _texts(parsed.get(name), name) for name in ("positive", "negative", "questions")}
    questions = lists["questions"]
    half = len(questions) // 2
    return Idea(
        str(parsed.get("name") or sentence).strip(),
        lists["positive"],
        lists["negative"],
        questions[:half],
        questions[half:],
        source=f"writer {sentence.strip()}",
    )


def _texts(value: Any, name: str) -> tuple[str, ...]:
    texts: Sequence[Any] = value if isinstance(value, list) else ()
    distinct = tuple(dict.fromkeys(" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()))
    if not distinct:
        raise TrimtabError(f"its {name!r} isn't a list of texts")
    return distinct
