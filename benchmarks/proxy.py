"""The proxy in a process of its own, for ``load.py`` and ``soak.py``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def start_proxy(
    export: str | Path, options: Sequence[str], environment: Mapping[str, str], log: Path
) -> tuple[subprocess.Popen, str]:
    """``sgt-titan serve`` on a free port under the name "m"; its process and URL, once it listens. All it says goes
    to ``log``."""
    command = [sys.executable, "-m", "sgt_titan.cli", "serve", str(export), "--port", "0", "--served-name", "m"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *options], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    while not (found := re.search(r"(http://127\S+)/v1 ->", log.read_text())):
        if process.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(0.2)
    return process, found[1]
