"""The schemas of docs/api.md, and as much of JSON Schema as they use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "api.md"
_BLOCK = re.compile(r"^```json\n(.*?)^```", re.M | re.S)
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    "$id", "$ref", "additionalProperties", "allOf", "description", "enum", "items", "maxItems",
    "minItems", "minLength", "minimum", "properties", "required", "type",
}  # fmt: skip


def load() -> dict[str, dict[str, Any]]:
    """Every schema by its id."""
    found = [json.loads(text) for text in _BLOCK.findall(DOCUMENT.read_text(encoding="utf-8"))]
    return {schema["$id"]: schema for schema in found}


def complaints(value: Any, name: str) -> list[str]:
    """What is wrong with ``value`` by the schema of this id; empty when nothing is."""
    schemas = load()
    return _check(value, schemas[name], name, schemas)


def _check(value: Any, schema: dict[str, Any], at: str, all_: dict[str, Any]) -> list[str]:
    assert schema.keys() <= _KNOWN, f"{at}: {schema.keys() - _KNOWN} is not checked"
    found: list[str] = []
    for other in [*schema.get("allOf", ()), *([schema] if "$ref" in schema else ())]:
        found += _check(value, all_[other["$ref"]], at, all_)
    wanted = schema.get("type", [])
    names = [wanted] if isinstance(wanted, str) else wanted
    if names and not any(_is(value, name) for name in names):
        return [*found, f"{at} is {value!r}, not {' or '.join(names)}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{at} is {value!r}")
    if isinstance(value, dict):
        found += _check_object(value, schema, at, all_)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            found.append(f"{at} has {len(value)} items")
        for index, item in enumerate(value):
            found += _check(item, schema.get("items", {}), f"{at}[{index}]", all_)
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        found.append(f"{at} is too short")
    if _is(value, "number") and value < schema.get("minimum", value):
        found.append(f"{at} is {value}")
    return found


def _check_object(
    value: dict[str, Any], schema: dict[str, Any], at: str, all_: dict[str, Any]
) -> list[str]:
    own = schema.get("properties", {})
    found = [f"{at} lacks {name}" for name in schema.get("required", ()) if name not in value]
    rest = schema.get("additionalProperties", {})
    for name, item in value.items():
        if name in own:
            found += _check(item, own[name], f"{at}.{name}", all_)
        elif rest is False:
            found.append(f"{at} has {name}")
        else:
            found += _check(item, rest, f"{at}.{name}", all_)
    return found


def _is(value: Any, name: str) -> bool:
    return isinstance(value, _TYPES[name]) and (name == "boolean" or not isinstance(value, bool))
