"""``sgt-titan report``: the before/after table of an export in seconds, for a first look. ``evaluate`` attacks it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sgt_titan.arguments import Parser
from sgt_titan.config.door import split_words
from sgt_titan.config.origin import settle
from sgt_titan.errors import UserError
from sgt_titan.evaluation.options import zero_argument


def main(argv: Sequence[str] | None = None) -> int:
    """``sgt-titan report EXPORT --trunk PATH --data SOURCE [--samples N] [--json FILE] [--data.key value ...]``.

    Raises:
        UserError: as ``summarise``; a JSON file that cannot be written.
    """
    parser = Parser(prog="sgt-titan report", description="Print what an export costs and hides.", allow_abbrev=False)
    parser.add_argument("export", metavar="EXPORT", help="an exported directory, or a run's")
    parser.add_argument(
        "--trunk",
        metavar="PATH",
        help="directory of the trunk, or a config's name (default: the run's own)",
    )
    parser.add_argument("--data", metavar="SOURCE", help="as data.source, or a config's name (default: the run's)")
    parser.add_argument("--samples", type=int, default=128, help="held-out rows (default 128)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    parser.add_argument("--examples", type=int, default=1, help="prompts to show in clear (default 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    zero_argument(parser)
    arguments, overrides = split_words(parser, sys.argv[2:] if argv is None else argv)
    settle(arguments)
    from transformers.utils.logging import disable_progress_bar

    from sgt_titan.evaluation.measure.summary import as_json, summarise, table
    from sgt_titan.evaluation.world.samples import data_config

    disable_progress_bar()  # of loading weights: a moment, and in the way of a table
    config = data_config(arguments.export, arguments.trunk, arguments.data, overrides)
    summary = summarise(
        arguments.export,
        config,
        samples=arguments.samples,
        seed=arguments.seed,
        examples=arguments.examples,
        zero_steps=arguments.zero_steps,
    )
    print(table(summary))
    if arguments.json:
        try:
            arguments.json.write_text(as_json(summary) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--json: cannot write {arguments.json}: {error.strerror}") from error
    return 0
