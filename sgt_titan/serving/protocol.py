"""HTTP as uvicorn speaks it, for clients that do not finish: a connection without a whole request's head is closed.

uvicorn closes a connection that is idle between requests, but waits for ever for one that sends nothing, or a byte a
minute. The body's time is bounded where it is read. An idle connection is kept longer than clients keep theirs: httpx,
and so OpenAI's client, reuses one for 5 s, which is uvicorn's own time, and a request sent in the moment of closing is
lost. For the same reason time in which this process did not run does not count: the client gets its whole time again.
"""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 20.0
KEEP_ALIVE_SECONDS = 75
LATE_SECONDS = 1.0  # a timer that is called so much too late says that the process was stopped, or starved


class PatientProtocol(H11Protocol):
    """``head_seconds`` for the head of a request that is first or has begun; ``keep_alive_seconds`` between two."""

    head_seconds = HEAD_SECONDS
    keep_alive_seconds: float = KEEP_ALIVE_SECONDS
    late_seconds = LATE_SECONDS
    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = self.keep_alive_seconds  # type: ignore[assignment]  # floats are as good

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait_for_a_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()  # a request's head is complete
        elif self.transport.is_closing():
            pass
        elif self.cycle is not None and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._cancel()  # that was the end of a body whose answer did not wait for it
            self._keep_alive()
        elif self._deadline is None:
            self._wait_for_a_head()  # the next one has begun

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        if self._is_late(self.timeout_keep_alive_task):
            self._keep_alive()
        else:
            super().timeout_keep_alive_handler()

    def _keep_alive(self) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _wait_for_a_head(self) -> None:
        self._deadline = self.loop.call_later(self.head_seconds, self._too_late)

    def _cancel(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        if self._is_late(self._deadline):
            self._wait_for_a_head()
        elif self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def _is_late(self, timer: asyncio.TimerHandle | None) -> bool:
        return timer is not None and self.loop.time() - timer.when() > self.late_seconds
