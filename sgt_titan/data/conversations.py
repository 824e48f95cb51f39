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
TOOL_KEYS = ("tool_call_id", "name")  # of what a tool says; some templates print them
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Conversation:
    """``messages``: ``{"role", "content"}``, of an assistant also ``tool_calls``, ``reasoning_content``, and ``weight``
    0 where the data say not to train on it; of a tool also ``tool_call_id`` and ``name``. ``private``: (text, kind) of
    the values that are marked. ``ignored``: names of what is there and not used."""

    messages: Messages
    tools: list[Any] = field(default_factory=list)
    private: list[tuple[str, str]] = field(default_factory=list)
    ignored: tuple[str, ...] = ()

    def ends(self, answers: str) -> tuple[list[int], tuple[str, ...]]:
        """Where samples end (turns of each), and what was left out. The answers are the ``last`` or ``all``; those of
        weight 0, and those that say nothing, are never any. Turns without an answer are one sample, a prompt."""
        found = [i + 1 for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        said = [i for i in found if not says_nothing(self.messages[i - 1])]
        kept = [i for i in said if self.messages[i - 1].get("weight", 1)]
        empty = (EMPTY_ANSWERS,) if len(said) < len(found) else ()
        if not said:
            whole = next((i for i in range(len(self.messages), 0, -1) if i not in found), 0)
            if not whole:
                raise UserError("has nothing but empty answers")
            return [whole], empty
        if not kept:
            raise UserError("every answer has weight 0")
        left = (*empty, "turns after the last answer") if kept[-1] < len(self.messages) else empty
        if answers != "all":
            return kept[-1:], left
        if kept[0] == 1 < kept[-1]:
            return kept[1:], (*left, "a first turn that answers nothing, as an answer")
        return kept, left


EMPTY_ANSWERS = "answers that say nothing"


def says_nothing(message: Mapping[str, Any]) -> bool:
    return not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


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
    if isinstance(pairs, str) and pairs.lstrip().startswith("["):
        pairs = _json(pairs, f"{column!r} (field 'history')")
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
    for t, turn in enumerate(value):
        given = turn if isinstance(turn, Mapping) else {}
        if plain := _plain(given, role_keys[0], content_keys[0], roles):
            yield plain
            continue
        turn = {k: v for k, v in given.items() if v is not None}
        key = next((key for key in role_keys if key in turn), "")
        name = turn.get(key)
        if not isinstance(name, str):
            raise UserError(f"turn {t} of {column!r} has no {role_keys[0]!r}")
        if (role := roles.get(name, roles.get(name.lower()))) is None:
            raise UserError(f"turn {t} of {column!r} has the role {name[:20]!r}; map it with data.roles")
        # A null is an empty text, where there is a key for one.
        said = next((key for key in content_keys if key in turn), next((k for k in content_keys if k in given), ""))
        found, used = _turn({**turn, said: turn.get(said, "")} if said else turn, role, said, f"turn {t} of {column!r}")
        if found is None:
            raise UserError(f"turn {t} of {column!r} has no {content_keys[0]!r}")
        more = [k for k in turn if k not in used and k != key and turn[k] not in ("", [], {})]
        ignored += [f"key {str(k)[:40]} of turns" for k in more]
        if role not in ("assistant", "call") and turn.get("weight", 1) not in (0, 1):
            ignored.append("weight of turns that are no answers")
        ignored += found.pop("ignored", ())
        yield found


def _plain(turn: Mapping[str, Any], role: str, content: str, roles: Mapping[str, str]) -> dict[str, Any] | None:
    """A turn of a role and a text under their first keys and nothing else, as most are; None: any other."""
    name, text = turn.get(role), turn.get(content)
    if len(turn) != 2 or not isinstance(name, str) or not isinstance(text, str):
        return None
    known = roles.get(name, "call")
    return None if known == "call" else {"role": known, "content": text}


def _turn(turn: Mapping[str, Any], role: str, said: str, where: str) -> tuple[dict[str, Any] | None, set[str]]:
    """A turn, also with ``ignored``, what of its parts is not used; and the keys that it was made of. None: it has no
    content.

    Args:
        said: the key of its content, "" if it has none.
    """
    asked = next((key for key in CALL_KEYS if turn.get(key)), "") if role == "assistant" else ""
    if not said and not asked:
        return None, set()
    ignored: list[str] = []
    content = _text(turn[said], where, ignored) if said else ""
    calls = turn.get(asked) or []
    if role == "call":
        role, calls, content = "assistant", [_json(content, where)], ""
    calls = [calls] if asked == "function_call" else calls
    message: dict[str, Any] = {"role": role, "content": content, "ignored": ignored}
    used = {said, asked, "weight"}
    if role == "tool":
        message |= {key: turn[key] for key in TOOL_KEYS if isinstance(turn.get(key), str)}
        used.update(TOOL_KEYS & message.keys())
    if role != "assistant":
        return message, used
    if calls:
        if not isinstance(calls, list):
            raise UserError(f"{where}: tool_calls must be a list")
        message["tool_calls"] = [_call(call, where, ignored) for call in calls]
    thought = next((key for key in REASONING_KEYS if key in turn), "")
    reasoning = turn.get(thought, "")
    if not isinstance(reasoning, str):
        raise UserError(f"{where}: reasoning must be text")
    if reasoning.strip():
        message["reasoning_content"] = reasoning
    if (weight := turn.get("weight", 1)) not in (0, 1):
        # In words: numbers are taken out of reasons that are counted.
        raise UserError(f"{where}: weight {weight!r:.20} is neither zero nor one; fractions are not trained with")
    if not weight:
        message["weight"] = 0
    return message, {*used, thought}


def _text(content: Any, where: str, ignored: list[str]) -> str:
    """The content of a turn: a text, or the text parts of the OpenAI API."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: must be text")
    kinds = [part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content]
    if other := sorted({str(kind)[:20] for kind in kinds if kind not in TEXT_PARTS}):
        raise UserError(f"{where} has a part that is no text ({', '.join(other)})")
    texts = [part.get("text", 0) for part in content]
    if not all(isinstance(text, str | None) for text in texts):
        raise UserError(f"{where} has a text part whose text is none")
    more = {str(key)[:40] for part in content for key in part if key not in ("type", "text") and part[key]}
    ignored += [f"key {key} of parts" for key in sorted(more)]
    return "".join(text or "" for text in texts)


def _call(call: Any, where: str, ignored: list[str]) -> dict[str, Any]:
    """A call as templates expect it: ``{"type", "function": {"name", "arguments"}}``, the arguments an object."""
    outer = call if isinstance(call, Mapping) else {}
    function = outer.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call must have a name")
    key = next((key for key in ("arguments", "parameters") if function.get(key) is not None), "arguments")
    arguments = function.get(key)
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: arguments of a call") if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise UserError(f"{where}: arguments of a call must be an object")
    rest = {"id": outer["id"]} if isinstance(outer.get("id"), str) else {}
    used = {"name", key, *rest}
    inner = {} if function is outer else {k: v for k, v in outer.items() if k != "function"}
    more = [k for k, v in (*function.items(), *inner.items()) if v is not None and k not in used and k != "type"]
    ignored += [f"key {str(k)[:40]} of calls" for k in more]
    function = {"name": function["name"], "arguments": _without_nulls(arguments)}
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
