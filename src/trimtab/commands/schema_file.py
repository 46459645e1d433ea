"""A JSON schema in a file, for `--json-schema`."""

from __future__ import annotations

import json
from pathlib import Path

from trimtab.decoding.grammar import Schema, json_grammar
from trimtab.errors import TrimtabError
from trimtab.text.text_files import read_text


def read_schema(path: Path) -> Schema:
    """Read the JSON schema in a file.

    Raises:
        TrimtabError: The file can't be read, isn't JSON, or has a schema that answers can't be constrained to.
    """
    try:
        schema: Schema = json.loads(read_text(path))
    except TrimtabError as error:
        raise TrimtabError(f"--json-schema: {error}") from None
    except (ValueError, RecursionError) as error:
        raise TrimtabError(f"--json-schema {path} isn't JSON: {error}") from None
    json_grammar(schema, where=str(path))  # reports an unsupported schema before the model is loaded
    return schema
