"""The outermost layer: who may ask, what is logged, and that no exception's words get out.

An exception may carry text of a prompt (a UnicodeEncodeError holds the whole string), so of one that nobody expected
only the type and the place are logged; uvicorn, which would print it, never sees it.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import time
import traceback
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgt_titan.errors import UserError
from sgt_titan.serving.disconnect import ClientGone
from sgt_titan.serving.errors import RequestError, response_of
from sgt_titan.serving.metrics import Metrics

LOG = logging.getLogger("sgt_titan.serving")
OPEN_ROUTES = ("/healthz", "/readyz")
ROUTES = (*OPEN_ROUTES, "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/inspect", "/metrics")
CLIENT_GONE = 499


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, api_keys: tuple[str, ...], metrics: Metrics):
        self._app, self._metrics = app, metrics
        self._digests = [_digest(key) for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), [0]

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        # Paths that are no route are somebody's text: not in the log, not in a label.
        path = scope["path"]
        route = path if path in ROUTES else "other"
        try:
            if route not in OPEN_ROUTES and not self._allowed(scope):
                error = RequestError("missing or wrong API key", status=401, code="invalid_api_key")
                await response_of(error)(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        except ClientGone:
            status[0] = CLIENT_GONE
        except Exception as error:  # see the module's docstring
            await self._failed(error, status, scope, receive, sending)
        seconds = time.perf_counter() - started
        self._metrics.requests.labels(route, str(status[0])).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        LOG.info("%s %s %d %.0f ms", scope["method"] if route != "other" else "-", route, status[0], 1e3 * seconds)

    async def _failed(self, error: Exception, status: list[int], scope: Scope, receive: Receive, send: Send) -> None:
        begun = status[0] != 0
        if not isinstance(error, UserError):
            LOG.error("%s at %s", type(error).__name__, where(error))
        if begun:
            return
        if isinstance(error, UserError):
            response: Any = response_of(error)
        else:
            body = {"message": "internal error of the proxy", "type": "server_error", "param": None, "code": None}
            response = JSONResponse({"error": body}, 500)
        await response(scope, receive, send)

    def _allowed(self, scope: Scope) -> bool:
        if not self._digests:
            return True
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = header.decode("latin-1").partition(" ")
        given = _digest(key.strip())
        # All of them, in a time that depends on none.
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return kind.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def where(error: BaseException) -> str:
    """File, line and function of the innermost frames, without a word of what they held."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
