"""What a row of data has, by the names of ``data.columns``: for whoever checks a config and whoever reads rows."""

from __future__ import annotations

# The fields of each format; those of the second list may be missing or empty.
FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("text",), ("private",)),
    "instruction": (("instruction", "output"), ("system", "input", "history", "private")),
    "chat": (("messages",), ("system", "tools", "private")),
}

# Column names that are understood without being told, by field, in order of preference.
USUAL_COLUMNS: dict[str, tuple[str, ...]] = {
    "text": ("text", "content", "story"),
    "system": ("system", "system_prompt"),
    "instruction": ("instruction", "prompt", "question", "query"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer"),
    "history": ("history",),
    "messages": ("messages", "conversations"),
    "tools": ("tools",),
    "private": ("pii_units", "spans"),
}
# Fields of a turn, not of a row.
TURN_FIELDS = ("role", "content")
