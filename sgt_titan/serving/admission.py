"""Back-pressure: so many requests at a time, so many more may wait, the rest is told to come again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sgt_titan.serving.errors import RequestError


class Admission:
    """``async with admission.slot()`` around a request."""

    def __init__(self, active: int, waiting: int, wait_s: float):
        self._slots = asyncio.Semaphore(active)
        self._most, self._wait_s = active + waiting, wait_s
        self.waiting = self.active = 0

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Raises RequestError (503) if too many wait already, or none came free in time."""
        if self.active + self.waiting >= self._most:  # counted here: several may arrive before one has its slot
            raise RequestError("the proxy is overloaded; try again", status=503, code="overloaded")
        self.waiting += 1
        try:
            await asyncio.wait_for(self._slots.acquire(), self._wait_s)
        except TimeoutError:
            raise RequestError(
                "the proxy is overloaded; no slot came free in time", status=503, code="overloaded"
            ) from None
        finally:
            self.waiting -= 1
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self._slots.release()
