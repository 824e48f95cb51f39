"""The proxy in a process of its own, for ``load.py`` and ``soak.py``; and a server that is no limit to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def start_proxy(
    export: str | Path, options: Sequence[str], environment: Mapping[str, str], log: Path
) -> tuple[subprocess.Popen, str]:
    """``sgt-titan serve`` on a free port under the name "m"; its process and URL, once it listens. All it says goes
    to ``log``."""
    command = [sys.executable, "-m", "sgt_titan.cli", "serve", str(export), "--port", "0", "--served-name", "m"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, *options], stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environment}
        )
    while not (found := re.search(r"(http://127\S+)/v1 ->", log.read_text())):
        if process.poll() is not None:
            sys.exit(log.read_text())
        time.sleep(0.2)
    return process, found[1]


def start_instant() -> tuple[subprocess.Popen, str]:
    """A server that says ``max_tokens`` words at once, whatever it is sent; its process and URL."""
    command = [sys.executable, "-c", "from benchmarks.proxy import instant; instant()"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1])
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def instant() -> None:
    import socket

    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "instant", "max_model_len": 8192}]})

    async def completions(request: Request) -> Response:
        body = await request.json()
        last = body["max_tokens"] - 1
        ends = [None] * last + ["length"]
        choices = [{"index": 0, "text": "a ", "finish_reason": end} for end in ends]
        if not body.get("stream"):
            return JSONResponse({"choices": [{"index": 0, "text": "a " * last, "finish_reason": "length"}]})
        events = [{"choices": [c], "usage": {"completion_tokens": i + 1}} for i, c in enumerate(choices)]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return StreamingResponse(iter([*lines, "data: [DONE]\n\n"]), media_type="text/event-stream")

    routes = [Route("/v1/models", models), Route("/v1/completions", completions, methods=["POST"])]
    app = Starlette(routes=routes)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # as the proxy's own
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listener])
