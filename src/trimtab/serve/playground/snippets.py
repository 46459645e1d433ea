"""A request as `curl` and as Python, to copy: everything the page does can be done with the API."""

from __future__ import annotations

import json
import shlex
from pprint import pformat
from typing import Any

from trimtab.serve.playground.choices import Request
from trimtab.serve.schema import ChatRequest

EXTRA = ("steering", "emphasize", "rejection")
"""Fields that OpenAI's client doesn't know: they go into `extra_body`."""


def body_of(request: Request) -> dict[str, Any]:
    """The request's JSON, without unset fields; the steering fields come last."""
    body = _plain(request.model_dump(exclude_unset=True))
    order = ["model", "messages", "prompt", *(name for name in body if name not in EXTRA), *EXTRA]
    return {name: body[name] for name in dict.fromkeys(order) if name in body}


def _plain(value: Any) -> Any:
    """Whole numbers without a decimal point, as a person writes them."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def as_curl(request: Request, address: str, *, keys: bool) -> str:
    """A command line. The API key, if one is needed, is taken from the environment."""
    path = "chat/completions" if isinstance(request, ChatRequest) else "completions"
    lines = [f"curl {shlex.quote(f'{address}/v1/{path}')}", "-H 'Content-Type: application/json'"]
    if keys:
        lines.append('-H "Authorization: Bearer $TRIMTAB_API_KEY"')
    fields = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in body_of(request).items()
    )
    body = f"{{\n{fields}\n  }}"
    lines.append(f"-d {shlex.quote(body)}")
    return " \\\n  ".join(lines)


def as_python(request: Request, address: str, *, keys: bool) -> str:
    """A program that sends the request with OpenAI's client."""
    body = body_of(request)
    chat = isinstance(request, ChatRequest)
    extra = {name: body.pop(name) for name in EXTRA if name in body}
    keywords = {**body, **({"extra_body": extra} if extra else {})}
    arguments = "".join(f"    {name}={_literal(value, len(name))},\n" for name, value in keywords.items())
    secret = 'os.environ["TRIMTAB_API_KEY"]' if keys else '"none"'
    answer_expression = "answer.choices[0].message.content" if chat else "answer.choices[0].text"
    return (
        f"{'import os' + chr(10) * 2 if keys else ''}from openai import OpenAI\n\n"
        f"client = OpenAI(base_url={f'{address}/v1'!r}, api_key={secret})\n"
        f"answer = client.{'chat.completions' if chat else 'completions'}.create(\n{arguments})\n"
        f"print({answer_expression})\nprint(answer.model_extra['trimtab'])\n"
    )


def _literal(value: Any, indent: int) -> str:
    """The value as Python source, with later lines indented to follow the argument's name."""
    shown = pformat(value, width=100 - indent, sort_dicts=False)
    return shown.replace("\n", "\n" + " " * (indent + 5))
