"""Options that several commands of the evaluation share; imports nothing heavy."""

from __future__ import annotations

import argparse

from sgt_titan.errors import UserError

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
        type=int,
        metavar="N",
        default=ZERO_STEPS,
        help=f"fit the constant prompt that `kept` counts from for at most N steps (default {ZERO_STEPS}), once for a "
        "trunk and its data; fewer make `kept` kinder",
    )


def check_zero(steps: int) -> None:
    """Raises UserError for a number of steps that fits nothing."""
    if steps < 1:
        raise UserError(f"--zero-steps must be at least 1, got {steps}")
