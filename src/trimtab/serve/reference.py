"""A reference of the API: its routes, and the fields of requests and responses, from the document at `/openapi.json`.

It is the page at `/docs`, which loads no script, font or image, from this server or elsewhere. It is also shown in the
playground, since a browser sends no API key with a link.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

Schema = Mapping[str, Any]
ABOUT = (
    "<p>Any client of OpenAI's API works: set its base URL to the address of this page with <code>/v1</code>, and its"
    " key to your API key, or to any text if the server doesn't ask for one. Steering has its own fields. <code>GET"
    " /openapi.json</code> returns the full document for programs.</p>"
)
UNSUPPORTED = "Not supported."
"""The description of fields that exist only to be refused; they are listed last."""
BOUNDS = {
    "minimum": "at least {}", "exclusiveMinimum": "above {}", "maximum": "at most {}", "exclusiveMaximum": "below {}",
    "minLength": "at least {} characters", "maxLength": "at most {} characters", "minItems": "at least {} items",
    "maxItems": "at most {} items",
}  # fmt: skip
STYLE = (
    ":root{color-scheme:light dark;background:Canvas;color:CanvasText}"
    "body{font:1rem/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code{font-family:ui-monospace,monospace;font-size:.9em;overflow-wrap:anywhere}a{color:inherit}"
    "h2{margin-top:2.5rem}h3{margin:2rem 0 .3rem}nav li{margin:.15rem 0}table{border-collapse:collapse;width:100%}"
    "td,th{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #8885}"
    "td{overflow-wrap:anywhere}th{font-weight:600}"
)
HEADERS = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    f" style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'",
    "referrer-policy": "no-referrer",
}
"""The headers of the page's response."""


@lru_cache(maxsize=1)
def reference() -> str:
    """All routes with the fields of their requests, collapsed, as HTML for another page."""
    from trimtab.serve.app import openapi

    document = openapi()
    schemas = document["components"]["schemas"]
    parts = []
    for method, path, operation in _operations(document):
        fields = _request_fields(operation, schemas)
        if fields:
            fields = f"<details><summary>Fields of the request</summary>{fields}</details>"
        parts.append(f"<h3><code>{method} {html.escape(path)}</code></h3><p>{_summary(operation)}</p>{fields}")
    return f'<div class="tt-routes"><h2>The API</h2>{ABOUT}{"".join(parts)}</div>'


def page(document: Schema) -> str:
    """An OpenAPI document as a page: routes, statuses, and each object with its fields."""
    schemas = document["components"]["schemas"]
    title = html.escape(f"{document['info']['title']} {document['info']['version']}")
    listed, routes = [], []
    for number, (method, path, operation) in enumerate(_operations(document)):
        head = f"<code>{method} {html.escape(path)}</code>"
        listed.append(f"<li><a href='#route-{number}'>{head}</a>: {_summary(operation)}</li>")
        routes.append(f"<h3 id='route-{number}'>{head}</h3><p>{_summary(operation)}.</p>{_route(operation, schemas)}")
    objects = "".join(
        f"<h3 id='{name}'>{name}</h3><p>{_words(schema.get('description', ''))}</p>{_fields(schema, linked=True)}"
        for name, schema in sorted(schemas.items())
    )
    about = "".join(f"<p>{_words(part)}</p>" for part in document["info"]["description"].split("\n\n"))
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{STYLE}</style></head><body><main>"
        f"<h1>{title}</h1>{about}{ABOUT}<nav aria-label='Routes'><ul>{''.join(listed)}</ul></nav>"
        f"<h2>Routes</h2>{''.join(routes)}<h2>Objects</h2>{objects}</main></body></html>"
    )


def _operations(document: Schema) -> list[tuple[str, str, Schema]]:
    paths = document["paths"].items()
    return [(method.upper(), path, operation) for path, operations in paths for method, operation in operations.items()]


def _route(operation: Schema, schemas: Schema) -> str:
    """A route's request and responses."""
    parts = []
    for kind, content in operation.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Takes <code>{kind}</code>: {_type(content.get('schema', {}), linked=True)}.</p>")
    rows = "".join(
        f"<tr><th scope='row'>{status}</th><td>{_content_of(response)}</td>"
        f"<td>{_words(response.get('description', ''))}</td></tr>"
        for status, response in sorted(operation["responses"].items())
    )
    head = "<tr><th scope='col'>status</th><th scope='col'>answer</th><th scope='col'>when</th></tr>"
    return f"{''.join(parts)}{_request_fields(operation, schemas, linked=True)}{_table(head, rows)}"


def _content_of(response: Schema) -> str:
    kinds = [
        _type(content["schema"], linked=True) if "$ref" in content.get("schema", {}) else f"<code>{kind}</code>"
        for kind, content in response.get("content", {}).items()
    ]
    return " or ".join(kinds)


def _request_fields(operation: Schema, schemas: Schema, *, linked: bool = False) -> str:
    """The fields of a request, as a table."""
    content = operation.get("requestBody", {}).get("content", {})
    name = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    return _fields(schemas[name], linked=linked) if name in schemas else ""


def _fields(schema: Schema, *, linked: bool) -> str:
    """The fields of an object, as a table."""
    required = schema.get("required", ())
    fields = sorted(
        schema.get("properties", {}).items(), key=lambda item: item[1].get("description", "") == UNSUPPORTED
    )
    rows = "".join(
        f"<tr><th scope='row'><code>{html.escape(field)}</code></th><td>{_type(subschema, linked=linked)}"
        f"{', required' if field in required else ''}{_bounds(subschema)}</td>"
        f"<td>{_words(subschema.get('description', ''))}</td></tr>"
        for field, subschema in fields
    )
    head = "<tr><th scope='col'>field</th><th scope='col'>type</th><th scope='col'>what it does</th></tr>"
    return _table(head, rows) if rows else ""


def _table(head: str, rows: str) -> str:
    return f"<div class='tt-wide'><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"


def _type(schema: Schema, *, linked: bool) -> str:
    """The type of a value, in a few words."""
    if "$ref" in schema:
        name = html.escape(str(schema["$ref"].rpartition("/")[2]))
        return f"<a href='#{name}'>{name}</a>" if linked else name
    if "const" in schema:
        return html.escape(repr(schema["const"]))
    if "enum" in schema:
        return html.escape(" or ".join(map(repr, schema["enum"])))
    if "anyOf" in schema or "oneOf" in schema:
        parts = [part for part in schema.get("anyOf", schema.get("oneOf", ())) if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(_type(part, linked=linked) for part in parts))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), linked=linked)}"
    return html.escape(str(schema.get("type", "any")))


def _bounds(schema: Schema) -> str:
    """The limits of a value, or of its only type other than null."""
    parts = [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]
    schema = {**schema, **parts[0]} if len(parts) == 1 else schema
    if schema.get("description") == UNSUPPORTED:
        return ""
    return "".join(f", {words.format(f'{schema[name]:g}')}" for name, words in BOUNDS.items() if name in schema)


def _summary(operation: Schema) -> str:
    return _words(operation.get("summary", ""))


def _words(text: str) -> str:
    """A text of the document as HTML, with backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
