"""The asynchronous side of client/remote.py: one server, what it says of itself, and whether it is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from sgt_titan import outgoing
from sgt_titan.client.answer import Delta, Options, UpstreamError
from sgt_titan.client.remote import MAX_ERROR, check_complete, connection_errors, deltas, most_bytes, parsed
from sgt_titan.client.sse import DONE, EventDecoder
from sgt_titan.client.stops import StopScanner
from sgt_titan.client.wire import WIRES, explain, wire_dtype
from sgt_titan.serving.settings import Settings, Target

Deltas = AsyncGenerator[Delta, None]

PROBE_EVERY_S = 15.0
DESCRIBE_EVERY_S = 60.0  # what it says of itself is believed so long
ASK_AGAIN_S = 1.0  # and so long where a request would be refused for it
MAX_CONTEXT = 1 << 30


@dataclass
class Described:
    """What the upstream says of itself, and when."""

    model: str
    context: int | None
    at: float


class Upstream:
    """Where the proxy's embeddings go. Nothing of a client's request reaches it but what ``Wire.body`` names."""

    def __init__(self, target: Target, settings: Settings, transport: httpx.AsyncBaseTransport | None = None):
        self._settings, self._target, self._wire = settings, target, WIRES[target.backend]
        self._dtype = wire_dtype(target.wire_dtype)
        self.base = target.url.rstrip("/").removesuffix("/v1")
        self._client = outgoing.async_client(
            timeout=settings.silence_timeout_s,
            connect=settings.connect_timeout_s,
            key=target.key,
            connections=settings.active + 4,
            transport=transport,
        )
        self._described: Described | None = None
        self._proved_at = -float("inf")
        self._probing = asyncio.Lock()

    async def close(self) -> None:
        await self._client.aclose()

    def body(self, embeds_TD: torch.Tensor, options: Options, model: str | None) -> bytes:
        """The request as bytes; slow for long prompts, so call it in a thread."""
        body = self._wire.body(embeds_TD.to(self._dtype or embeds_TD.dtype), options, model)
        return httpx.Request("POST", self.base, json=body).content

    async def stream(self, body: bytes, options: Options, request_id: str | None = None) -> Deltas:
        """The answer to ``body``; closing the iterator closes the connection, and the upstream stops.

        ``request_id``: one of ours, to find the request again in the upstream's log. Raises UpstreamError.
        """
        scanners = [StopScanner(options.stop) for _ in range(options.n)]
        read = self._wire.reader(options)
        headers = {"Content-Type": "application/json", **({"X-Request-Id": request_id} if request_id else {})}
        seconds = self._settings.total_timeout_s
        with self._errors():
            async with self._client.stream(
                "POST", self.base + self._wire.path, content=body, headers=headers
            ) as response:
                if response.status_code != 200:
                    words = await outgoing.whole_async(response, MAX_ERROR, seconds)
                    raise explain(self._wire, response.status_code, parsed(words))
                decoder, bounds = EventDecoder(), outgoing.Bounds(response, most_bytes(options), seconds)
                async for chunk in response.aiter_bytes():
                    for data in decoder.feed(bounds.take(chunk)):
                        bounds.check()
                        if data == DONE:
                            check_complete(scanners)
                            return
                        for delta in deltas(data, read, scanners, self._wire):
                            yield delta
                        if options.stop and all(scanner.stopped for scanner in scanners):
                            return
                    await asyncio.sleep(0)  # a chunk that is there already would leave nobody else a turn
        check_complete(scanners)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """``connection_errors``; after any error the upstream is asked anew what it is: it may come back as another."""
        try:
            with connection_errors():
                yield
        except UpstreamError:
            self._described = None
            raise

    async def describe(self, newer_than_s: float = DESCRIBE_EVERY_S) -> Described:
        """The model that is asked for and its context, from /v1/models. Raises UpstreamError if it is not served."""
        if self._described is not None and time.monotonic() - self._described.at < newer_than_s:
            return self._described
        with self._errors():
            async with self._client.stream("GET", self.base + "/v1/models") as response:
                content = await outgoing.whole_async(response, MAX_ERROR, self._settings.silence_timeout_s)
            if response.status_code != 200:
                raise explain(self._wire, response.status_code, parsed(content))
            self._described = self._choose(parsed(content))
        return self._described

    def _choose(self, listed: Any) -> Described:
        try:
            contexts = {card["id"]: card.get("max_model_len") for card in listed["data"]}
            if not all(isinstance(name, str) for name in contexts):
                raise TypeError
            if not all(c is None or (type(c) is int and 0 < c <= MAX_CONTEXT) for c in contexts.values()):
                raise TypeError
        except (TypeError, KeyError, AttributeError):
            raise UpstreamError(
                "the upstream's /v1/models is not a list of models", code="upstream_malformed"
            ) from None
        wanted = self._target.model
        if wanted is None and len(contexts) == 1:
            wanted = next(iter(contexts))
        if wanted is None:
            raise UpstreamError(
                f"the upstream serves {len(contexts)} models; choose with --model", code="upstream_wrong_model"
            )
        if wanted not in contexts:
            raise UpstreamError(
                "the upstream does not serve the model of --model; it serves: " + ", ".join(contexts)[:300],
                code="upstream_wrong_model",
            )
        return Described(wanted, contexts[wanted], time.monotonic())

    async def prove(self, probe_TD: torch.Tensor) -> None:
        """Have one token generated from ``probe_TD``: reachable, right width, embeddings accepted, key accepted.

        A proof lasts ``PROBE_EVERY_S`` seconds. Raises UpstreamError.
        """
        async with self._probing:
            if time.monotonic() - self._proved_at < PROBE_EVERY_S:
                return
            described = await self.describe(ASK_AGAIN_S)
            options = Options(max_tokens=1, temperature=0.0)
            body = await asyncio.to_thread(self.body, probe_TD, options, described.model)
            async for _ in self.stream(body, options):
                pass
            self._proved_at = time.monotonic()
