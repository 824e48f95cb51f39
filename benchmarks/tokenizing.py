"""Preparation at size: tokens a second a core against what has to be done, and time and memory by the number of rows.

    python benchmarks/tokenizing.py speed [--rows 20000] [--out FILE]
    python benchmarks/tokenizing.py size [--rows 10000 100000 1000000] [--out FILE]

Rows are Alpaca's of the assets (SGT_TITAN_ASSETS), over and over, each with a number of its own. ``speed``: one core,
the same texts by `tokenizers`' encode_batch alone, which is the limit, by `datasets`' map with the tokenizer in
batches, and by a preparation (data read, conversations found, templates, roles, hashes, arrays written); the best of
three.
``size``: `sgt-titan prepare` as it is, a process a core beside the one that writes; resident memory at most of that one
and of the largest of the others.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tables import add_out, written

HERE = Path(__file__).resolve().parents[1]
ROUNDS = 3
COLUMNS = {"way": "", "tokens/s a core": ",.0f", "of the limit": ".0%"}


def write_rows(file: Path, count: int) -> None:
    """JSON lines of instruction, input and output; no two are the same."""
    from sgt_titan.config import schema
    from sgt_titan.data.sources import load_rows

    found = load_rows(schema.Data(source="alpaca"))
    rows = [found.data[i] for i in range(min(len(found), 20_000))]
    with file.open("w") as stream:
        for i in range(count):
            row = rows[i % len(rows)]
            stream.write(json.dumps({**row, "instruction": f"{row['instruction']} ({i})"}) + "\n")


def speed(rows: int, tables) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets

    from sgt_titan.config import schema
    from sgt_titan.config.resolve import resolve
    from sgt_titan.data.cache import prepare
    from sgt_titan.data.tokenization import load_tokenizer
    from sgt_titan.demo import TRUNK

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(str(TRUNK))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", rows)
        read = [json.loads(line) for line in (folder / "rows.jsonl").open()]
        texts = [f"{row['instruction']}\n{row['input']}\n{row['output']}" for row in read]
        table = datasets.Dataset.from_dict({"text": texts})
        number = iter(range(10**9))

        def ours(template: str):
            config = schema.Config()
            config.training.seq_len, config.data.source = 2048, str(folder / "rows.jsonl")
            config.data.template, config.data.cache_dir = template, f"{folder}/cache{next(number)}"
            found = prepare(resolve(config, world_size=None), str(TRUNK), progress=False, workers=1)
            return len(found.tokens)

        def mapped():
            done = table.map(
                lambda batch: tokenizer(batch["text"], verbose=False), batched=True, load_from_cache_file=False
            )
            return sum(map(len, done["input_ids"]))

        ways = {
            "`encode_batch` alone": lambda: sum(len(e.ids) for e in tokenizer.backend_tokenizer.encode_batch(texts)),
            "`datasets.map` with the tokenizer": mapped,
            "a preparation, plain": lambda: ours("plain"),
            "a preparation, chat": lambda: ours("chat"),
        }
        best = dict.fromkeys(ways, 0.0)
        for _ in range(ROUNDS):
            for way, call in ways.items():
                began = time.process_time()
                tokens = call()
                best[way] = max(best[way], tokens / (time.process_time() - began))
    tables.start("", COLUMNS)
    for way, rate in best.items():
        tables.row(way, rate, rate / best["`encode_batch` alone"])


def size(counts: list[int], tables) -> None:
    from sgt_titan.data.tokenization import PARALLEL_ROWS

    columns = {"rows prepared": ",.0f", "tokens": ",.0f", "s": ",.0f", "tokens/s a core": ",.0f"}
    tables.start(
        "", columns | {"peak MiB, who writes": ",.0f", "peak MiB, of the others": ",.0f", "on disk, MiB": ",.0f"}
    )
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "rows.jsonl", count)
            # In a process of its own: the memory of children that have ended is the most that one of them had.
            said = subprocess.check_output([sys.executable, __file__, "--one", name], text=True, env={**os.environ})
            about = json.loads(said.splitlines()[-1])
            stored = sum(path.stat().st_size for path in (folder / "cache").rglob("*.npy"))
        cores = len(os.sched_getaffinity(0)) if count > PARALLEL_ROWS else 1
        rate = about["tokens"] / about["seconds"] / cores
        tables.row(count, about["tokens"], about["seconds"], rate, about["writer"], about["worker"], stored / 2**20)


def one(folder: Path) -> None:
    from sgt_titan import cli

    words = ["prepare", "demo", "--data.source", str(folder / "rows.jsonl"), "--data.cache_dir", str(folder / "cache")]
    words += ["--data.max_samples", "0", "--data.truncation", "right", "--training.seq_len", "512"]
    began = time.monotonic()
    code = cli.main(words)
    seconds = time.monotonic() - began
    for process in multiprocessing.active_children():
        process.join()  # or nothing is known of it
    (meta,) = (folder / "cache").glob("*/meta.json")
    peaks = {name: resource.getrusage(who).ru_maxrss / 1024 for name, who in
             (("writer", resource.RUSAGE_SELF), ("worker", resource.RUSAGE_CHILDREN))}  # fmt: skip
    print("\n" + json.dumps({"seconds": seconds, "tokens": json.loads(meta.read_text())["tokens"], **peaks}))
    sys.exit(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "size"), nargs="?")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    add_out(parser)
    options = parser.parse_args()
    if options.one:
        one(options.one)
    with written(options.out, f"{os.cpu_count()} CPUs") as tables:
        if options.what == "speed":
            speed((options.rows or [20_000])[0], tables)
        else:
            size(options.rows or [10_000, 100_000, 1_000_000], tables)


if __name__ == "__main__":
    main()
