"""Batches prepared ahead are the batches of their step, and the cursor does not know of them."""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from sgt_titan.data.batch import BatchSource, local_positions
from sgt_titan.titan.dataloader import SGTDataLoader, microbatch_inputs
from sgt_titan.titan.tasks import to_trainer_config


@pytest.fixture(scope="module")
def source(make_run, one_process) -> BatchSource:
    return to_trainer_config(make_run()).prepared.train_source


def loader(source, **changes):
    options = {"dp_world_size": 1, "dp_rank": 0, "local_batch_size": 2} | changes
    return SGTDataLoader(SGTDataLoader.Config(source=source), **options)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def test_batches_are_those_of_their_step_and_rank(source):
    """Global batch 4: two microbatches of two rows on one rank, one on each of two."""
    for ranks, rank in ((1, 0), (2, 0), (2, 1)):
        found = take(iter(loader(source, dp_world_size=ranks, dp_rank=rank)), 6)
        microbatches = 2 // ranks
        for index, (inputs, labels) in enumerate(found):
            step, microbatch = divmod(index, microbatches)
            expected = microbatch_inputs(source, step, local_positions(microbatch, rank, ranks, 2))
            assert torch.equal(inputs["input"], expected["input"])
            assert inputs["documents"] == expected["documents"] and inputs["counts"] == expected["counts"]
            assert torch.equal(labels != -100, inputs["utility_BT"])


def test_the_cursor_counts_steps_handed_out(source):
    first = loader(source)
    iterator = iter(first)
    for step in (1, 2, 3):
        take(iterator, 2)
        assert first.state_dict() == {"step": step}
    second = loader(source)
    second.load_state_dict(first.state_dict())
    expected = take(iterator, 2)
    for (found, _), (wanted, _) in zip(take(iter(second), 2), expected, strict=True):
        assert torch.equal(found["input"], wanted["input"])


def test_the_next_step_is_prepared_while_this_one_is_worked_on(source, monkeypatch):
    prepared, threads = [], set()
    original = SGTDataLoader._batches
    ready = threading.Event()

    def recorded(self, step):
        result = original(self, step)
        prepared.append(step)
        threads.add(threading.current_thread())
        if step == 1:
            ready.set()
        return result

    monkeypatch.setattr(SGTDataLoader, "_batches", recorded)
    next(iter(loader(source)))
    assert ready.wait(10)
    assert prepared == [0, 1] and threading.main_thread() not in threads


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for(source, monkeypatch):
    monkeypatch.setattr(SGTDataLoader, "_batches", lambda self, step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(iter(loader(source)))


def test_packing_efficiency_is_printed(source, caplog):
    with caplog.at_level(logging.INFO):
        loader(source)
        loader(source, dp_rank=1, dp_world_size=2)
    lines = [r.message for r in caplog.records if "not padding" in r.message]
    assert len(lines) == 1 and f"{source.efficiency:.1%}" in lines[0] and 0.1 < source.efficiency < 1
