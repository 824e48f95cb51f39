"""Answers as OpenAI's API writes them, whole and in chunks."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sgt_titan.client import Answer, Choice, Delta, TokenLogprob, ToolCall


@dataclass(frozen=True)
class Renderer:
    """Of one request. ``chat``: /v1/chat/completions, else /v1/completions."""

    chat: bool
    model: str
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, chunk: bool) -> dict[str, Any]:
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
            return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {"id": f"cmpl-{self.id}", "object": "text_completion", "created": self.created, "model": self.model}

    def whole(self, answers: Sequence[Answer], logprobs: bool) -> dict[str, Any]:
        """The response of a request that does not stream."""
        choices: list[dict[str, Any]] = []
        for answer in answers:
            for choice in answer.choices:
                listed = self._logprobs(choice.logprobs, 0) if logprobs else None
                text = {"message": _message(choice)}
                choices.append(
                    {
                        "index": len(choices),
                        **(text if self.chat else {"text": choice.text}),
                        "logprobs": listed,
                        "finish_reason": choice.finish_reason,
                    }
                )
        return {**self._head(False), "choices": choices, "usage": usage(answers)}

    def opening(self, choices: int) -> list[bytes]:
        """The events that name the speaker, of a chat."""
        role = {"role": "assistant", "content": ""}
        heads = [{"index": i, "delta": role, "logprobs": None, "finish_reason": None} for i in range(choices)]
        return [event({**self._head(True), "choices": [head]}) for head in heads] if self.chat else []

    def chunks(self, delta: Delta, logprobs: bool, offset: int) -> list[bytes]:
        """The events of a piece of an answer; ``offset``: characters of this choice before it."""
        listed = self._logprobs(delta.logprobs, offset) if logprobs and delta.logprobs else None
        text = {"delta": _delta(delta)} if self.chat else {"text": delta.text}
        choice = {"index": delta.index, **text, "logprobs": listed, "finish_reason": delta.finish_reason}
        return [event({**self._head(True), "choices": [choice]})]

    def closing(self, answers: Sequence[Answer], counts: bool) -> list[bytes]:
        """The last events; ``counts``: with ``stream_options.include_usage``."""
        used = [event({**self._head(True), "choices": [], "usage": usage(answers)})] if counts else []
        return [*used, event("[DONE]")]

    def failed(self, body: dict[str, Any]) -> bytes:
        """The event of an error in the middle of an answer."""
        return event(body)

    def _logprobs(self, tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        if self.chat:
            return {"content": [_entry(t.token, t.logprob, t.top) for t in tokens], "refusal": None}
        offsets, at = [], offset
        for token in tokens:
            offsets.append(at)
            at += len(token.token)
        return {
            "text_offset": offsets,
            "tokens": [token.token for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(token.top) for token in tokens],
        }


def _message(choice: Choice) -> dict[str, Any]:
    called = {"tool_calls": [_call(call) for call in choice.calls]} if choice.calls else {}
    thought = {"reasoning_content": choice.reasoning} if choice.reasoning else {}
    content = choice.text or (None if choice.calls else "")
    return {"role": "assistant", "content": content, "refusal": None, **thought, **called}


def _delta(delta: Delta) -> dict[str, Any]:
    called = {"tool_calls": [{"index": i, **_call(call)} for i, call in delta.calls]} if delta.calls else {}
    thought = {"reasoning_content": delta.reasoning} if delta.reasoning else {}
    return {**({"content": delta.text} if delta.text else {}), **thought, **called}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _entry(token: str, logprob: float, top: Sequence[tuple[str, float]] | None) -> dict[str, Any]:
    entry = {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", "replace"))}
    return entry if top is None else {**entry, "top_logprobs": [_entry(*pair, None) for pair in top]}


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Token counts: the prompt's are ours, the answer's the upstream's."""
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event. JSON in ASCII: clients that split lines at U+2028 must not cut an answer there."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}\n\n".encode()
