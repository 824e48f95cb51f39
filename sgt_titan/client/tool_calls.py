"""Tool calls out of the text a model wrote, whole or as it comes: a table of formats, one row a family.

A server's own parsers belong to its chat route, which takes no embeddings. What does not parse stays text, and so does
what stands before, between and after calls: nothing a model wrote is lost. A format is chosen from the chat template,
whose words show what the model was taught.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgt_titan.client.typed import json_of, typed


@dataclass(frozen=True)
class ToolCall:
    """``arguments``: a JSON object, as text, as OpenAI's clients read it."""

    name: str
    arguments: str
    id: str


Written = list[tuple[str, dict[str, Any]]]  # names and arguments
Read = tuple[Written, int] | None


@dataclass(frozen=True)
class Format:
    """How one family writes calls.

    begin: what opens a call or a list of them. end: what closes it, where the answer's end does not; None: only that.
    read: the calls in what is between, and where they end; None if it begins with none. known_by: words of
    templates that teach it. special: whether begin or end are special tokens, which a server leaves out of its text
    unless told otherwise. bare, bare_end: what opens and closes a call whose ``begin`` the model forgot; only calls of
    tools that there are count then, and without ``bare_end`` only at the start of an answer. untyped: whether arguments
    are text, to be typed as the tool declares them.
    """

    begin: str
    end: str | None
    read: Callable[[str], Read]
    known_by: tuple[str, ...]
    special: bool = False
    id_length: int | None = None
    bare: str | None = None
    bare_end: str | None = None
    untyped: bool = False


_DECODER = json.JSONDecoder()


def _value(text: str, at: int) -> tuple[Any, int] | None:
    """The JSON value that begins at ``at``, and where it ends."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError):
        return None


# Patterns give nothing back (``*+``), and nothing is cut or looked through twice: what is read here may have been made
# to keep us busy.
_SPACE, _BETWEEN = re.compile(r"\s*+"), re.compile(r"[\s;,]*+")


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Where a run of what may be left out ends."""
    match = pattern.match(text, at)
    return at if match is None else match.end()


def _objects(text: str, at: int = 0) -> Read:
    """JSON objects ``{"name", "arguments" or "parameters"}``, alone, in a list, or one after the other."""
    found: Written = []
    while (value := _value(text, _after(_BETWEEN, text, at))) is not None:
        calls = [_named(item) for item in (value[0] if isinstance(value[0], list) else [value[0]])]
        if not calls or None in calls:
            break
        found += [call for call in calls if call is not None]
        at = value[1]
    return (found, _after(_BETWEEN, text, at)) if found else None


def _named(item: Any) -> tuple[str, dict[str, Any]] | None:
    if isinstance(item, dict) and isinstance(item.get("function"), dict):
        item = item["function"]  # as OpenAI writes it, which Llama 3.2 repeats
    if not isinstance(item, dict) or not isinstance(item.get("name"), str):
        return None
    # Without arguments it is some object that has a name, and may well be the answer.
    arguments = item.get("arguments", item.get("parameters"))
    if isinstance(arguments, str):
        try:
            arguments = json_of(arguments)
        except ValueError:
            return None
    return (item["name"], arguments) if isinstance(arguments, dict) else None


# [CALL_ID] and [ARGS] are special tokens, which some servers leave out even where they keep [TOOL_CALLS].
_NAMED = re.compile(r"\s*+([^\s{\[]++)\s*+(?:\[CALL_ID\]\s*+\w++\s*+)?+(?:\[ARGS\]\s*+)?+(?=\{)")
_MARK = "[TOOL_CALLS]"


def _mistral(text: str) -> Read:
    """A JSON list, or ``name[ARGS]{...}`` of the newer ones, and again after each mark."""
    found: Written = []
    end = at = 0
    while True:
        match = _NAMED.match(text, at)
        if match is None:
            read = _objects(text, at)
        else:
            value = _value(text, match.end())
            read = None if value is None else ([(match[1], value[0])], value[1])
        if read is None:
            return (found, end) if found else None
        found += read[0]
        end = _after(_SPACE, text, read[1])
        if not text.startswith(_MARK, end):
            return found, end
        at = end + len(_MARK)


_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
# ``function SEP name, fenced JSON`` of V3 and R1; ``name SEP JSON`` of V3.1.
_DEEPSEEK = re.compile(rf"\s*+{_CALL}([^<\n]*+){_SEP}\s*+([^\s`{{][^\n`{{]*+)?+\s*+(?:```(?:json)?\s*+)?+(?=\{{)")
_DEEPSEEK_END = re.compile(rf"\s*+(?:```\s*+)?+(?:{_CALL_END}|\Z)")


def _deepseek(text: str) -> Read:
    found: Written = []
    at = 0
    while match := _DEEPSEEK.match(text, at):
        value, name = _value(text, match.end()), (match[2] or match[1]).strip()
        end = _DEEPSEEK_END.match(text, value[1]) if value is not None else None
        if value is None or end is None or not name:
            break
        found.append((name, value[0]))
        at = end.end()
    return (found, _after(_SPACE, text, at)) if found else None


_FUNCTION, _FUNCTION_END = re.compile(r"\s*+<function=([^>\n]++)>"), re.compile(r"\s*+</function>")
# A parameter that the model did not close ends where the next begins, or the function ends.
_PARAMETER = re.compile(
    r"\s*+<parameter=([^>\n]++)>\n?+(.*?)\n?(?:</parameter>|(?=\n<parameter=)|(?=\n</function>))", re.DOTALL
)


def _qwen_xml(text: str) -> Read:
    """``<function=name><parameter=key>value</parameter></function>``, values as text."""
    found: Written = []
    at = 0
    while match := _FUNCTION.match(text, at):
        arguments: dict[str, Any] = {}
        here = match.end()
        while parameter := _PARAMETER.match(text, here):
            arguments[parameter[1].strip()] = parameter[2]
            here = parameter.end()
        end = _FUNCTION_END.match(text, here)
        if end is None:
            break
        found.append((match[1].strip(), arguments))
        at = end.end()
    return (found, _after(_SPACE, text, at)) if found else None


# In the order in which a template is asked: the first whose words it has.
FORMATS = {
    "qwen_xml": Format(
        "<tool_call>",
        "</tool_call>",
        _qwen_xml,
        ("<function=",),
        bare="<function=",
        bare_end="</function>",
        untyped=True,
    ),
    "hermes": Format("<tool_call>", "</tool_call>", _objects, ("<tool_call>",)),
    "deepseek": Format(_CALLS, _CALLS_END, _deepseek, (_CALLS,), special=True),
    "mistral": Format(_MARK, None, _mistral, (_MARK,), special=True, id_length=9),
    "llama3_json": Format(
        "<|python_tag|>",
        None,
        _objects,
        ("<|python_tag|>", '"parameters": dictionary', "Environment: ipython"),
        special=True,
        bare="{",
    ),
}


def format_of(template: str | None) -> str | None:
    """The row of ``FORMATS`` whose calls a chat template writes; None if it has the words of none."""
    return next((name for name, row in FORMATS.items() if any(w in (template or "") for w in row.known_by)), None)


class CallScanner:
    """Text of one choice in, text and calls out. Holds back what may still become a call. ``tools``: as the request
    defines them."""

    def __init__(self, name: str, tools: Sequence[Mapping[str, Any]] = ()):
        self._format = row = FORMATS[name]
        self._parameters = _parameters(tools)
        marks = [row.begin] + ([row.bare] if row.bare is not None and row.bare_end is not None else [])
        self._marks, self._begin_of_one = marks, re.compile("|".join(map(re.escape, marks)))
        self._text, self._inside, self._started = "", False, False
        self._searched = 0  # how much of a call that is not complete has been looked through for its end
        self.called = False

    def feed(self, text: str, last: bool = False) -> tuple[str, list[ToolCall]]:
        """What may be shown of the text so far, and the calls that are complete. ``last``: no more will come."""
        self._text += text
        at = 0
        said: list[str] = []
        calls: list[ToolCall] = []
        while True:
            if self._inside:
                end = self._end(at)
                if end is None and not last:
                    break
                end = len(self._text) if end is None else end
                found, left = self._read(self._text[at:end])
                calls += found
                said.append(left)
                at, self._inside, self._searched = end, False, 0
                continue
            begin = self._begin(at)
            if begin is None:
                cut = len(self._text) - (0 if last else self._may_begin(at))
                said.append(self._text[at:cut])
                at = cut
                break
            said.append(self._text[at:begin])
            at, self._inside = begin, True
        self._text = self._text[at:]
        shown = "".join(said)
        self._started = self._started or bool(shown.strip())
        self.called = self.called or bool(calls)
        return shown if shown.strip() or not self.called else "", calls

    def _first_is_bare(self, at: int) -> bool:
        """Whether nothing has been said before ``at``, and a call may begin there without a mark."""
        row = self._format
        return row.bare is not None and row.bare_end is None and at == 0 and not self._started

    def _begin(self, at: int) -> int | None:
        if self._first_is_bare(at) and self._text.startswith(self._format.bare or "", _after(_SPACE, self._text, at)):
            return at
        match = self._begin_of_one.search(self._text, at)
        return match.start() if match else None

    def _may_begin(self, at: int) -> int:
        """How many of the last characters may be the beginning of a mark."""
        length = len(self._text) - at
        if self._first_is_bare(at) and _after(_SPACE, self._text, at) == len(self._text):
            return length
        longest = min(max(map(len, self._marks)) - 1, length)
        return next((k for k in range(longest, 0, -1) if any(m.startswith(self._text[-k:]) for m in self._marks)), 0)

    def _end(self, at: int) -> int | None:
        """Where the call ends that begins at ``at``; None: at the end of the answer, as far as can be said."""
        row = self._format
        if row.end is None:
            return None
        marked = row.bare_end is None or self._text.startswith(row.begin, at)
        closes = row.end if marked else row.bare_end or ""
        found = self._text.find(closes, at + max(0, self._searched - len(closes)))
        if found < 0:
            self._searched = len(self._text) - at
            return None
        end = found + len(closes)
        if marked:
            return end
        after = _after(_SPACE, self._text, end)  # what opens was forgotten, what closes perhaps not
        if self._text.startswith(row.end, after):
            return after + len(row.end)
        return None if row.end.startswith(self._text[after : after + len(row.end)]) else end

    def _read(self, whole: str) -> tuple[list[ToolCall], str]:
        """Calls of what is one from begin to end, and what is text of it."""
        row = self._format
        marked = whole.startswith(row.begin)
        inner = whole.removeprefix(row.begin)
        inner = inner.removesuffix(row.end) if row.end is not None else inner
        read = row.read(inner)
        if read is None:
            return [], whole
        found, end = read
        if not marked and self._parameters and any(name not in self._parameters for name, _ in found):
            return [], whole
        try:
            return [self._made(name, arguments) for name, arguments in found], inner[end:]
        except (ValueError, RecursionError):  # a number without a word in JSON, half of a pair in a name
            return [], whole

    def _made(self, name: str, arguments: dict[str, Any]) -> ToolCall:
        if self._format.untyped:
            parameters = self._parameters.get(name)
            arguments = {key: typed(value, parameters, key) for key, value in arguments.items()}
        length = self._format.id_length
        alphabet = string.ascii_letters + string.digits
        made = "".join(secrets.choice(alphabet) for _ in range(length)) if length else f"call_{secrets.token_hex(12)}"
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        name.encode()
        try:
            text.encode()
        except UnicodeEncodeError:  # half of a pair can be escaped, not sent
            text = json.dumps(arguments, allow_nan=False)
        return ToolCall(name, text, made)


def _parameters(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of each tool's arguments, by its name."""
    functions = [tool.get("function") for tool in tools]
    return {
        f["name"]: f.get("parameters") for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)
    }
