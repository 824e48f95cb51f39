"""Files as people have them: text stays text, and a split is honoured or refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import pickle
import threading
from decimal import Decimal
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sgt_titan.config.schema import Data
from sgt_titan.data.readers import ParquetRows, kind, split_of
from sgt_titan.data.sources import load_rows
from sgt_titan.errors import UserError

ROWS = [{"instruction": "007", "output": "true"}, {"instruction": "2024-01-02", "output": "+14155550100"},
        {"instruction": "1.50", "output": "NA"}]  # fmt: skip
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in ROWS)


@pytest.fixture
def read(tmp_path):
    """The contents of a source, and its fingerprint."""

    def rows(source, **options):
        found = load_rows(Data(source=str(source), cache_dir=str(tmp_path / "cache"), **options))
        return [[m["content"] for m in found.messages(i)] for i in range(len(found))], found.fingerprint

    return rows


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


def layout(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}) + "\n")
    return root


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("train.jsonl", "test.jsonl"), {}, ["train.jsonl"]),
        (("train.jsonl", "test.jsonl"), {"split": "test"}, ["test.jsonl"]),
        (("data/train-0.jsonl", "data/train-1.jsonl", "data/validation-0.jsonl"), {},
         ["data/train-0.jsonl", "data/train-1.jsonl"]),
        (("train/a.jsonl", "val/a.jsonl"), {"split": "validation"}, ["val/a.jsonl"]),
        (("a.jsonl", "b.jsonl"), {}, ["a.jsonl", "b.jsonl"]),
        (("x/a.jsonl", "y/b.jsonl"), {"subset": "y"}, ["y/b.jsonl"]),
    ],
)  # fmt: skip
def test_splits_are_honoured(tmp_path, read, names, options, expected):
    root = layout(tmp_path / "d", *names)
    assert [texts for (texts,) in read(root, **options)[0]] == expected


@pytest.mark.parametrize(
    ("names", "source", "options", "words"),
    [
        (("train.jsonl",), "", {"split": "test"}, "has no split 'test'; it has train"),
        (("a.jsonl",), "", {"split": "test"}, "no file in "),
        (("train.jsonl", "a.jsonl"), "", {}, "holds files of the splits train and others (a.jsonl); name files"),
        (("a.jsonl",), "", {"subset": "x"}, "has no folder 'x'"),
        (("a.jsonl",), "a.jsonl", {"split": "test"}, "data.split: 'test', but a file has no splits"),
        (("a.jsonl",), "a.jsonl", {"subset": "x"}, "data.subset: 'x', but a file has no subsets"),
        (("a.jsonl",), "*.jsonl", {"split": "test"}, "data.split: 'test', but a glob has no splits"),
        (("a.jsonl",), "*.csv", {}, "data.source: no file matches"),
    ],
)
def test_splits_that_are_not_there_are_refused(tmp_path, read, names, source, options, words):
    root = layout(tmp_path / "d", *names)
    with pytest.raises(UserError) as error:
        read(root / source if source else root, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"split": "test"}, {"subset": "x"}])
def test_presets_without_splits_refuse_them(options):
    with pytest.raises(UserError, match=r"but the preset demo has none"):
        load_rows(Data(source="demo", **options))


def test_saved_data_sets_of_several_splits(tmp_path, read):
    import datasets

    parts = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert read(tmp_path / "saved")[0] == [["train"]] and read(tmp_path / "saved", split="test")[0] == [["test"]]
    with pytest.raises(UserError, match=r"has no split 'dev'; it has test, train"):
        read(tmp_path / "saved", split="dev")
    with pytest.raises(UserError, match=r"is one saved data set without splits"):
        read(tmp_path / "saved" / "test", split="dev")


def test_lists_globs_and_addresses(tmp_path, read):
    root = layout(tmp_path / "d", "a.jsonl", "b.jsonl", "c.csv")
    assert [texts for (texts,) in read(f"{root}/*.jsonl")[0]] == ["a.jsonl", "b.jsonl"]
    assert [texts for (texts,) in read(f"{root}/b.jsonl\n{root}/a.jsonl")[0]] == ["b.jsonl", "a.jsonl"]
    with pytest.raises(UserError, match=r"mixes csv and json files"):
        read(f"{root}/a.jsonl\n{root}/c.csv")
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/bucket/a.jsonl", b'{"text": "far"}\n')
    assert read("memory://bucket/a.jsonl")[0] == [["far"]]
    store.pipe("/bucket/a.jsonl", b'{"text": "new"}\n')
    assert read("memory://bucket/*.jsonl")[0] == [["new"]]
    with pytest.raises(UserError, match=r"data\.source: memory://bucket/z\.jsonl cannot be fetched: FileNotFoundError"):
        read("memory://bucket/z.jsonl")
    with pytest.raises(UserError, match=r"memory://bucket/ is a folder; name its files, such as memory://bucket/\*"):
        read("memory://bucket/")
    store.makedirs("/bucket/b.jsonl", exist_ok=True)
    assert read("memory://bucket/*.jsonl")[0] == [["new"]], "a folder is no file, whatever its name"


@pytest.fixture
def web(tmp_path):
    """A web server of a folder: its address, the folder, and headers that it does not send."""
    root, silent = tmp_path / "web", set()
    root.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(root))

        def log_message(self, *args):
            pass

        def send_header(self, name, value):
            if name not in silent:
                super().send_header(name, value)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", root, silent
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("silent", [(), ("Last-Modified",)])
def test_a_file_of_the_web_that_was_replaced_is_another_one(web, read, silent):
    """Also behind a query, and where the server does not say which version it has."""
    url, root, left_out = web
    left_out |= set(silent)
    for n, text in enumerate(("one", "two")):
        (root / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
        os.utime(root / "a.jsonl", (n, n))
        assert read(f"{url}/a.jsonl?download=true")[0] == [[text]]
    with pytest.raises(UserError, match=r"z\.jsonl cannot be fetched: ClientResponseError: 404") as error:
        read(f"{url}/z.jsonl?signature=secret")
    assert "secret" not in str(error.value)


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


def test_names():
    assert [kind(n) for n in ("a.JSONL", "a.csv.gz", "a.parquet.gz", "a.md", "a")] == ["json", "csv", "", "", ""]
    from pathlib import Path

    assert [split_of(Path(n)) for n in ("train/x.csv", "test-00-of-02.parquet", "contest.csv", "dev/train.csv")] == (
        ["train", "test", "", "train"]
    )
