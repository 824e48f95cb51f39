"""Where the minutes of an evaluation go, part by part: ``python benchmarks/suite.py EXPORT --trunk T --data D``.

    --suite standard --rows 2,5 --steps 8,24 [--against CHECKOUT] [--out FILE] [--data.cache_dir DIR ...]

A standard suite takes hours, so each part is run small, twice, and its line goes through the two: a part by the number
of its prompts (``--rows``), a training attack by its steps (``--steps``), to its whole budget or, of our own checkout
and with ``--ended``, to where it ended in a whole evaluation, with what it reads at the end of each cycle. Who goes on
from another's network is measured without the other. What a step takes is measured on so few public rows that each has
been looked at before, as nearly all have in a whole training. Of mechanisms that differ in one number (noise of several
sizes, dropping of several shares) one is run and stands for all. Trained attacks are run on the SGT alone.

``--against``: the same of another checkout (git worktree add DIR COMMIT), in a process of its own beside ours, so that
both meet the same machine. ``estimate``: what ``--estimate`` says of the part. Seconds of a process with one thread.
What is kept beside the data (the zero, what is guessed) is not counted where the cache has it; ``guess`` and ``answer``
are run without it.

``--log FILE``: instead, what each part of a whole evaluation took beside its estimate, from what it said (2> FILE).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tables import add_out, written  # beside this file: PYTHONPATH may name another checkout

HERE = Path(__file__).resolve().parents[1]
STEPS = {"most": "first", "steps": None}  # the effort that says how long an attack trains, and what goes with it
PUBLIC = 215  # rows that steps are timed on: 194 without those kept aside, looked at once in eight steps of 24
LOOKS = 8  # of an attack without cycles at its curve, however short it is


def stands_for(mechanism: str) -> str:
    """Which mechanism is run for it: ``noise-4`` by ``noise``, ``dropping-30`` by ``dropping-10``."""
    name, _, number = mechanism.partition("-")
    return f"{name}-10" if name in ("dropping", "choosing") and number else name


def evaluation_of(arguments: argparse.Namespace, rows: int, corpus: int | None = None) -> Any:
    """An evaluation of so many prompts and public rows (the suite's), made as any checkout can make it."""
    from sgt_titan.evaluation.measure import runner
    from sgt_titan.evaluation.measure.setting import load_setting
    from sgt_titan.evaluation.measure.suite import SUITES
    from sgt_titan.evaluation.world.samples import data_config

    config = data_config(arguments.export, arguments.trunk, arguments.data, arguments.overrides)
    corpus = corpus or SUITES[arguments.suite].corpus
    setting = load_setting(arguments.export, config, rows=rows, corpus=corpus, zero_steps=arguments.zero_steps)
    return runner.Evaluation(setting=setting, suite=arguments.suite)


def seconds(run: Any) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def budget(effort: dict[str, Any]) -> str:
    """Which of the effort's words says how long an attack trains."""
    return next(word for word in STEPS if word in effort)


def shortened(effort: dict[str, Any], count: int) -> dict[str, Any]:
    """The effort with so many steps, after a step of whom it goes on from."""
    word = budget(effort)
    more = {"after": shortened(effort["after"], 1)} if effort.get("after") else {}
    return {**effort, **{key: count for key in (word, STEPS[word]) if key}, **more}


def trained(
    attack: Any, effort: dict[str, Any], worlds: list[Any], small: Any, rows: list[int], steps: list[int]
) -> Any:
    """Seconds of a whole training on as many prompts: (prompts) -> seconds. small: the world of few public rows."""
    from sgt_titan.evaluation.attacks import ATTACKS

    word, cycles = budget(effort), 2.0
    if not (first := STEPS[word]):
        steps = [count + LOOKS for count in steps]
    else:
        cycles += math.ceil(math.log2(max(1, effort[word] / effort[first])))

    def run(world: Any, count: int) -> float:
        granted, short = world.granted(attack.run), shortened(effort, count)
        if after := short.get("after"):  # kept by the world: not in the seconds
            ATTACKS["sequence"].run(**world.granted(ATTACKS["sequence"].run), **after)
        return seconds(lambda: attack.run(**granted, **short))

    few = run(worlds[0], steps[0])
    step = max(0.0, (run(small, steps[1]) - run(small, steps[0])) / (steps[1] - steps[0]))
    read = 0.0
    if effort.get("beams"):  # who searches at the end of each cycle: twice in a run of one
        read = max(0.0, (run(worlds[1], steps[0]) - few) / (rows[1] - rows[0]) / 2)
    return lambda prompts: few + step * (effort[word] - steps[0]) + read * (cycles * prompts - 2 * rows[0])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Part -> seconds of the whole suite, by the sgt_titan that is imported; and what it estimates."""
    import torch

    from sgt_titan.evaluation.attacks import ATTACKS
    from sgt_titan.evaluation.measure import runner
    from sgt_titan.evaluation.measure.suite import SUITES

    with suppress(ImportError):  # as its evaluation does; another checkout's may not
        from sgt_titan.processes import keep_memory

        keep_memory()
    torch.set_num_threads(1)
    time.perf_counter = time.process_time  # the estimates', too: a shared machine's wall is not this process's
    rows = [int(n) for n in arguments.rows.split(",")]
    steps = [int(n) for n in arguments.steps.split(",")]
    whole = evaluation_of(arguments, SUITES[arguments.suite].rows)
    prompts, wanted = len(whole.setting.prompts), re.compile(arguments.parts)
    parts = [job.name for job in whole.jobs() if wanted.search(job.name)]
    estimates: dict[str, float] = {}
    if arguments.estimates:
        jobs = [job for job in whole.jobs() if job.name in parts]
        speed = runner.measured_speed(whole, jobs)
        estimates = {job.name: speed.seconds(job) for job in jobs}
    small = [evaluation_of(arguments, count) for count in rows]
    of_steps = evaluation_of(arguments, rows[0], PUBLIC)
    *worlds, repeated = (evaluation.world(evaluation.mechanisms["sgt"]) for evaluation in (*small, of_steps))
    run = [{job.name: job.run for job in evaluation.jobs()} for evaluation in small]
    found: dict[str, float] = {}
    ended = {
        name: int(steps) for name, _, steps in (pair.partition("=") for pair in arguments.ended.split(",") if pair)
    }
    for name in parts:
        mechanism, _, attack = name.partition("/attacks/")
        effort = ATTACKS[attack].arguments(arguments.suite) if attack in ATTACKS else None
        if effort and attack in ended and arguments.estimates:
            effort[budget(effort)] = ended[attack]
        if effort and any(word in effort for word in ("first", "steps")):
            if mechanism == "sgt":
                found[name] = trained(ATTACKS[attack], effort, worlds, repeated, rows, steps)(prompts)
        elif stands_for(name.partition("/")[0]) == name.partition("/")[0]:
            few, more = (seconds(jobs[name]) for jobs in run)
            each = max(0.0, (more - few) / (rows[1] - rows[0]))
            found[name] = few + each * (prompts - rows[0])
    return {"parts": parts, "seconds": found, "estimates": estimates, "prompts": prompts}


def products(arguments: argparse.Namespace) -> None:
    """Table: of a training step's seconds, those in matrix products, and how near these are to the ceiling."""
    import torch

    from sgt_titan.evaluation.attacks import ATTACKS, sequence
    from sgt_titan.processes import keep_memory

    keep_memory()
    torch.set_num_threads(1)
    a = torch.randn(1024, 1024)
    ceiling = 2e-9 * 1024**3 / min(seconds(lambda: a @ a) for _ in range(9))
    evaluation, steps = evaluation_of(arguments, 2, PUBLIC), max(int(n) for n in arguments.steps.split(","))
    world = evaluation.world(evaluation.mechanisms["sgt"])
    columns = {
        "attack": "",
        "s a step": ".2f",
        "in products": ".0%",
        "Gflop/s of these": ".0f",
        "at the ceiling": ".0%",
    }
    machine = f"{os.cpu_count()} x {platform.machine()} CPU, torch {torch.__version__}, ceiling {ceiling:.0f} Gflop/s"
    step, taken = sequence._step, list[tuple[float, float, float]]()

    def profiled(*given: Any) -> torch.Tensor:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_flops=True) as seen:
            loss = step(*given)
        events = seen.key_averages()
        within = [event for event in events if event.key in ("aten::mm", "aten::addmm", "aten::bmm")]
        whole, in_products = (sum(event.self_cpu_time_total for event in part) / 1e6 for part in (events, within))
        taken.append((whole, in_products, sum(event.flops for event in within) / 1e9))
        return loss

    sequence._step = profiled
    with written(arguments.out, machine) as tables:
        tables.start(f"a training step, suite {arguments.suite}", columns)
        for name in arguments.products.split(","):
            attack = ATTACKS[name]
            effort = shortened(attack.arguments(arguments.suite) or {}, steps)
            taken.clear()
            attack.run(**world.granted(attack.run), **effort)
            again = taken[steps // 2 :]  # on rows that were looked at before
            whole, within, gflop = (sum(column) for column in zip(*again, strict=True))
            speed = gflop / within
            tables.row(name, whole / len(again), within / whole, speed, speed / ceiling)


SAID = re.compile(r"\[\d+/\d+\] (\S+): ([\d.]+) s, estimated ([\d.]+)")


def beside(arguments: argparse.Namespace) -> None:
    """Table: what each part of an evaluation took, and its estimate."""
    said = [(name, float(took), float(thought)) for name, took, thought in SAID.findall(arguments.log.read_text())]
    columns = {"part": "", "took, s": ",.0f", "estimate, s": ",.0f", "of it": ".2f"}
    with written(arguments.out, f"{os.cpu_count()} x {platform.machine()} CPU") as tables:
        tables.start("an evaluation beside its estimate", columns)
        large = sorted((part for part in said if part[1] >= arguments.least), key=lambda part: -part[1])
        for name, took, thought in large:
            tables.row(name.replace("/attacks/", ": ").replace("/", ": "), took, thought, thought / took)
        rest = [part for part in said if part[1] < arguments.least]
        for title, parts in ((f"{len(rest)} others", rest), ("all of these", said)):
            took, thought = (sum(part[i] for part in parts) for i in (1, 2))
            tables.row(title, took, thought, thought / took if took else None)


def of_all(found: dict[str, Any], key: str = "seconds") -> dict[str, float]:
    """Part by its kind -> seconds, with those that another stands for; parts that were not run are left out."""
    total: dict[str, float] = {}
    for name in found["parts"]:
        mechanism, _, rest = name.partition("/")
        model = f"{stands_for(mechanism)}/{rest}" if rest else name
        if model in found["seconds"]:
            label = f"{stands_for(mechanism).partition('-')[0]}: {rest.removeprefix('attacks/')}" if rest else name
            total[label] = total.get(label, 0.0) + found[key].get(model if key == "seconds" else name, 0.0)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", nargs="?")
    parser.add_argument("--trunk")
    parser.add_argument("--data")
    parser.add_argument("--suite", default="standard")
    parser.add_argument("--rows", default="2,5", help="prompts, twice")
    parser.add_argument("--steps", default="8,24", help="steps of a training attack, twice")
    parser.add_argument("--zero-steps", type=int, default=300)
    parser.add_argument("--least", type=float, default=10.0, help="parts below so many seconds are summed in one row")
    parser.add_argument("--parts", default="", metavar="REGEX", help="only these (sgt/attacks/map_search)")
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument(
        "--products", metavar="A,B", help="instead: how much of a training step of these attacks is matrix products"
    )
    parser.add_argument(
        "--ended", default="", metavar="A=STEPS,...", help="where ours ended in a whole evaluation before their budget"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="instead: what a whole evaluation said that it took")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--estimates", action="store_true", help=argparse.SUPPRESS)
    add_out(parser)
    arguments, arguments.overrides = parser.parse_known_args()
    if arguments.log:
        beside(arguments)
        return
    if not (arguments.export and arguments.trunk and arguments.data):
        parser.error("give EXPORT --trunk T --data D, or --log FILE")
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    if arguments.products:
        products(arguments)
        return
    trees = {"now": HERE} | ({"before": arguments.against.resolve()} if arguments.against else {})
    words = [sys.executable, __file__, *sys.argv[1:], "--measure"]
    running = {}
    for name, tree in trees.items():
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        own = [*words, "--estimates"] if name == "now" else words
        running[name] = subprocess.Popen(own, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True)
    said = {name: process.communicate()[0] for name, process in running.items()}
    for name, process in running.items():
        if process.returncode:
            sys.exit(f"{name}: the measuring process ended with {process.returncode}")
    found = {name: json.loads(text.splitlines()[-1]) for name, text in said.items()}
    now, before = of_all(found["now"]), of_all(found["before"]) if arguments.against else {}
    estimates = of_all(found["now"], "estimates")
    columns = {"part": "", "before, s": ",.0f", "now, s": ",.0f", "times": ".1f", "estimate, s": ",.0f", "of it": ".2f"}
    machine = f"{os.cpu_count()} x {platform.machine()} CPU, Python {platform.python_version()}"
    with written(arguments.out, machine) as tables:
        tables.start(f"suite {arguments.suite}, {found['now']['prompts']} prompts", columns)

        def row(title: str, names: list[str]) -> None:
            ours, theirs, said = (sum(part.get(n, 0.0) for n in names) for part in (now, before, estimates))
            ratio = theirs / ours if before and ours else None
            tables.row(title, theirs if before else None, ours, ratio, said, said / ours if ours else None)

        order = sorted(now, key=lambda name: -max(now[name], before.get(name, 0.0)))
        large = [name for name in order if max(now[name], before.get(name, 0.0)) >= arguments.least]
        for name in large:
            row(name, [name])
        row(f"{len(order) - len(large)} others", [name for name in order if name not in large])
        row("all of these", order)
        row("all but guess and answer", [name for name in order if name not in ("sgt: guess", "sgt: answer")])


if __name__ == "__main__":
    main()
