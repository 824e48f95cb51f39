"""The routes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, Response

from sgt_titan.client import Answer, Choice, Delta, StainedGlassTransform, UpstreamError, read_nearest
from sgt_titan.client.inspect import WARNING, best_attacker
from sgt_titan.errors import UserError
from sgt_titan.serving.disconnect import EventStream, until_disconnect
from sgt_titan.serving.errors import RequestError, body_of, response_of
from sgt_titan.serving.guard import Guard
from sgt_titan.serving.private import ask, spans
from sgt_titan.serving.render import Renderer, event
from sgt_titan.serving.schema import ChatRequest, CompletionRequest, parse
from sgt_titan.serving.service import Service
from sgt_titan.serving.settings import Settings
from sgt_titan.serving.upstream import Upstream


def create_app(
    settings: Settings, sgt: StainedGlassTransform, transport: httpx.AsyncBaseTransport | None = None
) -> FastAPI:
    """The proxy as an ASGI application; ``app.state.service`` is its service. ``transport``: httpx's, for tests."""
    service = Service(settings, sgt, Upstream(settings, transport))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, api_keys=settings.api_keys, metrics=service.metrics)

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        return response_of(error)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_route(request: Request, error: Exception) -> Response:
        return response_of(RequestError("no such route", status=getattr(error, "status_code", 404), code="not_found"))

    @app.get("/healthz")
    async def healthz() -> Any:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        try:
            await service.ready()
        except UpstreamError as error:
            _, body = body_of(error)
            return JSONResponse({"status": "not ready", **body}, 503)
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [_card(await service.name())]}

    @app.get("/v1/models/{model:path}")
    async def one_model(model: str) -> Any:
        await service.check_model(model)
        return _card(model)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answer(service, request, parse(ChatRequest, await _json(request, settings.max_body)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _answer(service, request, parse(CompletionRequest, await _json(request, settings.max_body)))

    if settings.inspect:

        @app.post("/v1/inspect")
        async def inspect(request: Request) -> Any:
            return await _inspect(service, await _json(request, settings.max_body))

    return app


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sgt-titan"}


async def _json(request: Request, limit: int) -> Any:
    """The body, read no further than ``limit`` bytes. Raises RequestError: 413, 415, 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps a web page from posting to a proxy on this machine: this type needs a preflight.
        raise RequestError("content-type: must be application/json", status=415)
    too_large = RequestError(f"body: larger than {limit} bytes", status=413, code="body_too_large")
    if (
        request.headers.get("content-length", "0").isdecimal()
        and int(request.headers.get("content-length", "0")) > limit
    ):
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise RequestError("body: is not valid UTF-8") from None
    except (ValueError, RecursionError):
        raise RequestError("body: is not valid JSON") from None


async def _answer(service: Service, request: Request, asked: ChatRequest | CompletionRequest) -> Response:
    is_chat = isinstance(asked, ChatRequest)
    renderer = Renderer(is_chat, asked.model)
    wants_logprobs = bool(asked.logprobs) if is_chat else asked.logprobs is not None
    found = service.deltas(asked)
    if not asked.stream:

        async def collect() -> list[Answer]:
            answers: list[Answer] = []
            async with aclosing(found):
                async for index, tokens, delta in found:
                    if delta is None:
                        answers.append(Answer([Choice() for _ in range(asked.n or 1)], tokens))
                    else:
                        answers[index].add(delta)
            return answers

        return JSONResponse(renderer.whole(await until_disconnect(request.receive, collect), wants_logprobs))

    async def begin() -> list[tuple[int, int, Delta | None]]:
        # Up to the first piece of an answer: until then an upstream's refusal can still be a status.
        begun = []
        async for item in found:
            begun.append(item)
            if item[2] is not None:
                break
        return begun

    try:
        begun = await until_disconnect(request.receive, begin)
    except BaseException:
        await found.aclose()
        raise
    events = _events(found, begun, renderer, asked, wants_logprobs)
    return EventStream(request, events, service.settings.silence_timeout_s)


async def _events(
    found: AsyncIterator[tuple[int, int, Delta | None]],
    begun: list[tuple[int, int, Delta | None]],
    renderer: Renderer,
    asked: ChatRequest | CompletionRequest,
    wants_logprobs: bool,
) -> AsyncIterator[bytes]:
    n = asked.n or 1
    answers: list[Answer] = []
    shown: dict[int, int] = {}

    def chunks(item: tuple[int, int, Delta | None]) -> list[bytes]:
        prompt, tokens, delta = item
        if delta is None:
            answers.append(Answer([Choice() for _ in range(n)], tokens))
            return []
        answers[prompt].add(Delta(delta.index, tokens=delta.tokens))
        if not (delta.text or delta.logprobs or delta.finish_reason):
            return []
        index = prompt * n + delta.index
        moved = Delta(index, delta.text, delta.logprobs, delta.finish_reason)
        chunk = event(renderer.chunk(moved, wants_logprobs, shown.get(index, 0)))
        shown[index] = shown.get(index, 0) + sum(len(t.token) for t in delta.logprobs)
        return [chunk]

    async with aclosing(found):
        for head in renderer.opening(n):
            yield event(head)
        try:
            for item in begun:
                for chunk in chunks(item):
                    yield chunk
            async for item in found:
                for chunk in chunks(item):
                    yield chunk
        except UserError as error:  # the status has been sent; the OpenAI clients raise on this event
            yield event(body_of(error)[1])
            return
    if asked.usage_wanted:
        yield event(renderer.closing(answers))
    yield event("[DONE]")


async def _inspect(service: Service, body: Any) -> dict[str, Any]:
    if not isinstance(body, dict) or ("messages" in body) == ("prompt" in body):
        raise RequestError("body: give either messages or prompt")
    what = body.get("messages") or body.get("prompt")
    (asked,) = await service.run(ask, service.settings.private, body.get("private"), [what])
    prompt = await service.prompt(asked.what, asked.tools(body.get("tools") or ()))
    embeds_TD = await service.run(service.sgt.encode, prompt)
    reading = await service.run(read_nearest, service.sgt, prompt, embeds_TD)
    return {
        "nearest_neighbour_reads": reading.text,
        "tokens": reading.tokens,
        "obfuscated_tokens": reading.hidden,
        "read_right": reading.right,
        "warning": WARNING,
        "best_attacker": best_attacker(service.settings.results),
        **({"private": spans(asked)} if asked.conversation is not None else {}),
    }
