"""One request from its JSON to the deltas of its answer: admit, encode, send."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from sgt_titan.client import Delta, Options, Prompt, StainedGlassTransform, UpstreamError
from sgt_titan.client.private import ChoiceRestorer, hidden_options
from sgt_titan.serving.admission import Admission
from sgt_titan.serving.errors import RequestError
from sgt_titan.serving.metrics import Metrics
from sgt_titan.serving.private import Asked, ask
from sgt_titan.serving.schema import ChatRequest, CompletionRequest
from sgt_titan.serving.settings import Settings
from sgt_titan.serving.upstream import Upstream

T = TypeVar("T")

COMPLETION_DEFAULT = 16  # OpenAI's own default of max_tokens at /v1/completions


class Service:
    """What the routes share."""

    def __init__(self, settings: Settings, sgt: StainedGlassTransform, upstream: Upstream):
        self.settings, self.sgt, self.upstream = settings, sgt, upstream
        self.metrics = Metrics()
        self.admission = Admission(settings.active, settings.waiting, settings.wait_s)
        self.metrics.active.set_function(lambda: self.admission.active)
        self.metrics.waiting.set_function(lambda: self.admission.waiting)
        self._pool = ThreadPoolExecutor(settings.encode_threads, thread_name_prefix="encode")
        self._tokenizing = threading.Lock()  # fast tokenizers are not safe to call from two threads

    async def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        await self.upstream.close()

    async def name(self) -> str:
        """What clients call the model. Raises UpstreamError where only the upstream knows and it cannot be asked."""
        return self.settings.served_name or (await self.upstream.describe()).model

    async def check_model(self, model: str) -> None:
        """Raise RequestError (404) for a model that is not served here."""
        if model != await self.name():
            raise RequestError(
                "model: not served here; see /v1/models", status=404, code="model_not_found", param="model"
            )

    async def ready(self) -> None:
        """Raise UpstreamError unless the upstream answers embeddings."""
        bos = self.sgt.tokenizer.bos_token_id
        probe_TD = self.sgt.embed_tokens.weight[[0 if bos is None else bos]].detach()
        await self.upstream.prove(probe_TD)

    async def deltas(self, request: ChatRequest | CompletionRequest) -> AsyncIterator[tuple[int, int, Delta | None]]:
        """(prompt, its tokens, delta) in order; first (prompt, tokens, None) for every prompt.

        The prompts of a request are answered one after the other. Raises RequestError and UpstreamError.
        """
        deadline = time.monotonic() + self.settings.total_timeout_s
        await self.check_model(request.model)
        async with self.admission.slot():
            described = await self.upstream.describe()
            asked = await self.run(self._ask, request)
            checked = [await self.run(self._check, request, one, described.context) for one in asked]
            for index, (prompt, _) in enumerate(checked):
                self.metrics.prompt_tokens.inc(len(prompt))
                yield index, len(prompt), None
            for index, (prompt, options) in enumerate(checked):
                # Only now: embeddings are thousands of times as large as the text, and prompts may be many.
                body = await self.run(self._encode, prompt, options, described.model)
                self.metrics.sent.inc(len(body))
                back = self._restorers(asked[index], options.n)
                async with aclosing(self.upstream.stream(body, options)) as stream:
                    async for delta in _until(deadline, self._timed(stream)):
                        yield index, len(prompt), back[delta.index].feed(delta) if back else delta
                self.metrics.put_back(back)

    async def prompt(self, what: Any, tools: Sequence[dict[str, Any]] = ()) -> Prompt:
        """Tokenized in the pool. Raises RequestError for one that is too long here."""
        return await self.run(self._prompt, what, tools)

    async def run(self, function: Callable[..., T], *args: Any) -> T:
        """A computation in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    def _prompt(self, what: Any, tools: Sequence[dict[str, Any]]) -> Prompt:
        with self._tokenizing:
            prompt = self.sgt.prompt(what, tools=tools)
        most = self.settings.max_prompt_tokens
        if most is not None and len(prompt) > most:
            raise RequestError(
                f"prompt: {len(prompt)} tokens, at most {most} are allowed here", code="context_length_exceeded"
            )
        return prompt

    def _ask(self, request: ChatRequest | CompletionRequest) -> list[Asked]:
        """The prompts with surrogates. ``logprobs`` 0 of a completion are log probabilities too."""
        wanted = bool(request.logprobs) if isinstance(request, ChatRequest) else request.logprobs is not None
        asked = ask(self.settings.private, request.private, _prompts(request), logprobs=wanted)
        for one in asked:
            self.metrics.replaced(one.hidden)
        return asked

    @staticmethod
    def _restorers(asked: Asked, n: int) -> list[ChoiceRestorer]:
        return [ChoiceRestorer(asked.conversation) for _ in range(n)] if asked.conversation is not None else []

    def _check(
        self, request: ChatRequest | CompletionRequest, asked: Asked, context: int | None
    ) -> tuple[Prompt, Options]:
        prompt = self._prompt(asked.what, asked.tools(getattr(request, "tools", None) or ()))
        contexts = [c for c in (context, self.sgt.limit) if c]
        options = self._options(request, len(prompt), min(contexts, default=None))
        return prompt, hidden_options(asked.conversation, options) if asked.conversation is not None else options

    def _encode(self, prompt: Prompt, options: Options, model: str) -> bytes:
        with self.metrics.encode.time():
            return self.upstream.body(self.sgt.encode(prompt), options, model)

    def _options(self, request: ChatRequest | CompletionRequest, tokens: int, context: int | None) -> Options:
        chat = isinstance(request, ChatRequest)
        wanted = request.max_tokens
        if chat and request.max_completion_tokens is not None:
            wanted = request.max_completion_tokens
        room = self.settings.max_tokens if context is None else context - tokens
        if room < 1 or (wanted is not None and wanted > room):
            raise RequestError(
                f"prompt: {tokens} tokens and an answer of {wanted or 1} do not fit into {context or room}",
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > self.settings.max_tokens:
            raise RequestError(f"max_tokens: at most {self.settings.max_tokens} are allowed here", param="max_tokens")
        default = min(room, self.settings.max_tokens if chat else COMPLETION_DEFAULT)
        alternatives = request.alternatives if chat else request.logprobs
        return request.options(max_tokens=default if wanted is None else wanted, logprobs=alternatives)

    async def _timed(self, stream: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
        started, counted = time.perf_counter(), {}
        try:
            async for delta in stream:
                if not counted:
                    self.metrics.first.observe(time.perf_counter() - started)
                counted[delta.index] = max(delta.tokens or 0, counted.get(delta.index, 0))
                yield delta
        except UpstreamError as error:
            self.metrics.upstream_errors.labels(error.code).inc()
            raise
        finally:
            self.metrics.completion_tokens.inc(sum(counted.values()))


def _prompts(request: ChatRequest | CompletionRequest) -> list[Any]:
    return [request.messages] if isinstance(request, ChatRequest) else request.prompts()


async def _until(deadline: float, stream: AsyncIterator[Delta]) -> AsyncIterator[Delta]:
    """The stream, cut with a 504 at the deadline. The timeout lives within one step, since it belongs to a task."""
    async with aclosing(stream):
        while True:
            try:
                async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                    delta = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise UpstreamError("the answer took too long", status=504, code="timeout") from None
            yield delta
