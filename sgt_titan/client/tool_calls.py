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


@dataclass(frozen=True)
class Format:
    """How one family writes calls.

    begin: what opens a call or a list of them. end: what closes it, where the answer's end does not; None: only that.
    read: the calls in what is between, and the text that follows them; None if it begins with none. known_by: words of
    templates that teach it. special: whether begin or end are special tokens, which a server leaves out of its text
    unless told otherwise. bare, bare_end: what opens and closes a call whose ``begin`` the model forgot; only calls of
    tools that there are count then, and without ``bare_end`` only at the start of an answer. untyped: whether arguments
    are text, to be typed as the tool declares them.
    """

    begin: str
    end: str | None
    read: Callable[[str], tuple[Written, str] | None]
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


_BETWEEN = re.compile(r"[\s;,]*")


def _objects(text: str) -> tuple[Written, str] | None:
    """JSON objects ``{"name", "arguments" or "parameters"}``, alone, in a list, or one after the other."""
    found: Written = []
    at = 0
    while (value := _value(text, _BETWEEN.match(text, at).end())) is not None:  # type: ignore[union-attr]
        calls = [_named(item) for item in (value[0] if isinstance(value[0], list) else [value[0]])]
        if not calls or None in calls:
            break
        found += [call for call in calls if call is not None]
        at = value[1]
    return (found, text[_BETWEEN.match(text, at).end() :]) if found else None  # type: ignore[union-attr]


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
_NAMED = re.compile(r"\s*([^\s{\[]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")
_MARK = "[TOOL_CALLS]"


def _mistral(text: str) -> tuple[Written, str] | None:
    """A JSON list, or ``name[ARGS]{...}`` of the newer ones, and again after each mark."""
    found: Written = []
    left, after = text, text
    while True:
        match = _NAMED.match(after)
        if match is None:
            read = _objects(after)
        else:
            value = _value(after, match.end())
            read = None if value is None else ([(match[1], value[0])], after[value[1] :].lstrip())
        if read is None:
            return (found, left) if found else None
        found, left = found + read[0], read[1]
        if not left.startswith(_MARK):
            return found, left
        after = left.removeprefix(_MARK)


_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
# ``function SEP name, fenced JSON`` of V3 and R1; ``name SEP JSON`` of V3.1.
_DEEPSEEK = re.compile(rf"\s*{_CALL}([^<\n]*){_SEP}\s*([^\s`{{][^\n`{{]*)?\s*(?:```(?:json)?\s*)?(?=\{{)")
_DEEPSEEK_END = re.compile(rf"\s*(?:```\s*)?(?:{_CALL_END}|\Z)")


def _deepseek(text: str) -> tuple[Written, str] | None:
    found: Written = []
    at = 0
    while match := _DEEPSEEK.match(text, at):
        value, name = _value(text, match.end()), (match[2] or match[1]).strip()
        end = _DEEPSEEK_END.match(text, value[1]) if value is not None else None
        if value is None or end is None or not name:
            break
        found.append((name, value[0]))
        at = end.end()
    return (found, text[at:].lstrip()) if found else None


_FUNCTION, _FUNCTION_END = re.compile(r"\s*<function=([^>\n]+)>"), re.compile(r"\s*</function>")
# A parameter that the model did not close ends where the next begins, or the function ends.
_PARAMETER = re.compile(
    r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?(?:</parameter>|(?=\n<parameter=)|(?=\n</function>))", re.DOTALL
)


def _qwen_xml(text: str) -> tuple[Written, str] | None:
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
    return (found, text[at:].lstrip()) if found else None


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
        self._format = FORMATS[name]
        self._parameters = _parameters(tools)
        self._text, self._inside, self._started = "", False, False
        self.called = False

    def feed(self, text: str, last: bool = False) -> tuple[str, list[ToolCall]]:
        """What may be shown of the text so far, and the calls that are complete. ``last``: no more will come."""
        self._text += text
        shown = ""
        calls: list[ToolCall] = []
        while True:
            if self._inside:
                whole = self._take(last)
                if whole is None:
                    break
                found, left = self._read(whole)
                shown, calls = shown + left, calls + found
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
        self._started = self._started or bool(shown.strip())
        self.called = self.called or bool(calls)
        return shown if shown.strip() or not self.called else "", calls

    def _begin(self) -> int | None:
        row = self._format
        places = [self._text.find(row.begin)]
        if row.bare is not None and row.bare_end is not None:
            places.append(self._text.find(row.bare))
        elif row.bare is not None and not self._started and self._text.lstrip().startswith(row.bare):
            places.append(0)
        return min((at for at in places if at >= 0), default=None)

    def _may_begin(self) -> int:
        row = self._format
        if row.bare is not None and row.bare_end is None and not self._started and not self._text.strip():
            return len(self._text)
        marks = [row.begin] + ([row.bare] if row.bare is not None else [])
        longest = min(max(map(len, marks)) - 1, len(self._text))
        return next((k for k in range(longest, 0, -1) if any(m.startswith(self._text[-k:]) for m in marks)), 0)

    def _take(self, last: bool) -> str | None:
        """The whole of a call as written; None: it is not complete yet."""
        cut = self._end()
        if cut is None:
            if not last:
                return None
            cut = len(self._text)
        whole, self._text, self._inside = self._text[:cut], self._text[cut:], False
        return whole

    def _end(self) -> int | None:
        """Where the call ends at whose begin the text begins, if that can be said before the answer ends."""
        row = self._format
        if row.end is None:
            return None
        if self._text.startswith(row.begin) or row.bare_end is None:
            at = self._text.find(row.end)
            return None if at < 0 else at + len(row.end)
        at = self._text.find(row.bare_end)
        if at < 0:
            return None
        at += len(row.bare_end)
        rest = self._text[at:].lstrip()
        if rest.startswith(row.end):  # what opens was forgotten, what closes was not
            return len(self._text) - len(rest) + len(row.end)
        return None if row.end.startswith(rest) else at

    def _read(self, whole: str) -> tuple[list[ToolCall], str]:
        """Calls of what ``_take`` gave, and what is text of it."""
        row = self._format
        opened = whole.startswith(row.begin)
        inner = whole.removeprefix(row.begin)
        read = row.read(inner.removesuffix(row.end) if row.end is not None else inner)
        if read is None:
            return [], whole
        found, left = read
        if not opened and self._parameters and any(name not in self._parameters for name, _ in found):
            return [], whole
        try:
            return [self._made(name, arguments) for name, arguments in found], left
        except (ValueError, RecursionError):  # a number without a word in JSON
            return [], whole

    def _made(self, name: str, arguments: dict[str, Any]) -> ToolCall:
        if self._format.untyped:
            parameters = self._parameters.get(name)
            arguments = {key: typed(value, parameters, key) for key, value in arguments.items()}
        length = self._format.id_length
        alphabet = string.ascii_letters + string.digits
        made = "".join(secrets.choice(alphabet) for _ in range(length)) if length else f"call_{secrets.token_hex(12)}"
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        if not _is_unicode(text):  # half of a pair can be escaped, not sent
            text = json.dumps(arguments, allow_nan=False)
        return ToolCall(name, text, made)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parameters(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The schema of each tool's arguments, by its name."""
    functions = [tool.get("function") for tool in tools]
    return {
        f["name"]: f.get("parameters") for f in functions if isinstance(f, Mapping) and isinstance(f.get("name"), str)
    }
