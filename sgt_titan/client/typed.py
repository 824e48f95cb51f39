"""Arguments that a model wrote as bare text (Qwen's XML), with the types that the tool's JSON schema declares.

Without them a house number 12 that has to be text would reach the tool as a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

_KINDS = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"}}
_KINDS |= {dict: {"object"}, type(None): {"null"}}
_WORDS = {"True": True, "False": False, "None": None}  # as templates print what Python has
_DEEPEST = 8  # references in references


def json_of(text: str) -> Any:
    """The JSON value of ``text``, whole; raises ValueError, also for numbers that JSON has no word for."""
    try:
        value = json.loads(text, parse_constant=_none)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("too large a number")
    return value


def _none(word: str) -> Any:
    raise ValueError(f"{word} is no JSON")


def typed(text: str, parameters: Mapping[str, Any] | None, name: str) -> Any:
    """The value of argument ``name``, as ``parameters``, a schema of an object, declares it. Undeclared: JSON if it is
    some, else text. A text that fits no declared type stays as it is, for the tool to refuse."""
    root = parameters if isinstance(parameters, Mapping) else {}
    properties = root.get("properties")
    types = _types(properties.get(name), root) if isinstance(properties, Mapping) else set()
    word = text.strip()
    if word in _WORDS and types & _kinds(_WORDS[word]):
        return _WORDS[word]
    try:
        value = json_of(text)
    except ValueError:
        return text
    if not types or _kinds(value) & (types - {"string"}):
        return value
    return text if "string" in types else value


def _kinds(value: Any) -> set[str]:
    return _KINDS[type(value)]


def _types(schema: Any, root: Mapping[str, Any], depth: int = 0) -> set[str]:
    """The names of all types that a schema lets through, as far as it says so."""
    if not isinstance(schema, Mapping) or depth > _DEEPEST:
        return set()
    said = schema.get("type")
    found = {one for one in (said if isinstance(said, list) else [said]) if isinstance(one, str)}
    for value in [*_listed(schema.get("enum")), *([schema["const"]] if "const" in schema else [])]:
        found |= _KINDS.get(type(value), set())
    for part in (*_listed(schema.get("anyOf")), *_listed(schema.get("oneOf")), *_listed(schema.get("allOf"))):
        found |= _types(part, root, depth + 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        found |= _types(target, root, depth + 1)
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
