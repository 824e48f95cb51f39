"""Overrides on the command line: words ``--section.key value`` to flat values. No torch."""

from __future__ import annotations

import difflib
from typing import Any, get_args, get_origin

from sgt_titan.config.keys import Leaf, describe, keys, sections, takes_items
from sgt_titan.config.schema import Auto, Source
from sgt_titan.config.values import convert, from_text, is_bool, scalar, source_hints
from sgt_titan.errors import UserError


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Flat values from command line words; see ``load``.

    Raises:
        UserError: a word that is no option, an unknown key, a missing or wrong value.
    """
    values: dict[str, Any] = {}
    for word, text in split_overrides(words):
        key, leaf, item = _override_key(word)
        if text is None:
            if leaf.hint not in (bool, Auto):
                raise UserError(f"--{word} needs a value: {describe(leaf.hint)}")
            text = "true"
        where = f"--{word}"
        if Source in (leaf.hint, *get_args(leaf.hint)):
            table: Any = text
            for name in reversed(item.split(".") if item else []):
                table = {name: table}
            values[key] = join(values.get(key, {}), _source_words(table, leaf.hint, f"--{key}"))
        elif item:
            free = get_args(leaf.hint)[1] is Any
            values[key] = {**values.get(key, {}), item: scalar(text, where) if free else text}
        else:
            values[key] = convert(from_text(text, leaf.hint), leaf.hint, where)
    return values


def split_overrides(words: list[str]) -> list[tuple[str, str | None]]:
    """Pairs (key without dashes, text or None) of ``--key value``, ``--key=value`` and bare ``--key``."""
    pairs: list[tuple[str, str | None]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"unexpected argument {word!r}; options are given as --section.key value")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if equals:
            pairs.append((key, text))
        elif rest and takes_value(word, rest[0]):
            pairs.append((key, rest.pop(0)))
        else:
            pairs.append((key, None))
    return pairs


def takes_value(word: str, following: str) -> bool:
    """Whether the option ``--section.key`` takes the next word as its value.

    A boolean takes it only if it is true or false, so that ``--metrics.wandb NAME`` leaves NAME.
    """
    leaf = keys().get(word[2:].replace("-", "_"))
    if "=" in word or following.startswith("--"):
        return False
    if leaf is not None and leaf.hint in (bool, Auto):
        return is_bool(following) or (leaf.hint is Auto and following == "auto")
    return True


def _override_key(word: str) -> tuple[str, Leaf, str]:
    """(key, its leaf, item of a mapping or "") of an option's name."""
    if word in sections():
        raise UserError(f"--{word} is a section; give one of its keys, such as --{_first_key(word)}")
    if word in keys() and get_origin(keys()[word].hint) is not dict:
        return word, keys()[word], ""
    if word in keys():
        raise UserError(f"--{word} needs a field: --{word}.{_item_hint(word)}")
    key = next((key for key in keys() if word.startswith(key + ".") and takes_items(keys()[key].hint)), "")
    item = word.removeprefix(key + ".")
    if key and ("." not in item or Source in get_args(keys()[key].hint) or item.startswith("columns.")):
        return key, keys()[key], item
    raise UserError(f"unknown option --{word}{nearest_key(word, dashes='--')}")


def _source_words(value: Any, hint: Any, where: str) -> Any:
    """A table of sources from words: the values of one are those that its keys take."""
    if hint is not Source:  # by name
        return {name: _source_words(table, Source, f"{where}.{name}") for name, table in value.items()}
    if isinstance(value, dict):
        hints = source_hints()
        value = {k: from_text(v, hints[k]) if k in hints and isinstance(v, str) else v for k, v in value.items()}
    return convert(value, hint, where)


def _item_hint(key: str) -> str:
    if Source in get_args(keys()[key].hint):
        return "NAME.source FILE"
    return "NAME VALUE" if get_args(keys()[key].hint)[1] is Any else "text COLUMN"


def _first_key(section: str) -> str:
    return next(key for key in keys() if key.startswith(section + "."))


def nearest_key(key: str, dashes: str = "") -> str:
    """A suggestion: the same name in another section first, then the most similar key."""
    candidates = [*keys(), *sections()]
    name = key.rpartition(".")[2]
    same = [candidate for candidate in keys() if candidate.rpartition(".")[2] == name]
    close = difflib.get_close_matches(key, same, n=1, cutoff=0.0) or difflib.get_close_matches(key, candidates, n=1)
    if not close:  # training_steps, sed: compare the last parts alone
        names = {candidate.rpartition(".")[2]: candidate for candidate in reversed(keys())}
        close = [names[match] for match in difflib.get_close_matches(name, names, n=1, cutoff=0.7)]
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def join(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Mappings and the tables in them, item by item."""
    deep = {k: join(base[k], v) for k, v in top.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return {**base, **top, **deep}
