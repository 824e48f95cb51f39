"""Whether a directory can be made and written, asked before any work that would end there."""

from __future__ import annotations

import os
from pathlib import Path

from sgt_titan.errors import UserError


def writable(path: str | Path, said: str) -> Path:
    """The nearest part of ``path`` that exists, in which all that is missing of it can be made.

    Args:
        said: what the user calls it, to begin the message with: ``run.output_dir``, ``--out``.

    Raises:
        UserError: a file is in the way, or the folder cannot be written.
    """
    path = Path(path)
    found = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.lexists(folder))
    if not found.is_dir():
        raise UserError(f"{said}: {path} cannot be made: {found} is not a directory")
    if os.statvfs(found).f_flag & os.ST_RDONLY:
        raise UserError(f"{said}: {path} cannot be written: {found} is on a read-only file system")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"{said}: {path} cannot be written: no permission in {found}")
    return found
