"""What a model wrote in a chat, taken apart: thoughts, calls, and the text that is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sgt_titan.client.answer import Delta, ToolCall
from sgt_titan.client.reasoning import ThoughtScanner, begins_inside, reasons
from sgt_titan.client.tool_calls import FORMATS, CallScanner, format_of
from sgt_titan.errors import UserError


@dataclass(frozen=True)
class Reading:
    """How a model's answers are read. calls: a row of ``FORMATS``; None: calls stay text. thoughts: kept apart."""

    calls: str | None
    thoughts: bool

    @property
    def special(self) -> bool:
        """Whether a server has to be told to leave special tokens in its text."""
        return self.calls is not None and FORMATS[self.calls].special


def reading_of(template: str | None, calls: str | None = None, thoughts: str | None = None) -> Reading:
    """As the chat template has it, unless said otherwise: ``calls`` a format or none, ``thoughts`` think or none.

    Raises UserError for a format that is none.
    """
    if calls is not None and calls not in (*FORMATS, "none"):
        raise UserError(f"tool format: {calls!r}, must be one of {', '.join(FORMATS)} or none")
    if thoughts is not None and thoughts not in ("think", "none"):
        raise UserError(f"reasoning: {thoughts!r}, must be think or none")
    chosen = format_of(template) if calls is None else calls
    return Reading(None if chosen == "none" else chosen, reasons(template) if thoughts is None else thoughts == "think")


class ChoiceReader:
    """Deltas of one choice in; out the same with ``reasoning`` and ``calls`` apart from ``text``. ``tools``: as the
    request defines them; ``one``: only the first call is wanted."""

    def __init__(self, reading: Reading, *, tools: Sequence[Mapping[str, Any]], prompt_end: str, one: bool = False):
        self._thoughts = ThoughtScanner(begins_inside(prompt_end)) if reading.thoughts else None
        self._calls = CallScanner(reading.calls, tools) if tools and reading.calls else None
        self._count, self._most = 0, 1 if one else None

    def feed(self, delta: Delta) -> Delta:
        last = delta.finish_reason is not None
        thought, text = "", delta.text
        calls: list[ToolCall] = []
        if self._thoughts is not None:
            thought, text = self._thoughts.feed(text, last)
        if self._calls is not None:
            text, calls = self._calls.feed(text, last)
        if self._most is not None:
            calls = calls[: self._most - self._count]
        first, self._count = self._count, self._count + len(calls)
        finish = delta.finish_reason
        if finish == "stop" and self._count:
            finish = "tool_calls"
        return replace(delta, text=text, reasoning=thought, calls=tuple(enumerate(calls, first)), finish_reason=finish)
