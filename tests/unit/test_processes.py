"""A pipe to each of several processes, and one that keeps the memory it frees and meets no fresh pages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from sgt_titan.processes import told

CODE = """
import resource, sys
import torch
from sgt_titan.processes import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def step():
    return [torch.empty(12_000_000).fill_(1.0) for _ in range(3)] and None
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(8)))  # a small block may take a freed place once, and the heap grow by one tensor
"""


def work(pipe, said):
    with suppress(EOFError):
        while True:
            pipe.send((said, pipe.recv(), os.getpid()))


def test_each_is_told_over_its_own_pipe_until_that_is_closed():
    with told(2, work, "heard") as pipes:
        for number, pipe in enumerate(pipes):
            pipe.send(number)
        answers = [pipe.recv() for pipe in pipes]
        assert [answer[:2] for answer in answers] == [("heard", 0), ("heard", 1)]
        assert len({os.getpid(), *(answer[2] for answer in answers)}) == 3
        os.kill(answers[0][2], signal.SIGKILL)
        with pytest.raises((EOFError, ConnectionError)):
            pipes[0].recv()
        pipes[1].send("still")
        assert pipes[1].recv()[1] == "still"
    assert all(pipe.closed for pipe in pipes)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_large_tensors_are_not_given_back():
    found = {}
    for way in ("keep", "leave"):
        done = subprocess.run([sys.executable, "-c", CODE, way], capture_output=True, text=True, check=True)
        found[way] = int(done.stdout)
    assert found["keep"] < 1000 < 30_000 < found["leave"]  # 144 MB are 35,156 pages
