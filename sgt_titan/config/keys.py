"""The schema as a flat table: dotted key to type, default and help. No torch."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from sgt_titan.config.schema import Auto, Config, Must, Source


class Leaf(NamedTuple):
    """One option: its type, default and help, and what its value must be beside its type."""

    hint: Any
    default: Any
    help: str
    must: Must | None


@functools.cache
def keys() -> dict[str, Leaf]:
    """Every option of the schema by dotted key, in the schema's order."""
    return {key: leaf for key, leaf in _walk(Config) if isinstance(leaf, Leaf)}


@functools.cache
def sections() -> dict[str, str]:
    """Every section (``objective``, ``objective.mi``) and its help, in the schema's order."""
    return {key: leaf for key, leaf in _walk(Config) if isinstance(leaf, str)}


def get(config: Config, key: str) -> Any:
    """The value of a dotted key."""
    return functools.reduce(getattr, key.split("."), config)


def describe(hint: Any) -> str:
    """A type in the words of an error message: "an integer", "one of ce, kl"."""
    if choices(hint):
        return f"one of {', '.join(choices(hint))}"
    if is_optional(hint):
        return f"{describe(inner(hint))} or none"
    names = {
        bool: "true or false",
        int: "an integer",
        float: "a number",
        str: "a string",
        Source: "a source or its table",
        Auto: "true, false or auto",
    }
    if takes_items(hint) and Source in typing.get_args(hint):
        return "a mapping from name to source"
    if typing.get_origin(hint) is dict and typing.get_args(hint)[1] is Any:
        return "a mapping"
    return names.get(hint, "a mapping from field to column")


def is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def inner(hint: Any) -> Any:
    return next(arg for arg in typing.get_args(hint) if arg is not type(None))


def choices(hint: Any) -> tuple[str, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def takes_items(hint: Any) -> bool:
    """Whether an option is a mapping, whose items are options as well: ``--data.columns.text story``."""
    return typing.get_origin(hint) is dict or hint is Source


def _walk(cls: type, prefix: str = "") -> Iterator[tuple[str, Leaf | str]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint, text = prefix + field.name, hints[field.name], field.metadata.get("help", "")
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield key, text
            yield from _walk(hint, key + ".")
        else:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            yield key, Leaf(hint, default, text, field.metadata.get("must"))
