"""The part of JSON Schema that docs/reference/json uses, checked without a package for it.

A keyword that is not known here is an error: a schema must not promise what nobody checks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SCHEMAS = Path(__file__).resolve().parent.parent / "docs" / "reference" / "json"
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {"$schema", "title", "type", "const", "enum", "pattern", "required", "properties"}
_KNOWN |= {"additionalProperties", "items", "description"}


def schema_of(verb: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SCHEMAS / f"{verb}.schema.json").read_text())
    return loaded


def problems(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Everything in which `value` differs from `schema`."""
    unknown = schema.keys() - _KNOWN
    if unknown:
        return [f"{where}: the schema uses {sorted(unknown)}"]
    if "const" in schema and (value != schema["const"] or type(value) is not type(schema["const"])):
        return [f"{where}: {value!r} is not {schema['const']!r}"]
    if "enum" in schema and value not in schema["enum"]:
        return [f"{where}: {value!r} is none of {schema['enum']}"]
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        fits = any(
            isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
            for name in names
        )
        if not fits:
            return [f"{where}: {value!r} is no {' or '.join(names)}"]
    if "pattern" in schema and isinstance(value, str) and not re.search(schema["pattern"], value):
        return [f"{where}: {value!r} does not match {schema['pattern']}"]
    if isinstance(value, list) and "items" in schema:
        return [
            p for at, x in enumerate(value) for p in problems(x, schema["items"], f"{where}[{at}]")
        ]
    return _object(value, schema, where) if isinstance(value, dict) else []


def _object(value: dict[str, Any], schema: dict[str, Any], where: str) -> list[str]:
    known: dict[str, Any] = schema.get("properties", {})
    found = [
        f"{where}: {name} is missing" for name in schema.get("required", []) if name not in value
    ]
    more = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in known:
            found += problems(item, known[name], f"{where}.{name}")
        elif more is False:
            found.append(f"{where}: {name} is not in the schema")
        elif isinstance(more, dict):
            found += problems(item, more, f"{where}.{name}")
    return found


def check(verb: str, text: str) -> dict[str, Any]:
    """The one JSON object in `text`, which must be what the schema of `verb` says."""
    value: dict[str, Any] = json.loads(text)
    found = problems(value, schema_of(verb))
    assert not found, found[:5]
    return value
