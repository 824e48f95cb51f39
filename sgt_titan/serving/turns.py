"""So many at a time, and fair turns between clients: whoever sends a thousand requests waits behind himself."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class Full(Exception):
    """No place to wait, or it was taken by a client that had fewer."""


class Turns:
    """``async with turns.turn(client)`` around work of which ``active`` may run at a time.

    Free places go round the clients that wait, one each. At most ``waiting`` wait; then the client who has the most
    waiting loses his newest. ``None``: any number.
    """

    def __init__(self, active: int, waiting: int | None = None):
        self._free, self._most = active, waiting
        self._queues: dict[Hashable, deque[asyncio.Future[None]]] = {}  # in the order of their turns
        self.active = self.waiting = 0

    @asynccontextmanager
    async def turn(self, client: Hashable, seconds: float | None = None) -> AsyncIterator[None]:
        """Raises Full if nothing may wait, TimeoutError after ``seconds`` of waiting."""
        await self.take(client, seconds)
        try:
            yield
        finally:
            self.give_back()

    async def take(self, client: Hashable, seconds: float | None = None) -> None:
        """A place, to be given back by :meth:`give_back`. Raises as :meth:`turn`."""
        if self._free and not self.waiting:
            self._free -= 1
            self.active += 1
            return
        self._make_room(client)
        place = asyncio.get_running_loop().create_future()
        self._queues.setdefault(client, deque()).append(place)
        self.waiting += 1
        try:
            async with asyncio.timeout(seconds):
                await place
        except BaseException:
            if place.done() and not place.cancelled() and place.exception() is None:
                self.give_back()  # it came in the same moment
            else:
                self._forget(client, place)
            raise

    def give_back(self) -> None:
        """A place is free: the next client's oldest gets it."""
        self.active -= 1
        self._free += 1
        while self._free and self._queues:
            client = next(iter(self._queues))
            queue = self._queues.pop(client)
            place = queue.popleft()
            self.waiting -= 1
            if queue:
                self._queues[client] = queue  # to the end of the round
            if not place.done():
                self._free -= 1
                self.active += 1
                place.set_result(None)

    def _make_room(self, client: Hashable) -> None:
        if self._most is None or self.waiting < self._most:
            return
        largest = max(self._queues, key=lambda c: len(self._queues[c]), default=client)
        if len(self._queues.get(largest, ())) <= len(self._queues.get(client, ())) + 1:
            raise Full
        self._queues[largest][-1].set_exception(Full())
        self._drop(largest, self._queues[largest][-1])

    def _forget(self, client: Hashable, place: asyncio.Future[None]) -> None:
        if place in self._queues.get(client, ()):
            self._drop(client, place)

    def _drop(self, client: Hashable, place: asyncio.Future[None]) -> None:
        self._queues[client].remove(place)
        self.waiting -= 1
        if not self._queues[client]:
            del self._queues[client]


class Workers:
    """Computations in threads, in fair turns. One whose client leaves before its turn is never begun; of one that has
    begun, the place is free when it has ended, not when its client left."""

    def __init__(self, threads: int):
        self._turns = Turns(threads)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="encode")

    async def run(self, client: Hashable, function: Callable[..., T], *args: Any) -> T:
        """``function(*args)``. Raises what it raises."""
        await self._turns.take(client)
        future = asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        future.add_done_callback(self._ended)
        return await asyncio.shield(future)

    def _ended(self, done: asyncio.Future[Any]) -> None:
        self._turns.give_back()
        if not done.cancelled():
            done.exception()  # asked for, so that nobody is told that nobody has

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
