"""A row as a conversation: turns, tools, private values. Tables say which names are understood.

Nothing of a row is dropped in silence: a key of a turn that is not used is named in ``ignored``, and who reads many
rows counts them. White space alone, an empty cell and a null are the same, whatever the file's format.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sgt_titan.data.marks import MarkError, private_values
from sgt_titan.errors import UserError

Messages = list[dict[str, Any]]

# Names of roles, in the words of OpenAI, ShareGPT and others; `data.roles` adds to them.
ROLES: dict[str, str] = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatgpt": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool", "tool_response": "tool",
    "function_response": "tool", "function_call": "call", "tool_call": "call",
}  # fmt: skip
# Keys of a turn, in order of preference.
ROLE_KEYS = ("role", "from", "speaker")
CONTENT_KEYS = ("content", "value", "text")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")


@dataclass(frozen=True)
class Conversation:
    """``messages``: ``{"role", "content"}``, of an assistant also ``tool_calls``, ``reasoning_content``, and ``weight``
    0 where the data say not to train on it. ``private``: (text, kind) of the values that are marked. ``ignored``: names
    of what is there and not used."""

    messages: Messages
    tools: list[Any] = field(default_factory=list)
    private: list[tuple[str, str]] = field(default_factory=list)
    ignored: tuple[str, ...] = ()

    def ends(self, answers: str) -> tuple[list[int], tuple[str, ...]]:
        """Where samples end (turns of each), and what was left out. The answers are the ``last`` or ``all``; those of
        weight 0 are never any. Turns without an answer are one sample, a prompt."""
        found = [i + 1 for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        kept = [i for i in found if self.messages[i - 1].get("weight", 1)]
        if not found:
            return [len(self.messages)], ()
        if not kept:
            raise UserError("every answer has weight 0")
        left = ("turns after the last answer",) if kept[-1] < len(self.messages) else ()
        if answers != "all":
            return kept[-1:], left
        if kept[0] == 1 < kept[-1]:
            return kept[1:], (*left, "a first turn that answers nothing, as an answer")
        return kept, left


def conversation(
    row: Mapping[str, Any], fmt: str, columns: Mapping[str, str], roles: Mapping[str, str] | None = None
) -> Conversation:
    """One row.

    Args:
        columns: field -> column; of the format chat also ``role`` and ``content``, the keys of a turn.
        roles: names of roles beside those of ``ROLES``.

    Raises:
        UserError: what is needed is missing or of another kind; MarkError: a mark that is not in the text.
    """
    ignored: list[str] = []
    if fmt == "text":
        messages = [{"role": "user", "content": text_of(row, "text", columns)}]
    elif fmt == "chat":
        messages = list(_chat(row, columns, {**ROLES, **(roles or {})}, ignored))
    elif fmt == "instruction":
        messages = _instruction(row, columns)
    else:
        raise UserError(f"data.format: must be text, instruction or chat, got {fmt!r}")
    column = columns.get("private")
    private = private_values(row, column, messages) if column else []
    before: Messages = []
    system = text_of(row, "system", columns)
    if system.strip():
        if messages[0]["role"] == "system":
            ignored.append(f"column {columns['system']}, beside a system turn")
        else:
            before.append({"role": "system", "content": system})
    before += _history(row, columns)
    return Conversation(before + messages, _tools(row, columns), private, tuple(ignored))


def text_of(row: Mapping[str, Any], name: str, columns: Mapping[str, str]) -> str:
    """A field as text; "" where it is missing, null or empty. Numbers, dates and truth values as they are written."""
    column = columns.get(name)
    value = row.get(column) if column else None
    if isinstance(value, str):
        return value
    if value is None or value != value:  # NaN is how tables of numbers say null
        return ""
    if isinstance(value, Written):
        return value.text
    if isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float | Decimal):
        return str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise UserError(f"{column!r} (field {name!r}) must be text, is {type(value).__name__}")


class Written(float):
    """A number of JSON that remembers how it was written: 1.50 is another text than 1.5."""

    text: str

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = text
        return number


def _instruction(row: Mapping[str, Any], columns: Mapping[str, str]) -> Messages:
    """The input follows the instruction after a blank line; without an output there is no answer."""
    instruction, extra = text_of(row, "instruction", columns), text_of(row, "input", columns)
    output = text_of(row, "output", columns)
    asked = "\n\n".join(part for part in (instruction, extra) if part.strip())
    messages: Messages = [{"role": "user", "content": asked}]
    return [*messages, {"role": "assistant", "content": output}] if output.strip() else messages


def _history(row: Mapping[str, Any], columns: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    column = columns.get("history")
    pairs = (row.get(column) if column else None) or []
    if not isinstance(pairs, Sequence) or isinstance(pairs, str):
        raise UserError(f"{column!r} (field 'history') must be a list of [question, answer], is {type(pairs).__name__}")
    for pair in pairs:
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UserError(f"{column!r} (field 'history') must be a list of [question, answer]")
        yield {"role": "user", "content": pair[0]}
        yield {"role": "assistant", "content": pair[1]}


def _tools(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[Any]:
    column = columns.get("tools")
    value = row.get(column) if column else None
    if isinstance(value, str) and value.strip():
        value = _json(value, f"{column!r} (field 'tools')")
    if not value:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"{column!r} (field 'tools') must be a list of objects, or JSON of one")
    return [_without_nulls(tool) for tool in value]


def _chat(
    row: Mapping[str, Any], columns: Mapping[str, str], roles: Mapping[str, str], ignored: list[str]
) -> Iterator[dict[str, Any]]:
    column = columns.get("messages", "messages")
    value = row.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, repr(column))  # as CSV holds it
    if value is None or value == []:
        raise UserError(f"has no {column!r} (field 'messages')" if value is None else f"{column!r} has no turns")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{column!r} must be a list of {{role, content}}, is {type(value).__name__}")
    role_keys = (columns["role"],) if columns.get("role") else ROLE_KEYS
    content_keys = (columns["content"],) if columns.get("content") else CONTENT_KEYS
    used = {*role_keys, *content_keys, *REASONING_KEYS, *CALL_KEYS, "weight"}
    for t, turn in enumerate(value):
        turn = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, Mapping) else {}
        name = next((turn[key] for key in role_keys if key in turn), None)
        if not isinstance(name, str):
            raise UserError(f"turn {t} of {column!r} has no {role_keys[0]!r}")
        if (role := roles.get(name, roles.get(name.lower()))) is None:
            raise UserError(f"turn {t} of {column!r} has the role {name[:20]!r}; map it with data.roles")
        found = _turn(turn, role, content_keys, f"turn {t} of {column!r}")
        ignored += [f"key {key} of turns" for key in turn if key not in used and turn[key] not in ("", [], {})]
        if role not in ("assistant", "call") and turn.get("weight", 1) not in (0, 1):
            ignored.append("weight of turns that are no answers")
        yield found


def _turn(turn: Mapping[str, Any], role: str, content_keys: Sequence[str], where: str) -> dict[str, Any]:
    calls = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    content = next((turn[key] for key in content_keys if key in turn), "" if calls else None)
    if isinstance(content, list):  # the parts of the OpenAI API
        kinds = {part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content}
        if kinds - {"text"}:
            raise UserError(f"{where} has a part that is no text ({', '.join(sorted(map(str, kinds - {'text'})))})")
        content = "".join(str(part.get("text") or "") for part in content)
    if not isinstance(content, str):
        raise UserError(f"{where} has no {content_keys[0]!r}" if content is None else f"{where}: must be text")
    if role == "call":
        role, calls = "assistant", [_json(content, where)]
        content = ""
    message: dict[str, Any] = {"role": role, "content": content}
    if role != "assistant":
        return message
    if calls:
        if not isinstance(calls, list):
            raise UserError(f"{where}: tool_calls must be a list")
        message["tool_calls"] = [_call(call, where) for call in calls]
    reasoning = next((turn[key] for key in REASONING_KEYS if key in turn), "")
    if not isinstance(reasoning, str):
        raise UserError(f"{where}: reasoning must be text")
    if reasoning.strip():
        message["reasoning_content"] = reasoning
    if (weight := turn.get("weight", 1)) not in (0, 1):
        # In words: numbers are taken out of reasons that are counted.
        raise UserError(f"{where}: weight {weight!r:.20} is neither zero nor one; fractions are not trained with")
    if not weight:
        message["weight"] = 0
    return message


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call as templates expect it: ``{"type", "function": {"name", "arguments"}}``, the arguments an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call must have a name")
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: arguments of a call") if arguments.strip() else {}
    rest = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    function = {"name": function["name"], "arguments": _without_nulls(arguments if arguments is not None else {})}
    return {"type": "function", **rest, "function": function}


def _without_nulls(value: Any) -> Any:
    """Columnar files give every object all keys that any object of the column has."""
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not valid JSON") from None


__all__ = ["ROLES", "Conversation", "MarkError", "Messages", "Written", "conversation", "text_of"]
