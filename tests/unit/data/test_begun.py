"""A preparation that is killed in the middle is gone on with, and its data set is the one that it would have been."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from sgt_titan.data import tokenization
from sgt_titan.data.cache import ARRAYS, cache_dir, prepare

KILLED_AT, CHUNKS = 4, 6


@pytest.fixture
def long(write, make_config, monkeypatch):
    """60 rows in chunks of 10, with what a chunk has to remember: marks, bad rows, rows that are left out."""
    monkeypatch.setattr(tokenization, "PARALLEL_ROWS", 20)
    monkeypatch.setattr(tokenization, "CHUNK_ROWS", 60 // CHUNKS)
    rows = [
        {"messages": [{"role": "user", "content": f"name {i}"}, {"role": "assistant", "content": "yes " * (i % 9)}]}
        | {"private": [{"message": 0, "start": 5, "end": 6, "kind": f"kind{i % 3}"}] * (i % 2)}
        for i in range(60)
    ]
    rows[7]["messages"][0]["content"] = 7
    path = write(rows)

    def config(name: str):
        found = make_config(path, seq_len=60, on_bad_row="skip", max_bad_share=0.5)
        found.data.columns, found.data.cache_dir = {"private": "private"}, f"{found.data.cache_dir}-{name}"
        return found

    return config


def made(config, directory, monkeypatch) -> tuple[int, object]:
    """How many chunks are tokenized to prepare it, and the data set."""
    asked, tokenize = [], tokenization.tokenize_chunk
    with monkeypatch.context() as patch:
        patch.setattr(tokenization, "tokenize_chunk", lambda *words: asked.append(words[3:]) or tokenize(*words))
        dataset = prepare(config, directory, progress=False, workers=1)
    return len(asked), dataset


def killed(config, directory) -> None:
    """Prepare it in a process that is killed when it comes to its fourth chunk."""

    def start() -> None:
        left, tokenize = [KILLED_AT], tokenization.tokenize_chunk

        def dying(*words):
            left[0] -= 1
            return tokenize(*words) if left[0] else os.kill(os.getpid(), signal.SIGKILL)

        tokenization.tokenize_chunk = dying
        prepare(config, directory, progress=False, workers=1)

    process = multiprocessing.get_context("fork").Process(target=start)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def same(one, other) -> bool:
    kept = [k for k in one.meta if k != "arrays"]
    return all(one.meta[k] == other.meta[k] for k in kept) and all(
        (one.directory / f"{name}.npy").read_bytes() == (other.directory / f"{name}.npy").read_bytes()
        for name in ARRAYS
    )


def test_a_preparation_that_was_killed_is_gone_on_with(long, tokenizer_dir, monkeypatch):
    asked, whole = made(long("whole"), tokenizer_dir, monkeypatch)
    assert asked == CHUNKS and whole.meta["bad_rows"]["count"] == 1 and whole.meta["marks"]["values"] > 0
    config = long("killed")
    killed(config, tokenizer_dir)
    (begun,) = (cache_dir(config) / "begun").iterdir()
    assert len(list(begun.iterdir())) == KILLED_AT - 1
    asked, found = made(config, tokenizer_dir, monkeypatch)
    assert asked == CHUNKS - (KILLED_AT - 1)
    assert same(found, whole) and found.fingerprint == whole.fingerprint
    assert not begun.exists()


def test_what_is_not_whole_is_done_again(long, tokenizer_dir, monkeypatch):
    _, whole = made(long("whole"), tokenizer_dir, monkeypatch)
    config = long("damaged")
    killed(config, tokenizer_dir)
    (begun,) = (cache_dir(config) / "begun").iterdir()
    cut, changed, _ = sorted(begun.iterdir())
    cut.write_bytes(cut.read_bytes()[:200])
    bytes_ = bytearray(changed.read_bytes())
    bytes_[len(bytes_) // 3] ^= 1
    changed.write_bytes(bytes_)
    asked, found = made(config, tokenizer_dir, monkeypatch)
    assert asked == CHUNKS - 1
    assert same(found, whole)


def test_few_rows_are_not_kept(long, tokenizer_dir, monkeypatch):
    monkeypatch.setattr(tokenization, "PARALLEL_ROWS", 60)
    config = long("few")
    killed(config, tokenizer_dir)
    assert not (cache_dir(config) / "begun").exists()
