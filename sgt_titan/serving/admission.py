"""Back-pressure: so many requests at a time, so many more may wait, the rest is told to come again."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager

from sgt_titan.serving.errors import RequestError
from sgt_titan.serving.turns import Full, Turns


class Admission:
    """``async with admission.slot(client)`` around a request."""

    def __init__(self, active: int, waiting: int, wait_s: float):
        self._turns, self._wait_s = Turns(active, waiting), wait_s

    @property
    def active(self) -> int:
        return self._turns.active

    @property
    def waiting(self) -> int:
        return self._turns.waiting

    @asynccontextmanager
    async def slot(self, client: Hashable) -> AsyncIterator[None]:
        """Raises RequestError (503) if too many wait already, or none came free in time."""
        try:
            await self._turns.take(client, self._wait_s)
        except Full:
            raise RequestError("the proxy is overloaded; try again", status=503, code="overloaded") from None
        except TimeoutError:
            raise RequestError(
                "the proxy is overloaded; no slot came free in time", status=503, code="overloaded"
            ) from None
        try:
            yield
        finally:
            self._turns.give_back()
