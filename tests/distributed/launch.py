"""Starts the ranks of a run the way torchrun does, and reads back what the run left behind.

A rank is a process of its own that calls ``sgt_titan.train.main`` with torchrun's environment. What differs from
torchrun is where the process comes from: Python's fork server, which has imported torch and torchtitan once, so that a
rank starts in a fraction of a second rather than in ten. ``test_launchers.py`` starts the real launchers.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PRELOAD = (
    "sgt_titan.titan.main",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.tokenization_auto",
    "torch.utils.tensorboard",
    "datasets",
)

Hook = Callable[[int, Path], None]
"""Called in each rank, with the rank and the run's directory, before anything of the program."""


@dataclass
class Outcome:
    """What became of the ranks of one start."""

    codes: list[int]
    output: list[str]
    """Everything a rank printed, by rank."""
    errors: list[str]
    """Its stderr alone."""
    seconds: float


@dataclass
class Job:
    """Ranks that are running."""

    processes: list[Any]
    logs: Path
    started: float = field(default_factory=time.monotonic)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def wait(self, timeout: float = 120.0) -> Outcome:
        """Until all ranks have ended. As torchrun does, ends those that are left a while after one has failed."""
        deadline = self.started + timeout
        while alive := [process for process in self.processes if process.is_alive()]:
            failed = any(process.exitcode for process in self.processes)
            if failed:
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                self.kill()
            alive[0].join(0.05)
        codes = [process.exitcode for process in self.processes]
        ranks = range(len(codes))
        errors = [(self.logs / f"{rank}.err").read_text() for rank in ranks]
        output = [(self.logs / f"{rank}.out").read_text() + error for rank, error in zip(ranks, errors, strict=True)]
        return Outcome(codes, output, errors, time.monotonic() - self.started)


def start(ranks: int, words: Sequence[str], folder: Path, *, hooks: Sequence[Hook] = ()) -> Job:
    """``ranks`` processes of ``python -m sgt_titan.train WORDS``; ``folder`` is for what they print and for hooks."""
    context = _context()
    logs = folder / f"logs-{time.monotonic_ns()}"
    logs.mkdir(parents=True)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    processes = []
    for rank in range(ranks):
        env = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        process = context.Process(target=_rank, args=(env, list(words), folder, logs, list(hooks)), daemon=True)
        process.start()
        processes.append(process)
    return Job(processes, logs)


def run(
    ranks: int, words: Sequence[str], folder: Path, *, hooks: Sequence[Hook] = (), timeout: float = 120.0
) -> Outcome:
    """``start`` and wait; codes other than 0 are the caller's to judge."""
    return start(ranks, words, folder, hooks=hooks).wait(timeout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    # The server's environment is the one it is first started in, and it decides about the device while importing.
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONPATH=path):
        context.set_forkserver_preload(["launch_preload"])
        forkserver.ensure_running()
    return context


def preload() -> None:
    """Import what every rank needs, in the fork server."""
    for name in PRELOAD:
        importlib.import_module(name)


def _rank(env: Mapping[str, str], words: Sequence[str], folder: Path, logs: Path, hooks: Sequence[Hook]) -> None:
    os.environ.update(env)
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(logs / f"{env['RANK']}.{name}", os.O_WRONLY | os.O_CREAT, 0o644), descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    code = 1
    try:
        from sgt_titan import train

        for hook in hooks:
            hook(int(env["RANK"]), folder)
        code = train.main(list(words))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as `python -m sgt_titan.train` ends


# -- what a run left behind -------------------------------------------------------------------------------------------


def scalars(output_dir: Path) -> dict[int, dict[str, float]]:
    """Every TensorBoard scalar by step, of all event files together, the newest file winning."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, dict[str, float]] = {}
    for file in sorted(Path(output_dir, "tb").rglob("events.*"), key=lambda f: f.stat().st_mtime_ns):
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                found.setdefault(event.step, {})[tag] = event.value
    return found


def copy_until(output_dir: Path, step: int, target: Path) -> Path:
    """The directory as it was when ``step`` had just been saved and nothing after it, without logs of the past."""
    shutil.copytree(output_dir, target, ignore=shutil.ignore_patterns("tb", "export"))
    for path in (target / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    assert (target / "checkpoints" / f"step-{step:08d}" / "COMMITTED").is_file()
    return target


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file and directory below ``folder``."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


# -- hooks ------------------------------------------------------------------------------------------------------------


def record_samples(rank: int, folder: Path) -> None:
    """Write a line to samples-RANK.jsonl for every microbatch trained on: step, (epoch, sample) of its documents."""
    from sgt_titan.titan.trainer import SGTTrainer

    original = SGTTrainer._forward_backward_body
    file = (folder / f"samples-{rank}.jsonl").open("w", buffering=1)

    def body(self, inputs, labels, global_valid_tokens, extra_kwargs):
        ids = [(doc.epoch, doc.sample_id) for row in extra_kwargs["documents"] for doc in row]
        file.write(json.dumps({"step": self.step, "dp_rank": self.dp_rank, "samples": ids}) + "\n")
        return original(self, inputs, labels, global_valid_tokens, extra_kwargs)

    SGTTrainer._forward_backward_body = body


def samples(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """Sorted (epoch, sample) that each step consumed; tensor-parallel ranks, which share rows, count once."""
    by_rank: dict[tuple[int, int], dict[str, list]] = {}
    for file in folder.glob("samples-*.jsonl"):
        for line in map(json.loads, file.read_text().splitlines()):
            seen = by_rank.setdefault((line["step"], line["dp_rank"]), {})
            seen.setdefault(file.name, []).extend(map(tuple, line["samples"]))
    steps: dict[int, list[tuple[int, int]]] = {}
    for (step, _), seen in by_rank.items():
        first, *others = seen.values()
        assert all(other == first for other in others), f"step {step}: tensor-parallel ranks saw different rows"
        steps.setdefault(step, []).extend(first)
    return {step: sorted(ids) for step, ids in steps.items()}


def record_weights(rank: int, folder: Path) -> None:
    """Save this rank's trainable weights after each step: weights-RANK-STEP.safetensors."""
    from safetensors.torch import save_file

    from sgt_titan.titan.load_trunk import local_region, named_weights
    from sgt_titan.titan.trainer import SGTTrainer

    original = SGTTrainer.train_step

    def train_step(self, data_iterator):
        original(self, data_iterator)
        weights = named_weights(self.model_parts[0].estimator)
        local = {name: local_region(tensor)[0].detach().clone().contiguous() for name, tensor in weights.items()}
        save_file(local, folder / f"weights-{rank}-{self.step}.safetensors")

    SGTTrainer.train_step = train_step


def slow_commit(rank: int, folder: Path) -> None:
    """Leave two seconds between the tensors of a checkpoint and its marker."""
    from sgt_titan import checkpoint

    original = checkpoint.describe_files

    def describe_files(files):
        time.sleep(2)
        return original(files)

    checkpoint.describe_files = describe_files


@dataclass
class Poison:
    """Make the loss of one rank, and so its gradient, non-finite at some steps."""

    rank: int
    gradient_steps: tuple[int, ...]
    """Loss and gradient are NaN."""
    value_steps: tuple[int, ...] = ()
    """The loss is infinite, its gradient is not."""

    def __call__(self, rank: int, folder: Path) -> None:
        if rank != self.rank:
            return
        from sgt_titan.titan.loss import SGTLoss

        original = SGTLoss.__call__

        def poisoned(loss_fn, *args, step, **kwargs):
            loss, terms = original(loss_fn, *args, step=step, **kwargs)
            if step in self.gradient_steps:
                loss = loss * float("nan")
            if step in self.value_steps:
                loss = loss + float("inf")
            return loss, terms

        SGTLoss.__call__ = poisoned


@dataclass
class FillDisk:
    """During the save of ``step``, fill the file system but for ``left`` bytes, after or before its space check."""

    step: int
    left: int
    before_check: bool = False

    def __call__(self, rank: int, folder: Path) -> None:
        if rank != 0:
            return
        from sgt_titan.titan import checkpoint as saving
        from sgt_titan.titan.trainer import SGTTrainer

        check, train_step = saving._require_space, SGTTrainer.train_step
        steps = []

        def remember(trainer, data_iterator):
            train_step(trainer, data_iterator)
            steps.append(trainer.step)

        def require_space(output_dir: Path, needed: int) -> None:
            if self.before_check:
                self.fill(folder, steps[-1])
            check(output_dir, needed)
            if not self.before_check:
                self.fill(folder, steps[-1])

        saving._require_space, SGTTrainer.train_step = require_space, remember

    def fill(self, folder: Path, step: int) -> None:
        if step == self.step:
            with (folder / "filler").open("wb") as stream:
                stream.write(bytes(shutil.disk_usage(folder).free - self.left))


def no_nap(rank: int, folder: Path) -> None:
    """torchtitan's rank 0 sleeps for 2 seconds at the end of a run."""
    from torchtitan import trainer

    trainer.time = mock.Mock(wraps=time, sleep=lambda seconds: None)
