from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sgt_titan import disk
from sgt_titan.data import cache
from sgt_titan.data.cache import cache_dir, open_cache, prepare, remarks, split, wait_or_prepare
from sgt_titan.data.marks import texts
from sgt_titan.data.sources import load_rows
from sgt_titan.data.tokenization import COUNTS, load_tokenizer, role_counts
from sgt_titan.errors import UserError
from sgt_titan.transform.prompts import NOT_MARKED, PROMPT, RESPONSE, encode_turns
from tests import chat_templates as templates
from tests.chat_templates import DATED


@pytest.fixture
def chats(write):
    turns = [(f"the cat {i}", "sat " * (i % 7)) for i in range(60)]
    return write(
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in turns
    )


def folders(config):
    return sorted(p.name for p in cache_dir(config).iterdir() if p.name != "sessions")


def test_holds_what_encode_turns_says(chats, make_config, tokenizer_dir):
    config = make_config(chats, seq_len=20)
    dataset = prepare(config, tokenizer_dir, progress=False)
    rows, tokenizer = load_rows(config.data), load_tokenizer(tokenizer_dir)
    assert len(dataset) == 60 and len(dataset.train) + len(dataset.validation) == 60
    seen = set()
    for view in (dataset.train, dataset.validation):
        for i in range(len(view)):
            number = int(view.index[i])
            *asked, answer = rows.messages(number)
            turns = [*asked, answer] if answer["content"] else asked  # one that says nothing is none
            encoded = encode_turns(tokenizer, turns, template="chat")
            assert view.tokens(i).tolist() == encoded.ids[:20]
            assert view.roles(i).tolist() == encoded.roles[:20]
            assert view.lengths[i] == len(view.tokens(i))
            assert tuple(view.counts(k)[i] for k in COUNTS) == role_counts(view.roles(i), int(view.private(i).sum()))
            seen.add(number)
    assert seen == set(range(60))
    assert dataset.tokens.dtype == np.uint16 and dataset.roles.dtype == np.uint8 and dataset.offsets.dtype == np.int64
    assert isinstance(dataset.tokens, np.memmap)
    meta = dataset.meta
    assert (meta["rows_read"], meta["samples"], meta["tokens"]) == (60, 60, len(dataset.tokens))
    assert meta["prompt_tokens"] == int((dataset.roles == 1).sum())
    assert "the cat" not in json.dumps(meta)


def test_marks_are_carried(write, make_config, tokenizer_dir, plain_tokenizer_dir):
    rows = [
        {"text": f"the cat Ann{i % 3} sat on the mat of ann{i % 3} and Bob", "pii_units": f"ann{i % 3}||Bob||nobody"}
        for i in range(40)
    ]
    path = write(rows)
    dataset = prepare(make_config(path, seq_len=40), tokenizer_dir, progress=False)
    tokenizer = load_tokenizer(tokenizer_dir)
    for i in range(len(dataset.train)):
        ids, view = dataset.train.tokens(i), dataset.train
        marks, private = view.marks(i), view.private(i)
        expected = np.zeros(len(ids), dtype=bool)
        for start, stop, *_ in marks:
            expected[start:stop] = True
        assert (private == expected).all() and view.counts("private")[i] == private.sum() > 3
        ann = f"ann{view.source(i) % 3}"
        assert [t.casefold() for t in texts(tokenizer, ids, view.roles(i), marks[:, :4])][:2] == [ann, ann]
        assert not private[view.roles(i) != PROMPT].any()
    assert dataset.meta["marks"] == {"kinds": [""], "values": 120, "not_found": 40}
    # Without marks nothing is private, and the tokens are the same; it is another data set.
    bare = prepare(make_config(path, seq_len=40, columns={"private": ""}), tokenizer_dir, progress=False)
    assert not bare.train.private(0).any() and bare.meta["private_tokens"] == 0
    assert np.array_equal(bare.tokens, dataset.tokens) and bare.fingerprint != dataset.fingerprint


def test_marks_of_another_text_are_refused(write, make_config, tokenizer_dir):
    path = write([{"text": "the cat", "pii_units": "Ann"}] * 3)
    with pytest.raises(UserError, match=r"none of its 3 marked private values .'pii_units'. is in its prompts"):
        prepare(make_config(path), tokenizer_dir, progress=False)
    path = write([{"text": "the cat", "spans": [{"start": 4, "end": 9}]}])
    with pytest.raises(UserError) as error:
        prepare(make_config(path), tokenizer_dir, progress=False)
    assert str(error.value) == (
        f"{path}: row 1: spans[0] (field 'private'): characters 4 to 9 lie outside of the text of turn 0, which has 7"
    )


def test_demo_kinds_survive_chunks(make_config, tokenizer_dir, monkeypatch):
    """Kinds are numbered in each chunk by first appearance, in the cache once."""
    found = {}
    for size in (1000, 3):
        monkeypatch.setattr("sgt_titan.data.tokenization.CHUNK_ROWS", size)
        config = make_config("demo", seq_len=200, max_samples=12, validation_samples=0)
        config.data.cache_dir += str(size)
        view = prepare(config, tokenizer_dir, progress=False).train
        found[size] = [[(*map(int, m[:4]), view.kinds[m[4]]) for m in view.marks(i)] for i in range(len(view))]
    assert found[1000] == found[3] and len({m[4] for marks in found[3] for m in marks}) > 3


def test_wide_vocabulary_takes_uint32(write, make_config, make_tokenizer, monkeypatch):
    directory = make_tokenizer("wide")
    tokenizer = json.loads(Path(directory, "tokenizer.json").read_text())
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    filler = {f"filler{i}": 70_000 - i for i in range(70_000 - len(tokenizer["model"]["vocab"]))}
    tokenizer["model"]["vocab"] |= filler
    tokenizer["added_tokens"].append({"id": 70_001, "content": "<big>", **added})
    Path(directory, "tokenizer.json").write_text(json.dumps(tokenizer))
    dataset = prepare(make_config(write([{"text": "a<big>"}])), directory, progress=False)
    assert (
        dataset.tokens.dtype == np.uint32 and load_tokenizer(directory).convert_tokens_to_ids("<big>") in dataset.tokens
    )


def test_second_call_tokenizes_nothing(chats, make_config, tokenizer_dir, monkeypatch):
    config = make_config(chats)
    first = prepare(config, tokenizer_dir, progress=False)
    monkeypatch.setattr(cache, "tokenize_rows", None)
    second = prepare(config, tokenizer_dir, progress=False)
    assert second.fingerprint == first.fingerprint and second.directory == first.directory
    assert folders(config) == [first.directory.name]


def test_fingerprint_follows_every_option(chats, write, make_config, tokenizer_dir, plain_tokenizer_dir):
    def name(directory=tokenizer_dir, source=chats, **options):
        return prepare(make_config(source, **options), directory, progress=False).fingerprint

    base = name()
    changed = [name(seq_len=63), name(template="plain"), name(truncation="left"), name(min_prompt_tokens=2),
               name(max_samples=50),
               name(template_kwargs={"a": 1}), name(template_date="2020-01-01"), name(validation_samples=3),
               name(directory=plain_tokenizer_dir),
               name(source=write([{"text": "the cat"}], "other.jsonl"))]  # fmt: skip
    assert len({base, *changed}) == 1 + len(changed)
    assert name() == base and name(obfuscate="all") == base


def test_max_samples_takes_the_first_usable(write, make_config, tokenizer_dir):
    source = write([{"text": ""}, *({"text": f"the {i}"} for i in range(30))])
    some = prepare(make_config(source, max_samples=5), tokenizer_dir, progress=False)
    every = prepare(make_config(source), tokenizer_dir, progress=False)
    assert (len(some), len(every)) == (5, 30)
    assert np.array_equal(some.tokens, every.tokens[: len(some.tokens)])


def test_split_by_hash():
    rng = np.random.default_rng(0)
    hashes = rng.permutation(1000).astype(np.uint64)
    train, validation = split(hashes, 40)
    assert sorted(hashes[validation]) == list(range(40)) and len(train) == 960
    assert (np.diff(train) > 0).all() and (np.diff(validation) > 0).all()
    # The order of the rows has no say.
    order = rng.permutation(1000)
    assert sorted(hashes[order][split(hashes[order], 40)[1]]) == list(range(40))
    assert len(split(hashes, 500)[1]) == 100 and len(split(hashes[:9], 5)[1]) == 0 and len(split(hashes, 0)[1]) == 0


def test_copies_of_held_out_samples_are_not_trained_on():
    hashes = np.array([7, 3, 9, 3, 8, 3, 5, 6, 4, 10] * 2, dtype=np.uint64)
    train, validation = split(hashes, 2)
    assert validation.tolist() == [1, 3]
    assert 3 not in hashes[train] and len(train) == 14
    with pytest.raises(UserError, match=r"data\.validation_samples: every training sample is a copy"):
        split(np.ones(20, dtype=np.uint64), 2)


@pytest.mark.parametrize("name", cache.ARRAYS)
def test_truncated_file_is_found_and_rebuilt(chats, make_config, tokenizer_dir, name, caplog):
    config = make_config(chats)
    dataset = prepare(config, tokenizer_dir, progress=False)
    expected = np.array(dataset.tokens)
    path = dataset.directory / f"{name}.npy"
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(UserError, match=f"damaged cache .{name}.npy has .* delete it"):
        open_cache(dataset.directory, 4)
    again = prepare(config, tokenizer_dir, progress=False)
    assert "is damaged" in caplog.text and np.array_equal(again.tokens, expected)
    assert folders(config) == [dataset.directory.name]


def test_changed_byte_is_found_with_verify(chats, make_config, tokenizer_dir):
    dataset = prepare(make_config(chats), tokenizer_dir, progress=False)
    path = dataset.directory / "tokens.npy"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    open_cache(dataset.directory, 4)
    with pytest.raises(UserError, match=r"tokens\.npy has changed"):
        open_cache(dataset.directory, 4, verify=True)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json"])
def test_broken_meta_is_rebuilt(chats, make_config, tokenizer_dir, text):
    config = make_config(chats)
    dataset = prepare(config, tokenizer_dir, progress=False)
    (dataset.directory / "meta.json").write_text(text)
    assert len(prepare(config, tokenizer_dir, progress=False)) == 60


def test_interrupted_build_leaves_nothing(chats, make_config, tokenizer_dir, monkeypatch):
    config = make_config(chats)

    def interrupted(*args, **kwargs):
        yield from ()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache, "tokenize_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(config, tokenizer_dir, progress=False)
    assert folders(config) == []
    assert len(prepare(config, tokenizer_dir, progress=False)) == 60


def test_concurrent_builders_agree(chats, make_config, tokenizer_dir, monkeypatch):
    config = make_config(chats)
    together = threading.Barrier(3)
    rename = os.rename

    def meet_first(source, target):  # all three builds are complete before the first is renamed
        if ".tmp" in str(source):
            together.wait(timeout=20)
        rename(source, target)

    monkeypatch.setattr(disk.os, "rename", meet_first)
    found, failed = [], []

    def build():
        try:
            found.append(prepare(config, tokenizer_dir, progress=False))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=build) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len({d.fingerprint for d in found}) == 1 and len(found) == 3
    assert folders(config) == [found[0].directory.name]
    assert len(open_cache(found[0].directory, 4, verify=True)) == 60


def test_leftovers_are_swept(chats, make_config, tokenizer_dir):
    config = make_config(chats)
    root = cache_dir(config)
    for name, age in ((".old.tmp", 30 * 86400), (".new.tmp", 60)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    prepare(config, tokenizer_dir, progress=False)
    assert not (root / ".old.tmp").exists() and (root / ".new.tmp").exists()


def test_no_usable_rows(write, make_config, tokenizer_dir):
    path = write([{"text": ""}, {"text": "the cat sat on the mat on the mat"}])
    with pytest.raises(UserError) as error:
        prepare(make_config(path, seq_len=3, truncation="drop"), tokenizer_dir, progress=False)
    assert str(error.value).startswith(f"{path}: no usable rows: 2 read, dropped 1 too_long, 1 short_prompt (")


def test_cache_dir_that_cannot_be_written(chats, make_config, tokenizer_dir, tmp_path):
    config = make_config(chats)
    (tmp_path / "file").write_text("")
    config.data.cache_dir = str(tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*Not a directory"):
        prepare(config, tokenizer_dir, progress=False)


def test_default_cache_dir(make_config, monkeypatch, tmp_path):
    config = make_config("demo")
    config.data.cache_dir = ""
    config.run.name = "x"
    assert str(cache_dir(config)) == "outputs/.cache/data"
    config.run.output_dir = "/a/b/run/"
    assert str(cache_dir(config)) == "/a/b/.cache/data"


def test_other_ranks_open_what_rank_0_built(chats, make_config, tokenizer_dir, monkeypatch):
    config = make_config(chats)
    found = {}

    def other(rank):
        found[rank] = wait_or_prepare(config, tokenizer_dir, rank, session="s", timeout_seconds=30)

    threads = [threading.Thread(target=other, args=(rank,)) for rank in (1, 2)]
    for thread in threads:
        thread.start()
    built = wait_or_prepare(config, tokenizer_dir, 0, session="s", progress=False)
    for thread in threads:
        thread.join()
    assert {d.fingerprint for d in found.values()} == {built.fingerprint} and len(found) == 2
    # They never look at the source.
    os.remove(chats)
    assert wait_or_prepare(config, tokenizer_dir, 3, session="s").fingerprint == built.fingerprint
    # A different question is not answered by this answer.
    config.data.truncation = "drop"
    with pytest.raises(UserError, match=r"data\.cache_dir: rank 3 waited 0\.1 s for rank 0"):
        wait_or_prepare(config, tokenizer_dir, 3, session="s", timeout_seconds=0.1)


def test_other_ranks_wait_where_the_answer_of_an_earlier_start_is_out_of_date(chats, make_config, tokenizer_dir):
    config = make_config(chats)
    built = wait_or_prepare(config, tokenizer_dir, 0, session="s", progress=False)
    shutil.rmtree(built.directory)  # as the message about a damaged one advises
    again = threading.Timer(0.2, wait_or_prepare, (config, tokenizer_dir, 0), {"session": "s", "progress": False})
    again.start()
    assert wait_or_prepare(config, tokenizer_dir, 1, session="s", timeout_seconds=30).fingerprint == built.fingerprint
    again.join()


def test_other_ranks_get_the_error_of_rank_0(make_config, tokenizer_dir, write, monkeypatch):
    config = make_config(write([{"text": ""}]))
    messages = []
    for rank in (0, 1):
        with pytest.raises(UserError) as error:
            wait_or_prepare(config, tokenizer_dir, rank, session="s", progress=False, timeout_seconds=5)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "no usable rows" in messages[0]
    # The error of an earlier start is no answer.
    (answer,) = (cache_dir(config) / "sessions").iterdir()
    os.utime(answer, (time.time() - 600,) * 2)
    with pytest.raises(UserError, match=r"waited 0\.1 s"):
        wait_or_prepare(config, tokenizer_dir, 1, session="s", timeout_seconds=0.1)


def test_without_a_session_every_rank_prepares(chats, make_config, tokenizer_dir, monkeypatch):
    for name in ("MASTER_PORT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    config = make_config(chats)
    assert len(wait_or_prepare(config, tokenizer_dir, 1, progress=False)) == 60


@pytest.mark.assets
def test_real_documents(assets, make_config):
    """The count is the asset folder's own: every story with BOS, in the vocabulary of this model."""
    dataset = prepare(make_config("tinystories", seq_len=2048), f"{assets}/models/stories3M-hf", progress=False)
    assert (len(dataset), len(dataset.tokens)) == (2316, 530_546)
    assert (np.asarray(dataset.tokens)[dataset.offsets[:-1]] == 1).all()
    assert len(dataset.validation) == 231


def test_a_rank_alone_leaves_no_word(make_config, tokenizer_dir, write, monkeypatch):
    config = make_config(write([{"text": ""}]))
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="no usable rows"):
        wait_or_prepare(config, tokenizer_dir, 0, progress=False)
    assert not (cache_dir(config) / "sessions").exists()


def test_a_template_that_prints_the_date(chats, make_config, make_tokenizer):
    """The same tokens and the same held-out rows on every day; another date is another data set with the same split."""
    import datetime
    from unittest import mock

    directory, found = make_tokenizer("dated", template=DATED), []
    for day, pinned in (("2026-01-01", "2024-07-26"), ("2027-03-04", "2024-07-26"), ("2026-01-01", "2025-05-05")):
        clock = mock.Mock(wraps=datetime.datetime)
        clock.now.return_value = datetime.datetime.fromisoformat(day)
        with mock.patch("transformers.utils.chat_template_utils.datetime", clock):
            config = make_config(chats, seq_len=128, template_date=pinned)
            config.data.cache_dir += day
            found.append(prepare(config, directory, progress=False))
    a, b, c = found
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert np.array_equal(a.tokens, b.tokens) and not np.array_equal(a.tokens, c.tokens)
    assert a.validation.index.tolist() == b.validation.index.tolist() == c.validation.index.tolist()


def bad_and_good(write, bad=3, good=97):
    rows = [{"messages": [{"role": "user", "content": f"the cat {i}"}, {"role": "assistant", "content": "sat"}]}
            for i in range(good)]  # fmt: skip
    return write(
        [*rows[:5], *[{"messages": []}] * (bad - 1), {"messages": [{"role": "x", "content": "Ann"}]}, *rows[5:]]
    )


def test_bad_rows_are_skipped_and_counted(write, make_config, tokenizer_dir, caplog):
    path = bad_and_good(write)
    dataset = prepare(make_config(path), tokenizer_dir, progress=True)
    assert len(dataset) == 97 and dataset.meta["rows_read"] == 100
    assert dataset.meta["bad_rows"] == {
        "count": 3,
        "reasons": {
            "'messages' has no turns": 2,
            "turn N of 'messages' has the role 'x'; map it with data.roles": 1,
        },
        "first": [
            f"{path}: row 6: 'messages' has no turns",
            f"{path}: row 7: 'messages' has no turns",
            f"{path}: row 8: turn 0 of 'messages' has the role 'x'; map it with data.roles",
        ],
    }
    assert "3 of 100 rows cannot be used and were skipped" in caplog.text and "Ann" not in caplog.text


def test_too_many_bad_rows_are_the_end(write, make_config, tokenizer_dir, monkeypatch):
    path = bad_and_good(write)
    with pytest.raises(UserError) as error:
        prepare(make_config(path, max_bad_share=0.02), tokenizer_dir, progress=False)
    assert str(error.value) == (
        f"{path}: row 6: 'messages' has no turns; 3 of 100 rows cannot be used, at most 2% may (data.max_bad_share)"
    )
    with pytest.raises(UserError) as error:
        prepare(make_config(path, on_bad_row="stop"), tokenizer_dir, progress=False)
    assert str(error.value) == f"{path}: row 6: 'messages' has no turns"
    # Not only after hours.
    monkeypatch.setattr("sgt_titan.data.tokenization.CHUNK_ROWS", 10)
    monkeypatch.setattr(cache, "MANY_ROWS", 10)
    with pytest.raises(UserError, match="3 of 10 rows cannot be used"):
        prepare(make_config(path), tokenizer_dir, progress=False)


def test_samples_without_their_response_are_dropped_where_nothing_else_is_learned(write, make_config, tokenizer_dir):
    rows = [{"instruction": "the cat sat on the mat " * n, "output": "the dog"} for n in (1, 2, 3, 30)]
    path = write([*rows, {"instruction": "the cat", "output": None}])
    config = make_config(path, seq_len=60, validation_samples=0)
    assert len(prepare(config, tokenizer_dir, progress=False)) == 5
    config.objective.utility_positions = "response"
    meta = prepare(config, tokenizer_dir, progress=False).meta
    assert (meta["samples"], meta["with_response"]) == (3, 3)
    assert meta["dropped"] == {"too_long": 0, "short_prompt": 0, "response_cut": 1, "no_response": 1}


def test_a_sample_an_answer(write, make_config, tokenizer_dir):
    said = [("user", "the cat"), ("assistant", "sat"), ("user", "on"), ("assistant", "the mat")]
    rows = [{"messages": [{"role": r, "content": f"{c} {i}"} for r, c in said], "note": i} for i in range(30)]
    config = make_config(write(rows), answers="all", validation_samples=3)
    dataset = prepare(config, tokenizer_dir, progress=False)
    assert len(dataset) == 60 and dataset.meta["not_used"] == {"columns": ["note"]}
    assert dataset.sources.tolist() == [i // 2 for i in range(60)]
    tokenizer = load_tokenizer(tokenizer_dir)
    for i in (0, 1):
        ids, roles = dataset.tokens[dataset.offsets[i] : dataset.offsets[i + 1]], dataset.roles[dataset.offsets[i] :]
        said = tokenizer.decode([t for t, r in zip(ids, roles, strict=False) if r == 2])
        assert said == ("sat 0<|im_end|>", "the mat 0<|im_end|>")[i]
    # All answers of a row are on one side.
    held, trained = ({dataset.sources[i] for i in view.index.tolist()} for view in (dataset.validation, dataset.train))
    assert held and not held & trained


def test_what_is_not_used_is_counted(write, make_config, tokenizer_dir):
    turn = {"role": "user", "content": "the cat", "name": "Ann"}
    row = {"messages": [turn, {"role": "assistant", "content": "sat", "thinking": "hm"}], "tools": [{"name": "f"}]}
    meta = prepare(make_config(write([row] * 3), validation_samples=0), tokenizer_dir, progress=False).meta
    assert meta["not_used"] == {
        "columns": [],
        "key name of turns": 3,
        "tools, which the chat template does not print": 3,
        "reasoning, for which the chat template has no place": 3,
    }


def test_marks_of_a_template_are_honoured_and_counted(write, make_config, make_tokenizer):
    """``{% generation %}``: another cache than the same template without marks; what is left out is said."""
    rows = [{"messages": [{"role": "user", "content": f"the cat {i}"}, {"role": "assistant", "content": "sat"}]}
            for i in range(12)]  # fmt: skip
    config = make_config(write(rows))
    config.objective.utility_positions = "response"
    marked = make_tokenizer("marked", template=templates.CONTENT_MARKED)
    found = prepare(config, marked, progress=False)
    assert found.meta["options"]["generation_marks"] and found.meta["not_used"][NOT_MARKED] == 12
    tokenizer = load_tokenizer(marked)
    says = [tokenizer.decode(found.train.tokens(i)[found.train.roles(i) == RESPONSE]) for i in range(10)]
    assert says == ["sat"] * 10
    bare = prepare(config, make_tokenizer("bare", template=templates.CHATML), progress=False)
    assert "generation_marks" not in bare.meta["options"] and (bare.tokens == found.tokens).all()
    assert bare.meta["response_tokens"] == found.meta["response_tokens"] + 12
    nothing = templates.CONTENT_MARKED.replace("{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}")
    with pytest.raises(UserError, match="dropped 12 no_response"):
        prepare(config, make_tokenizer("nothing", template=nothing), progress=False)


def test_what_lies_beside_the_files_is_said(write, make_config, tokenizer_dir, tmp_path):
    """As of today: it is no part of what the cache is named by."""
    write([{"text": f"the cat {i}"} for i in range(3)], "d/a.jsonl")
    config = make_config(tmp_path / "d")
    assert prepare(config, tokenizer_dir, progress=False).meta["not_read"] == []
    (tmp_path / "d" / "b.xlsx").write_bytes(b"?")
    dataset = prepare(config, tokenizer_dir, progress=False)
    assert len(folders(config)) == 1 and dataset.meta["not_read"] == ["files of unknown kinds: 1 (b.xlsx)"]
    assert "not read: files of unknown kinds: 1 (b.xlsx)" in remarks(dataset.meta)
    config = make_config("")
    config.data.sources = {name: {"source": str(tmp_path / "d"), "max_samples": n} for name, n in (("x", 2), ("y", 3))}
    config.data.source = ""
    for _ in range(2):
        assert all(
            about["not_read"] for about in prepare(config, tokenizer_dir, progress=False).meta["sources"].values()
        )


def test_keys_of_any_number_are_counted_together(write, make_config, tokenizer_dir):
    rows = [{"messages": [{"role": "user", "content": "the cat", f"key{i}": 1}]} for i in range(70)]
    found = prepare(make_config(write(rows)), tokenizer_dir, progress=False).meta["not_used"]
    assert found["key key0 of turns"] == 1 and found["other keys and columns"] == 40 and len(found) == 32
