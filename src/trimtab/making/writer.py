"""An idea written out by another model: system prompts for and against it, and questions on which it can show.

This follows Chen et al., arXiv 2507.21509, appendix A, where a large model writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from trimtab.errors import TrimtabError
from trimtab.evaluate.judge import Judge, Reply
from trimtab.making.idea import LEARN, TEST, Idea

TRIES = 3
SIDE = 5
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


def idea_from_writer(writer: Judge, sentence: str) -> Idea:
    """Have a model write out the idea of a sentence.

    Args:
        writer: The model that writes, such as an `Endpoint`.
        sentence: What is wanted.

    Raises:
        TrimtabError: The reply can't be used, three times in a row, or there is no reply.
    """
    ask = ASK.format(wish=sentence.strip(), side=SIDE, questions=LEARN + TEST)
    problem = "it was empty"
    for _ in range(TRIES):
        replies: list[Reply] = []
        writer.ask([[{"role": "user", "content": ask}]], lambda _, reply: replies.append(reply))  # noqa: B023
        if not replies or replies[0].text is None:
            problem = (replies[0].problem if replies else None) or problem
            continue
        try:
            return _read(replies[0].text, sentence)
        except TrimtabError as error:
            problem = str(error)
    raise TrimtabError(f"the writer's answer was unusable {TRIES} times: {problem}")


def _read(text: str, sentence: str) -> Idea:
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
