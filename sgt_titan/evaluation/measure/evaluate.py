"""``sgt-titan evaluate``: what every class of attacker recovers from an export, what it costs, and how sure that is.

``sgt-titan report`` is this command with ``--suite glance``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgt_titan import __version__
from sgt_titan.arguments import Parser, http_url, number, seed_argument
from sgt_titan.config.door import split_words
from sgt_titan.config.origin import settle
from sgt_titan.errors import UserError
from sgt_titan.evaluation.options import GLANCE, suite_argument, zero_argument
from sgt_titan.processes import keep_memory
from sgt_titan.terminal import clock, say

if TYPE_CHECKING:
    from sgt_titan.evaluation.measure import runner

FORMAT = 2  # 1: `kept` from a zero that a constant prompt beats


def parser() -> argparse.ArgumentParser:
    """The options; imports nothing heavy, so that ``--help`` is instant."""
    found = Parser(
        prog="sgt-titan evaluate",
        description="Measure what every class of attacker recovers from an export, and what it costs the answers.",
        epilog="Options of the data as in a config (--data.prompt_tokens 48, --training.seq_len 96, ...). "
        "Writes OUT/results.json and OUT/report.html; run it again to go on after an interruption. "
        "docs/EVALUATION.md explains every number.",
    )
    found.add_argument("export", metavar="EXPORT", help="an exported directory, or a run's")
    found.add_argument(
        "--trunk",
        metavar="PATH",
        help="directory of the trunk, or a config's name (default: the run's own)",
    )
    found.add_argument("--data", metavar="SOURCE", help="as data.source, or a config's name (default: the run's)")
    found.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="default: EXPORT's folder, evaluation-SUITE; of a glance: nothing is kept",
    )
    suite_argument(found, "how much (default quick: minutes); glance: seconds, the weakest attacker", glance=True)
    found.add_argument(
        "--rows", "--samples", type=number(int, 2), help="held-out prompts, instead of the suite's number"
    )
    seed_argument(found, "the noise and the attacks")
    found.add_argument("--attacks", metavar="A,B", default="", help="only these (default: all of the suite)")
    found.add_argument("--no-baselines", action="store_true", help="the export alone, nothing to compare it with")
    found.add_argument(
        "--examples", type=number(int, 0), default=2, help="prompts the report shows in clear (default 2; 0: none)"
    )
    found.add_argument(
        "--benchmarks", metavar="A,B", default="", help="lm-eval tasks for utility: names, or `paper` for the eight"
    )
    found.add_argument("--benchmark-dir", metavar="DIR", help="local copies of the benchmarks; default: from the hub")
    found.add_argument(
        "--judge", metavar="URL", help="OpenAI-compatible endpoint to judge PII leaks: it is SENT the private text"
    )
    found.add_argument("--judge-model", metavar="NAME", help="model of the judge (key: OPENAI_API_KEY)")
    found.add_argument(
        "--rotated", metavar="SERVER,CLIENT,SECRET",
        help="what `sgt-titan conjformer convert TRUNK` wrote: also attack a secret rotation, alone and around the SGT",
    )  # fmt: skip
    zero_argument(found)
    found.add_argument(
        "--minutes", type=number(float, above=0), help="refuse to start what would take longer than this"
    )
    found.add_argument(
        "--memory",
        type=number(float, above=0),
        metavar="GIB",
        help="refuse to start what would need more (default: free)",
    )
    found.add_argument(
        "--jobs",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="measure N parts at a time, each in a process with its share of the CPU's threads (default 1)",
    )
    found.add_argument("--estimate", action="store_true", help="print what would run, how long and how large; stop")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0.

    Raises:
        UserError: bad options; an export, trunk or data that do not fit; a directory of another evaluation; more memory
            or time than given.
    """
    arguments, overrides = split_words(parser(), sys.argv[2:] if argv is None else argv)
    checked(arguments)
    settle(arguments)
    # Not before the words are known to be good: the first of these takes seconds.
    from transformers.utils.logging import disable_progress_bar

    from sgt_titan.evaluation.attacks import ATTACKS, ROTATION
    from sgt_titan.evaluation.measure import runner, workers
    from sgt_titan.evaluation.measure.parts import Parts, open_parts, write
    from sgt_titan.evaluation.measure.setting import fingerprint_export
    from sgt_titan.evaluation.report.html import page
    from sgt_titan.evaluation.report.terminal import render
    from sgt_titan.evaluation.scores.recovery import similarities
    from sgt_titan.transform.trunk_files import TrunkFiles

    if unknown := [name for name in _attacks(arguments) if name not in ATTACKS | ROTATION]:
        raise UserError(f"--attacks: {unknown[0]!r} is unknown; there are {', '.join(ATTACKS | ROTATION)}")
    if benchmark_names(arguments):  # they run last: the harness that is not installed is missed now
        import sgt_titan.evaluation.scores.harness  # noqa: F401
    similarities()  # nor is what every score needs missed after the first attack
    disable_progress_bar()
    keep_memory()
    out = arguments.out
    if out is None and arguments.suite != GLANCE:
        out = Path(arguments.export).resolve().parent / f"evaluation-{arguments.suite}"
    # What is begun may be of another evaluation: refused below, before anything runs.
    begun = Parts(out)
    arguments.out = out
    evaluation = evaluation_of(arguments, overrides, begun.get(runner.FIRST))
    setting, jobs = evaluation.setting, list(evaluation.jobs())
    if arguments.jobs > 1 and setting.device.type != "cpu":
        raise UserError(f"--jobs {arguments.jobs}: several processes would share one GPU; leave it out")
    models = sum(p.numel() * p.element_size() for m in (setting.trunk, setting.transform) for p in m.parameters())
    size = runner.check_memory(jobs, arguments.memory, arguments.jobs, models)
    if waiting := runner.missing(jobs, begun):
        speed = runner.measured_speed(evaluation, waiting)
        jobs = [replace(job, seconds=speed.seconds(job)) for job in jobs]
    seconds = runner.check_time(runner.missing(jobs, begun), arguments.minutes, arguments.jobs)
    say(
        f"{len(jobs)} parts on {len(setting.prompts)} prompts; about {clock(seconds)}, less where an attacker settles "
        f"early, and {size / 2**30:.2f} GiB beside the models"
    )
    if arguments.estimate:
        for job in jobs:
            print(f"{job.name:<44}{job.seconds:>10,.1f} s{job.cost.bytes / 2**20:>12,.0f} MiB")
        return 0
    # What changes a part that is there already. More attacks, baselines or benchmarks only add parts.
    identity = {
        "format": FORMAT,
        "suite": arguments.suite,
        "seed": arguments.seed,
        "examples": arguments.examples,
        "judge": arguments.judge,
        "judge_model": arguments.judge_model,
        **({"rotated": TrunkFiles(evaluation.rotation[0]).fingerprint()} if evaluation.rotation else {}),
        "export": fingerprint_export(arguments.export),
        "trunk": setting.trunk_fingerprint,
        "data": setting.data_fingerprint,
        "rows": len(setting.rows),
        "zero_steps": arguments.zero_steps,
        "seq_len": setting.config.training.seq_len,
        "effort": runner.effort_of(arguments.suite),
        "version": __version__,
    }
    parts = open_parts(out, identity) if out else Parts(None)
    began = time.monotonic()
    several = None
    if arguments.jobs > 1:
        several = lambda left: workers.several(  # noqa: E731
            left, arguments.jobs, jobs_of, (arguments, overrides, parts.get(runner.FIRST))
        )
    runner.run_jobs(jobs, parts, say, several)
    found = runner.merged(evaluation, jobs, parts)
    results = {
        "format": FORMAT,
        "about": about(evaluation, arguments, argv, identity, time.monotonic() - began, parts.get("lm_top1")),
        **found,
    }
    if out:
        write(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        write(out / "report.html", page(results))
    print(render(results))
    if out:
        print(f"\n{out / 'results.json'}\n{out / 'report.html'}")
    return 0


def evaluation_of(
    arguments: argparse.Namespace, overrides: Sequence[str], begun: dict[str, Any] | None
) -> runner.Evaluation:
    """What the command means, with everything loaded. ``begun``: the part of an earlier start that others go by.

    Raises:
        UserError: an export, trunk or data that do not fit.
    """
    from sgt_titan.evaluation.measure import runner
    from sgt_titan.evaluation.measure.setting import load_setting
    from sgt_titan.evaluation.measure.suite import SUITES
    from sgt_titan.evaluation.world.samples import data_config

    suite = SUITES[arguments.suite]
    config = data_config(arguments.export, arguments.trunk, arguments.data, overrides)
    rows = arguments.rows or suite.rows
    setting = load_setting(arguments.export, config, rows=rows, corpus=suite.corpus, zero_steps=arguments.zero_steps)
    return runner.Evaluation(
        setting=setting,
        suite=arguments.suite,
        seed=arguments.seed,
        examples=arguments.examples,
        only=_attacks(arguments),
        baselines=not arguments.no_baselines,
        benchmarks=benchmark_names(arguments),
        benchmark_dir=arguments.benchmark_dir,
        judge=(arguments.judge, arguments.judge_model) if arguments.judge else None,
        rotation=(*arguments.rotated.split(","), config.trunk.path) if arguments.rotated else None,
        begun=begun,
        networks=arguments.out / "networks" if arguments.out else None,
    )


def jobs_of(arguments: argparse.Namespace, overrides: Sequence[str], begun: dict[str, Any] | None) -> list[runner.Job]:
    """The same in a process of ``--jobs``."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return list(evaluation_of(arguments, overrides, begun).jobs())


def _attacks(arguments: argparse.Namespace) -> tuple[str, ...]:
    return tuple(filter(None, arguments.attacks.split(",")))


def checked(arguments: argparse.Namespace) -> None:
    """What can be said before anything is imported."""
    if bool(arguments.judge) != bool(arguments.judge_model):
        raise UserError("--judge and --judge-model belong together")
    if arguments.judge and (not (url := http_url(arguments.judge)) or "@" in url.netloc):
        # Not repeated: what stands before an @ is a secret, and results.json holds the command.
        raise UserError("--judge: give http://HOST/v1 or https://HOST/v1; a key goes into OPENAI_API_KEY")
    if arguments.rotated and len(arguments.rotated.split(",")) != 3:
        raise UserError(
            "--rotated: give SERVER,CLIENT,SECRET: two directories and a file of `sgt-titan conjformer convert`"
        )
    if arguments.benchmark_dir and not arguments.benchmarks:
        raise UserError("--benchmark-dir without --benchmarks: say which, or `paper` for the eight")
    if arguments.benchmark_dir and not Path(arguments.benchmark_dir).is_dir():
        raise UserError(f"--benchmark-dir: no directory {arguments.benchmark_dir}")


def benchmark_names(arguments: argparse.Namespace) -> tuple[str, ...]:
    if not arguments.benchmarks:
        return ()
    from sgt_titan.evaluation.scores.benchmarks import BENCHMARKS

    names = tuple(BENCHMARKS) if arguments.benchmarks == "paper" else tuple(arguments.benchmarks.split(","))
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise UserError(f"--benchmarks: {unknown[0]!r} is unknown; there are {', '.join(BENCHMARKS)}, or paper")
    for name in names if arguments.benchmark_dir else ():
        BENCHMARKS[name].read(Path(arguments.benchmark_dir))  # a file that is missing is said now, not in an hour
    return names


def about(
    evaluation: Any,
    arguments: argparse.Namespace,
    argv: Sequence[str] | None,
    identity: dict[str, Any],
    seconds: float,
    lm_top1: dict[str, Any] | None,
) -> dict[str, Any]:
    """Where the numbers come from. ``seconds``: of this call, which an interruption makes shorter than the whole."""
    import torch
    import transformers

    from sgt_titan.evaluation.world.samples import embedding_table
    from sgt_titan.metrics.table import near_duplicates

    setting = evaluation.setting
    table_VD = embedding_table(setting.trunk)
    duplicates = near_duplicates(table_VD)
    V, D = table_VD.shape
    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} x {platform.machine()} CPU"
    )
    return {
        "command": shlex.join(["sgt-titan", "evaluate", *(sys.argv[2:] if argv is None else argv)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "suite": arguments.suite,
        "seed": arguments.seed,
        "seconds": seconds,
        "versions": {
            "sgt_titan": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": device,
        "export": arguments.export,
        "trunk": arguments.trunk,
        "data": arguments.data,
        "data_fingerprint": setting.data_fingerprint,
        "export_fingerprint": identity["export"],
        "trunk_fingerprint": setting.trunk_fingerprint,
        **({"rotated_fingerprint": identity["rotated"]} if "rotated" in identity else {}),
        "held_out": setting.held_out,
        "rows": len(setting.prompts),
        "hidden_tokens": sum(int(row.obfuscate.sum()) for row in setting.prompts),
        "response_tokens": sum(int(row.target.sum()) for row in setting.rows),
        "corpus_rows": len(setting.corpus),
        "marked_spans": sum(len(row.spans) for row in setting.prompts),
        "vocab": V,
        "width": D,
        "ln_vocab": float(torch.tensor(float(V)).log()),
        "lm_top1": lm_top1,
        "near_duplicate_rows": duplicates.rows,
        "untrained_rows": duplicates.untrained,
        "notes": list(setting.notes),
    }
