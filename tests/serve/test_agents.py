"""Agents against a real server on the default model: OpenAI's client, and OpenAI's framework of agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance", reason="grammars need trimtab[serve]")

from pydantic import BaseModel  # noqa: E402
from serve.toolbox import WEATHER  # noqa: E402

# What the server takes and gives is tested in this process, in test_tool_calls.py and test_responses.py.
pytestmark = [pytest.mark.slow, pytest.mark.real, pytest.mark.long]
QUESTION = [{"role": "user", "content": "What is the weather in Lyon?"}]
PLAIN: dict[str, Any] = {"model": "trimtab", "temperature": 0}


class City(BaseModel):
    name: str
    people: int


@pytest.fixture(scope="module")
def server(start: Callable[..., Any], lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import torch

    from trimtab import Add, Card, Edit, Site, Steering, save

    folder = tmp_path_factory.mktemp("pushes")
    v = torch.randn(lm.layout.width, generator=torch.Generator().manual_seed(0))
    steering = Steering((Edit(Site(14), Add(60 * v / v.norm())),), Card("manual", model=lm.identity))
    save(steering, folder / "push.safetensors")
    return start("--max-tokens", "200", "--dtype", "float32", model=None, known=folder)


@pytest.fixture(scope="module")
def agents() -> Any:
    """OpenAI's framework, which is slow to import: by the worker that runs these, and by no other."""
    return pytest.importorskip("agents")


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300)


def test_chat_with_tools_and_back(client: Any) -> None:
    body = {**PLAIN, "tools": [WEATHER], "parallel_tool_calls": False, "max_tokens": 60}
    completion = client.chat.completions.create(messages=QUESTION, tool_choice="required", **body)
    (call,) = completion.choices[0].message.tool_calls
    assert completion.choices[0].finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] == "Lyon"
    pieces = list(client.chat.completions.create(messages=QUESTION, tool_choice="required", stream=True, **body))
    calls = [delta for piece in pieces if piece.choices for delta in piece.choices[0].delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather"
    assert "".join(made.function.arguments for made in calls) == call.function.arguments
    assert len(calls) > 3
    answer = {"role": "tool", "tool_call_id": call.id, "content": "It snows."}
    talk = [*QUESTION, completion.choices[0].message.model_dump(), answer]
    after = client.chat.completions.create(messages=talk, **{**body, "max_tokens": 20})
    assert after.choices[0].message.content


def test_formats_and_steering(client: Any) -> None:
    """JSON under a push that unmakes the text; the client parses it."""
    ask = [{"role": "user", "content": "Describe Lyon."}]
    body = {**PLAIN, "messages": ask, "response_format": City, "max_tokens": 100}
    completion = client.chat.completions.parse(**body)
    assert completion.choices[0].message.parsed.name == "Lyon"
    hard = {"steering": [{"name": "push", "strength": 2}], "response_format": {"type": "json_object"}}
    pushed = client.chat.completions.create(**PLAIN, messages=ask, max_tokens=100, extra_body=hard)
    assert pushed.choices[0].finish_reason in ("stop", "length")
    assert pushed.choices[0].message.content.startswith("{")
    if pushed.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(pushed.choices[0].message.content), dict)
    assert pushed.model_extra["trimtab"]["answers"][0]["dose"] > 0.3


def test_responses(client: Any) -> None:
    response = client.responses.parse(**PLAIN, input="Describe Lyon.", text_format=City, max_output_tokens=100)
    assert response.output_parsed.name == "Lyon"
    with client.responses.stream(**PLAIN, input="Say hello.", max_output_tokens=40) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        assert stream.get_final_response().output_text == text


@pytest.mark.parametrize("kind", [pytest.param("chat", marks=pytest.mark.long), "responses"])
def test_agents_call_tools(server: Any, agents: Any, kind: str) -> None:
    agents.set_tracing_disabled(True)
    called = []

    @agents.function_tool
    def get_weather(city: str) -> str:
        """Get the current weather in a city."""
        called.append(city)
        return f"It snows in {city}."

    async def run() -> Any:
        async with agents.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            of = agents.OpenAIChatCompletionsModel if kind == "chat" else agents.OpenAIResponsesModel
            settings = agents.ModelSettings(
                temperature=0, max_tokens=50, tool_choice="required", parallel_tool_calls=False
            )
            agent = agents.Agent(
                name="Weather",
                instructions="You tell the weather.",
                model=of(model="trimtab", openai_client=client),
                tools=[get_weather],
                model_settings=settings,
                tool_use_behavior="stop_on_first_tool",
            )
            ran = agents.Runner.run_streamed(agent, "What is the weather in Lyon?", max_turns=3)
            async for _ in ran.stream_events():
                pass
            return ran

    result = asyncio.run(run())
    assert called == ["Lyon"]
    assert result.final_output == "It snows in Lyon."


def test_agents_with_a_format(server: Any, agents: Any) -> None:
    agents.set_tracing_disabled(True)

    async def run() -> Any:
        async with agents.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            agent = agents.Agent(
                name="Geographer",
                model=agents.OpenAIResponsesModel(model="trimtab", openai_client=client),
                output_type=City,
                model_settings=agents.ModelSettings(temperature=0, max_tokens=100),
            )
            return await agents.Runner.run(agent, "Describe Lyon.", max_turns=1)

    assert asyncio.run(run()).final_output.name == "Lyon"
