"""The routes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
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
from sgt_titan.serving.guard import Caller, Guard
from sgt_titan.serving.keys import KeyRing, plain_keys
from sgt_titan.serving.openapi import document
from sgt_titan.serving.origin import Origins
from sgt_titan.serving.private import ask, spans
from sgt_titan.serving.render import Renderer
from sgt_titan.serving.responses import ResponsesRenderer, chat_body
from sgt_titan.serving.schema import ChatRequest, CompletionRequest, parse
from sgt_titan.serving.service import Piece, Service
from sgt_titan.serving.settings import Served, Settings
from sgt_titan.serving.telemetry import Telemetry

NO_EMBEDDINGS = (
    "embeddings: not served here; the upstream would have to see the text, or its vectors be worth no privacy. Run an "
    "embedding model on this side"
)


def create_app(
    settings: Settings,
    sgt: StainedGlassTransform | Sequence[Served],
    transport: httpx.AsyncBaseTransport | None = None,
    telemetry: Telemetry | None = None,
) -> FastAPI:
    """The proxy as an ASGI application; ``app.state.service`` is its service. ``transport``: httpx's, for tests."""
    keys = KeyRing(plain_keys(settings.api_keys, "API keys"), settings.keys_file)
    service = Service(settings, settings.served(sgt), transport, telemetry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    # A slash too many is no route: the redirect would name http://, whatever stands before this proxy.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    app.state.service = service
    origins = Origins(settings.hosts, settings.origins, settings.any_host)
    app.add_middleware(Guard, keys=keys, origins=origins, metrics=service.metrics, telemetry=service.telemetry)

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        return response_of(error)

    @app.exception_handler(404)
    async def no_route(request: Request, error: Exception) -> Response:
        return response_of(RequestError("no such route", status=404, code="not_found"))

    @app.exception_handler(405)
    async def no_method(request: Request, error: Exception) -> Response:
        return response_of(RequestError("this route has no such method", status=405, code="method_not_allowed"))

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
    async def models(request: Request) -> Any:
        return {"object": "list", "data": [_card(name) for name in await service.names(_caller(request).key)]}

    @app.get("/v1/models/{model:path}")
    async def one_model(request: Request, model: str) -> Any:
        await service.model(model, _caller(request).key)
        return _card(model)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = parse(ChatRequest, await _json(request, settings), drop=settings.drop_params)
        return await _answer(service, request, asked, Renderer(True, asked.model))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await _json(request, settings), drop=settings.drop_params)
        return await _answer(service, request, asked, Renderer(False, asked.model))

    @app.post("/v1/responses")
    async def responses(request: Request) -> Response:
        body = chat_body(await _json(request, settings), drop=settings.drop_params)
        asked = parse(ChatRequest, body, drop=settings.drop_params)
        return await _answer(service, request, asked, ResponsesRenderer(asked.model))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return response_of(RequestError(NO_EMBEDDINGS, status=400, code="unsupported_route"))

    if settings.inspect:

        @app.post("/v1/inspect")
        async def inspect(request: Request) -> Any:
            return await _inspect(service, _caller(request), await _json(request, settings))

    if settings.openapi:

        @app.get("/openapi.json")
        async def openapi() -> Any:
            return document(settings.inspect)

    return app


def _card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sgt-titan"}


def _caller(request: Request) -> Caller:
    return request.scope["state"]["caller"]


async def _json(request: Request, settings: Settings) -> Any:
    """The body, read no further than it may be long, nor longer than it may take. Raises RequestError: 4xx."""
    limit, kind = settings.max_body, request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps a web page from posting to a proxy on this machine: this type needs a preflight.
        raise RequestError("content-type: must be application/json", status=415)
    too_large = RequestError(f"body: larger than {limit} bytes", status=413, code="body_too_large")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.silence_timeout_s):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise RequestError("body: did not come in time", status=408, code="timeout") from None
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError:
        raise RequestError("body: is not valid UTF-8") from None
    except (ValueError, RecursionError):
        raise RequestError("body: is not valid JSON") from None


async def _answer(
    service: Service,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    renderer: Renderer | ResponsesRenderer,
) -> Response:
    found = service.pieces(asked, _caller(request))
    headers = {"X-Dropped-Params": ", ".join(asked.dropped)} if asked.dropped else {}
    if not asked.stream:

        async def collect() -> list[Answer]:
            answers: list[Answer] = []
            async with aclosing(found):
                async for piece in found:
                    if piece.delta is None:
                        answers.append(Answer([Choice() for _ in range(asked.n or 1)], piece.tokens))
                    else:
                        answers[piece.index].add(piece.delta)
            return answers

        answers = await until_disconnect(request.receive, collect)
        return JSONResponse(renderer.whole(answers, asked.logprobs_wanted), headers=headers)

    async def begin() -> list[Piece]:
        # Up to the first piece of an answer: until then an upstream's refusal can still be a status.
        begun = []
        async for piece in found:
            begun.append(piece)
            if piece.delta is not None:
                break
        return begun

    try:
        begun = await until_disconnect(request.receive, begin)
    except BaseException:
        await found.aclose()
        raise
    events = _events(found, begun, renderer, asked)
    return EventStream(request, events, service.settings.silence_timeout_s, headers)


async def _events(
    found: AsyncGenerator[Piece, None],
    begun: list[Piece],
    renderer: Renderer | ResponsesRenderer,
    asked: ChatRequest | CompletionRequest,
) -> AsyncGenerator[bytes, None]:
    n = asked.n or 1
    answers: list[Answer] = []
    shown: dict[int, int] = {}

    def chunks(piece: Piece) -> list[bytes]:
        delta = piece.delta
        if delta is None:
            answers.append(Answer([Choice() for _ in range(n)], piece.tokens))
            return []
        answers[piece.index].add(delta)
        if not (delta.text or delta.reasoning or delta.calls or delta.logprobs or delta.finish_reason):
            return []
        index = piece.index * n + delta.index
        moved = Delta(
            index, delta.text, delta.logprobs, delta.finish_reason, reasoning=delta.reasoning, calls=delta.calls
        )
        made = renderer.chunks(moved, asked.logprobs_wanted, shown.get(index, 0))
        shown[index] = shown.get(index, 0) + sum(len(t.token) for t in delta.logprobs)
        return made

    async with aclosing(found):
        for head in renderer.opening(n):
            yield head
        try:
            for piece in begun:
                for chunk in chunks(piece):
                    yield chunk
            async for piece in found:
                for chunk in chunks(piece):
                    yield chunk
        except UserError as error:  # the status has been sent; the OpenAI clients raise on this event
            yield renderer.failed(body_of(error)[1])
            return
    for tail in renderer.closing(answers, asked.usage_wanted):
        yield tail


async def _inspect(service: Service, caller: Caller, body: Any) -> dict[str, Any]:
    if not isinstance(body, dict) or ("messages" in body) == ("prompt" in body):
        raise RequestError("body: give either messages or prompt")
    name = body.get("model")
    model = service.models[0] if name is None else await service.model(name, caller.key)
    what = body.get("messages") or body.get("prompt")
    async with service.admission.slot(caller.turn):
        model.sgt.check_size(what, tools=body.get("tools"), most=service.settings.max_prompt_tokens)
        (asked,) = await service.workers.run(caller.turn, ask, service.settings.private, body.get("private"), [what])
        prompt = await service.prompt(model, asked.what, caller, tools=asked.tools(body.get("tools") or ()))
        embeds_TD = await service.workers.run(caller.turn, model.sgt.encode, prompt)
        reading = await service.workers.run(caller.turn, read_nearest, model.sgt, prompt, embeds_TD)
    return {
        "nearest_neighbour_reads": reading.text,
        "tokens": reading.tokens,
        "obfuscated_tokens": reading.hidden,
        "read_right": reading.right,
        "warning": WARNING,
        "best_attacker": best_attacker(model.served.results),
        **({"private": spans(asked)} if asked.conversation is not None else {}),
    }
