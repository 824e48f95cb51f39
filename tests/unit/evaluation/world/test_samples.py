"""Rows to measure on: cut, shortened, batched, and the options that choose them."""

from __future__ import annotations

import numpy as np
import pytest

from sgt_titan.config.load import dump
from sgt_titan.config.schema import Config
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.evaluation.world import samples
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.transform.prompts import RESPONSE


def test_shortened_rows_keep_template_and_response():
    row = Sample(
        np.array([1, 5, 6, 2, 7, 8]),
        np.array([0, 1, 1, 0, 0, 0], dtype=bool),
        np.array([0, 0, 0, 0, 1, 1], dtype=bool),
    )
    short = samples.shorten(row)
    assert short.ids.tolist() == [1, 2, 7, 8]
    assert short.target.tolist() == [False, False, True, True]
    assert not short.obfuscate.any()


def test_a_first_response_token_without_context_is_not_scored():
    class View:
        """One row of a text without BOS: the prompt is all that stands before the response."""

        def __len__(self):
            return 2

        def spread(self, count):
            return range(count)

        def tokens(self, i):
            return np.array([5, 6, 7, 8], dtype=np.uint16)

        def roles(self, i):
            return np.array([1, 1, RESPONSE, RESPONSE], dtype=np.uint8)

    row = samples.read_samples(View(), Config(), 1)[0]
    assert row.target.tolist() == [False, False, False, True]
    assert samples.shorten(row).ids.tolist() == [7, 8]


@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_batches_hold_every_row_once(count):
    rows = [Sample(np.full(3, i), np.zeros(3, bool), np.zeros(3, bool)) for i in range(count)]
    parts = list(samples.batched(rows, 10))
    assert [int(row.ids[0]) for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) <= samples.MAX_ROWS
    assert {len(part) for part in samples.batched(rows, 10**9)} <= {1, 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.lr", "1"], "--optimizer.lr: does not belong"),
        (["--data.prompt_token", "1"], "data.prompt_token"),
        (["--training.seq_len", "100000"], "beyond the trunk's"),
        (["--training.seq_len", "0"], "training.seq_len must be at least 2, got 0"),
        (["--data.max_samples", "-5"], "data.max_samples must be 0 or more, got -5"),
        (["--data.columns.txt", "story"], "data.columns.txt is no field"),
    ],
)
def test_options_that_do_not_belong(make_export, words, message):
    with pytest.raises(UserError, match=message):
        samples.data_config(make_export(0.1), str(TRUNK), "demo", words)


def test_options_of_the_run_beside_the_export(make_export):
    export = make_export(0.1)
    run = Config()
    run.data.source, run.data.max_samples, run.training.seq_len = "demo", 77, 99
    (export.parent / "config.yaml").write_text(dump(run))
    config = samples.data_config(export, "demo", "demo")
    assert (config.data.max_samples, config.training.seq_len, config.trunk.path) == (77, 99, str(TRUNK))
    assert samples.data_config(export, "demo", "demo", ["--data.max_samples", "5"]).data.max_samples == 5
    run.data.columns = {"text": "story"}
    (export.parent / "config.yaml").write_text(dump(run))
    both = samples.data_config(export, "demo", "demo", ["--data.columns.output", "end"]).data.columns
    assert both == {"text": "story", "output": "end"}
    # Another source: nothing of the run's data options applies.
    assert samples.data_config(export, "demo", "rows.jsonl").data.max_samples == 0
