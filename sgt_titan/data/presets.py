"""Known data sets: a row of a table each. Adding one is adding a row."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A source with its columns. ``path`` is a hub name, or a local file if it starts with ``${``."""

    path: str
    format: str
    columns: dict[str, str] = field(default_factory=dict)
    strip_suffix: str = ""  # removed from the end of every response


PRESETS: dict[str, Preset] = {
    "openorca": Preset("Open-Orca/OpenOrca", "instruction",
                       {"system": "system_prompt", "instruction": "question", "output": "response"}),
    "alpaca": Preset("${SGT_TITAN_ASSETS}/alpaca/alpaca_8k.jsonl", "instruction",
                     {"instruction": "instruction", "input": "input", "output": "output"}),
    "tinystories": Preset("${SGT_TITAN_ASSETS}/text/tinystories.jsonl", "text", {"text": "text"}),
    "pupa": Preset("${SGT_TITAN_ASSETS}/pupa/PUPA_New.csv", "instruction",
                   {"instruction": "user_query", "output": "target_response", "private": "pii_units"}),
    "t0": Preset("${SGT_TITAN_ASSETS}/instruct/t0_15k.jsonl", "instruction",
                 {"instruction": "prompt", "output": "completion"}, strip_suffix="<|endoftext|>"),
    "flan_cot": Preset("${SGT_TITAN_ASSETS}/instruct/flan_cot_10k.jsonl", "instruction",
                       {"instruction": "question", "output": "answer"}),
    "demo": Preset("demo", "chat", {"messages": "messages", "private": "spans"}),
}  # fmt: skip

# Rows of the generated corpus when data.max_samples does not say.
DEMO_ROWS = 20_000
DEMO_SEED = 2  # the shipped trunk was trained on seed 0 and evaluated on seed 1
