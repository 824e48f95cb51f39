"""Processes that are told over a pipe each what to do, and one that keeps its memory."""

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


MALLOPT = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 1 << 26)}  # of malloc.h


def keep_memory() -> None:
    """Have this process keep the memory that it frees, as CUDA's allocator does; for one that trains on a CPU.

    By default glibc gives every tensor of more than 32 MB back to the kernel, which fills fresh pages with zeros for
    the next: of a step at V = 128,256 that is a twentieth, and half of one that makes whole logits. A step's peak is
    the next one's too, so nothing is kept that would not be wanted again. No effect without glibc.
    """
    import ctypes

    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for option, value in MALLOPT.values():
        mallopt(option, value)
