"""A small Python program in a process of its own, with little time and memory: for what strangers wrote."""

from __future__ import annotations

import subprocess
import sys

TOO_LONG = (-9, -24)  # killed, or told by the kernel that its time is up
_LIMITS = """
import sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]), int(sys.argv[1])))
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
except ImportError:
    pass
"""


def confined(
    program: str, given: bytes, *words: str, seconds: float, cpu_seconds: int, memory: int
) -> tuple[int, bytes]:
    """Exit code and output of ``program``, which reads ``given`` from its standard input and has ``words`` as
    ``sys.argv[3:]``. ``TOO_LONG`` holds the codes of one that was stopped for its time (seconds of the clock and of the
    processor); memory is in bytes. Raises OSError where no process can be had."""
    limits = (str(cpu_seconds), str(memory))
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LIMITS + program, *limits, *words],
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            env={"PYTHONPATH": ":".join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8:surrogatepass"},
        )
    except subprocess.TimeoutExpired:
        return TOO_LONG[0], b""
    return done.returncode, done.stdout
