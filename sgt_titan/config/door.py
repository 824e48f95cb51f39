"""The one way in: command lines with config overrides among their own options, and a config read, resolved and checked.

Every command that takes the name of a config goes through here, so that a word means the same to all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Literal

from sgt_titan.config.check import validate
from sgt_titan.config.load import load
from sgt_titan.config.overrides import parse_overrides, takes_value
from sgt_titan.config.resolve import resolve
from sgt_titan.config.schema import Config
from sgt_titan.config.trunk import read_trunk


def name_argument(parser: argparse.ArgumentParser, dest: str = "name", *, needed: bool = True) -> None:
    """NAME, of every command that takes a config."""
    help = "a config of train_configs/ or a YAML file"
    parser.add_argument(dest, nargs=None if needed else "?", metavar="NAME", help=help)


def split_words(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """A command's own arguments, and the overrides that stood anywhere among them.

    argparse would take the value of an option that it does not know for a positional argument:
    ``plan --training.seq_len 64 demo`` would plan the config 64.

    Raises:
        UserError: an override that is wrong in itself; what ``parser`` refuses.
    """
    own: list[str] = []
    overrides: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name = word.partition("=")[0]
        action = parser._option_string_actions.get(name)  # there is no public way to ask
        if action is not None or not word.startswith("--") or word == "--":
            own.append(word)
            wanted = 0 if action is None or "=" in word else _values(action)
            while wanted and words and (wanted == 1 or not words[0].startswith("--")):
                own.append(words.pop(0))
                wanted -= 1
        else:
            overrides.append(word)
            if words and takes_value(word, words[0]):
                overrides.append(words.pop(0))
    if not {"--help", "-h"} & set(own):
        parse_overrides(overrides)
    return parser.parse_args(own), overrides


def _values(action: argparse.Action) -> int:
    """How many words an option takes; of ``+`` and ``*`` those up to the next option."""
    if action.nargs is None:
        return 1
    return action.nargs if isinstance(action.nargs, int) else 1 if action.nargs == "?" else 1 << 30


def read_config(
    name: str, overrides: Sequence[str] = (), *, world_size: int | None = None,
    trunk: Literal["", "config", "weights"] = "", device: str | None = None, shared: str = "",
) -> tuple[Config, dict[str, Any]]:  # fmt: skip
    """A config resolved and checked, cheap mistakes first, and its trunk's config.json, {} where that is not asked for.

    Args:
        world_size: number of processes; None skips what depends on it.
        trunk: "" does not look at the trunk; "config": its config.json, or ``trunk.architecture``; "weights": all its
            files must be there.
        device: "cpu" refuses what needs a GPU.
        shared: where the run's directory is, unless the config says otherwise.

    Raises:
        UserError: anything wrong with the config, the overrides or the trunk's directory.
    """
    config = resolve(load(name, overrides), world_size=world_size, home=shared or "outputs")
    validate(config, world_size, None)  # cheap mistakes first: they do not need the trunk's directory
    if not trunk:
        return config, {}
    found = read_trunk(config, weights=trunk == "weights")
    validate(config, world_size, found, device=device)
    return config, found
