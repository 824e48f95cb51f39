"""Which export, trunk and data a command means: a run's directory knows all three, a config's name the latter two."""

from __future__ import annotations

import argparse
from pathlib import Path

from sgt_titan.config.keys import get
from sgt_titan.config.load import RECORDED, available, load, recorded
from sgt_titan.config.paths import expand
from sgt_titan.config.schema import Config
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError

EXPORT = "export"  # in a run's directory
KEYS = {"trunk": "trunk.path", "data": "data.source"}


def settle(arguments: argparse.Namespace) -> None:
    """Fill in ``export``, ``trunk`` and ``data`` of a command's arguments, in place.

    ``export`` may be a run's directory. What is not given is the run's own; what is given may be the
    name of a config, whose trunk or data are meant.

    Raises:
        UserError: neither given nor known; a run that has not been exported.
    """
    arguments.export, run = export_of(arguments.export)
    for name, key in KEYS.items():
        found = of_run(getattr(arguments, name), key, run)
        setattr(arguments, name, found)
        if found is None:
            raise UserError(
                f"--{name}: is needed, since {arguments.export} is neither a run's directory nor an export in one"
            )


def of_run(given: str | None, key: str, run: Config | None) -> str | None:
    """What was given, as ``meant``; else the run's own value of ``key``; None where there is no run either.

    Raises:
        UserError: as ``meant``.
    """
    if given is not None:
        return meant(given, key)
    return get(run, key) if run is not None else None


def export_of(path: str) -> tuple[str, Config | None]:
    """The export that a path means, and the config of its run; None where it lies in no run's directory.

    Raises:
        UserError: a run without an export; a config.yaml that is damaged.
    """
    folder = Path(path)
    if not (folder / "config.json").is_file() and (folder / RECORDED).is_file():
        if not (folder / EXPORT / "config.json").is_file():
            raise UserError(f"{path}: is a run that has not been exported; sgt-titan export {path} {folder / EXPORT}")
        folder = folder / EXPORT
    return str(folder) if folder != Path(path) else path, recorded(folder.resolve().parent)


def meant(given: str, key: str) -> str:
    """A directory, file or preset as it is; of a config's name its value of ``key``.

    Raises:
        UserError: the config has no value, or names an environment variable that is not set.
    """
    if given == "demo" or Path(given).exists() or given not in available():
        return given
    config = load(given)
    value = get(config, key)
    if key == "data.source" and config.data.sources:
        raise UserError(f"{given}: this config mixes {config.data.called}; name one source, or give a run's directory")
    if not value:
        raise UserError(f"{given}: this config has no {key}")
    return expand(value, f"{given}: {key}")


def trunk_directory(given: str) -> str:
    """The directory of a trunk: as it is given, of a config's name its ``trunk.path``, of ``demo`` the one that ships.

    Raises:
        UserError: as ``meant``.
    """
    found = meant(given, KEYS["trunk"])
    return str(TRUNK) if found == "demo" else found
