"""Processes that are told over a pipe each what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


@contextmanager
def told(count: int, work: Callable[..., None], *arguments: Any) -> Iterator[list[Connection]]:
    """Pipes to ``count`` new processes of ``work(pipe, *arguments)``, a function of a module, which is to go on until
    it reads the end of its pipe.

    Spawned, not forked: the parent may hold threads of torch. A pipe each: a process that is killed is the end of its
    pipe at once (EOFError, ConnectionError), where a pool's shared queues would wait for ever.
    """
    import multiprocessing

    context, pipes = multiprocessing.get_context("spawn"), list["Connection"]()
    try:
        for _ in range(count):
            ours, theirs = context.Pipe()
            pipes.append(ours)
            context.Process(target=work, args=(theirs, *arguments), daemon=True).start()
            theirs.close()
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
