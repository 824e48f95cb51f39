"""The one door to the network: every request that this package itself makes goes through a client made here.

What leaves is private text, embeddings or a key, and what comes back is private too. So: no proxy that the environment
names (``http_proxy`` and its kind would see all of it) unless ``SGT_TITAN_PROXY`` asks for one; no redirects, which
would hand the body to whatever host is named; no compression, behind which a small answer may be of any size; no
cookies. ``SSL_CERT_FILE`` is obeyed, for an authority of one's own.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from sgt_titan.arguments import http_url
from sgt_titan.errors import UserError

if TYPE_CHECKING:
    import httpx

PROXY_VARIABLE = "SGT_TITAN_PROXY"
KEEP_ALIVE_SECONDS = 2.0
HEADERS = {"User-Agent": "sgt-titan", "Accept-Encoding": "identity"}


def require_httpx() -> Any:
    """The httpx module. Raises UserError naming the extra."""
    try:
        import httpx
    except ImportError:
        raise UserError("httpx is not installed; pip install 'sgt-titan[client]'") from None
    return httpx


def client(*, timeout: float, connect: float = 10.0, key: str | None = None, transport: Any = None) -> httpx.Client:
    """``timeout``: seconds without a byte; ``key``: sent as a bearer token. UserError for a proxy that is none."""
    httpx = require_httpx()
    transport = transport or httpx.HTTPTransport(proxy=_proxy())
    return httpx.Client(**_options(timeout, connect, key), transport=transport)


def async_client(
    *, timeout: float, connect: float = 10.0, key: str | None = None, connections: int = 100, transport: Any = None
) -> httpx.AsyncClient:
    """As :func:`client`, for at most so many ``connections``."""
    httpx = require_httpx()
    if transport is None:
        # Shorter than servers keep theirs (vLLM: 5 s): a request sent in the moment of closing is lost.
        limits = httpx.Limits(
            max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEP_ALIVE_SECONDS
        )
        transport = httpx.AsyncHTTPTransport(limits=limits, proxy=_proxy())
    return httpx.AsyncClient(**_options(timeout, connect, key), transport=transport)


def _options(timeout: float, connect: float, key: str | None) -> dict[str, Any]:
    return {
        "headers": {**HEADERS, **({"Authorization": f"Bearer {key}"} if key else {})},
        "timeout": require_httpx().Timeout(timeout, connect=connect),
        "follow_redirects": False,
        "trust_env": False,
    }


def _proxy() -> str | None:
    asked = os.environ.get(PROXY_VARIABLE) or None
    if asked is not None and http_url(asked) is None:
        raise UserError(f"{PROXY_VARIABLE}: is no URL of a proxy; give http://host:port")
    return asked


class Bounds:
    """What an answer may take: raises ``httpx.ReadTimeout`` after ``seconds``, ``httpx.DecodingError`` after ``most``
    bytes, and at once for an answer that is compressed although that was not asked for."""

    def __init__(self, response: httpx.Response, most: int, seconds: float):
        self._most, self._deadline = most, time.monotonic() + seconds
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise require_httpx().DecodingError("compressed, which was not asked for")

    def take(self, chunk: bytes) -> bytes:
        """``chunk``, counted."""
        self._most -= len(chunk)
        if self._most < 0:
            raise require_httpx().DecodingError("longer than any answer")
        self.check()
        return chunk

    def check(self) -> None:
        if time.monotonic() > self._deadline:
            raise require_httpx().ReadTimeout("the answer takes too long")


def whole(response: httpx.Response, most: int, seconds: float) -> bytes:
    """The body of a response that is being streamed. Raises as :class:`Bounds`."""
    bounds = Bounds(response, most, seconds)
    return b"".join(bounds.take(chunk) for chunk in response.iter_bytes())


async def whole_async(response: httpx.Response, most: int, seconds: float) -> bytes:
    """As :func:`whole`."""
    bounds, body = Bounds(response, most, seconds), bytearray()
    async for chunk in response.aiter_bytes():
        body += bounds.take(chunk)
    return bytes(body)


def exchange(
    client: httpx.Client, method: str, url: str, *, most: int, seconds: float, **request: Any
) -> tuple[int, bytes]:
    """Status and body of one answer, at most ``most`` bytes and ``seconds``. Raises httpx.HTTPError."""
    with client.stream(method, url, **request) as response:
        return response.status_code, whole(response, most, seconds)
