"""What every task's trainer shares, and the table of tasks."""

from __future__ import annotations

import inspect
import logging
from typing import get_args, get_type_hints

import pytest
from torchtitan.tools.logging import logger
from torchtitan.tools.utils import GarbageCollection
from torchtitan.trainer import Trainer

from sgt_titan.config.schema import Run
from sgt_titan.titan import chatter
from sgt_titan.titan.finetune import FinetuneTrainer
from sgt_titan.titan.loop import Loop, follow_flags
from sgt_titan.titan.tasks import TASKS, to_trainer_config
from sgt_titan.titan.trainer import SGTTrainer


def test_every_task_of_the_schema_has_a_row():
    assert tuple(TASKS) == get_args(get_type_hints(Run)["task"])


@pytest.mark.parametrize("kind", [SGTTrainer, FinetuneTrainer])
def test_trainers_are_siblings(kind):
    """Of one base, and neither goes past it to a grandparent; all that a task must say it says."""
    assert kind.__bases__ == (Loop,) and not kind.__abstractmethods__
    shared = {name for name, value in vars(kind).items() if inspect.isfunction(value)} & set(vars(Loop))
    assert shared == {"__init__", "evaluate_streams", "probe"}
    assert issubclass(kind.Config, Loop.Config) and kind.Config._owner is kind


def test_a_task_without_a_probe_cannot_be_built():
    class Half(Loop):
        def evaluate_streams(self, tokens_BT, batch): ...

    assert Half.__abstractmethods__ == {"probe"}


def test_flags_of_torchtitans_launcher_make_the_run_anew(make_run):
    """The config carries the way back to its own task."""
    config = to_trainer_config(make_run("--training.steps=7"))
    assert config.anew is to_trainer_config and isinstance(config, SGTTrainer.Config)
    assert follow_flags(config) is config
    config.training.steps = 9
    again = follow_flags(config)
    assert again is not config and again.prepared.config.training.steps == 9
    assert again.lr_scheduler == config.lr_scheduler


def test_torchtitans_chatter_leaves_the_log(caplog, monkeypatch):
    monkeypatch.setattr(logger, "filters", [])
    caplog.set_level(logging.INFO, logger.name)
    chatter.install()
    chatter.install()
    assert len(logger.filters) == 1
    GarbageCollection.collect("Performing periodic GC collection")
    logger.info("Sleeping 2 seconds for other ranks to complete")
    logger.info("step 1 of 2")
    assert [record.message for record in caplog.records] == ["step 1 of 2"]
    logger.setLevel(logging.DEBUG)
    GarbageCollection.collect("Performing periodic GC collection")
    assert caplog.records[-1].message.startswith("[GC] Performing periodic GC collection")


def test_the_lines_are_those_that_torchtitan_writes():
    written = inspect.getsource(GarbageCollection) + inspect.getsource(Trainer)
    assert all(f'logger.info("{line}' in written for line in chatter.LINES)
