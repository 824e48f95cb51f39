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
_MOST = 1000


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


def _types(schema: Any, root: Mapping[str, Any]) -> set[str]:
    """The names of all types that a schema lets through, as far as it says so within its first ``_MOST`` parts: it is
    a client's, and may refer to itself in any way."""
    found: set[str] = set()
    todo: list[Any] = [schema]
    seen: set[int] = set()
    while todo and len(seen) < _MOST:
        part = todo.pop()
        if not isinstance(part, Mapping) or id(part) in seen:
            continue
        seen.add(id(part))
        said = part.get("type")
        found |= {one for one in (said if isinstance(said, list) else [said]) if isinstance(one, str)}
        for value in [*_listed(part.get("enum"))[:_MOST], *([part["const"]] if "const" in part else [])]:
            found |= _KINDS.get(type(value), set())
        for name in ("anyOf", "oneOf", "allOf"):
            todo += _listed(part.get(name))[:_MOST]
        todo.append(_target(part.get("$ref"), root))
    return found


def _target(reference: Any, root: Mapping[str, Any]) -> Any:
    """What ``#/...`` refers to; None: nothing, or something elsewhere."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    target: Any = root
    for step in reference[2:].split("/")[:_MOST]:
        target = target.get(step) if isinstance(target, Mapping) else None
    return target


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
