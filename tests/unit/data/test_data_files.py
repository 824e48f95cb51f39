"""Which files a source means; what is there and not read is said, and what can be read in two ways is refused."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest
from fsspec.spec import AbstractFileSystem

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


REGISTRY = importlib.import_module("fsspec.registry")  # the attribute of that name is another object


class Bucket(AbstractFileSystem):
    """A store as s3fs and the hub's are: a file has a tag of its version, and listings are kept until they are told."""

    root_marker = ""
    files: ClassVar[dict[str, bytes]] = {}
    denied: ClassVar[bool] = False
    fetched: ClassVar[list[str]] = []

    def ls(self, path, detail=True, **options):
        if self.denied:
            raise PermissionError("Access Denied")
        path = self._strip_protocol(path).rstrip("/")
        if path not in self.dircache:
            listed = {}
            for name, content in self.files.items():
                if name == path:
                    listed[name] = {"name": name, "size": len(content), "type": "file", "ETag": str(hash(content))}
                elif name.startswith(f"{path}/"):
                    child = path + "/" + name.removeprefix(f"{path}/").split("/")[0]
                    kind = "file" if child == name else "directory"
                    listed[child] = {"name": child, "size": len(content), "type": kind, "ETag": str(hash(content))}
            if not listed:
                raise FileNotFoundError(path)
            self.dircache[path] = list(listed.values())
        return self.dircache[path] if detail else [entry["name"] for entry in self.dircache[path]]

    def invalidate_cache(self, path=None):
        self.dircache.clear()

    def _open(self, path, mode="rb", **options):
        self.fetched.append(path)
        return io.BytesIO(self.files[self._strip_protocol(path)])


@pytest.fixture(params=["s3://bucket/d", "hf://datasets/owner/name"])
def bucket(request, monkeypatch):
    """Its address; the protocol is that of a stand-in meanwhile."""
    protocol, _, root = request.param.partition("://")
    store = type("Store", (Bucket,), {"protocol": protocol, "files": {}, "denied": False, "fetched": []})
    monkeypatch.setitem(REGISTRY._registry, protocol, store)
    return request.param, root, store


def test_buckets_and_the_hub(bucket, read):
    """Fetched once for each version of a file, whatever was listed before."""
    url, root, store = bucket
    store.files |= {f"{root}/{name}.jsonl": json.dumps({"text": name}).encode() for name in "ab"}
    store.files[f"{root}/c.csv.gz"] = gzip.compress(b"text\n007\n")
    assert read(f"{url}/a.jsonl")[0] == [["a"]] and read(f"{url}/*.jsonl")[0] == [["a"], ["b"]]
    assert read(f"{url}/c.csv.gz")[0] == [["007"]]
    assert sorted(store.fetched) == sorted(store.files), "each once"
    before = read(f"{url}/*.jsonl")[1]
    store.files[f"{root}/b.jsonl"] = b'{"text": "new"}'
    store.files[f"{root}/z.jsonl"] = b'{"text": "more"}'
    found, after = read(f"{url}/*.jsonl")
    assert found == [["a"], ["new"], ["more"]] and after != before
    assert len(store.fetched) == 5
    assert read(f"{url}/a.jsonl\n{url}/z.jsonl")[0] == [["a"], ["more"]]


@pytest.mark.parametrize(
    ("end", "options", "words"),
    [
        ("none.jsonl", {}, "none.jsonl cannot be fetched: FileNotFoundError"),
        ("*.parquet", {}, "no file matches"),
        ("", {}, "is a folder; name its files, such as"),
        ("a.jsonl", {"split": "test"}, "data.split: 'test', but an address has no splits"),
        ("*", {}, "mixes csv and json files"),
        ("a.xlsx", {}, "a.xlsx: unknown kind of file"),
    ],
)
def test_what_buckets_and_the_hub_do_not_have(bucket, read, end, options, words):
    url, root, store = bucket
    store.files |= dict.fromkeys((f"{root}/a.jsonl", f"{root}/b.csv", f"{root}/a.xlsx"), b"{}")
    if end == "*":
        del store.files[f"{root}/a.xlsx"]
    with pytest.raises(UserError) as error:
        read(f"{url}/{end}", **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_bucket_that_is_closed_and_one_without_its_package(bucket, read, monkeypatch):
    url, _, store = bucket
    store.denied = True
    with pytest.raises(UserError, match=r"a\.jsonl cannot be fetched: PermissionError: Access Denied"):
        read(f"{url}/a.jsonl")
    protocol = url.partition(":")[0]
    monkeypatch.delitem(REGISTRY._registry, protocol)
    missing = {"class": "not_installed.Store", "err": f"Install the package of {protocol}"}
    monkeypatch.setitem(REGISTRY.known_implementations, protocol, missing)
    with pytest.raises(UserError, match=f"b.jsonl needs another package: Install the package of {protocol}"):
        read(f"{url}/b.jsonl")


def test_links_are_followed_and_nothing_is_read_twice(tmp_path, read):
    root = layout(tmp_path / "d", "a.jsonl")
    (tmp_path / "real").mkdir()
    layout(tmp_path / "real", "b.jsonl")
    (root / "more").symlink_to(tmp_path / "real")
    assert [texts for (texts,) in read(root)[0]] == ["a.jsonl", "b.jsonl"]
    (root / "again").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match=r"more: is .*again once more, through a link"):
        read(root)
    (root / "again").unlink()
    (root / "loop").symlink_to(root)
    with pytest.raises(UserError, match="once more, through a link"):
        read(root)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("d", "latest.jsonl: and {d}/a.jsonl are one file; its rows would come twice"),
        ("d/*.jsonl", "latest.jsonl: and {d}/a.jsonl are one file"),
        ("d/a.jsonl\nd/a.jsonl", "a.jsonl: is named twice in"),
        ("d/a*\nd/latest.jsonl", "are one file"),
        ("e", "b.jsonl: is a link to nothing"),
        ("e/*", "b.jsonl: is a link to nothing"),
        ("e/b.jsonl", "e/b.jsonl does not exist"),
        ("pipe.jsonl", "pipe.jsonl is no regular file"),
    ],
)
def test_one_file_under_two_names_and_links_to_nothing(tmp_path, read, source, words):
    layout(tmp_path / "d", "a.jsonl")
    layout(tmp_path / "e", "a.jsonl")
    (tmp_path / "d" / "latest.jsonl").symlink_to("a.jsonl")
    (tmp_path / "e" / "b.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError) as error:
        read("\n".join(f"{tmp_path}/{part}" for part in source.split("\n")))
    assert words.format(d=tmp_path / "d") in str(error.value)


@pytest.fixture
def left(tmp_path):
    """What of a source is there and not read."""

    def of(source, **options):
        return load_rows(Data(source=str(source), cache_dir=str(tmp_path / "cache"), **options)).left

    return of


def test_what_is_not_read_is_said(tmp_path, left):
    root = layout(tmp_path / "d", "a.jsonl", "b.jsonl.xz", "c.xlsx", "README.md", "LICENSE.txt", "more/e.parquet.gz")
    (root / "empty.jsonl").write_text("\n")
    assert left(root) == (
        "files of unknown kinds: 3 (b.jsonl.xz, c.xlsx, more/e.parquet.gz)",
        "files without a row: 1 (empty.jsonl)",
    )
    assert left(f"{root}/*a*") == () and left(f"{root}/*.jsonl") == ("files without a row: 1 (empty.jsonl)",)
    assert left(f"{layout(tmp_path / 'e', 'a.jsonl', 'sub/b.jsonl')}/*") == (
        "folders that the pattern matches: 1 (sub)",
    )
    assert left(f"{tmp_path}/e/**/*.jsonl") == ()
    assert left(layout(tmp_path / "f", "train.jsonl", "test.jsonl", "dev.jsonl")) == (
        "other splits: 2 (test, validation)",
    )


CARD = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: "x/1*.jsonl"}
  - {split: test, path: ["x/2.jsonl"]}
- config_name: de
  data_files: y/3.jsonl
- config_name: fr
  data_dir: z
---
# Words
"""


def test_subsets_that_a_card_declares(tmp_path, read, left):
    root = layout(tmp_path / "d", "x/1.jsonl", "x/11.jsonl", "x/2.jsonl", "y/3.jsonl", "z/test.jsonl", "z/train.jsonl")
    (root / "README.md").write_text(CARD)
    texts = lambda **options: [text for (text,) in read(root, **options)[0]]  # noqa: E731
    with pytest.raises(UserError, match=r"data\.subset: .* has the subsets en, de, fr \(README\.md\); choose one"):
        texts()
    assert texts(subset="en") == ["x/1.jsonl", "x/11.jsonl"] and texts(subset="en", split="test") == ["x/2.jsonl"]
    assert texts(subset="de") == ["y/3.jsonl"] and texts(subset="fr", split="test") == ["z/test.jsonl"]
    assert texts(subset="x") == ["x/1.jsonl", "x/11.jsonl", "x/2.jsonl"], "a folder that is no subset of the card"
    assert left(root, subset="en") == ("other subsets: 2 (de, fr)", "other splits: 1 (test)")
    (root / "README.md").write_text(CARD.replace("config_name: de", "config_name: de\n  default: true"))
    assert texts() == ["y/3.jsonl"]
    for options, words in (
        ({"subset": "en", "split": "dev"}, "has no split 'dev'; it has train, test"),
        ({"subset": "nl"}, "data.subset: "),
    ):
        with pytest.raises(UserError, match=words):
            texts(**options)


@pytest.mark.parametrize(
    ("declared", "words"),
    [
        ("../*.jsonl", "README.md declares files outside of the folder"),
        ("/etc/*.txt", "README.md declares files outside of the folder"),
        ("{split: train}", "README.md: data_files must be names, or splits with a path"),
        ("gone.jsonl", "README.md declares gone.jsonl, and no file matches it"),
    ],
)
def test_cards_that_are_not_about_the_files(tmp_path, read, declared, words):
    root = layout(tmp_path / "d", "a.jsonl")
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: [{declared}]\n---\n")
    with pytest.raises(UserError, match=words):
        read(root)


def test_cards_that_say_nothing(tmp_path, read, left):
    root = layout(tmp_path / "d", "a.jsonl")
    for text in ("# no card", "---\nlicense: mit\n---\n", "---\nconfigs: 3\n---\n", "---\n[]\n---\n", "---\nx"):
        (root / "README.md").write_text(text)
        assert read(root)[0] == [["a.jsonl"]] and left(root) == ()
    (root / "README.md").write_text("---\na: [\n---\n")
    assert left(root) == ("metadata of README.md, which are no YAML",)


def test_names():
    assert [kind(n) for n in ("a.JSONL", "a.csv.gz", "a.parquet.gz", "a.md", "a")] == ["json", "csv", "", "", ""]
    assert [split_of(Path(n)) for n in ("train/x.csv", "test-00-of-02.parquet", "contest.csv", "dev/train.csv")] == (
        ["train", "test", "", "train"]
    )
