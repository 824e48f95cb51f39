"""What config.json says of a checkpoint that this project changed: whose server it is, and that it is no original.

"sgt_titan_conjformer": {"secret": "3f0c..."}    a server's: a hash of the secret, as in its client's half
"sgt_titan_conjformer": {"drift": 0.5}           moved away from its original on purpose
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sgt_titan.errors import UserError

MARK = "sgt_titan_conjformer"


def mark_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The mark of a config.json, empty without one."""
    found = config.get(MARK)
    return dict(found) if isinstance(found, Mapping) else {}


def require_original(path: str | Path, config: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint that is to be the original is not."""
    mark = mark_of(config)
    if "secret" in mark:
        raise UserError(f"{path}: is a server's rotated checkpoint; give the original that it was made from")
    if mark.get("drift"):
        raise UserError(f"{path}: was moved away from its original on purpose; give the original")


def require_same_secret(server: str | Path, config: Mapping[str, Any], mine: str) -> None:
    """Raises UserError for a server's directory of another secret than ``mine`` (``Secret.name``)."""
    theirs = mark_of(config).get("secret")
    if theirs is not None and theirs != mine:
        raise UserError(f"{server}: was made with another secret than this client's; convert again, or give its own")
