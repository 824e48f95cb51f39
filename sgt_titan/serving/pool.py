"""Several servers of one trunk: which is asked, and what happens when it fails before its answer has begun."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import TypeVar

import torch

from sgt_titan.client.answer import UpstreamError
from sgt_titan.serving.upstream import ASK_AGAIN_S, Deltas, Described, Upstream

T = TypeVar("T")

# Failures that the same server need not have a little later. Of the others (too slow, embeddings disabled, our key
# refused, another model) it would only say the same again; another server is still asked.
_PASSING = {"upstream_down", "upstream_cut_off", "upstream_overloaded"}
_THE_CLIENTS = {"context_length_exceeded", "upstream_refused", "upstream_body_too_large"}
FIRST_REST_S, LONGEST_REST_S = 1.0, 30.0


class Member:
    """A server and how it has done lately. ``rests_until``: it failed, and is asked only if no other is left."""

    def __init__(self, upstream: Upstream):
        self.upstream, self.busy = upstream, 0
        self.failures, self.rests_until = 0, 0.0

    @property
    def up(self) -> bool:
        return time.monotonic() >= self.rests_until

    def failed(self) -> None:
        rest = min(FIRST_REST_S * 2**self.failures, max(LONGEST_REST_S, FIRST_REST_S))
        self.failures = min(self.failures + 1, 10)
        self.rests_until = time.monotonic() + rest

    def answered(self) -> None:
        self.failures, self.rests_until = 0, 0.0


class Pool:
    """``stream`` sends to the least busy server that is up; ``retries`` more are tried while no answer has begun.

    What is sent again are the same embeddings: a second sample of a prompt would be a second chance for an observer.
    """

    def __init__(self, upstreams: list[Upstream], retries: int, pause_s: float):
        self.members = [Member(upstream) for upstream in upstreams]
        self._retries, self._pause_s = retries, pause_s

    async def close(self) -> None:
        for member in self.members:
            await member.upstream.close()

    async def describe(self, fresh: bool = False) -> Described:
        """Of the server that would be asked. Raises UpstreamError if none can say, asked as often as for an answer."""
        how = (ASK_AGAIN_S,) if fresh else ()
        for attempt in range(self._retries + 1):
            try:
                return await self._first(lambda member: member.upstream.describe(*how))
            except UpstreamError as error:
                if attempt == self._retries or error.code not in _PASSING:
                    raise
            await asyncio.sleep(self._pause_s * 2**attempt)
        raise AssertionError("retries are at least 0")

    async def prove(self, probe_TD: torch.Tensor) -> None:
        """That one of them answers embeddings. Raises UpstreamError."""
        await self._first(lambda member: member.upstream.prove(probe_TD))

    async def _first(self, ask: Callable[[Member], Awaitable[T]]) -> T:
        error = None
        for member in self._order():
            try:
                return await ask(member)
            except UpstreamError as failure:
                error = error or failure
                if len(self.members) > 1:
                    member.failed()
        raise error or AssertionError("no upstream")

    def _order(self, not_first: Member | None = None) -> list[Member]:
        now = time.monotonic()
        rank = lambda m: (m is not_first, m.rests_until > now, max(m.rests_until - now, 0), m.busy)  # noqa: E731
        return sorted(self.members, key=rank)

    async def stream(self, send: Callable[[Upstream], Awaitable[Deltas]]) -> Deltas:
        """The deltas of the first server whose answer begins. ``send``: asks one of them. Raises UpstreamError."""
        last: Member | None = None
        for attempt in range(self._retries + 1):
            member = last = self._order(last)[0]
            member.busy += 1
            begun = False
            try:
                async with aclosing(await send(member.upstream)) as deltas:
                    async for delta in deltas:
                        begun = True
                        yield delta
                member.answered()
                return
            except UpstreamError as error:
                if error.code in _THE_CLIENTS or begun:
                    raise
                member.failed()
                another = len(self.members) > 1
                if attempt == self._retries or not (another or error.code in _PASSING):
                    raise
            finally:
                member.busy -= 1
            if len(self.members) == 1:
                await asyncio.sleep(self._pause_s * 2**attempt)
