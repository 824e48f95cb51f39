"""A client that has gone needs no answer: whatever is done for it is cancelled, down to the upstream's generation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection before the answer."""


async def until_disconnect(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """``await work()``, cancelled when the client disconnects. Raises ClientGone then, and whatever ``work`` raises.

    ``receive``: of a request whose body has been read. The work runs in the caller's task and the watch beside it,
    because an asynchronous generator may be begun here and gone on with later.
    """
    result: list[T] = []
    failure: list[Exception] = []
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            result.append(await work())
        except Exception as error:  # a task group would wrap it
            failure.append(error)
        group.cancel_scope.cancel()
    if failure:
        raise failure[0]
    if not result:
        raise ClientGone
    return result[0]


class EventStream(Response):
    """Server-sent events, closed together with the connection, and when the client takes none for ``patience_s``."""

    media_type = "text/event-stream"

    def __init__(
        self, request: Request, events: AsyncGenerator[bytes, None], patience_s: float, headers: dict[str, str]
    ):
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self._request, self._events, self._patience_s = request, events, patience_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with aclosing(self._events):
                async for event in self._events:
                    async with asyncio.timeout(self._patience_s):
                        await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await until_disconnect(self._request.receive, work)
        except (ClientGone, TimeoutError):
            pass
        finally:
            await self._events.aclose()
