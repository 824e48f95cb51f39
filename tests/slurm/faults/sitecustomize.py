"""Loaded by every Python that has this folder on PYTHONPATH: records what a rank consumes, and makes it fail as told.

SGT_TEST_FOLDER   where to write samples-RANK.jsonl, in a folder for each attempt, JOB.RESTART
SGT_TEST_BAD_NODE the node on which the checks before training hang
SGT_TEST_FAULT    JSON: {"kind", "rank", "step", "restart"}; one fault of one rank, in one attempt

Nothing is patched until the trainer is imported, so that launchers and small commands stay as they are.
"""

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

TRAINER = "sgt_titan.titan.trainer"


class AfterTrainer(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            arrange(module.SGTTrainer)

        spec.loader.exec_module = exec_module
        return spec


def arrange(trainer) -> None:
    rank, restart = int(os.environ["RANK"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    folder = Path(os.environ["SGT_TEST_FOLDER"]) / "samples" / f"{os.environ['SLURM_JOB_ID']}.{restart}"
    folder.mkdir(parents=True, exist_ok=True)

    import launch  # tests/distributed/launch.py

    launch.no_nap(rank, folder)
    launch.record_samples(rank, folder)
    slow = float(os.environ.get("SGT_TEST_STEP_SECONDS", "0"))
    fault = json.loads(os.environ.get("SGT_TEST_FAULT", "{}"))
    if fault.get("kind") == "nan":  # part of the run itself: the same in every attempt
        launch.Poison(rank=fault["rank"], gradient_steps=tuple(fault["steps"]))(rank, folder)
        fault = fault.get("and", {})
    mine = fault.get("rank") == rank and fault.get("restart", 0) in (restart, "every")
    if fault.get("kind") in ("kill_in_save", "full_in_save") and fault.get("restart", 0) == restart:
        fail_in_save(fault, rank)
        mine = False
    original = trainer._forward_backward_body

    def body(self, *arguments):
        time.sleep(slow)
        if mine and self.step == fault["step"]:
            fail(fault["kind"])
        return original(self, *arguments)

    trainer._forward_backward_body = body


def fail(kind: str) -> None:
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "raise":
        raise RuntimeError("a rank that raises")
    elif kind == "hang":
        time.sleep(3600)
    else:
        raise AssertionError(kind)


def fail_in_save(fault: dict, rank: int) -> None:
    """Between the tensors of a checkpoint and its marker, or as the file system says that it is full."""
    import errno

    from sgt_titan import checkpoint

    describe = checkpoint.describe_files

    def describe_files(files):
        files = list(files)
        if rank == fault["rank"] and any(f"step-{fault['step']:08d}" in str(file) for file in files):
            if fault["kind"] == "kill_in_save":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return describe(files)

    checkpoint.describe_files = describe_files


if "sgt_titan.doctor" in sys.orig_argv and os.environ.get("SGT_TEST_BAD_NODE") == os.environ.get("SLURMD_NODENAME"):
    time.sleep(3600)  # a node that never answers
if "SGT_TEST_FOLDER" in os.environ:
    sys.meta_path.insert(0, AfterTrainer())
