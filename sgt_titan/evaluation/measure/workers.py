"""``--jobs``: the parts of an evaluation by several processes.

A process loads the setting for itself and is told names of parts, the longest first, but none before what it goes on
from; it answers with their values in JSON. A part is a function of the setting, the seed and its name, so it makes no
difference who measures it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure.runner import Job
from sgt_titan.processes import keep_memory, told


def several(
    jobs: Sequence[Job], count: int, build: Callable[..., Sequence[Job]], arguments: Sequence[Any]
) -> Iterator[tuple[Job, dict[str, Any], float]]:
    """Each of ``jobs`` with its part and the seconds that it took, as they come.

    Args:
        build: makes all jobs from ``arguments``, in a process; a function of a module.

    Raises:
        UserError: what a process says, or that it was killed.
    """
    behind = {job.name: max((j.seconds for j in jobs if j.after == job.name), default=0.0) for job in jobs}
    left, busy = sorted(jobs, key=lambda job: -job.seconds - behind[job.name]), dict[Connection, Job]()
    idle: list[Connection] = []

    def begin() -> None:
        unfinished = {job.name for job in (*left, *busy.values())}
        for job in [job for job in left if job.after not in unfinished][: len(idle)]:
            pipe = idle.pop()
            left.remove(job)
            busy[pipe] = job
            pipe.send(job.name)

    threads = max(1, torch.get_num_threads() // count)
    try:
        with told(min(count, len(jobs)), _work, threads, build, arguments) as pipes:
            idle += pipes
            begin()
            while busy:
                for pipe in [pipe for pipe in wait(list(busy)) if isinstance(pipe, Connection)]:
                    job = busy.pop(pipe)
                    answer = json.loads(pipe.recv_bytes())
                    if "error" in answer:
                        raise UserError(answer["error"])
                    idle.append(pipe)
                    begin()
                    yield job, answer["part"], answer["seconds"]
    except (EOFError, ConnectionError):
        raise UserError(
            f"--jobs {count}: a process that measured {job.name} ended; its last words are above, or it was killed for "
            "want of memory: take fewer --jobs. What is finished is kept"
        ) from None


def _work(pipe: Connection, threads: int, build: Callable[..., Sequence[Job]], arguments: Sequence[Any]) -> None:
    """A process: names come, parts or errors go, until the pipe is closed."""
    torch.set_num_threads(threads)
    keep_memory()
    jobs: dict[str, Job] = {}
    with suppress(EOFError, ConnectionError, KeyboardInterrupt):
        while True:
            name = pipe.recv()
            answer: dict[str, Any]
            try:
                jobs = jobs or {job.name: job for job in build(*arguments)}
                started = time.monotonic()
                answer = {"part": jobs[name].run(), "seconds": time.monotonic() - started}
            except UserError as error:
                answer = {"error": str(error)}
            pipe.send_bytes(json.dumps(answer, ensure_ascii=False, allow_nan=False).encode())
