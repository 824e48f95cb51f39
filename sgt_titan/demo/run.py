"""The demo: train, export and measure through the commands that anybody would type, and say where things lie.

``python -m sgt_titan.demo.run [--fresh] [--out DIR]``; ``make demo`` installs what it needs first. Each step is a
process of its own, so nothing here depends on the training or the evaluation code.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sgt_titan.errors import UserError

OUT = Path("outputs") / "demo"
# Of the constant prompt that `kept` counts from: half a minute. It has not settled by then, and the report says so.
ZERO_STEPS = 100
RUN_FILE = "run.json"  # what training leaves in a directory of its own

OWN = Path(__file__).parent / "private.yaml"
# What goes through the whole client at the end; like the rest of the demo, it belongs to nobody.
LETTER = (
    "Hello, my name is Ella Nellakin. For a winter coat I paid $694.33 with card 4327 6736 5229 1676, order XS-863504. "
    "Today your site sells it for less. Could you look into it?"
)

Execute = Callable[[Sequence[str]], int]


def execute(words: Sequence[str]) -> int:
    """Run ``sgt-titan`` with ``words`` under this interpreter, showing the command; returns its exit code."""
    print(f"\n$ sgt-titan {shlex.join(words)}", flush=True)
    # The demo's matrices are too small to share: on a busy machine two threads spend their time waiting for each other.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    code = subprocess.run([sys.executable, "-m", "sgt_titan.cli", *words], check=False, env=environment).returncode
    return code if code >= 0 else 128 - code  # killed by a signal, as a shell counts it


def discard(out: Path) -> None:
    """Delete an earlier demo run.

    Raises:
        UserError: ``out`` is something else.
    """
    if not out.exists():
        return
    if not (out / RUN_FILE).is_file():
        raise UserError(f"{out}: is not a run of ours (it has no {RUN_FILE}), so it is not deleted; move it away first")
    shutil.rmtree(out)


def run(out: Path, *, fresh: bool = False, overrides: Sequence[str] = (), execute: Execute = execute) -> int:
    """Train the demo in ``out`` (or go on, or find it finished), export it, report; returns the first bad exit code.

    Args:
        fresh: delete an earlier run in ``out`` and start over.
        overrides: further words for ``sgt-titan train demo``.

    Raises:
        UserError: ``fresh``, and ``out`` is not a run of ours.
    """
    if fresh:
        discard(out)
    export, began = out / "export", time.monotonic()
    if code := execute(["train", "demo", "--run.output_dir", str(out), *overrides]):
        return code
    trained = time.monotonic()
    # An interrupted run may have finished training without having exported.
    if not (export / "config.json").is_file() and (code := execute(["export", str(out), str(export)])):
        return code
    report = ["report", str(export), "--trunk", "demo", "--data", "demo", "--out", str(out / "report")]
    report += ["--zero-steps", str(ZERO_STEPS)]
    if code := execute(report):
        return code
    letter = out / "letter.txt"
    out.mkdir(parents=True, exist_ok=True)
    letter.write_text(LETTER + "\n", encoding="utf-8")
    readings = ["readings", str(export), str(letter), "--trunk", "demo", "--data", "demo", "--private-own", str(OWN)]
    if code := execute(readings):
        return code
    print(closing(out, trained - began, time.monotonic() - trained))
    return 0


def closing(out: Path, training: float, reporting: float) -> str:
    """Where everything lies; ``training`` and ``reporting`` are seconds."""
    python = os.path.relpath(sys.executable)
    python = sys.executable if python.startswith(os.pardir) else python
    return f"""
Took {training:.0f} s for training and {reporting:.0f} s for the report. Left behind:
  {out}/export         the transform, for a client (README.md there)
  {out}/report         the numbers above, as a page (report.html) and for programs (results.json)
  {out}/checkpoints    to go on from
  {out}/tb             TensorBoard logs; look at them with
      {python} -m tensorboard.main --logdir {out}/tb
Start over with `make demo FRESH=1`; the options are in train_configs/demo.yaml."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; returns an exit code: 0, that of the step that failed, 2 for bad input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m sgt_titan.demo.run", description="Train, export and measure.")
    parser.add_argument("--out", type=Path, default=OUT, help=f"directory of the run (default {OUT})")
    parser.add_argument("--fresh", action="store_true", help="delete an earlier demo run and start over")
    arguments, overrides = parser.parse_known_args(argv)
    try:
        return run(arguments.out, fresh=arguments.fresh, overrides=overrides)
    except UserError as error:
        print(f"sgt-titan: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
