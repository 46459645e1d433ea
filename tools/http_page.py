"""Generates the reference of the server's routes from its OpenAPI document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

NOT_SUPPORTED = "Not supported."
"""The description of fields that are accepted only with values that have no effect; they are listed in one line."""


def http_page() -> str:
    """The page: every route with its fields, its response statuses, and the objects that it refers to."""
    from trimtab.serve.app import openapi

    document = openapi()
    schemas = document["components"]["schemas"]
    parts = [
        "# HTTP\n\nThe routes of `trimtab serve`, from the document that a running server has at `/openapi.json` and"
        " shows at `/docs`. [Serving](../serving.md) explains them, [limits and errors](../serving-limits.md) what is"
        " refused.\n"
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"## {method.upper()} {path}\n\n{operation.get('summary', '')}.")
            if text := operation.get("description"):
                parts.append(str(text))
            for kind, body in (operation.get("requestBody") or {}).get("content", {}).items():
                name = _name(body["schema"])
                parts.append(f"Takes `{kind}`" + (f": [{name}](#{name.lower()})." if name in schemas else "."))
            parts.append(_statuses(operation["responses"], schemas))
    parts.append("## Objects\n\nA field without a default has to be there.")
    for name in sorted(schemas):
        parts.append("\n\n".join(_object(name, schemas[name], schemas)))
    return "\n\n".join(parts) + "\n"


def _name(schema: Any) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _statuses(responses: Any, schemas: Any) -> str:
    rows = ["| status | what |", "| --- | --- |"]
    for status, response in sorted(responses.items()):
        names = [_name(content.get("schema", {})) for content in response.get("content", {}).values()]
        links = "".join(f" ([{name}](#{name.lower()}))" for name in names if name in schemas)
        rows.append(f"| {status} | {_cell(response.get('description', ''))}{links} |")
    return "\n".join(rows)


def _object(name: str, schema: Any, schemas: Any) -> Iterator[str]:
    yield f"### {name}"
    if text := schema.get("description"):
        yield str(text)
    fields = schema.get("properties", {})
    if not fields:
        yield f"`{_type(schema, schemas)}`"
        return
    needed = schema.get("required", [])
    rows = ["| field | type | default | what |", "| --- | --- | --- | --- |"]
    refused = [field for field, value in fields.items() if value.get("description") == NOT_SUPPORTED]
    for field, value in fields.items():
        if field not in refused:
            default = "" if field in needed or "default" not in value else f"`{value['default']!r}`"
            shown = _cell(value.get("description", ""))
            rows.append(f"| `{field}` | {_type(value, schemas)} | {default} | {shown} |")
    yield "\n".join(rows)
    if refused:
        yield "Accepted only where they ask for nothing: " + ", ".join(f"`{field}`" for field in refused) + "."


def _type(schema: Any, schemas: Any) -> str:
    """A field's type in a word or two, with links to objects."""
    if "$ref" in schema:
        name = _name(schema)
        return f"[{name}](#{name.lower()})"
    for joined in ("anyOf", "oneOf"):
        if joined in schema:
            kinds = list(dict.fromkeys(_type(part, schemas) for part in schema[joined]))
            return " or ".join(kinds)
    if "const" in schema:
        return f"`{schema['const']!r}`"
    if "enum" in schema:
        return " or ".join(f"`{value!r}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return "list of " + (_type(schema["items"], schemas) if schema.get("items") else "anything")
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join([str(schema.get("type", "anything")), *bounds])


def _cell(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
