"""Files as people have them: text stays text, and what is no row is said."""

from __future__ import annotations

import bz2
import gzip
import json
import mmap
import os
import pickle
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sgt_titan.config.schema import Data
from sgt_titan.data import readers
from sgt_titan.data.readers import ParquetRows
from sgt_titan.data.sources import load_rows
from sgt_titan.errors import UserError

ROWS = [{"instruction": "007", "output": "true"}, {"instruction": "2024-01-02", "output": "+14155550100"},
        {"instruction": "1.50", "output": "NA"}]  # fmt: skip
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in ROWS)


def compressed(text: str, how: str) -> bytes:
    if how == "zst":
        return pa.compress(text.encode(), codec="zstd", asbytes=True)
    # Without the time: processes that collect the same tests must name them alike.
    return gzip.compress(text.encode(), mtime=0) if how == "gz" else bz2.compress(text.encode())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES.encode()),
        ("a.ndjson", LINES.encode()),
        ("a.json", json.dumps(ROWS, indent=1).encode()),
        ("a.jsonl.gz", compressed(LINES, "gz")),
        ("a.json.bz2", compressed(json.dumps(ROWS), "bz2")),
        ("a.jsonl.zst", compressed(LINES, "zst")),
        ("a.csv", CSV.encode()),
        ("a.csv.gz", compressed(CSV, "gz")),
        ("a.tsv", CSV.replace(",", "\t").encode()),
        ("a[1].csv", CSV.encode()),
    ],
)
def test_text_stays_text(tmp_path, read, name, content):
    (tmp_path / "a1.csv").write_text("instruction,output\nx,y\n")  # what a glob would read instead
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name)[0] == [list(row.values()) for row in ROWS]


def test_numbers_as_they_are_written_and_nothing_is_nothing(tmp_path, read):
    (tmp_path / "a.json").write_text('[{"instruction": 1.50, "output": true},\n {"instruction": "a", "output": null}]')
    (tmp_path / "b.csv").write_text("instruction,output\n1.50,true\na,\n")
    assert read(tmp_path / "a.json")[0] == read(tmp_path / "b.csv")[0] == [["1.50", "true"], ["a"]]


def test_plain_text_is_a_row_a_line(tmp_path, read):
    (tmp_path / "a.txt").write_text("one\n\n two\n")
    assert read(tmp_path / "a.txt")[0] == [["one"], [" two"]]


def test_parquet_in_place_and_in_any_order(tmp_path, read):
    for n, name in ((2500, "a"), (3, "b")):
        table = pa.table({"text": [f"{name}{i}" for i in range(n)], "n": list(range(n))})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=700)
    rows = ParquetRows([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    expected = [f"a{i}" for i in range(2500)] + ["b0", "b1", "b2"]
    assert [rows[i]["text"] for i in range(len(rows))] == expected
    again = pickle.loads(pickle.dumps(rows))
    for i in (2502, 0, 1399, 1400, 699, 2499, 2500, 5):
        assert again[i]["text"] == expected[i]
    pq.write_table(pa.table({"text": expected}), tmp_path / "one.parquet")  # a group of several batches
    assert ParquetRows([tmp_path / "one.parquet"])[2400]["text"] == expected[2400]
    with pytest.raises(UserError, match=r"c\.parquet: has other columns than a\.parquet"):
        pq.write_table(pa.table({"x": [1]}), tmp_path / "c.parquet")
        ParquetRows([tmp_path / "a.parquet", tmp_path / "c.parquet"])


def test_a_file_that_was_replaced_is_another_one(tmp_path, read):
    for name, first, second in (
        ("a.csv", b"text\nold\n", b"text\nnew\n"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "old"}'), gzip.compress(b'{"text": "new"}')),
    ):
        path = tmp_path / name
        path.write_bytes(first)
        before, when = read(path), path.stat()
        path.write_bytes(second)
        os.utime(path, ns=(when.st_atime_ns, when.st_mtime_ns))
        after = read(path)
        assert before[0] == [["old"]] and after[0] == [["new"]] and before[1] != after[1]


def test_columns_that_first_appear_late(tmp_path, read):
    rows = [{"instruction": "a", "output": "b"}] * 150 + [{"instruction": "a", "output": "b", "system": "s", "x": "y"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "a.jsonl")[0][-1] == ["s", "a", "b"]
    assert read(tmp_path / "a.jsonl", columns={"system": "x"})[0][-1] == ["y", "a", "b"]
    with pytest.raises(UserError, match=r"data\.columns\.system: .*a\.jsonl has no column 'z'"):
        read(tmp_path / "a.jsonl", columns={"system": "z"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,a\n1,2\n", "column 'a' stands twice in the first line"),
        ('text\n"1\n', "cannot be read as csv: Error: unexpected end of data"),
    ],
)
def test_csv_that_is_none(tmp_path, read, content, words):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.csv")
    assert str(error.value) == f"{tmp_path}/a.csv: {words}"


def test_a_row_of_too_many_cells_is_one_bad_row(tmp_path):
    (tmp_path / "a.csv").write_text("text\none\n1,2\nthree\n")
    rows = load_rows(Data(source=str(tmp_path / "a.csv"), cache_dir=str(tmp_path / "cache")))
    assert [rows.messages(i)[0]["content"] for i in (0, 2)] == ["one", "three"]
    with pytest.raises(UserError, match=r"a\.csv: row 2: has 2 cells, the first line has 1$"):
        rows.messages(1)


def test_a_row_of_too_few_cells_is_one_bad_row_and_a_blank_line_is_none(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output\na,b\n\n  \nc\nd,\n")
    rows = load_rows(Data(source=str(tmp_path / "a.csv"), cache_dir=str(tmp_path / "cache")))
    assert len(rows) == 3 and [m["content"] for m in rows.messages(2)] == ["d"]
    with pytest.raises(UserError, match=r"a\.csv: row 2: has 1 cells, the first line has 2$"):
        rows.messages(1)


def test_what_pandas_writes(tmp_path, read):
    """NaN is a value that is missing, the column of its index has no name."""
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "x", "output": NaN}\n{"instruction": -Infinity, "output": "y"}\n'
    )
    assert read(tmp_path / "a.jsonl")[0] == [["x"], ["-Infinity", "y"]]
    (tmp_path / "a.csv").write_text(",instruction,output\n0,x,y\n")
    assert read(f"file://{tmp_path}/a.csv")[0] == [["x", "y"]]
    table = pa.table(
        {"instruction": ["x", "z"], "output": pa.array([float("nan"), 2.5]), "input": [None, Decimal("1.50")]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == [["x"], ["z\n\n1.50", "2.5"]]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        # Turns without a row around them: the first line's would be rows, and the rest be gone.
        ("a.jsonl", '[{"content": "x"}]\n[{"content": "y"}]\n', "holds more behind its first array"),
        (
            "a.json",
            '{\n "data": []\n}',
            "row 1: cannot be read as JSON .* rows are objects, one a line, or an array of them",
        ),
    ],
)
def test_json_that_is_no_rows(tmp_path, read, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_numbers_that_python_does_not_read_are_text(tmp_path, read, name):
    rows = [
        '{"instruction": %s, "output": -0}' % ("7" * 5000),
        '{"instruction": 1e999, "output": 12345678901234567890}',
    ]
    text = f"[{', '.join(rows)}]" if name == "a.json" else "\n".join(rows)
    (tmp_path / name).write_bytes(compressed(text, "gz") if name.endswith("gz") else text.encode())
    assert read(tmp_path / name)[0] == [["7" * 5000, "-0"], ["1e999", "12345678901234567890"]]


def test_a_key_that_stands_twice_is_a_bad_row(tmp_path):
    """Readers of JSON disagree on which of the two counts; wherever it stands."""
    turns = '[{"role": "user", "content": "a", "content": "b"}]'
    (tmp_path / "a.jsonl").write_text(
        f'{{"messages": []}}\n{{"messages": {turns}}}\n{{"messages": [], "messages": []}}\n'
    )
    rows = load_rows(Data(source=str(tmp_path / "a.jsonl")))
    for i in (1, 2):
        with pytest.raises(
            UserError, match=rf"row {i + 1}: cannot be read as JSON \(a key stands twice in one object\)"
        ):
            rows.messages(i)


def test_a_first_row_that_is_none_is_one_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xe9"}\n{"text": "a"}\n')
    rows = load_rows(Data(source=str(tmp_path / "a.jsonl")))
    assert rows.messages(1)[0]["content"] == "a"
    with pytest.raises(UserError, match=r"row 1: cannot be read as JSON \(not UTF-8\)"):
        rows.messages(0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is no UTF-8 text (UTF-16, or binary); save it as UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16-be"), "is no UTF-8 text"),
        ("a.txt", "a\nb\n".encode("utf-16-le"), "is no UTF-8 text"),
        ("a.txt", "\xe9\n".encode("latin-1"), "is not UTF-8 text"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 500, mtime=0)[:-9], "cannot be read as json: OSError: Truncated"),
        ("a.jsonl.zst", compressed(LINES * 500, "zst")[:-9], "cannot be read as json: OSError: Truncated"),
        ("a.json", b'[{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}]", "cannot be read as json: nested too deeply"),
        ("a.parquet", b"", "cannot be read as parquet: ArrowInvalid"),
        ("a.csv", b"", "no usable rows: the source is empty"),
    ],
)
def test_files_that_are_not_what_their_name_says(tmp_path, read, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read(tmp_path / name)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_marks_at_the_beginning_and_several_streams_in_a_file(tmp_path, read):
    """A byte order mark; what `cat a.gz b.gz` and parallel compressors write."""
    bom = "\ufeff".encode()
    (tmp_path / "a.jsonl").write_bytes(bom + b'{"text": "one"}\r\n{"text": "two"}\r\n')
    (tmp_path / "b.txt").write_bytes(bom + b"one\r\ntwo\r\n")
    (tmp_path / "c.csv").write_bytes(bom + b"text\rone\rtwo\r")
    for how in ("gz", "bz2", "zst"):
        parts = [compressed(json.dumps({"text": text}) + "\n", how) for text in ("one", "two")]
        (tmp_path / f"d.jsonl.{how}").write_bytes(b"".join(parts))
    for file in sorted(tmp_path.glob("*.*")):
        assert read(file)[0] == [["one"], ["two"]], file


def test_columns_of_other_types(tmp_path):
    """Lists, bytes and durations are no text; a list of structs is a list of turns, an absent key a null."""
    import datetime

    table = {
        "instruction": [["a"], ["b"]],
        "output": [b"a", b"b"],
        "text": [datetime.timedelta(1)] * 2,
        "messages": [[{"role": "user", "content": "a", "name": None}], [{"role": "user", "content": "b", "name": "c"}]],
    }
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    rows = load_rows(Data(source=str(tmp_path / "a.parquet")))
    assert rows.format == "chat" and rows.unused == ("instruction", "output", "text")
    assert rows.conversation(0).ignored == () and rows.conversation(1).ignored == ("key name of turns",)
    for fmt, columns, kind in (("text", {}, "timedelta"), ("instruction", {}, "list"),
                               ("instruction", {"instruction": "output"}, "bytes")):  # fmt: skip
        with pytest.raises(UserError, match=f"must be text, is {kind}"):
            load_rows(Data(source=str(tmp_path / "a.parquet"), format=fmt, columns=columns)).messages(0)


def test_columns_that_stand_twice_and_feather(tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    for name, new in (("b.arrow", pa.ipc.new_stream), ("c.arrow", pa.ipc.new_file)):
        with pa.OSFile(str(tmp_path / name), "wb") as sink, new(sink, twice.schema) as writer:
            writer.write_table(twice)
    for name, words in (
        ("a.parquet", "column 'text' stands in it twice"),
        ("b.arrow", "cannot be read as arrow: "),
        ("c.arrow", "is in Arrow's file format (Feather); write a stream, or Parquet"),
    ):
        with pytest.raises(UserError) as error:
            load_rows(Data(source=str(tmp_path / name)))
        assert words in str(error.value)


def test_columns_that_no_early_row_has_are_said(tmp_path):
    rows = [{"text": "a"}] * 120 + [{"text": "b", "note": "c", "nothing": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_rows(Data(source=str(tmp_path / "a.jsonl")))
    assert found.conversation(0).ignored == ()
    assert found.conversation(120).ignored == ("column note, which no early row has",)


def test_a_column_is_found_wherever_a_window_ends(tmp_path, monkeypatch):
    """Files that are longer than a window, with the only row that has the column at every place of one."""
    monkeypatch.setattr(readers, "WINDOW", mmap.PAGESIZE)
    file = tmp_path / "rows.jsonl"
    for before in (0, 1, *range(mmap.PAGESIZE - 24, mmap.PAGESIZE + 4), 3 * mmap.PAGESIZE - 9):
        file.write_text(
            json.dumps({"text": "a" * before}) + "\n" + json.dumps({"rare": 1}) + "\n" + '{"text": ""}\n' * 900
        )
        rows = readers.JsonLines([file])
        assert rows.has("rare") and rows.has("text") and not rows.has("nobody's")
