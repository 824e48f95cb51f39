"""What an answer has to be, kept on this side: JSON, JSON of a schema, a call of a tool.

A server that holds answers to a schema needs the schema, and it says in clear what the application wants. So the model
is told, in obfuscated words at the end of the last turn of the user; the answer is checked here, and one that does not
fit goes back to the model with what is wrong. Schemas are a client's, with loops and expressions in them: they run in a
process of their own (client/confined.py), which fetches nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sgt_titan.client.answer import Choice, Delta
from sgt_titan.client.confined import TOO_LONG, confined
from sgt_titan.serving.errors import RequestError

SECONDS, CPU_SECONDS, MEMORY = 10, 3, 1 << 30
LONGEST_COMPLAINT = 300
ANY_OBJECT = {"type": "object"}

_CHILD = r"""
import json
import jsonschema, referencing
given = json.load(sys.stdin)
schema, text = given["schema"], given["text"]

def references(part):
    if isinstance(part, dict):
        for key, value in part.items():
            if key in ("$ref", "$dynamicRef") and isinstance(value, str):
                yield value
            yield from references(value)
    elif isinstance(part, list):
        for item in part:
            yield from references(item)

def say(**said):
    print(json.dumps(said))
    sys.exit(0)

kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
if any(not to.startswith("#") for to in references(schema)):
    say(bad="it refers to something outside of it")
try:
    kind.check_schema(schema)
    if text is None:
        say()
    value = json.loads(text)
    error = next(kind(schema, registry=referencing.Registry()).iter_errors(value), None)
except jsonschema.SchemaError:
    say(bad="it is none")
except referencing.exceptions.Unresolvable:
    say(bad="it refers to something that is not in it")
except (ValueError, RecursionError):
    say(complaint="it is no JSON")
say(**({} if error is None else {"complaint": f"{error.json_path}: {error.message}"}))
"""


@dataclass(frozen=True)
class Promise:
    """schema: of the text, if it is no call. call: the tool that has to be called, "" for any; None: none has to be.
    tools: their definitions. told: whether the model has to be told. held: whether the server is asked for an object.
    """

    schema: Mapping[str, Any] | None = field(default=None, repr=False)
    call: str | None = None
    tools: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    told: bool = True
    held: bool = False

    def check(self) -> None:
        """Raise RequestError for a schema that is none, or refers to something elsewhere."""
        if self.schema is not None and self.told:
            _fits(self.schema, None)

    def words(self) -> str:
        """What the model is told; contents like any other, and hidden like them."""
        if self.call is not None:
            which = f"the function {self.call}" if self.call else "one of the functions"
            return f"Call {which} and write nothing else."
        shown = json.dumps(self.schema, ensure_ascii=False)
        return f"Answer with a JSON object that fits this schema, and nothing else:\n{shown}"

    def complaint(self, whole: Delta) -> str | None:
        """What is wrong with an answer, for the model to read; None: it keeps the promise. Slow: for a thread."""
        if self.call is None:
            return None if whole.calls else self._of_text(whole.text)
        called = [call for _, call in whole.calls if self.call in ("", call.name)]
        if not called or len(called) < len(whole.calls):
            return "that is not the call that was asked for"
        definitions = {tool["function"]["name"]: tool["function"] for tool in self.tools}
        for call in called:
            if call.name not in definitions:
                return "there is no function of that name"
            parameters = definitions[call.name].get("parameters")
            found = _fits(parameters, call.arguments) if isinstance(parameters, dict) else None
            if found is not None:
                return f"the arguments do not fit, {found}"
        return None

    def _of_text(self, text: str) -> str | None:
        if self.schema is None:
            return None
        if self.told:
            return _fits(self.schema, text)
        try:
            return None if isinstance(json.loads(text), dict) else "it is no JSON object"
        except (ValueError, RecursionError):
            return "it is no JSON"


def promise_of(
    response_format: Mapping[str, Any] | None, tool_choice: Any, tools: Sequence[Mapping[str, Any]] | None
) -> Promise | None:
    """Of fields that ``schema.py`` let pass; None: any answer will do. Raises RequestError."""
    form, tools = response_format or {"type": "text"}, tools or ()
    forced = tool_choice == "required" or isinstance(tool_choice, dict)
    if forced:
        names = [(tool.get("function") or {}).get("name") for tool in tools]
        name = tool_choice["function"]["name"] if isinstance(tool_choice, dict) else ""
        if not names or not all(isinstance(one, str) for one in names) or (name and name not in names):
            raise RequestError("tool_choice: asks for a function that is not in tools", param="tool_choice")
        return Promise(call=name, tools=tools)
    if form["type"] == "json_object":
        return Promise(ANY_OBJECT, told=False, held=not tools)
    if form["type"] == "json_schema":
        schema = form["json_schema"]["schema"]
        if schema.get("type", "object") != "object":
            raise RequestError("response_format: a schema has to be of an object", param="response_format")
        return Promise(schema, held=not tools)
    return None


def told(messages: Sequence[dict[str, Any]], words: str) -> list[dict[str, Any]]:
    """The chat with ``words`` at the end of its last turn of the user: nothing before them changes, so that held noise
    holds. A turn of its own where the last one is somebody else's."""
    *before, last = messages
    content = last.get("content")
    if last.get("role") != "user" or not isinstance(content, str | list):
        return [*messages, {"role": "user", "content": words}]
    more: Any = f"{content}\n\n{words}" if isinstance(content, str) else [*content, {"type": "text", "text": words}]
    return [*before, {**last, "content": more}]


def again(
    messages: Sequence[dict[str, Any]], choice: Choice, complaint: str, hide: Callable[[str], str]
) -> list[dict[str, Any]]:
    """The chat with an answer that does not fit, and what is wrong with it. ``hide``: of words that may repeat
    values."""
    said = choice.text or "\n".join(f"{call.name} {call.arguments}" for call in choice.calls) or "-"
    words = f"That does not fit: {hide(complaint)}. Answer again, as asked for."
    return [*messages, {"role": "assistant", "content": said}, {"role": "user", "content": words}]


_FENCED = re.compile(r"\s*```(?:json)?[ \t]*\n(.*)\n[ \t]*```\s*", re.DOTALL)


def bare(text: str) -> str:
    """JSON without the fence that models like to put around it."""
    fenced = _FENCED.fullmatch(text)
    return fenced[1] if fenced else text


def _fits(schema: Mapping[str, Any], text: str | None) -> str | None:
    """What of ``text`` does not fit; None for the schema alone, or if all does. Raises RequestError for a schema that
    cannot be used."""
    given = json.dumps({"schema": schema, "text": text}).encode()
    code, said = confined(_CHILD, given, seconds=SECONDS, cpu_seconds=CPU_SECONDS, memory=MEMORY)
    if code in TOO_LONG:
        raise RequestError("the schema takes too long to check", param="response_format")
    try:
        found = json.loads(said)
    except ValueError:
        raise RequestError("the schema cannot be checked here", param="response_format") from None
    if "bad" in found:
        raise RequestError(f"the schema cannot be used: {found['bad']}", param="response_format")
    complaint = found.get("complaint")
    return None if complaint is None else complaint[:LONGEST_COMPLAINT]
