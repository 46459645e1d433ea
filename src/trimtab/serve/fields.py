"""Types for the fields of requests, and other servers' fields, which are accepted only with values that do nothing.

Every list and text is bounded, and the first wrong item of a list ends its validation: an error for each of a hundred
thousand would take the server longer than the answer.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

NAME = "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""The pattern of a steering's name."""
Text = Annotated[str, Field(max_length=1_000_000)]
PairText = Annotated[str, Field(max_length=20_000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]
Nothing = Annotated[list[Any], Field(max_length=0, fail_fast=True)]
"""A list that requests nothing: an empty one."""
Zero = Annotated[Finite, Field(ge=0, le=0)]
One = Annotated[Finite, Field(ge=1, le=1)]
OFF = "Not supported."


class RequestModel(BaseModel):
    """The base class of the parts of a request. Unknown fields are refused, and values aren't converted."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)


class Unsupported(RequestModel):
    """Fields that only other servers support, accepted with a value that does nothing: clients send whole objects."""

    presence_penalty: Zero | None = Field(None, description=OFF)
    frequency_penalty: Zero | None = Field(None, description=OFF)
    repetition_penalty: One | None = Field(None, description=OFF)
    length_penalty: One | None = Field(None, description=OFF)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = Field(None, description=OFF)
    top_k: Literal[-1, 0] | None = Field(None, description=OFF)
    min_p: Zero | None = Field(None, description=OFF)
    ignore_eos: Literal[False] | None = Field(None, description=OFF)
    skip_special_tokens: Literal[True] | None = Field(None, description="Always true.")


class UnsupportedChat(Unsupported):
    """The same for chats only."""

    functions: Nothing | None = Field(None, description=OFF)
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1, fail_fast=True)] | None = None
    reasoning_effort: Literal["none"] | None = Field(None, description=OFF)
    verbosity: Literal["medium"] | None = Field(None, description=OFF)
    store: bool | None = Field(None, description="Accepted and ignored: nothing is stored.")
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = Field(None, max_length=512)
    prompt_cache_key: str | None = Field(None, max_length=512)
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None


ALTERNATIVES = {
    "presence_penalty": "penalties aren't supported; leave it out",
    "frequency_penalty": "penalties aren't supported; leave it out",
    "repetition_penalty": "penalties aren't supported; leave it out",
    "length_penalty": "beam search isn't supported; leave it out",
    "logit_bias": "token biases aren't supported; leave it out",
    "top_k": "it isn't supported; use top_p, or temperature 0",
    "min_p": "it isn't supported; use top_p, or temperature 0",
    "ignore_eos": "an answer ends where the model ends it; leave it out",
    "skip_special_tokens": "special tokens are never part of an answer; leave it out",
    "functions": "functions have been replaced by tools; use tools",
    "function_call": "it has been replaced by tool_choice and tool_calls; use those",
    "modalities": "answers are text; leave it out",
    "audio": "answers are text; leave it out",
    "reasoning_effort": "it isn't supported; set the chat template's own options for thinking in chat_template_kwargs",
    "verbosity": "it isn't supported; ask for a length in the prompt",
    "prediction": "predicted outputs aren't supported; leave it out",
    "web_search_options": "web search isn't supported; leave it out",
    "service_tier": "there is only one tier; leave it out",
    "previous_response_id": "nothing is stored; send the whole conversation as input, with the items of its responses",
    "conversation": "nothing is stored; send the whole conversation as input, with the items of its responses",
    "background": "nothing is stored; wait for the answer, or stream it",
    "truncation": "prompts aren't truncated; shorten the input",
    "reasoning": "it isn't supported; set the chat template's own options for thinking in chat_template_kwargs",
    "include": "only message.output_text.logprobs is supported; leave others out",
    "max_tool_calls": "this server doesn't call tools itself; leave it out",
    "echo": "prompts aren't echoed; leave it out",
    "suffix": "text is only continued, not filled in; leave it out",
    "best_of": "it isn't supported; ask for n answers and choose",
    "function_calls": "functions have been replaced by tools; leave such messages out",
    "annotations": "annotations aren't supported; leave them out",
    "use_beam_search": "beam search isn't supported; leave it out",
    "guided_json": 'give response_format: {"type": "json_schema", …}',
    "guided_regex": 'give a JSON schema with a pattern, as response_format: {"type": "json_schema", …}',
    "guided_choice": 'give a JSON schema with an enum, as response_format: {"type": "json_schema", …}',
    "structured_outputs": 'give response_format: {"type": "json_schema", …}',
}
"""What to do instead, by field."""
EXPECTED = {
    "content": "a string, or a list of text and image parts",
    "prompt": "a string, a list of strings, or token ids",
    "stop": "a string, or up to 4 strings",
    "tool_choice": '"none", "auto", "required", or {"type": "function", "function": {"name": …}}',
    "response_format": '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": …}',
    "emphasize": 'a list of phrases, {"text", "occurrence"} or {"role", "index"}',
    "rejection": 'true, false, or an object such as {"beta": 0.5}',
}
"""What the value of a field with several types must be."""
