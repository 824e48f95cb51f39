"""``sgt-titan conjformer convert | serve | generate``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from sgt_titan.arguments import Parser
from sgt_titan.conjformer import command, talk

COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "convert": (command.main, "Write a checkpoint in a secretly rotated basis, or with scalar norms."),
    "serve": (talk.serve, "Serve a rotated checkpoint, to try it out."),
    "generate": (talk.generate, "Answer a prompt with a served rotated checkpoint."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of ``COMMANDS``; returns its exit code.

    Raises:
        UserError: no such command, or what it refuses.
    """
    parser = Parser(
        prog="sgt-titan conjformer",
        description="Inference in a secretly rotated basis (docs/CONJFORMER.md says what that is worth).",
        epilog="\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=tuple(COMMANDS), metavar="|".join(COMMANDS), help="see `COMMAND --help`")
    argv = list(sys.argv[2:] if argv is None else argv)
    return COMMANDS[parser.parse_args(argv[:1]).command][0](argv[1:])
