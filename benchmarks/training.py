"""A training step: the naive way, ours with each optimisation added, torchtitan's pretraining, and the bound.

    python benchmarks/training.py                         sizes for any CPU, minutes
    python benchmarks/training.py --gpu --out FILE        Llama 1B and 8B shapes in bf16 on one GPU

Each arm lives in a process of its own, which steps when told to, so that arms alternate step by step and memory is an
arm's own. On a GPU the processes take turns instead: two 8B trunks do not fit. HFU is the work of an arm's matrix
products over what the machine reaches on the best of a few of them, measured in the same run. Seconds are those of
``timing.clock``: with OMP_NUM_THREADS=1 a busy CPU does not count, but for the caches and the memory that others use
too. So what others did is measured beside every step, and a line says where it was too much for a ratio to be trusted.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.arms import ARMS, AS_STARTED, CPU, LLAMA_1B, LLAMA_8B, Size, allow_older_torch, device  # noqa: E402
from benchmarks.tables import Tables, add_out, written  # noqa: E402
from benchmarks.timing import Watched, clock, doubts, machine, peak_bytes, watched  # noqa: E402

SIZES = {
    "cpu": {"D 256, 4 layers, V 32,000": CPU, "D 256, 4 layers, V 128,256": replace(CPU, vocab=128_256)},
    "gpu": {
        "Llama 1B, 4 x 2048": LLAMA_1B,
        "Llama 1B, 1 x 8192": replace(LLAMA_1B, rows=1, length=8192),
        "Llama 8B, 2 x 2048": LLAMA_8B,
        "Llama 8B, 1 x 8192": replace(LLAMA_8B, rows=1, length=8192),
    },
}


def ceiling(size: Size) -> float:
    """Flops per second of the fastest of a layer's products and a square one, median of five each."""
    best = 0.0
    side = 8192 if torch.cuda.is_available() else 1024
    for m, n, k in ((size.tokens, size.hidden, size.width), (size.tokens, size.width, size.hidden), (side, side, side)):
        a, b = (torch.randn(shape, device=device(), dtype=size.dtype) for shape in ((m, k), (k, n)))
        times = []
        for _ in range(6):
            started = clock()
            a @ b
            times.append(clock() - started)
        best = max(best, 2.0 * m * n * k / statistics.median(times[1:]))
    return best


# -- the process of an arm ---------------------------------------------------------------------------------------------


def serve(family: str, name: str, arm: str) -> None:
    """Build an arm, then make a step for every line read; answer in JSON lines."""
    import torch.distributed as dist

    allow_older_torch()
    if not torch.cuda.is_available() and not arm.endswith(AS_STARTED):
        from sgt_titan.processes import keep_memory

        keep_memory()  # as a run does, and as whoever writes the naive way well does
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo", store=dist.HashStore(), rank=0, world_size=1
    )
    size = SIZES[family][name]
    built = ARMS[arm](size)
    built.step()  # what is made once: the optimizer's state, compiled code
    peak = peak_bytes(built.step)
    print(json.dumps({"flops": built.flops, "peak": peak}), file=answers, flush=True)
    for _ in sys.stdin:
        print(json.dumps(watched(built.step)._asdict()), file=answers, flush=True)


class Worker:
    """The process of an arm, seen from outside."""

    def __init__(self, family: str, name: str, arm: str):
        command = [sys.executable, __file__, "--serve", family, name, arm]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        self.calls: list[Watched] = []
        first = self._answer()
        self.flops, self.peak = first["flops"], first["peak"]

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            lines = [line for line in self.process.stderr.read().splitlines() if line.strip()]
            raise RuntimeError(lines[-1] if lines else "the process of the arm ended")
        return json.loads(line)

    def step(self, *, count: bool) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self._answer()
        if count:
            self.calls.append(Watched(**answer))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# -- the comparison ----------------------------------------------------------------------------------------------------


def run(family: str, name: str, wanted: list[str], repeats: int, warmup: int) -> dict[str, dict]:
    """Arm -> figures; an arm that fails (out of memory) has its error instead."""
    results, workers = {}, {}
    together = family == "cpu"

    def measure(turn: dict[str, Worker]) -> None:
        for round_ in range(warmup + repeats):
            for arm, worker in turn.items():
                if arm in results:
                    continue
                try:
                    worker.step(count=round_ >= warmup)
                except RuntimeError as error:
                    results[arm] = {"error": str(error)}

    for arm in wanted:
        try:
            workers[arm] = Worker(family, name, arm)
        except RuntimeError as error:
            results[arm] = {"error": str(error)}
            continue
        if not together:
            measure({arm: workers[arm]})
            workers[arm].close()
    if together:
        measure(workers)
    top = ceiling(SIZES[family][name])
    for arm, worker in workers.items():
        worker.close()
        if arm in results:
            continue
        seconds = [call.seconds for call in worker.calls]
        median = statistics.median(seconds)
        results[arm] = {
            "seconds": median,
            "low": min(seconds),
            "high": max(seconds),
            "faults": statistics.median(call.faults for call in worker.calls),
            "others": statistics.median(call.others for call in worker.calls),
            "tokens_per_second": SIZES[family][name].tokens / median,
            "hfu": worker.flops / median / top,
            "bound_seconds": worker.flops / top,
            "peak_mib": worker.peak / 2**20,
        }
    measured = {arm: worker.calls for arm, worker in workers.items() if "seconds" in results[arm]}
    results["(d) ceiling"] = {"tflops": top / 1e12, "doubts": doubts(measured) if together else []}
    return {arm: results[arm] for arm in [*wanted, "(d) ceiling"]}


COLUMNS = {
    "arm": "",
    "s a step, median (spread)": ".3f",
    "bound, s": ".3f",
    "tokens/s": ",.0f",
    "times (a)": ".2f",
    "HFU": ".0%",
    "peak above the weights, MiB": ",.0f",
    "page faults": ",.0f",
    "others' load": ".0%",
}


def show(tables: Tables, name: str, results: dict[str, dict]) -> None:
    tables.start(name, COLUMNS)
    naive = next((r["seconds"] for arm, r in results.items() if arm.startswith("(a)") and "seconds" in r), math.nan)
    empty = [None] * (len(COLUMNS) - 2)
    for arm, r in results.items():
        if "error" in r:
            tables.row(arm, r["error"][:80], *empty)
        elif "seconds" in r:
            r["times"] = naive / r["seconds"]
            shown = ("bound_seconds", "tokens_per_second", "times", "hfu", "peak_mib", "faults", "others")
            tables.row(arm, (r["seconds"], r["low"], r["high"]), *(r[name] for name in shown))
        else:
            tables.row(f"{arm} of matrix products, {r['tflops']:.3g} Tflop/s", None, *empty)
    for doubt in results["(d) ceiling"]["doubts"]:
        print(f"NOT TO BE TRUSTED: {doubt}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="Llama 1B and 8B shapes in bf16")
    parser.add_argument("--sizes", default="", help="only sizes whose name contains this")
    parser.add_argument("--arms", default="", help="only arms that this regular expression is found in")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    add_out(parser)
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.serve:
        serve(*words.serve)
        return 0
    family = "gpu" if words.gpu else "cpu"
    wanted = [arm for arm in ARMS if re.search(words.arms, arm)]
    sizes = [name for name in SIZES[family] if words.sizes in name]
    if not wanted or not sizes:
        parser.error(f"nothing to run; sizes are {', '.join(SIZES[family])}; arms are {', '.join(ARMS)}")
    with written(words.out, machine()) as tables:
        for name in sizes:
            show(tables, name, run(family, name, wanted, words.repeats, words.warmup))
    return 0


if __name__ == "__main__":
    sys.exit(main())
