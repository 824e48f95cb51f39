"""Options that several commands of the evaluation share; imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgt_titan.arguments import number
from sgt_titan.config.door import name_argument

GLANCE = "glance"  # the suite of the weakest attacker alone: what `sgt-titan report` prints
SUITES = ("quick", "standard", "full")  # those that attack
ZERO_STEPS = 600
GUESSING = "guess"  # what every reading is compared with; no attack
ANSWER = "answer"  # nor is this: what the answer tells of its prompt
UNSENT = (GUESSING, ANSWER)  # they see nothing of what a mechanism makes, so are the same for all


def suite_argument(found: argparse.ArgumentParser, text: str, *, glance: bool = False) -> None:
    """--suite, of every command that attacks. ``glance``: also the one that does not."""
    found.add_argument("--suite", choices=(GLANCE,) * glance + SUITES, default="quick", help=text)


def zero_argument(found: argparse.ArgumentParser) -> None:
    """--zero-steps, of every command that says what is kept."""
    found.add_argument(
        "--zero-steps",
        type=number(int, 1),
        metavar="N",
        default=ZERO_STEPS,
        help=f"fit the constant prompt that `kept` counts from for at most N steps (default {ZERO_STEPS}), once for a "
        "trunk and its data; fewer make `kept` kinder",
    )


def study_arguments(found: argparse.ArgumentParser, command: str) -> None:
    """What every command has that trains and evaluates many."""
    name_argument(found, "config")
    found.add_argument("--out", metavar="DIR", type=Path, help=f"default: outputs/{command}-NAME")
    suite_argument(found, "of each evaluation")
    found.add_argument(
        "--prompts", type=number(int, 2), metavar="N", help="held-out prompts to attack, instead of the suite's number"
    )
    zero_argument(found)
    found.add_argument("--dry-run", action="store_true", help="print the commands that would run, and stop")
