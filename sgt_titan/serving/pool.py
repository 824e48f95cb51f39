"""Several servers of one trunk: which is asked, and what happens when it fails before its answer has begun."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
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
    """Asks the least busy server that is up, and while no answer has begun, another, or the same one again.

    What is sent again are the same embeddings: a second sample of a prompt would be a second chance for an observer.
    """

    def __init__(self, upstreams: list[Upstream], retries: int, pause_s: float):
        self.members = [Member(upstream) for upstream in upstreams]
        self._tries, self._pause_s = retries + 1, pause_s

    async def close(self) -> None:
        for member in self.members:
            await member.upstream.close()

    def stream(self, send: Callable[[Upstream], Awaitable[Deltas]]) -> Deltas:
        """The deltas of the first server whose answer begins. ``send``: asks one of them. Raises UpstreamError."""

        async def answer(member: Member) -> Deltas:
            async with aclosing(await send(member.upstream)) as deltas:
                async for delta in deltas:
                    yield delta
            member.answered()

        return self._first(answer, self._tries)

    async def describe(self, fresh: bool = False) -> Described:
        """Of the server that would be asked. Raises UpstreamError if none can say."""
        how = (ASK_AGAIN_S,) if fresh else ()

        async def say(member: Member) -> AsyncGenerator[Described, None]:
            yield await member.upstream.describe(*how)

        # Nothing is sent for it, so all of them may be asked.
        return await _only(self._first(say, max(self._tries, len(self.members))))

    async def prove(self, probe_TD: torch.Tensor) -> None:
        """That one of them answers embeddings. Raises UpstreamError."""

        async def proved(member: Member) -> AsyncGenerator[None, None]:
            await member.upstream.prove(probe_TD)
            yield

        await _only(self._first(proved, len(self.members)))

    async def _first(self, ask: Callable[[Member], AsyncGenerator[T, None]], tries: int) -> AsyncGenerator[T, None]:
        """What ``ask`` yields of the first server that yields anything. Whoever fails before that rests, and the next
        is asked; one that was asked already only for what may pass, after a pause. Raises UpstreamError: the last."""
        asked: list[Member] = []
        while True:
            member = self._next(asked)
            asked.append(member)
            member.busy += 1
            begun = False
            try:
                async with aclosing(ask(member)) as found:
                    async for item in found:
                        begun = True
                        yield item
                return
            except UpstreamError as error:
                if begun or error.code in _THE_CLIENTS:
                    raise
                member.failed()
                again = len(asked) - len(self.members) + 1  # the how-manieth time that somebody is asked again, if next
                if len(asked) == tries or (again > 0 and error.code not in _PASSING):
                    raise
            finally:
                member.busy -= 1
            if again > 0:
                await asyncio.sleep(self._pause_s * 2 ** (again - 1))

    def _next(self, asked: Sequence[Member]) -> Member:
        """Whoever was asked least often; of these the first to be up again; of these the least busy."""
        now = time.monotonic()
        return min(self.members, key=lambda m: (asked.count(m), max(m.rests_until - now, 0), m.busy))


async def _only(found: AsyncGenerator[T, None]) -> T:
    async with aclosing(found):
        return await anext(found)
