"""A value as the schema's type, strictly, from YAML or from a word of the command line. No torch."""

from __future__ import annotations

import copy
import difflib
import math
import re
import reprlib
from collections.abc import Iterable
from typing import Any, get_args, get_origin

import yaml

from sgt_titan.config.keys import choices, describe, inner, is_optional, keys
from sgt_titan.config.schema import SOURCE_KEYS, Auto, Source
from sgt_titan.errors import UserError

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
brief = _short.repr


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the schema's type, strictly: no rounding, no truth values of other things.

    Raises:
        UserError: it is of another type or not among the choices.
    """
    wrong = UserError(f"{where} must be {describe(hint)}, got {brief(value)}")
    if is_optional(hint):
        if value is None:
            return None
        try:
            return convert(value, inner(hint), where)
        except UserError:
            raise wrong from None
    if offered := choices(hint):
        if value not in offered:
            raise UserError(f"{wrong}{nearest(value, offered)}" if isinstance(value, str) else str(wrong))
        return value
    if hint is Auto:
        if not isinstance(value, bool) and value != "auto":
            raise wrong
        return value
    if hint is Source:
        return _source(value, where, wrong)
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise wrong
        if Source in get_args(hint):
            return {str(name): convert(table, Source, f"{where}.{name}") for name, table in value.items()}
        if get_args(hint)[1] is Any:
            _refuse_odd(value, where)
            return copy.deepcopy(value)
        for name, item in value.items():
            if not (isinstance(name, str) and isinstance(item, str)):
                raise UserError(f"{where}.{name} must be a string, got {brief(item)}")
        return dict(value)
    if where.endswith(".source") and isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return "\n".join(value)
    if hint is float:
        # YAML 1.1 reads 1e-3 (no dot) as a string.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and not (isinstance(value, str) and _NUMBER.fullmatch(value)):
            raise wrong
        try:
            value = float(value)
        except OverflowError:  # an integer of more than 308 digits
            raise wrong from None
        if not math.isfinite(value):
            raise wrong
        return value
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise wrong
    return value


def from_text(text: str, hint: Any) -> Any:
    """The value a word on the command line stands for; the word itself if it is none of that type."""
    if is_optional(hint):
        return None if text.lower() in ("none", "null") else from_text(text, inner(hint))
    if hint in (bool, Auto) and is_bool(text):
        return text.lower() == "true"
    if hint is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    return text


def source_hints() -> dict[str, Any]:
    return {name: keys()[f"data.{name}"].hint for name in SOURCE_KEYS} | {"weight": float}


def _source(value: Any, where: str, wrong: UserError) -> dict[str, Any]:
    """A table of `data.sources`; a text or a list of texts is its source."""
    if isinstance(value, str | list):
        value = {"source": value} if value else {}
    if not isinstance(value, dict):
        raise wrong
    hints, found = source_hints(), {}
    for name, item in value.items():
        if name not in hints:
            raise UserError(f"{where}: unknown key {brief(name)}{nearest(str(name), hints)}")
        if item is not None:
            found[name] = convert(item, hints[name], f"{where}.{name}")
    return found


def scalar(text: str, where: str) -> Any:
    """What a word stands for in YAML: false, 3, text."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"{where}: invalid YAML: {brief(text)}") from None


def _refuse_odd(value: Any, where: str) -> None:
    """Raise UserError unless a value is what JSON can hold."""
    if isinstance(value, dict):
        for name, item in value.items():
            if not isinstance(name, str):
                raise UserError(f"{where}: {brief(name)} must be a name")
            _refuse_odd(item, f"{where}.{name}")
    elif isinstance(value, list):
        for item in value:
            _refuse_odd(item, where)
    elif not isinstance(value, str | int | float | bool | None) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise UserError(f"{where} must be text, a number, true or false, got {brief(value)}")


def is_bool(text: str) -> bool:
    return text.lower() in ("true", "false")


def nearest(word: str, candidates: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(candidates), n=1)
    return f"; did you mean {close[0]}?" if close else ""
