"""The outermost layer: who may ask, from where, what is logged, and that no exception's words get out.

An exception may carry text of a prompt (a UnicodeEncodeError holds the whole string), so of one that nobody expected
only the type and the place are logged; uvicorn, which would print it, never sees it.
"""

from __future__ import annotations

import logging
import secrets
import time
import traceback
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgt_titan.errors import UserError
from sgt_titan.serving.disconnect import ClientGone
from sgt_titan.serving.errors import RequestError, response_of
from sgt_titan.serving.keys import ANYBODY, Key, KeyRing
from sgt_titan.serving.metrics import Metrics
from sgt_titan.serving.origin import Origins
from sgt_titan.serving.telemetry import Telemetry

LOG = logging.getLogger("sgt_titan.serving")
OPEN_ROUTES = ("/healthz", "/readyz")
ROUTES = (
    *OPEN_ROUTES,
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/models", "/v1/inspect"),
    *("/metrics", "/openapi.json"),
)
CLIENT_GONE = 499


@dataclass(frozen=True)
class Caller:
    """Of one request: whose key, whose turn it takes, and the id by which logs, the client and the upstream find it."""

    key: Key
    turn: str
    request_id: str


class Guard:
    """ASGI middleware; leaves a ``Caller`` in the request's state."""

    def __init__(self, app: ASGIApp, keys: KeyRing, origins: Origins, metrics: Metrics, telemetry: Telemetry):
        self._app, self._keys, self._origins = app, keys, origins
        self._metrics, self._telemetry = metrics, telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), [0]
        request_id = f"req_{secrets.token_hex(12)}"
        origin = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"), None)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                if origin is not None and self._origins.allows(origin):
                    headers["Access-Control-Allow-Origin"] = origin
                    headers["Vary"] = "Origin"
            await send(message)

        # Paths that are no route are somebody's text: not in the log, not in a label.
        path = scope["path"]
        route = path if path in ROUTES else "other"
        name = "-"
        with self._telemetry.span(route) as span:
            try:
                key = self._admitted(scope, route, origin)
                if isinstance(key, Response):
                    await key(scope, receive, sending)
                else:
                    name = key.name
                    peer = (scope.get("client") or ("unknown",))[0]
                    caller = Caller(key, name if key is not ANYBODY else str(peer), request_id)
                    scope.setdefault("state", {})["caller"] = caller
                    await self._app(scope, receive, sending)
            except ClientGone:
                status[0] = CLIENT_GONE
            except Exception as error:  # see the module's docstring
                await self._failed(error, status, scope, receive, sending)
            span.set("http.response.status_code", status[0])
            span.set("sgt.request_id", request_id)
        seconds = time.perf_counter() - started
        self._metrics.requests.labels(route, str(status[0])).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        method = scope["method"] if route != "other" else "-"
        LOG.info("%s %s %d %.0f ms %s %s", method, route, status[0], 1e3 * seconds, request_id, name)

    def _admitted(self, scope: Scope, route: str, origin: str | None) -> Key | Response:
        """Whose request it is, or what to answer instead."""
        headers = scope["headers"]
        why = self._origins.refusal(headers)
        if why is not None:
            return response_of(RequestError(why, status=403, code="origin_not_allowed"))
        names = [name for name, _ in headers]
        if b"content-length" in names and b"transfer-encoding" in names:
            # Two servers on the way may differ over where such a request ends.
            return response_of(RequestError("give Content-Length or Transfer-Encoding, not both", code="bad_request"))
        if scope["method"] == "OPTIONS" and origin is not None and self._origins.allows(origin):
            allowed = {
                "Access-Control-Allow-Methods": "GET, POST",
                "Access-Control-Allow-Headers": "authorization, content-type",
            }
            return Response(status_code=204, headers=allowed)
        if route in OPEN_ROUTES or not self._keys.needed:
            return ANYBODY
        authorization = next((value for name, value in headers if name == b"authorization"), b"")
        key = self._keys.find(authorization)
        if key is None:
            return response_of(RequestError("missing or wrong API key", status=401, code="invalid_api_key"))
        return key

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


def where(error: BaseException) -> str:
    """File, line and function of the innermost frames, without a word of what they held."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in reversed(frames))
