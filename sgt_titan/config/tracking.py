"""Whether TensorBoard and Weights & Biases would take a run: asked before it starts, because torchtitan's logger goes
on without the latter, and ours opens the former after the first step.
"""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError

AWAY = ("offline", "dryrun", "disabled")  # of WANDB_MODE: nothing is sent, so no key is needed
HOST = "https://api.wandb.ai"


def require_tracking(config: Config, env: Mapping[str, str]) -> None:
    """Raises UserError where ``metrics.tensorboard`` or ``metrics.wandb`` is on and its package or a key is missing."""
    if config.metrics.tensorboard and find_spec("tensorboard") is None:
        raise UserError(
            "metrics.tensorboard: the package tensorboard is not installed; pip install 'sgt-titan[train]', or set it "
            "to false"
        )
    if not config.metrics.wandb:
        return
    if find_spec("wandb") is None:
        raise UserError("metrics.wandb: the package wandb is not installed; pip install wandb, or set it to false")
    if env.get("WANDB_MODE") in AWAY:
        return
    host = urlsplit(env.get("WANDB_BASE_URL", HOST)).hostname or ""
    if not env.get("WANDB_API_KEY") and not _in_netrc(host, env):
        raise UserError(
            f"metrics.wandb: no key for {host}; run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline, or "
            "metrics.wandb false"
        )


def _in_netrc(host: str, env: Mapping[str, str]) -> bool:
    for file in (env.get("NETRC", ""), "~/.netrc", "~/_netrc"):
        path = Path(file).expanduser() if file else None
        if path is None or not path.is_file():
            continue
        try:
            if netrc.netrc(str(path)).authenticators(host):
                return True
        except (netrc.NetrcParseError, OSError):
            continue
    return False
