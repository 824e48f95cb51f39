"""``/v1/responses`` as the newer OpenAI clients speak it, for text and function tools: a chat in other words.

Nothing is stored here: what refers to an earlier response is refused, and clients send their conversation, as they do
with ``store: false``.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgt_titan.client import Answer, Choice, Delta, ToolCall
from sgt_titan.serving.errors import RequestError
from sgt_titan.serving.render import usage

# Of the request, under the same name in a chat.
_SAME = (
    *("model", "temperature", "top_p", "stream", "tool_choice", "parallel_tool_calls", "seed", "top_k", "min_p"),
    *("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "truncation", "include"),
    *("background", "chat_template_kwargs", "stop", "private"),
)
_STATE = {
    "previous_response_id": "nothing is stored here; send the conversation in input",
    "conversation": "nothing is stored here; send the conversation in input",
    "prompt": "nothing is stored here; send the text itself",
}
_IGNORED = ("store", "stream_options")  # store: false is what happens here
FIELDS = (*_SAME, *_IGNORED, "input", "instructions", "max_output_tokens", "tools", "text", "reasoning")


def chat_body(body: Any, *, drop: bool = False) -> dict[str, Any]:
    """The body of the same request as a chat. Raises RequestError naming what has no equal."""
    if not isinstance(body, dict):
        raise RequestError("body: must be a JSON object")
    body = {key: value for key, value in body.items() if value is not None}
    for key, why in _STATE.items():
        if key in body:
            raise RequestError(f"{key}: unsupported; {why}", code="unsupported_parameter", param=key)
    if body.get("store") not in (None, False) and not drop:
        raise RequestError("store: nothing is stored here; send store: false", param="store")
    chat = {key: body[key] for key in _SAME if key in body}
    chat |= {"messages": _messages(body)}
    if "max_output_tokens" in body:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    if "tools" in body:
        chat["tools"] = _tools(body["tools"])
    text, reasoning = _object(body, "text"), _object(body, "reasoning")
    if "format" in text:
        chat["response_format"] = _form(text.pop("format"))
    if isinstance(chat.get("tool_choice"), dict):  # here the name stands beside the type
        chat["tool_choice"] = {"type": chat["tool_choice"].get("type"), "function": chat["tool_choice"]}
    if "effort" in reasoning:
        chat["reasoning_effort"] = reasoning.pop("effort")
    # What is left has to be refused by its name, or dropped and said.
    left = {f"text.{key}": value for key, value in text.items()}
    left |= {f"reasoning.{key}": value for key, value in reasoning.items()}
    return chat | left | {key: value for key, value in body.items() if key not in FIELDS}


def _object(body: dict[str, Any], name: str) -> dict[str, Any]:
    given = body.get(name, {})
    if not isinstance(given, dict):
        raise RequestError(f"{name}: must be an object", param=name)
    return {key: value for key, value in given.items() if value is not None}


def _form(form: Any) -> Any:
    if isinstance(form, dict) and form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": form}
    return form or {"type": "text"}


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    said, messages = body.get("input"), []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    if isinstance(said, str):
        return [*messages, {"role": "user", "content": said}]
    if not isinstance(said, list) or not said:
        raise RequestError("input: must be text or a list of items", param="input")
    for i, item in enumerate(said):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "message":
            messages.append({"role": item.get("role"), "content": item.get("content")})
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "type": "function"}
            call["function"] = {"name": item.get("name"), "arguments": item.get("arguments")}
            if messages and messages[-1].get("role") == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            result = {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
            messages.append(result)
        elif kind == "reasoning":
            parts = item.get("content") or []
            if not isinstance(parts, list) or not all(isinstance(p, dict) for p in parts):
                raise RequestError(f"input[{i}].content: must be a list of parts", param="input")
            texts = [p.get("text", "") for p in parts]
            if not all(isinstance(text, str) for text in texts):
                raise RequestError(f"input[{i}].content: must be text", param="input")
            if thought := "".join(texts):
                messages.append({"role": "assistant", "content": None, "reasoning_content": thought})
        else:
            raise RequestError(
                f"input[{i}]: must be a message, function_call, function_call_output or reasoning", param="input"
            )
    return _joined(messages)


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A thought goes with the turn of the assistant that follows it."""
    found: list[dict[str, Any]] = []
    for message in messages:
        before = found[-1] if found else {}
        alone = before.keys() == {"role", "content", "reasoning_content"} and before["content"] is None
        if message.get("role") == "assistant" and alone:
            found[-1] = {**before, **{k: v for k, v in message.items() if v is not None}}
        else:
            found.append(message)
    return found


def _tools(tools: Any) -> list[dict[str, Any]]:
    found = []
    for i, tool in enumerate(tools if isinstance(tools, list) else [None]):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise RequestError(
                f"tools[{i}]: only functions; the provider's own tools would see the prompt", param="tools"
            )
        named = {key: tool[key] for key in ("name", "description", "parameters") if tool.get(key) is not None}
        found.append({"type": "function", "function": named})
    return found


@dataclass
class ResponsesRenderer:
    """The answer to one request, whole or as events. It numbers events, so it is good for one answer."""

    model: str
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    _sequence: int = 0
    _items: list[dict[str, Any]] = field(default_factory=list)  # as they are when done
    _open: dict[str, Any] | None = None  # the item whose text is coming

    def whole(self, answers: Sequence[Answer], logprobs: bool) -> dict[str, Any]:
        """The response of a request that does not stream."""
        choice = answers[0].choices[0]
        return self._response(_items_of(choice), choice.finish_reason, answers)

    def opening(self, choices: int) -> list[bytes]:
        head = self._response([], None, ())
        return [self._event("response.created", response=head), self._event("response.in_progress", response=head)]

    def chunks(self, delta: Delta, logprobs: bool, offset: int) -> list[bytes]:
        """The events of a piece of the answer."""
        events: list[bytes] = []
        if delta.reasoning:
            events += self._text("reasoning", delta.reasoning)
        if delta.text:
            events += self._text("message", delta.text)
        for _, call in delta.calls:
            events += [*self._close(), *self._called(call)]
        if delta.finish_reason:
            events += self._close()
        return events

    def closing(self, answers: Sequence[Answer], counts: bool) -> list[bytes]:
        choice = answers[0].choices[0]
        response = self._response(self._items, choice.finish_reason, answers)
        kind = "response.incomplete" if response["status"] == "incomplete" else "response.completed"
        return [*self._close(), self._event(kind, response=response)]

    def failed(self, body: dict[str, Any]) -> bytes:
        error = body["error"]
        return self._event("error", code=error["code"], message=error["message"], param=error["param"])

    def _event(self, kind: str, **data: Any) -> bytes:
        text = json.dumps({"type": kind, "sequence_number": self._sequence, **data}, separators=(",", ":"))
        self._sequence += 1
        return f"event: {kind}\ndata: {text}\n\n".encode()

    def _text(self, kind: str, text: str) -> list[bytes]:
        events, item = [], self._open
        if item is None or item["type"] != kind:
            events += self._close()
            item = _message("") if kind == "message" else _thought("")
            events += self._begin(item)
        item["content"][0]["text"] += text
        extra: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        name = "output_text" if kind == "message" else "reasoning_text"
        return [*events, self._event(f"response.{name}.delta", **self._where(item), delta=text, **extra)]

    def _begin(self, item: dict[str, Any]) -> list[bytes]:
        self._open = item
        shown = {**item, "status": "in_progress", "content": []}
        at = len(self._items)
        return [
            self._event("response.output_item.added", output_index=at, item=shown),
            self._event("response.content_part.added", **self._where(item), part=item["content"][0]),
        ]

    def _where(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._items), "content_index": 0}

    def _close(self) -> list[bytes]:
        item = self._open
        if item is None:
            return []
        part, where = item["content"][0], self._where(item)
        name = "output_text" if item["type"] == "message" else "reasoning_text"
        extra: dict[str, Any] = {"logprobs": []} if name == "output_text" else {}
        events = [
            self._event(f"response.{name}.done", **where, text=part["text"], **extra),
            self._event("response.content_part.done", **where, part=part),
            self._event("response.output_item.done", output_index=where["output_index"], item=item),
        ]
        self._items.append(item)
        self._open = None
        return events

    def _called(self, call: ToolCall) -> list[bytes]:
        item, at = _call(call), len(self._items)
        where = {"item_id": item["id"], "output_index": at}
        begun = {**item, "status": "in_progress", "arguments": ""}
        self._items.append(item)
        return [
            self._event("response.output_item.added", output_index=at, item=begun),
            self._event("response.function_call_arguments.delta", **where, delta=call.arguments),
            self._event("response.function_call_arguments.done", **where, arguments=call.arguments, name=call.name),
            self._event("response.output_item.done", output_index=at, item=item),
        ]

    def _response(self, output: list[dict[str, Any]], finish: str | None, answers: Sequence[Answer]) -> dict[str, Any]:
        cut = finish == "length"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress" if finish is None else "incomplete" if cut else "completed",
            "model": self.model,
            "output": list(output),
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": None,
            "metadata": {},
            "parallel_tool_calls": True,
            "temperature": None,
            "top_p": None,
            "tool_choice": "auto",
            "tools": [],
            "store": False,
            "usage": None if finish is None else _usage(answers),
        }


def _usage(answers: Sequence[Answer]) -> dict[str, Any]:
    counts = usage(answers)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counts["total_tokens"],
    }


def _items_of(choice: Choice) -> list[dict[str, Any]]:
    thought = [_thought(choice.reasoning)] if choice.reasoning else []
    message = [_message(choice.text)] if choice.text or not choice.calls else []
    return [*thought, *message, *map(_call, choice.calls)]


def _message(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "status": "completed"} | {
        "content": [part]
    }


def _thought(text: str) -> dict[str, Any]:
    part = {"type": "reasoning_text", "text": text}
    return {"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "status": "completed", "summary": []} | {
        "content": [part]
    }


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": f"fc_{secrets.token_hex(12)}",
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }
