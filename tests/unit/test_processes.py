"""A pipe to each of several processes."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from sgt_titan.processes import told


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
