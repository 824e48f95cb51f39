"""Speed of preparing rows: with and without marks of private values, against the tokenizer alone, in one run.

    python benchmarks/preparation.py [--against CHECKOUT] [--rows N] [--out FILE]

Microseconds of CPU a row on one core, the smallest of several rounds, which alternate between what is compared; memory
is what the process has held at most. ``tokenizer alone``: the same texts through the same fast tokenizer with offsets,
a row at a time, which is the least that any way has to do. ``--against``: the same functions of another checkout
(git worktree add DIR COMMIT), in processes of their own that take turns with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

from tables import add_out, written  # beside this file: PYTHONPATH may name another checkout

HERE = Path(__file__).resolve().parents[1]
ROUNDS = 2
CASES = ("demo, marks", "demo", "alpaca", "alpaca, plain")


def measure(rows: int) -> dict[str, float]:
    """Microseconds a row of each case of the sgt_titan that is imported."""
    from sgt_titan.config import schema
    from sgt_titan.config.resolve import resolve
    from sgt_titan.data.sources import load_rows
    from sgt_titan.data.tokenization import load_tokenizer, make_options, tokenize_chunk
    from sgt_titan.demo import TRUNK

    tokenizer, found = load_tokenizer(str(TRUNK)), {}
    for case in CASES:
        config = schema.Config()
        config.training.seq_len, config.data.source = 512, case.split(",")[0]
        if case == "demo":
            config.data.columns = {"private": ""}
        if case.endswith("plain"):
            config.data.template = "plain"
        if config.data.source == "alpaca" and not os.environ.get("SGT_TITAN_ASSETS"):
            continue
        config = resolve(config, world_size=None)
        source = load_rows(config.data)
        options = make_options(config, source, tokenizer)
        tokenize_chunk(source, tokenizer, options, 0, 50)
        start = time.process_time()
        chunk = tokenize_chunk(source, tokenizer, options, 0, rows)
        found[case] = 1e6 * (time.process_time() - start) / rows
        ends = chunk.lengths.cumsum()
        texts = [
            tokenizer.decode(ids)
            for ids in (chunk.tokens[e - n : e].tolist() for e, n in zip(ends, chunk.lengths, strict=True))
        ]
        start = time.process_time()
        for text in texts:
            tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        found[f"{case}: tokenizer alone"] = 1e6 * (time.process_time() - start) / rows
    found["MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout of this project")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    add_out(parser)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.rows)))
        return
    trees = {"here": HERE} | ({"against": arguments.against.resolve()} if arguments.against else {})
    best: dict[str, dict[str, float]] = {name: {} for name in trees}
    for _ in range(ROUNDS):
        for name, tree in trees.items():
            words = [sys.executable, __file__, "--measure", "--rows", str(arguments.rows)]
            environment = os.environ | {
                "PYTHONPATH": str(tree),
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
            said = subprocess.run(words, env=environment, cwd=tree, capture_output=True, text=True, check=True).stdout
            for key, value in json.loads(said.splitlines()[-1]).items():
                best[name][key] = min(value, best[name].get(key, value))
    here, other = best["here"], best.get("against", {})
    columns = {"us a row": "", "now": ",.0f", "before": ",.0f", "ratio": ".2f", "tokenizer alone": ",.0f"}
    machine = f"{os.cpu_count()} x {platform.machine()} CPU, Python {platform.python_version()}"
    with written(arguments.out, machine) as tables:
        tables.start("", columns)
        for case in [*(case for case in CASES if case in here), "MiB"]:
            before = other.get(case)
            ratio = here[case] / before if before else None
            tables.row(
                case if case != "MiB" else "peak MiB", here[case], before, ratio, here.get(f"{case}: tokenizer alone")
            )


if __name__ == "__main__":
    main()
