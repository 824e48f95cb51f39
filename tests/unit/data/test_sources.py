from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import pytest

from sgt_titan.config.schema import Data
from sgt_titan.data.presets import PRESETS
from sgt_titan.data.readers import JsonLines
from sgt_titan.data.sources import load_rows
from sgt_titan.errors import UserError


def line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_field_names_file_row_and_field(write):
    path = write([{"messages": [{"role": "user", "content": "a"}]}, {"messages": None}])
    with pytest.raises(UserError) as error:
        load_rows(Data(source=path)).messages(1)
    assert line(error) == f"{path}: row 2: has no 'messages' (field 'messages')"


def test_field_missing_everywhere(write):
    path = write([{"text": "a"}])
    with pytest.raises(UserError) as error:
        load_rows(Data(source=path, format="instruction"))
    assert line(error).startswith(f"{path}: row 1: has no 'instruction' (field 'instruction' of format instruction)")


def test_columns_are_mapped_and_checked(write):
    path = write([{"story": "x", "ask": "a", "reply": "b"}])
    rows = load_rows(Data(source=path, columns={"instruction": "ask", "output": "reply"}))
    assert rows.format == "instruction"
    assert [m["content"] for m in rows.messages(0)] == ["a", "b"]
    with pytest.raises(UserError) as error:
        load_rows(Data(source=path, columns={"instruktion": "ask"}))
    assert line(error) == "data.columns: unknown field 'instruktion'; did you mean instruction?"
    with pytest.raises(UserError) as error:
        load_rows(Data(source=path, columns={"text": "tale"}))
    assert line(error) == f"data.columns.text: {path} has no column 'tale'; its columns are story, ask, reply"


def test_format_cannot_be_told(write):
    path = write([{"foo": "x"}])
    with pytest.raises(UserError, match=r"data\.format: cannot tell the format .*\(foo\)"):
        load_rows(Data(source=path))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "arrow"])
def test_local_kinds(tmp_path, kind):
    import datasets

    rows = [{"text": "NA"}, {"text": "two\nlines, and a comma"}, {"text": "été"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, ["text"])
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
        path = next((tmp_path / "saved").glob("*.arrow"))
    found = load_rows(Data(source=str(path)))
    assert [found.messages(i)[0]["content"] for i in range(len(found))] == [r["text"] for r in rows]


def test_folder_of_files_in_name_order(write, tmp_path):
    write([{"text": "c"}, {"text": []}], "many/b.jsonl")
    write([{"text": "a"}, {"text": "b"}, {"text": "b2"}], "many/a.jsonl")
    (tmp_path / "many" / "README.md").write_text("not data")
    rows = load_rows(Data(source=str(tmp_path / "many")))
    assert [rows.messages(i)[0]["content"] for i in range(4)] == ["a", "b", "b2", "c"]
    with pytest.raises(UserError) as error:
        rows.messages(4)
    assert line(error) == f"{tmp_path}/many/b.jsonl: row 2: 'text' (field 'text') must be text, is list"


def test_json_lines_are_read_by_offset(tmp_path):
    """Blank lines, CRLF, no newline at the end, keys that come and go, several files."""
    (tmp_path / "a.jsonl").write_bytes('\n{"text": "é"}\r\n\n{"text": "b", "n": 1}\n'.encode())
    (tmp_path / "b.jsonl").write_bytes(b"")
    (tmp_path / "c.jsonl").write_bytes(b'{"n": [1, {"x": null}], "text": "c"}')
    rows = JsonLines([tmp_path / f"{n}.jsonl" for n in "abc"])
    assert [row["text"] for row in (rows[2], rows[0], rows[1])] == ["c", "é", "b"]
    assert rows.column_names == ["text", "n"]
    assert pickle.loads(pickle.dumps(rows))[2] == {"n": [1, {"x": None}], "text": "c"}
    with pytest.raises(IndexError):
        rows[3]


def test_saved_data_set(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(tmp_path / "saved"))
    assert load_rows(Data(source=str(tmp_path / "saved"))).messages(0)[0]["content"] == "a"


def test_fingerprint_follows_content_not_place(write, tmp_path):
    first = load_rows(Data(source=write([{"text": "a"}], "one/x.jsonl"))).fingerprint
    assert load_rows(Data(source=write([{"text": "a"}], "two/x.jsonl"))).fingerprint == first
    assert load_rows(Data(source=write([{"text": "b"}], "three/x.jsonl"))).fingerprint != first


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: "", "data.source: is empty; name a preset (openorca, alpaca"),
        (lambda d: f"{d}/nothing.jsonl", "nothing.jsonl does not exist"),
        (lambda d: "nothing.jsonl", "data.source: nothing.jsonl does not exist"),
        (lambda d: "${SGT_TEST_UNSET}/x.jsonl", "environment variable SGT_TEST_UNSET is not set (in '${SGT_TEST"),
        (lambda d: touch(d, "x.md", "hello"), "x.md: unknown kind of file; known are .jsonl"),
        (lambda d: touch(d, "x.jsonl", ""), "x.jsonl: no usable rows: the source is empty"),
        (lambda d: touch(d, "x.jsonl", "{not json"), "x.jsonl: row 1: cannot be read as JSON (Expecting"),
        (lambda d: touch(d, "x.jsonl", "3\n"), "x.jsonl: row 1: must be a JSON object, is int"),
        (lambda d: touch(d, "x.json", "[{]"), "x.json: cannot be read as json"),
        (lambda d: touch(d, "x.parquet", "not parquet"), "x.parquet: cannot be read as parquet"),
        (lambda d: folder(d), "empty: no data files in this folder"),
        (lambda d: mixed(d), "mixes csv and json files"),
        (lambda d: "alpca", "data.source: unknown preset 'alpca'; did you mean alpaca? (a hub data set is owner/name)"),
        (lambda d: "nobody/nothing", "data.source: 'nobody/nothing' is no preset (openorca, "),
    ],
)  # fmt: skip
def test_bad_sources(tmp_path, make, words):
    with pytest.raises(UserError) as error:
        load_rows(Data(source=make(tmp_path)))
    assert words in line(error)


def touch(directory, name, text):
    (directory / name).write_text(text)
    return str(directory / name)


def folder(directory):
    (directory / "empty").mkdir()
    return str(directory / "empty")


def mixed(directory):
    (directory / "mixed").mkdir()
    touch(directory / "mixed", "a.csv", "text\na\n")
    touch(directory / "mixed", "a.jsonl", "{}")
    return str(directory / "mixed")


def test_preset_without_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("SGT_TITAN_ASSETS", str(tmp_path))
    with pytest.raises(UserError) as error:
        load_rows(Data(source="alpaca"))
    assert line(error).endswith("alpaca_8k.jsonl, which does not exist; check SGT_TITAN_ASSETS")
    monkeypatch.delenv("SGT_TITAN_ASSETS")
    with pytest.raises(UserError, match=r"SGT_TITAN_ASSETS.* is not set"):
        load_rows(Data(source="alpaca"))


def test_hub_source_is_asked_for_by_preset_name(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list([{"id": "1", "system_prompt": "", "question": "q", "response": "r"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_rows(Data(source="openorca", split="train[:1]"))
    assert asked == [("Open-Orca/OpenOrca", None, "train[:1]")]
    assert rows.messages(0) == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]


def test_demo_rows_are_made_on_demand():
    rows = load_rows(Data(source="demo", max_samples=5))
    assert len(rows) == 5 and rows.format == "chat"
    assert rows.messages(4)[-1]["role"] == "assistant"
    assert rows.messages(4) == rows.messages(4) != rows.messages(3)
    with pytest.raises(IndexError):
        rows[5]


def test_presets_are_complete():
    for preset in PRESETS.values():
        assert preset.format in ("text", "instruction", "chat")


@pytest.mark.assets
@pytest.mark.parametrize(
    ("source", "count", "last_role"),
    [("alpaca", 8000, "assistant"), ("tinystories", 2316, "user"), ("pupa", 664, "assistant"),
     ("t0", 15_000, "assistant"), ("flan_cot", 10_000, "assistant")],
)  # fmt: skip
def test_presets_on_real_data(assets, source, count, last_role):
    rows = load_rows(Data(source=source))
    assert len(rows) == count
    for i in range(0, count, 97):
        messages = rows.messages(i)
        assert messages[-1]["role"] == last_role and messages[0]["content"]
        assert not messages[-1]["content"].endswith("<|endoftext|>")


@pytest.mark.parametrize("kind", ["formats", "templates"])
def test_the_tables_in_the_docs_are_what_happens(kind):
    """docs/TRAINING.md: ``python -m tests.data_tables formats | templates``."""
    from tests.data_tables import table

    text = (Path(__file__).parents[3] / "docs" / "TRAINING.md").read_text()
    assert text.split(f"<!-- {kind} -->\n")[1].split(f"\n<!-- /{kind} -->")[0] == table(kind)
