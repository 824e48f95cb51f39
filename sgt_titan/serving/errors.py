"""Errors as OpenAI's clients read them. No message repeats anything of a request."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from sgt_titan.client.answer import UpstreamError
from sgt_titan.errors import UserError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class RequestError(UserError):
    """A request that is refused here: HTTP status, OpenAI's code and the parameter at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        again_s: float = 1.0,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.again_s = status, code, param, again_s


def body_of(error: UserError) -> tuple[int, dict[str, Any]]:
    """HTTP status and JSON body of an error."""
    status = error.status if isinstance(error, RequestError | UpstreamError) else 400
    return status, {
        "error": {
            "message": " ".join(str(error).split()),
            "type": _TYPES.get(status, "upstream_error" if isinstance(error, UpstreamError) else "server_error"),
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None),
        }
    }


def response_of(error: UserError) -> JSONResponse:
    """An error as a response; 503 and 429 say when to come again."""
    status, body = body_of(error)
    again = str(max(1, math.ceil(getattr(error, "again_s", 1.0))))
    return JSONResponse(body, status, headers={"Retry-After": again} if status in (429, 503) else None)
