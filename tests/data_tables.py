"""What becomes of a user's rows: the tables of formats and of templates in docs/TRAINING.md.

python -m tests.data_tables formats | templates

A sample is written as `sgt-titan preview` writes it without colours: [obfuscated], {response}, the rest clear.
"""

from __future__ import annotations

import bz2
import gzip
import json
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from sgt_titan.config import schema
from sgt_titan.data.sources import load_rows
from sgt_titan.data.tokenization import encode_row, make_options
from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import PROMPT, RESPONSE, EncodedPrompt, encode_turns
from tests.chat_templates import ALL, bytewise

ROWS = [{"instruction": "hi", "output": "007"}, {"instruction": "ho", "output": "1.50"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
USER, CALL = {"role": "user", "content": "hi"}, {"name": "find", "arguments": {"who": "Ann"}}
CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {name}\n  data_files: x/{n}.jsonl\n" for n, name in ((1, "en"), (2, "de"))
) + "---\n"  # fmt: skip
CALL_ID = "call_" + "7" * 24  # as long as OpenAI's
CALLING = {
    "role": "assistant", "content": "", "tool_calls": [{"type": "function", "id": CALL_ID, "function": CALL}]
}  # fmt: skip
TALK = {"messages": [USER, {"role": "assistant", "content": "yes"}]}


def lines(*rows: Mapping[str, Any]) -> Callable[[Path], None]:
    return lambda path: (path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows)) and None


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content.encode() if isinstance(content, str) else content) and None


def files(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(LINES)

    return write


def saved(path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(str(path / "d"))


def arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path / "x.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def zstd(path: Path) -> None:
    with pa.output_stream(str(path / "x.jsonl.zst"), compression="zstd") as out:
        out.write(LINES.encode())


# What a user has -> how it is made, what of it is `data.source`, and other options of `data`.
FORMATS: dict[str, tuple[Callable[[Path], Any], str, dict[str, Any]]] = {
    "JSON lines": (lines(*ROWS), "x.jsonl", {}),
    ".ndjson": (text("x.ndjson", LINES), "x.ndjson", {}),
    "a JSON array": (text("x.json", json.dumps(ROWS)), "x.json", {}),
    ".gz": (text("x.jsonl.gz", gzip.compress(LINES.encode())), "x.jsonl.gz", {}),
    ".bz2": (text("x.jsonl.bz2", bz2.compress(LINES.encode())), "x.jsonl.bz2", {}),
    ".zst": (zstd, "x.jsonl.zst", {}),
    "CSV": (text("x.csv", "instruction,output\nhi,007\nho,true\n"), "x.csv", {}),
    "TSV": (text("x.tsv", "instruction\toutput\nhi\t007\n"), "x.tsv", {}),
    "text, a row a line": (text("x.txt", "hi ho\n\nhe\n"), "x.txt", {}),
    "Parquet": (lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path / "x.parquet"), "x.parquet", {}),
    "Arrow": (arrow, "x.arrow", {}),
    "a saved DatasetDict": (saved, "d", {}),
    "the same, `split: test`": (saved, "d", {"split": "test"}),
    "the same, `split: dev`": (saved, "d", {"split": "dev"}),
    "a folder of train and test files": (files("train.jsonl", "test.jsonl"), "", {"split": "test"}),
    "the same and another file": (files("train.jsonl", "more.jsonl"), "", {}),
    "a glob": (files("a/1.jsonl", "b/2.jsonl"), "*/*.jsonl", {}),
    "a name with brackets": (files("a[1].jsonl", "a1.jsonl"), "a[1].jsonl", {}),
    "JSON lines and CSV in a folder": (lambda path: (files("a.jsonl")(path), text("b.csv", "x\n")(path)), "", {}),
    "`split: test` of a file": (lines(*ROWS), "x.jsonl", {"split": "test"}),
    "the same named twice": (files("a.jsonl"), "[ab].jsonl\n{}/a.jsonl", {}),
    "a link to nothing": (lambda path: (path / "x.jsonl").symlink_to("y.jsonl"), "*", {}),
    "a folder with files of other kinds": (
        lambda path: (files("a.jsonl")(path), text("b.jsonl.xz", "?")(path)), "", {}),
    "subsets that README.md declares": (
        lambda path: (files("x/1.jsonl", "x/2.jsonl")(path), text("README.md", CARD)(path)), "", {}),
    "the same, `subset: en`": (
        lambda path: (files("x/1.jsonl", "x/2.jsonl")(path), text("README.md", CARD)(path)), "", {"subset": "en"}),
    "UTF-16": (text("x.csv", "text\nhi\n".encode("utf-16")), "x.csv", {}),
    "a pointer of Git LFS": (text("x.txt", "version https://git-lfs.github.com/spec/v1\n"), "x.txt", {}),
    "a key that stands twice": (text("x.jsonl", LINES + '{"instruction": "a", "instruction": "b"}\n'), "x.jsonl", {}),
    "a row of too few cells": (text("x.csv", "instruction,output\nhi,007\nho\n"), "x.csv", {}),
    "a file of another kind": (text("x.xlsx", "?"), "x.xlsx", {}),
    "OpenAI's turns": (lines(TALK), "x.jsonl", {}),
    "ShareGPT's, with `system`": (
        lines({"system": "s", "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]}),
        "x.jsonl", {}),
    "content in parts": (
        lines({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TALK["messages"][1]]}),
        "x.jsonl", {}),
    "a picture among them": (
        lines({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}), "x.jsonl", {}),
    "an unknown role": (lines({"messages": [{"role": "narrator", "content": "hi"}]}), "x.jsonl", {}),
    "the same, `roles: {narrator: user}`": (
        lines({"messages": [{"role": "narrator", "content": "hi"}]}), "x.jsonl", {"roles": {"narrator": "user"}}),
    "a call of a tool and its answer": (
        lines({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
                            {"role": "tool", "content": "Bonn"}, {"role": "assistant", "content": "yes"}]}),
        "x.jsonl", {"template": "plain"}),
    "two answers, `answers: all`": (
        lines({"messages": [USER, {"role": "assistant", "content": "a"}, USER, {"role": "assistant", "content": "b"}]}),
        "x.jsonl", {"answers": "all", "template": "plain"}),
    "an answer of weight 0": (
        lines({"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}]}), "x.jsonl", {}),
    "an answer that says nothing": (
        lines({"messages": [USER, {"role": "assistant", "content": None}]}), "x.jsonl", {}),
    "keys of turns that nobody reads": (
        lines({"messages": [{**USER, "mood": "x"}, {"role": "assistant", "content": "yes", "value": "no"}]}),
        "x.jsonl", {}),
    "Alpaca's history": (
        lines({"instruction": "hi", "output": "yes", "history": [["a", "b"]]}), "x.jsonl", {"template": "plain"}),
    "no turns": (lines({"messages": []}), "x.jsonl", {}),
    "no JSON": (text("x.jsonl", json.dumps(ROWS[0]) + "\n{\n"), "x.jsonl", {}),
    "a column that is not there": (lines(*ROWS), "x.jsonl", {"columns": {"output": "reply"}}),
}  # fmt: skip

# A conversation -> its turns, tools, and variables of the template.
CONVERSATIONS: dict[str, tuple[Sequence[Mapping[str, Any]], Sequence[Any], dict[str, Any]]] = {
    "answer": (TALK["messages"], (), {}),
    "thoughts": ([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}], (), {}),
    "thinking off": (TALK["messages"], (), {"enable_thinking": False, "thinking": False}),
    "an earlier answer": ([USER, TALK["messages"][1], USER, {"role": "assistant", "content": "no"}], (), {}),
    "a call": ([USER, CALLING, {"role": "tool", "content": "Bonn", "tool_call_id": CALL_ID}, TALK["messages"][1]],
               (), {}),
    "a call as the answer": ([USER, CALLING], (), {}),
}  # fmt: skip


def shown(tokenizer: Any, encoded: EncodedPrompt) -> str:
    marks = {PROMPT: "[{}]", RESPONSE: "{{{}}}"}
    runs = groupby(zip(encoded.ids, encoded.roles, strict=True), key=lambda pair: pair[1])
    said = "".join(marks.get(role, "{}").format(tokenizer.decode([t for t, _ in run])) for role, run in runs)
    return said.replace("\n", "\\n").replace("|", "\\|")


def formats() -> Iterator[tuple[str, str]]:
    """(what a user has, what becomes of it)."""
    tokenizer = bytewise(ALL["chatml"])
    for name, (make, source, options) in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows")
            path.mkdir()
            make(path)
            config = schema.Config()
            config.data = schema.Data(
                **{"source": str(path / source).format(path), "cache_dir": folder, "template": "plain", **options}
            )
            try:
                rows = load_rows(config.data)
                found = make_options(config, rows, tokenizer)
            except UserError as error:
                yield name, f"refused: {_short(str(error), path)}"
                continue
            said, bad = [], []
            for i in range(len(rows)):
                try:
                    samples = encode_row(rows, i, tokenizer, found)[1]
                    said += [shown(tokenizer, sample) for sample in samples]
                    bad += [f"not used: {note}" for sample in samples for note in sample.notes]
                except UserError as error:
                    bad.append(f"left out and counted: {_short(str(error), path)}")
            bad += [f"not read: {line}" for line in rows.left]
            yield name, "; ".join([*(f"`{sample}`" for sample in said), *bad])


def templates() -> Iterator[tuple[str, str, str]]:
    """(template, conversation, sample)."""
    for name, template in ALL.items():
        tokenizer = bytewise(template)
        for kind, (messages, tools, variables) in CONVERSATIONS.items():
            try:
                encoded = encode_turns(tokenizer, messages, template="chat", tools=tools, variables=variables)
                said = f"`{shown(tokenizer, encoded)}`" + "".join(f"; {note}" for note in encoded.notes)
            except UserError as error:
                said = f"refused: {_short(str(error), Path('/nowhere'))}"
            if kind == "answer":
                plain = said
            if kind == "answer" or said != plain:  # a variable that a template does not know of changes nothing
                yield name, kind, said


def _short(line: str, path: Path) -> str:
    line = line.replace(f"{path}/", "").replace(str(path), "DIR").split("; ")[0]
    return textwrap.shorten(line.replace("|", "\\|"), 110, placeholder=" ...")


def table(kind: str) -> str:
    if kind == "formats":
        heads, rows = ("what is there", "samples"), [*formats()]
    else:
        heads, rows = ("template like", "conversation", "sample"), [*templates()]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ("---",) * len(heads), *rows))


if __name__ == "__main__":
    print(table(sys.argv[1]))
