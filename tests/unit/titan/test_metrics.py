"""What is shown of a step."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from sgt_titan.config.schema import TERMS
from sgt_titan.titan import metrics
from sgt_titan.titan.loss import REPORTED
from sgt_titan.titan.metrics import TAGS, SGTMetricsProcessor


def bare(**fields) -> SGTMetricsProcessor:
    """A processor without torchtitan's loggers and devices."""
    processor = object.__new__(SGTMetricsProcessor)
    vars(processor).update({"sums": None, "first_step": None, "live": False, "curve": None, **fields})
    return processor


def test_every_reported_term_has_a_tag_of_its_own():
    assert set(TAGS) == set(REPORTED)
    assert len(set(TAGS.values())) == len(TAGS)
    assert set(TERMS) < set(REPORTED)


def test_terms_of_microbatches_are_summed_and_a_step_starts_anew():
    processor = bare()
    processor.start_step(1)
    for scale in (1.0, 10.0):
        processor.add({name: torch.tensor(scale * (i + 1)) for i, name in enumerate(REPORTED)})
    assert processor.sums.tolist() == [11.0 * (i + 1) for i in range(len(REPORTED))]
    processor.start_step(2)
    assert processor.sums is None


def test_reduced_is_the_sum_over_ranks(gloo):
    sums = torch.arange(len(REPORTED), dtype=torch.float32)
    reduced = bare().reduced(sums)
    assert list(reduced) == list(REPORTED)
    assert list(reduced.values()) == sums.tolist()
    assert sums.tolist() == list(range(len(REPORTED)))  # not changed


@pytest.mark.parametrize(
    ("first", "step", "seconds", "total", "expected"),
    [
        (1, 10, 20.0, 100, "0:03:00"),  # 2 s a step, 90 left
        (1, 1, 3.0, 1, "0:00:00"),
        (501, 510, 3600.0, 520, "1:00:00"),  # resumed: only this process's 10 steps count
        (1, 1, 1.0, 360_001, "100:00:00"),
    ],
)
def test_eta(monkeypatch, first, step, seconds, total, expected):
    monkeypatch.setattr(time, "perf_counter", lambda: 1000.0 + seconds)
    processor = bare(first_step=first, started=1000.0, config=SimpleNamespace(total_steps=total))
    assert processor.eta(step) == expected


def test_what_was_not_measured_stays_out_of_checkpoints(gloo):
    processor = bare(logger=SimpleNamespace(log=lambda *args: None), data_loading_times=[1.0], teacher_tokens_read=7)
    processor.log_probe(3, {"held-out kl": 0.5, "held-out mi": float("nan")})
    assert processor.latest_probe == {"held-out kl": 0.5}
    # The time before a probe does not count, so neither does what was done in it.
    assert processor.teacher_tokens_read == processor.ntokens_since_last_log == 0


def test_progress_line_is_for_terminals_only(capsys, monkeypatch):
    processor = bare(first_step=1, started=time.perf_counter(), config=SimpleNamespace(total_steps=4))
    processor.show_progress(2)
    assert capsys.readouterr().err == ""
    processor.live = True
    processor.show_progress(2)
    line = capsys.readouterr().err
    assert line.startswith("\r[###############               ] step 2/4") and "\n" not in line


def test_torchtitan_reads_our_module():
    assert issubclass(SGTMetricsProcessor, metrics.MetricsProcessor)
    assert SGTMetricsProcessor.Config().progress is True
