"""A JSON schema in a file, for `--json-schema`."""

from __future__ import annotations

import json
from pathlib import Path

from trimtab.decoding.grammar import Schema, json_grammar
from trimtab.errors import TrimtabError
from trimtab.text.read import read_text


def read_schema(path: Path) -> Schema:
    """The schema in a file.

    Raises:
        TrimtabError: A file that can't be read, isn't JSON, or holds no schema that answers can keep to.
    """
    try:
        schema: Schema = json.loads(read_text(path))
    except TrimtabError as error:
        raise TrimtabError(f"--json-schema: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"--json-schema {path} isn't JSON: {error}") from None
    json_grammar(schema, where=str(path))  # before the model is loaded
    return schema
