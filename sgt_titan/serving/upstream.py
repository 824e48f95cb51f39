"""The asynchronous side of client/remote.py: one pool of connections to the server, and whether it is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from sgt_titan.client.answer import Delta, Options, UpstreamError
from sgt_titan.client.remote import check_complete, connection_errors, deltas, parsed
from sgt_titan.client.sse import DONE, EventDecoder
from sgt_titan.client.stops import StopScanner
from sgt_titan.client.wire import WIRES, explain, wire_dtype
from sgt_titan.serving.settings import Settings

PROBE_EVERY_S = 15.0


@dataclass
class Described:
    """What the upstream says of itself."""

    model: str
    context: int | None


class Upstream:
    """Where the proxy's embeddings go. Nothing of a client's request reaches it but what ``Wire.body`` names."""

    def __init__(self, settings: Settings, transport: httpx.AsyncBaseTransport | None = None):
        self._settings, self._wire = settings, WIRES[settings.backend]
        self._dtype = wire_dtype(settings.wire_dtype)
        self.base = settings.upstream.rstrip("/").removesuffix("/v1")
        key = settings.upstream_key
        limits = httpx.Limits(max_connections=settings.active + 4, max_keepalive_connections=settings.active)
        self._client = httpx.AsyncClient(
            # A header set of our own: nothing is copied from the client's request.
            headers={"User-Agent": "sgt-titan", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=httpx.Timeout(settings.silence_timeout_s, connect=settings.connect_timeout_s),
            follow_redirects=False,
            # Of our own: a proxy that the environment names would see the embeddings and the answers.
            transport=transport or httpx.AsyncHTTPTransport(limits=limits),
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

    async def stream(self, body: bytes, options: Options) -> AsyncIterator[Delta]:
        """The answer to ``body``; closing the iterator closes the connection, and the upstream stops.

        Raises UpstreamError.
        """
        scanners = [StopScanner(options.stop) for _ in range(options.n)]
        read = self._wire.reader(options)
        with self._errors():
            async with self._client.stream(
                "POST", self.base + self._wire.path, content=body, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status_code != 200:
                    raise explain(self._wire, response.status_code, parsed(await response.aread()))
                decoder = EventDecoder()
                async for chunk in response.aiter_bytes():
                    for data in decoder.feed(chunk):
                        if data == DONE:
                            check_complete(scanners)
                            return
                        for delta in deltas(data, read, scanners, self._wire):
                            yield delta
                        if options.stop and all(scanner.stopped for scanner in scanners):
                            return
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

    async def describe(self) -> Described:
        """The model that is asked for and its context, from /v1/models. Raises UpstreamError if it is not served."""
        if self._described is not None:
            return self._described
        with connection_errors():
            response = await self._client.get(self.base + "/v1/models")
        if response.status_code != 200:
            raise explain(self._wire, response.status_code, parsed(response.content))
        self._described = self._choose(parsed(response.content))
        return self._described

    def _choose(self, listed: Any) -> Described:
        try:
            contexts = {card["id"]: card.get("max_model_len") for card in listed["data"]}
            if not all(isinstance(context, int | None) for context in contexts.values()):
                raise TypeError
        except (TypeError, KeyError):
            raise UpstreamError(
                "the upstream's /v1/models is not a list of models", code="upstream_malformed"
            ) from None
        wanted = self._settings.model
        if wanted is None and len(contexts) == 1:
            wanted = next(iter(contexts))
        if wanted is None:
            raise UpstreamError(
                f"the upstream serves {len(contexts)} models; choose with --model", code="upstream_wrong_model"
            )
        if wanted not in contexts:
            raise UpstreamError(
                "the upstream does not serve the model of --model; it serves: " + ", ".join(map(str, contexts))[:300],
                code="upstream_wrong_model",
            )
        return Described(wanted, contexts[wanted])

    async def prove(self, probe_TD: torch.Tensor) -> None:
        """Have one token generated from ``probe_TD``: reachable, right width, embeddings accepted, key accepted.

        A proof lasts ``PROBE_EVERY_S`` seconds. Raises UpstreamError.
        """
        async with self._probing:
            if time.monotonic() - self._proved_at < PROBE_EVERY_S:
                return
            described = await self.describe()
            options = Options(max_tokens=1, temperature=0.0)
            body = await asyncio.to_thread(self.body, probe_TD, options, described.model)
            async for _ in self.stream(body, options):
                pass
            self._proved_at = time.monotonic()
