"""What a step of a training is made of beside the model: ``python benchmarks/bookkeeping.py [CONFIG] [--steps 60]``.

Trains a config on one process, `demo` unless another is given, and takes the time of the functions that a step is made
of. Milliseconds of the trainer's thread, medians over the steps after the first ten; of what does not happen at every
step the mean. Probes, the checkpoint and the export are not among them.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import add_out, written

FIRST = 10
"""Steps that do not count."""


class Clock:
    """Milliseconds by name and step. What is called inside another that is watched counts for the outer one."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.busy = False
        self.began: float | None = None

    def watch(self, owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        @functools.wraps(original)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.busy or not self.steps:
                return original(*args, **kwargs)
            self.busy, began = True, time.thread_time()
            try:
                return original(*args, **kwargs)
            finally:
                self.busy = False
                now = self.steps[-1]
                now[name] = now.get(name, 0.0) + 1000 * (time.thread_time() - began)

        setattr(owner, method, timed)

    def boundary(self, *, more: bool) -> None:
        """A step ends here, and the next begins if there are more."""
        now = time.thread_time()
        if self.began is not None:
            self.steps[-1][WHOLE] = 1000 * (now - self.began)
        self.began = now
        if more:
            self.steps.append({})


WHOLE = "the whole step"
BESIDE = ("a probe", "a checkpoint")


def watched(clock: Clock) -> None:
    import torch
    from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer
    from torchtitan.distributed import utils
    from torchtitan.trainer import Trainer

    from sgt_titan.titan.checkpoint import SGTCheckpointManager
    from sgt_titan.titan.loop import Loop
    from sgt_titan.titan.metrics import SGTMetricsProcessor
    from sgt_titan.titan.optimizer import GuardedOptimizers
    from sgt_titan.titan.trainer import SGTTrainer
    from sgt_titan.titan.watchdog import Watchdog

    parts: list[tuple[Any, str, str]] = [
        (SGTTrainer, "evaluate_streams", "forward and loss"),
        (torch.Tensor, "backward", "backward"),
        (OptimizersContainer, "step", "AdamW"),
        (OptimizersContainer, "zero_grad", "AdamW"),
        (GuardedOptimizers, "all_finite", "is every gradient finite"),
        (utils, "clip_grad_norm_", "the gradient's norm"),
        (LRSchedulersContainer, "step", "schedule of the rate"),
        (LRSchedulersContainer, "get_metrics", "schedule of the rate"),
        (SGTMetricsProcessor, "add", "sums of the terms"),
        (SGTMetricsProcessor, "log", "a line of the log (mean)"),
        (Watchdog, "beat", "watchdog"),
        (Loop, "probe", BESIDE[0]),
        (SGTCheckpointManager, "save", BESIDE[1]),
    ]
    for part in parts:
        clock.watch(*part)
    more, batches = Loop.should_continue_training, Trainer.batch_generator

    def should_continue(self: Loop) -> bool:
        found = more(self)
        clock.boundary(more=found)
        return found

    class Rows:
        def __init__(self, rows: Any):
            self.rows = rows

        def fetch(self) -> Any:
            return next(self.rows)

        def __iter__(self) -> Rows:
            return self

        def __next__(self) -> Any:
            return self.fetch()

    clock.watch(Rows, "fetch", "rows from the thread that makes them")
    Loop.should_continue_training = should_continue  # type: ignore[method-assign]
    Trainer.batch_generator = lambda self, rows: Rows(batches(self, rows))  # type: ignore[method-assign]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="demo")
    parser.add_argument("--steps", type=int, default=60)
    add_out(parser)
    words = parser.parse_args()

    from sgt_titan.titan import lean

    lean.spare()
    from benchmarks.timing import machine
    from sgt_titan import cli

    clock = Clock()
    watched(clock)
    with written(words.out, machine()) as tables, tempfile.TemporaryDirectory() as folder:
        options = ["--run.output_dir", f"{folder}/out", "--data.cache_dir", f"{folder}/cache"]
        options += ["--data.max_samples", "1000", "--export.at_end", "false", "--training.steps", str(words.steps)]
        if code := cli.main(["train", words.config, *options]):
            return code
        steps = clock.steps[FIRST:]

        def taken(name: str) -> float:
            of = [step.get(name, 0.0) for step in steps]
            return statistics.mean(of) if name.endswith("(mean)") else statistics.median(of)

        whole = statistics.median(step[WHOLE] - sum(step.get(name, 0.0) for name in BESIDE) for step in steps)
        names = list(dict.fromkeys(name for step in steps for name in step if name not in (WHOLE, *BESIDE)))
        found = {name: taken(name) for name in names}
        tables.start("", {"part of a step": "", "ms": ".2f", "of the step": ".1%"})
        for name, took in sorted(found.items(), key=lambda item: -item[1]):
            tables.row(name, took, took / whole)
        rest = whole - sum(found.values())
        tables.row("everything else", rest, rest / whole)
        tables.row(WHOLE, whole, 1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
