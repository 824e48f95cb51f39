"""The sources of a run: one, or several with formats, columns and weights of their own, and one to hold rows out of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sgt_titan.config import schema
from sgt_titan.data.sources import Rows, load_rows
from sgt_titan.data.tokenization import TokenOptions, make_options
from sgt_titan.errors import UserError

VALIDATION = "validation"


@dataclass(frozen=True)
class Part:
    """A source with its rows and all that decides their tokens. ``name``: "" where it is the only one."""

    name: str
    rows: Rows
    options: TokenOptions
    held_out: bool = False


def tables(data: schema.Data) -> dict[str, schema.Data]:
    """By name, each source as if it were alone; that of held-out rows is the last."""
    if not data.sources and not data.validation_source:
        return {"": data}
    found = {name: _alone(data, table) for name, table in data.sources.items()} or {"train": _alone(data, None)}
    return found | ({VALIDATION: _alone(data, data.validation_source)} if data.validation_source else {})


def _alone(data: schema.Data, table: dict[str, Any] | None) -> schema.Data:
    """``data`` with a source's own keys, or with those that it has itself; nothing of one source is another's."""
    nothing = schema.Data()
    own = {key: getattr(data, key) for key in schema.SOURCE_KEYS} if table is None else table
    keys = {key: own.get(key, getattr(nothing, key)) for key in schema.SOURCE_KEYS}
    return replace(data, sources={}, validation_source=schema.Source({}), **keys)


def parts(config: schema.Config, tokenizer: Any) -> list[Part]:
    """Every source opened.

    Raises:
        UserError: as ``load_rows`` and ``make_options``; of a mixture it names the source.
    """
    found = []
    for name, data in tables(config.data).items():
        try:
            rows = load_rows(data)
            # What has no turns is plain beside what has: the template of a mixture is its conversations'.
            plain = bool(name) and rows.format == "text" and data.template == "chat"
            own = replace(config, data=replace(data, template="plain") if plain else data)
            found.append(Part(name, rows, make_options(own, rows, tokenizer), name == VALIDATION))
        except UserError as error:
            raise type(error)(_named(str(error), name, config.data)) from None
    return found


def _named(message: str, name: str, data: schema.Data) -> str:
    """A message about one source's key, with the key that the user wrote."""
    if name not in data.sources and name != VALIDATION:
        return message
    key = "data.validation_source" if name == VALIDATION else f"data.sources.{name}"
    own, dot, rest = message.removeprefix("data.").partition(":")
    known = message.startswith("data.") and own.partition(".")[0] in schema.SOURCE_KEYS
    return f"{key}.{own}{dot}{rest}" if known else f"{key}: {message}"
