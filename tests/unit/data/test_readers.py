"""Files as people have them: text stays text, and what is no row is said."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sgt_titan.config.schema import Data
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
