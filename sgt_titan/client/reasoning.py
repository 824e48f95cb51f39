"""Reasoning apart from the answer: what a model thinks between ``<think>`` and ``</think>``, as it comes."""

from __future__ import annotations

BEGIN, END = "<think>", "</think>"


def reasons(template: str | None) -> bool:
    """Whether a chat template speaks of thoughts."""
    return END in (template or "")


def begins_inside(prompt_end: str) -> bool:
    """Whether the prompt ends within a thought, which some templates open for the model."""
    return prompt_end.rfind(BEGIN) > prompt_end.rfind(END)


class ThoughtScanner:
    """Text of one choice in, thoughts and text out. Only a first thought is one; later tags are text."""

    def __init__(self, inside: bool):
        self._tag: str | None = END if inside else BEGIN  # what is waited for
        self._text = ""
        self._trim = inside

    def feed(self, text: str, last: bool = False) -> tuple[str, str]:
        """What may be shown so far, as (thought, text)."""
        if self._tag is None:
            return "", self._trimmed(text)
        self._text += text
        thought = ""
        if self._tag == BEGIN:
            head = self._text.lstrip()
            if not head.startswith(BEGIN):
                if BEGIN.startswith(head) and not last:
                    return "", ""
                self._tag = None
                shown, self._text = self._text, ""
                return "", shown
            self._tag, self._text, self._trim = END, head[len(BEGIN) :], True
        at = self._text.find(END)
        if at < 0:
            keep = 0 if last else self._may_end()
            cut = len(self._text) - keep
            thought, self._text = self._text[:cut], self._text[cut:]
            return self._trimmed(thought), ""
        thought, rest = self._text[:at], self._text[at + len(END) :]
        thought = self._trimmed(thought)
        self._tag, self._text, self._trim = None, "", True
        return thought, self._trimmed(rest)

    def _may_end(self) -> int:
        longest = min(len(END) - 1, len(self._text))
        return next((k for k in range(longest, 0, -1) if END.startswith(self._text[-k:])), 0)

    def _trimmed(self, text: str) -> str:
        """Without the line breaks that follow a tag."""
        if self._trim:
            text = text.lstrip("\n")
            self._trim = not text
        return text
