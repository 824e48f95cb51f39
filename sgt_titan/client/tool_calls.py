"""Tool calls out of the text a model wrote, whole or as it comes: a table of formats, one row a family.

A server's own parsers belong to its chat route, which takes no embeddings. What does not parse stays text, so nothing
a model wrote is lost. A format is chosen from the chat template, whose words show what the model was taught.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ToolCall:
    """``arguments``: a JSON object, as text, as OpenAI's clients read it."""

    name: str
    arguments: str
    id: str


@dataclass(frozen=True)
class Format:
    """How one family writes calls.

    begin: what opens a call or a list of them. end: what closes it; None: the end of the answer, or of a JSON value.
    read: the calls in what is between, or None if it holds none. known_by: words of templates that teach it. special:
    whether begin or end are special tokens, which a server leaves out of its text unless told otherwise.
    """

    begin: str
    end: str | None
    read: Callable[[str], list[tuple[str, Any]] | None]
    known_by: tuple[str, ...]
    special: bool = False
    id_length: int | None = None


def _objects(text: str) -> list[tuple[str, Any]] | None:
    """JSON objects ``{"name", "arguments" or "parameters"}``, alone, in a list, or one after the other."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while at < len(text):
        at = next((i for i in range(at, len(text)) if text[i] not in " \t\r\n;,"), len(text))
        if at == len(text):
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        for item in value if isinstance(value, list) else [value]:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str):
                return None
            arguments = item.get("arguments", item.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = _json(arguments)
            if not isinstance(arguments, dict):
                return None
            found.append((item["name"], arguments))
    return found or None


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


_NAMED = re.compile(r"\s*([\w.:-]+)\s*(?:\[CALL_ID\]\w+\s*)?\[ARGS\]\s*(\{.*\})\s*", re.DOTALL)


def _mistral(text: str) -> list[tuple[str, Any]] | None:
    """A JSON list, or ``name[ARGS]{...}`` of the newer ones."""
    if "[ARGS]" not in text:
        return _objects(text)
    found = []
    for part in text.split("[TOOL_CALLS]"):
        match = _NAMED.fullmatch(part)
        arguments = _json(match[2]) if match else None
        if match is None or not isinstance(arguments, dict):
            return None
        found.append((match[1], arguments))
    return found


_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


def _deepseek(text: str) -> list[tuple[str, Any]] | None:
    """``function SEP name, fenced JSON`` of V3 and R1; ``name SEP JSON`` of V3.1."""
    found = []
    for part in filter(str.strip, text.split(_CALL_END)):
        head, sep, tail = part.partition(_CALL)[2].partition(_SEP)
        fenced = re.fullmatch(r"\s*([^\n]+)\n```json\n(.*)\n```\s*", tail, re.DOTALL)
        name, arguments = (fenced[1], _json(fenced[2])) if fenced else (head, _json(tail))
        if not sep or not name.strip() or not isinstance(arguments, dict):
            return None
        found.append((name.strip(), arguments))
    return found or None


_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _qwen_xml(text: str) -> list[tuple[str, Any]] | None:
    """``<function=name><parameter=key>value</parameter></function>``; a value that is JSON is taken for that."""
    match = _FUNCTION.fullmatch(text)
    if not match:
        return None
    arguments = {}
    for key, value in _PARAMETER.findall(match[2]):
        parsed = _json(value)
        arguments[key.strip()] = value if parsed is None and value.strip() != "null" else parsed
    return [(match[1].strip(), arguments)]


# In the order in which a template is asked: the first whose words it has.
FORMATS = {
    "qwen_xml": Format("<tool_call>", "</tool_call>", _qwen_xml, ("<function=",)),
    "hermes": Format("<tool_call>", "</tool_call>", _objects, ("<tool_call>",)),
    "deepseek": Format(_CALLS, _CALLS_END, _deepseek, (_CALLS,), special=True),
    "mistral": Format("[TOOL_CALLS]", None, _mistral, ("[TOOL_CALLS]",), special=True, id_length=9),
    "llama3_json": Format(
        "<|python_tag|>", None, _objects, ("<|python_tag|>", '"parameters": dictionary', "Environment: ipython"), True
    ),
}


def format_of(template: str | None) -> str | None:
    """The row of ``FORMATS`` whose calls a chat template writes; None if it has the words of none."""
    return next((name for name, row in FORMATS.items() if any(w in (template or "") for w in row.known_by)), None)


class CallScanner:
    """Text of one choice in, text and calls out. Holds back what may still become a call."""

    def __init__(self, name: str):
        self._format, self._bare = FORMATS[name], name == "llama3_json"
        self._text, self._inside, self._started = "", False, False
        self.called = False

    def feed(self, text: str, last: bool = False) -> tuple[str, list[ToolCall]]:
        """What may be shown of the text so far, and the calls that are complete. ``last``: no more will come."""
        self._text += text
        shown, calls = "", []
        while True:
            if self._inside:
                content = self._take(last)
                if content is None:
                    break
                found = self._format.read(content[1])
                if found is None:
                    shown += content[0]  # as the model wrote it
                else:
                    calls += [self._made(*call) for call in found]
                continue
            at = self._begin()
            if at is None:
                keep = 0 if last else self._may_begin()
                cut = len(self._text) - keep
                shown, self._text = shown + self._text[:cut], self._text[cut:]
                break
            shown, self._text = shown + self._text[:at], self._text[at:]
            self._inside = True
        self._started = self._started or bool(shown.strip())
        self.called = self.called or bool(calls)
        return shown if shown.strip() or not self.called else "", calls

    def _begin(self) -> int | None:
        at = self._text.find(self._format.begin)
        if at >= 0:
            return at
        # Llama 3 also writes the bare object, and then nothing else.
        bare = self._bare and not self._started and self._text.lstrip().startswith("{")
        return 0 if bare else None

    def _may_begin(self) -> int:
        if self._bare and not self._started and not self._text.strip():
            return len(self._text)
        begin, longest = self._format.begin, min(len(self._format.begin) - 1, len(self._text))
        return next((k for k in range(longest, 0, -1) if begin.startswith(self._text[-k:])), 0)

    def _take(self, last: bool) -> tuple[str, str] | None:
        """The whole of a call as written, and what is inside of it; None: it is not complete yet."""
        row = self._format
        skip = len(row.begin) if self._text.startswith(row.begin) else 0
        if row.end is not None:
            end = self._text.find(row.end, skip)
            if end >= 0:
                whole, inner = self._text[: end + len(row.end)], self._text[skip:end]
            elif last:
                whole = inner = self._text  # cut off in the middle of a call: not one
            else:
                return None
        elif last:
            whole, inner = self._text, self._text[skip:]
        else:
            return None
        if not whole:
            self._inside = False
            return None
        self._text, self._inside = self._text[len(whole) :], False
        return whole, inner

    def _made(self, name: str, arguments: Any) -> ToolCall:
        length = self._format.id_length
        alphabet = string.ascii_letters + string.digits
        made = "".join(secrets.choice(alphabet) for _ in range(length)) if length else f"call_{secrets.token_hex(12)}"
        return ToolCall(name, json.dumps(arguments, ensure_ascii=False), made)
