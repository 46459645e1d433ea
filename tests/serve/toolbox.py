"""Tiny models whose chat templates call tools and think in the ways of several families, and a service on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

HEAD = "{% for m in messages %}<|{{ m.role }}|>"
CALLS = "{% if m.tool_calls %}{% for c in m.tool_calls %}"
END = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
TEMPLATES = {
    "no tools": f"{HEAD}{{{{ m.content }}}}\n{END}",
    "hermes": "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    + HEAD
    + "{{ m.content }}"
    + CALLS
    + '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    + "{% endfor %}{% endif %}\n"
    + END,
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}"
    + HEAD
    + "{{ m.content }}"
    + CALLS
    + '[TOOL_CALLS][{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}]'
    + "{% endfor %}{% endif %}\n"
    + END,
    "mistral, with [ARGS]": "{% if tools %}{{ tools | tojson }}{% endif %}"
    + HEAD
    + "{{ m.content }}"
    + CALLS
    + "[TOOL_CALLS]{{ c.function.name }}[ARGS]{{ c.function.arguments | tojson }}"
    + "{% endfor %}{% endif %}\n"
    + END,
    "llama": '{% if tools %}{{ tools | tojson }} {"name": …, "parameters": …} <|python_tag|>{% endif %}'
    + HEAD
    + "{{ m.content }}"
    + CALLS
    + '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    + "{% endfor %}{% endif %}\n"
    + END,
    "thinking": "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}"
    + HEAD
    + "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n"
    + END
    + "{% if open %}<think>\n{% endif %}",
    "unknown": "{% if tools %}{{ tools | tojson }}<call>{% endif %}" + HEAD + "{{ m.content }}\n" + END,
}
SPECIAL = {"mistral": ("[TOOL_CALLS]",), "mistral, with [ARGS]": ("[TOOL_CALLS]", "[ARGS]")}


def model(folder: Path, name: str) -> Any:
    """A tiny model with this template."""
    from commands.conftest import save_model

    from trimtab import LM

    special = SPECIAL.get(name, ())
    saved = save_model(folder / "tiny", template=TEMPLATES[name], context=4096, special=special)
    return LM.load(saved, device="cpu", dtype="float32")


def service(lm: Any, steerings: Path, **limits: Any) -> Any:
    """A service on it."""
    from trimtab.serve.audit import Audit
    from trimtab.serve.library import read_folder
    from trimtab.serve.metrics import Metrics
    from trimtab.serve.policy import Policy
    from trimtab.serve.scheduler import Scheduler
    from trimtab.serve.service import Limits, Service

    library = read_folder(lm, steerings)
    return Service(lm, library, Scheduler(lm), Policy(), Audit(), Metrics(), Limits(max_tokens=400, **limits))


def steerings(lm: Any, folder: Path) -> Path:
    """A folder with one steering, `push`."""
    import torch

    from trimtab import Add, Card, Edit, Site, Steering, save

    folder.mkdir()
    v = torch.randn(32, generator=torch.Generator().manual_seed(3))
    save(Steering((Edit(Site(1), Add(v)),), Card("manual", model=lm.identity)), folder / "push.safetensors")
    return folder


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Lyon", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
BARE = {"type": "function", "function": {"name": "stop-it"}}
STRICT = {
    "type": "function",
    "function": {
        "name": "note",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "maxLength": 6}},
            "required": ["text"],
            "additionalProperties": False,
        },
    },
}


def check_call(call: Any) -> None:
    """The arguments of a call are what its tool takes."""
    import json

    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "get_weather":
        assert arguments["city"] in ("Lyon", "Oslo")
        assert arguments.keys() <= {"city", "days"}
        assert arguments.get("days", 1) in range(1, 10)
    elif call["function"]["name"] == "note":
        assert arguments.keys() == {"text"}
        assert len(arguments["text"]) <= 6
    else:
        assert call["function"]["name"] == "stop-it"
        assert isinstance(arguments, dict)
