"""Tools and response formats in requests, as in OpenAI's API."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from trimtab.serve.fields import RequestModel, Text

FUNCTION = "^[A-Za-z0-9_.-]{1,64}$"
"""The pattern of a function's name."""
FunctionName = Annotated[str, Field(pattern=FUNCTION)]
Words = Annotated[str, Field(max_length=10_000)]
Schema = dict[str, Any]


class FunctionSpec(RequestModel):
    """A function that the model may call."""

    name: FunctionName
    description: Words | None = None
    parameters: Schema | None = Field(None, description="A JSON schema of an object. Default: any object.")
    strict: bool | None = Field(
        None,
        description="true: refuse a schema that can't be fully enforced. Otherwise keywords that no grammar can"
        " enforce are ignored, and listed in `trimtab.unheld`.",
    )


class Tool(RequestModel):
    """A tool; only functions are supported."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionChoice(RequestModel):
    """A function by its name."""

    name: FunctionName


class ToolChoice(RequestModel):
    """The one tool that must be called."""

    type: Literal["function"]
    function: FunctionChoice


class CallFunction(RequestModel):
    """The called function: `arguments` is JSON in a string."""

    name: FunctionName
    arguments: Text = ""


class Call(RequestModel):
    """A tool call in an assistant message."""

    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CallFunction
    index: int | None = Field(None, ge=0, lt=1000, description="Accepted, since streams have it.")


class TextFormat(RequestModel):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(RequestModel):
    """A JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """A JSON schema with a name."""

    name: Annotated[str, Field(max_length=64)]
    description: Words | None = None
    schema_: Schema = Field({}, alias="schema")
    strict: bool | None = Field(
        None,
        description="false: ignore keywords that no grammar can enforce, and list them in `trimtab.unheld`; otherwise"
        " they are refused.",
    )


class SchemaFormat(RequestModel):
    """JSON that matches a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]
Tools = Annotated[list[Tool], Field(max_length=128, fail_fast=True)]
