"""Epochs with the teacher's output from disk, written and read by several ranks, are those of one process that asks."""

from __future__ import annotations

import json

from test_parallelism import ROWS, TP2, assert_same_terms

SHORT = ("--data.max_samples", "24", "--training.steps", "10", "--metrics.probe_every", "10")


def test_ranks_that_read_train_as_one_process_that_asks(small, demo_trunk, tmp_path):
    vocabulary = json.loads((demo_trunk / "config.json").read_text())["vocab_size"]
    cache = ("--teacher_cache.top_k", str(vocabulary), "--teacher_cache.dir", str(tmp_path / "cache"))
    asks = small.finish(1, *SHORT)
    reads = small.finish(4, *SHORT, *TP2, ROWS, "2", *cache)
    assert "bytes a token" in reads.outcome.output[0]
    assert_same_terms(reads.scalars, asks.scalars)
    assert (tmp_path / "cache" / "teacher.bin").stat().st_size > 1e6
