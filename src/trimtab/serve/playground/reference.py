"""The API in words: its routes, and the fields of what they take, from the same document as `/openapi.json`.

It stands on the page itself, as a browser sends no API key along with a link.
"""

from __future__ import annotations

import html
from functools import lru_cache
from typing import Any

ABOUT = (
    "<p>Any client of OpenAI's works: take the address of this page with <code>/v1</code> as its base, and your API"
    " key. What steers is in fields of its own. <code>GET /openapi.json</code> is this in full, for programs.</p>"
)


@lru_cache(maxsize=1)
def reference() -> str:
    """All routes, as HTML."""
    from trimtab.serve.app import openapi

    document = openapi()
    schemas = document["components"]["schemas"]
    parts = []
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            head = f"<h3><code>{method.upper()} {html.escape(path)}</code></h3>"
            parts.append(f"{head}<p>{html.escape(operation.get('summary', ''))}</p>{_taken(operation, schemas)}")
    return f'<div class="tt-routes"><h2>The API</h2>{ABOUT}{"".join(parts)}</div>'


def _taken(operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    """The fields of a request, to be folded out."""
    content = operation.get("requestBody", {}).get("content", {})
    name = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    schema = schemas.get(name)
    if schema is None:
        return ""
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><th scope='row'><code>{html.escape(field)}</code></th><td>{html.escape(_type(one))}"
        f"{', required' if field in required else ''}</td><td>{html.escape(one.get('description', ''))}</td></tr>"
        for field, one in schema["properties"].items()
    )
    head = "<tr><th scope='col'>field</th><th scope='col'>type</th><th scope='col'>what it does</th></tr>"
    return (
        f"<details><summary>Fields of the request</summary><div class='tt-wide'><table><thead>{head}</thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _type(schema: dict[str, Any]) -> str:
    """What a value may be, in few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    if "anyOf" in schema or "oneOf" in schema:
        kinds = [_type(one) for one in schema.get("anyOf", schema.get("oneOf", ())) if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    return str(schema.get("type", "any"))
