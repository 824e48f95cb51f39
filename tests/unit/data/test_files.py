"""Which files a source means; what is there and not read is said, and what can be read in two ways is refused."""

from __future__ import annotations

import json
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sgt_titan.config.schema import Data
from sgt_titan.data.files import kind, split_of
from sgt_titan.data.sources import load_rows
from sgt_titan.errors import UserError


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


def test_names():
    assert [kind(n) for n in ("a.JSONL", "a.csv.gz", "a.parquet.gz", "a.md", "a")] == ["json", "csv", "", "", ""]
    assert [split_of(Path(n)) for n in ("train/x.csv", "test-00-of-02.parquet", "contest.csv", "dev/train.csv")] == (
        ["train", "test", "", "train"]
    )
