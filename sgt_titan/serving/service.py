"""One request from its JSON to the deltas of its answer: admit, encode, send."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import httpx

from sgt_titan.client import Choice, Delta, Options, Prompt, UpstreamError
from sgt_titan.client.answer import brief
from sgt_titan.client.private import ChoiceRestorer, hidden_options
from sgt_titan.client.prompt import decode, special_ids
from sgt_titan.client.reading import ChoiceReader, reading_of
from sgt_titan.client.reasoning import END
from sgt_titan.serving.admission import Admission
from sgt_titan.serving.errors import RequestError
from sgt_titan.serving.guard import Caller
from sgt_titan.serving.keys import Key, Spent
from sgt_titan.serving.metrics import Metrics
from sgt_titan.serving.pool import Member, Pool
from sgt_titan.serving.private import Asked, ask
from sgt_titan.serving.promise import Promise, again, bare, told
from sgt_titan.serving.schema import ChatRequest, CompletionRequest
from sgt_titan.serving.settings import Served, Settings
from sgt_titan.serving.telemetry import Telemetry
from sgt_titan.serving.turns import Workers
from sgt_titan.serving.upstream import Deltas, Upstream

COMPLETION_DEFAULT = 16  # OpenAI's own default of max_tokens at /v1/completions
PROMPT_END = 16  # tokens in which a template may have opened a thought


class Model:
    """One served model: its transform, its servers, and one tokenizer that one thread at a time may use."""

    def __init__(self, served: Served, settings: Settings, transport: httpx.AsyncBaseTransport | None):
        self.served, self.sgt, self.name = served, served.sgt, served.name
        template = served.sgt.tokenizer.chat_template if served.sgt.config.template == "chat" else None
        self.reading = reading_of(template, served.tool_format, served.reasoning)
        upstreams = [Upstream(target, settings, transport) for target in served.targets]
        self.pool = Pool(upstreams, settings.retries, settings.retry_pause_s)
        self.tokenizing = threading.Lock()  # fast tokenizers are not safe to call from two threads

    async def called(self) -> str:
        """Its name to clients. Raises UpstreamError where only the upstream knows and it cannot be asked."""
        return self.name or (await self.pool.describe()).model


@dataclass(frozen=True)
class Piece:
    """Of an answer: ``delta`` of prompt number ``index``, which has ``tokens``. delta None: it begins."""

    index: int
    tokens: int
    delta: Delta | None


@dataclass
class Tally:
    """Tokens of one request: of prompts, and of every choice of every prompt, as far as it has come."""

    prompt: int = 0
    choices: dict[tuple[int, int], int] = field(default_factory=dict)
    given_up: int = 0  # of answers that did not keep their promise

    @property
    def answered(self) -> int:
        return sum(self.choices.values()) + self.given_up


class Service:
    """What the routes share."""

    def __init__(
        self,
        settings: Settings,
        served: Sequence[Served],
        transport: httpx.AsyncBaseTransport | None = None,
        telemetry: Telemetry | None = None,
    ):
        self.settings, self.telemetry = settings, telemetry or Telemetry()
        self.metrics = Metrics()
        self.models = [Model(one, settings, transport) for one in served]
        self.admission = Admission(settings.active, settings.waiting, settings.wait_s)
        self.spent = Spent()
        self.metrics.active.set_function(lambda: self.admission.active)
        self.metrics.waiting.set_function(lambda: self.admission.waiting)
        for m, model in enumerate(self.models):
            for u, member in enumerate(model.pool.members):
                self.metrics.upstream_up.labels(str(m), str(u)).set_function(partial(_as_number, member))
        self.workers = Workers(settings.encode_threads)
        self.checks = Workers(1)  # of answers, each in a process that it waits for

    async def close(self) -> None:
        self.workers.close()
        self.checks.close()
        for model in self.models:
            await model.pool.close()

    async def names(self, key: Key) -> list[str]:
        """What clients call the models, as far as ``key`` may ask them."""
        names = [await model.called() for model in self.models]
        return [name for name in names if key.models is None or name in key.models]

    async def model(self, name: str, key: Key) -> Model:
        """The model of that name. Raises RequestError (404) for one that is not served here, or not to this key."""
        for model in self.models:
            if await model.called() == name and (key.models is None or name in key.models):
                return model
        raise RequestError("model: not served here; see /v1/models", status=404, code="model_not_found", param="model")

    async def ready(self) -> None:
        """Raise UpstreamError unless for every model a server answers embeddings."""
        for model in self.models:
            bos = model.sgt.tokenizer.bos_token_id
            await model.pool.prove(model.sgt.embed_tokens.weight[[0 if bos is None else bos]].detach())

    async def pieces(self, request: ChatRequest | CompletionRequest, caller: Caller) -> AsyncGenerator[Piece, None]:
        """The answer, in order; first a piece without delta for every prompt.

        The prompts of a request are answered one after the other. Raises RequestError and UpstreamError.
        """
        deadline = time.monotonic() + self.settings.total_timeout_s
        model = await self.model(request.model, caller.key)
        minute = self.spent.of(caller.key)
        refusal = minute.begin(caller.key)
        if refusal is not None:
            raise RequestError(
                f"{refusal[0]} of this key are used up", status=429, code="rate_limit_exceeded", again_s=refusal[1]
            )
        promise = request.promise()
        if promise is not None and promise.call is not None and model.reading.calls is None:
            raise RequestError("tool_choice: how this model writes calls is not known; see --tool-format")
        tally = Tally()
        try:
            async with self.admission.slot(caller.turn):
                asked = await self.workers.run(caller.turn, self._ask, model, request)
                if promise is not None and promise.told:
                    await self.checks.run(caller.turn, promise.check)
                    asked = [replace(one, what=told(one.what, one.words(promise.words()))) for one in asked]
                checked = [await self._checked(model, request, one, caller) for one in asked]
                for index, (prompt, _) in enumerate(checked):
                    yield Piece(index, len(prompt), None)
                for index, (prompt, options) in enumerate(checked):
                    one = _Turn(model, request, asked[index], prompt, options, caller, deadline)
                    self._count(tally, one)
                    if promise is None or (options.json_object and not promise.told):  # or the server holds to it
                        answer = self._restored(one)
                    else:
                        answer = self._kept(promise, one, tally)
                    async with aclosing(answer) as stream:
                        async for delta in stream:
                            at = (index, delta.index)
                            tally.choices[at] = max(delta.tokens or 0, tally.choices.get(at, 0))
                            yield Piece(index, len(prompt), delta)
        finally:
            self.metrics.completion_tokens.inc(tally.answered)
            minute.end(caller.key, tally.prompt + tally.answered)

    def _count(self, tally: Tally, turn: _Turn) -> None:
        self.metrics.prompt_tokens.inc(len(turn.prompt))
        tally.prompt += len(turn.prompt)

    async def _read(self, turn: _Turn) -> Deltas:
        """The answer with thoughts and calls apart; surrogates are still in it."""
        readers = self._readers(turn)
        async with aclosing(self._answer(turn.model, turn.prompt, turn.options, turn.caller)) as stream:
            async for delta in _until(turn.deadline, stream):
                yield readers[delta.index].feed(delta) if readers else delta

    async def _restored(self, turn: _Turn) -> Deltas:
        """The answer as it comes, with the values back."""
        back = self._restorers(turn.asked, turn.options.n)
        async with aclosing(self._read(turn)) as stream:
            async for delta in stream:
                yield back[delta.index].feed(delta) if back else delta
        self.metrics.put_back(back)

    async def _kept(self, promise: Promise, turn: _Turn, tally: Tally) -> Deltas:
        """Whole answers that keep their promise, each choice in one piece. One that does not, and whose model was told,
        is asked for again with what is wrong. Raises UpstreamError after so many tries."""
        for attempt in range(self.settings.answer_tries):
            choices = [Choice() for _ in range(turn.options.n)]
            async with aclosing(self._read(turn)) as stream:
                async for delta in stream:
                    choices[delta.index].add(delta)
            back = self._restorers(turn.asked, turn.options.n)
            shown = [one.whole(i) for i, one in enumerate(choices)]
            shown = [back[i].feed(delta) for i, delta in enumerate(shown)] if back else shown
            complaint: str | None = None
            for i, delta in enumerate(shown):
                if delta.finish_reason != "length":  # cut off: that is said, and nothing else can be
                    shown[i] = delta = replace(delta, text=bare(delta.text))
                    complaint = complaint or await self.checks.run(turn.caller.turn, promise.complaint, delta)
            if complaint is None:
                self.metrics.put_back(back)
                for delta in shown:
                    yield replace(delta, tokens=(delta.tokens or 0) + tally.given_up)
                tally.given_up = 0  # they are in what was just counted
                return
            self.metrics.broken.inc()
            tally.given_up += sum(choice.tokens for choice in choices)
            if attempt + 1 == self.settings.answer_tries:
                break
            what = again(turn.asked.what, choices[0], complaint, turn.asked.words) if promise.told else turn.asked.what
            asked = replace(turn.asked, what=what)
            prompt, options = await self._checked(turn.model, turn.request, asked, turn.caller)
            turn = replace(turn, asked=asked, prompt=prompt, options=options)
            self._count(tally, turn)
        raise UpstreamError(
            f"the model's answers do not fit what was asked for, {self.settings.answer_tries} times",
            code="answer_does_not_fit",
        )

    async def _answer(self, model: Model, prompt: Prompt, options: Options, caller: Caller) -> Deltas:
        # Only now: embeddings are thousands of times as large as the text, and prompts may be many.
        gone = threading.Event()
        try:
            with self.telemetry.span("encode") as span:
                span.set("sgt.prompt_tokens", len(prompt))
                embeds_TD = await self.workers.run(caller.turn, self._encode, model, prompt, gone)
        finally:
            gone.set()  # a thread cannot be stopped, but asks
        bodies: dict[tuple[int, str], bytes] = {}

        async def send(upstream: Upstream) -> Deltas:
            described = await upstream.describe()
            at = (id(upstream), described.model)
            if at not in bodies:  # the same embeddings, however often they have to be sent
                bodies.clear()
                bodies[at] = await self.workers.run(caller.turn, upstream.body, embeds_TD, options, described.model)
            self.metrics.sent.inc(len(bodies[at]))
            return upstream.stream(bodies[at], options, caller.request_id)

        started, begun = time.perf_counter(), False
        try:
            async with aclosing(model.pool.stream(send)) as stream:
                async for delta in stream:
                    if not begun:
                        begun = True
                        self.metrics.first.observe(time.perf_counter() - started)
                    yield delta
        except UpstreamError as error:
            self.metrics.upstream_errors.labels(error.code).inc()
            raise

    def _encode(self, model: Model, prompt: Prompt, gone: threading.Event) -> Any:
        with self.metrics.encode.time():
            return model.sgt.encode(prompt, gone=gone.is_set)

    def _readers(self, turn: _Turn) -> list[ChoiceReader]:
        """Of a chat: one a choice."""
        request, reading = turn.request, turn.model.reading
        if isinstance(request, CompletionRequest):
            return []
        end, one = self._end(turn.model, turn.prompt), request.parallel_tool_calls is False
        tools = turn.asked.tools(request.tools or ())  # as the model was told them
        return [ChoiceReader(reading, tools=tools, prompt_end=end, one=one) for _ in range(turn.options.n)]

    @staticmethod
    def _end(model: Model, prompt: Prompt) -> str:
        with model.tokenizing:
            return decode(model.sgt.tokenizer, prompt.ids[-PROMPT_END:])

    async def prompt(self, model: Model, what: Any, caller: Caller, **rendering: Any) -> Prompt:
        """Tokenized in a thread. Raises RequestError for one that is too long here."""
        most = min(filter(None, (self.settings.max_prompt_tokens, model.sgt.limit)), default=None)

        def tokenize() -> Prompt:
            with model.tokenizing:
                return model.sgt.prompt(what, most=most, **rendering)

        return await self.workers.run(caller.turn, tokenize)

    def _ask(self, model: Model, request: ChatRequest | CompletionRequest) -> list[Asked]:
        """The prompts with surrogates, once it is clear that they may fit."""
        whats, tools = request.prompts(), request.rendering().get("tools", ())
        for what in whats:
            model.sgt.check_size(what, tools=tools, most=self.settings.max_prompt_tokens)
        asked = ask(self.settings.private, request.private, whats, logprobs=request.logprobs_wanted)
        for one in asked:
            self.metrics.replaced(one.hidden)
        return asked

    @staticmethod
    def _restorers(asked: Asked, n: int) -> list[ChoiceRestorer]:
        return [ChoiceRestorer(asked.conversation) for _ in range(n)] if asked.conversation is not None else []

    async def _checked(
        self, model: Model, request: ChatRequest | CompletionRequest, asked: Asked, caller: Caller
    ) -> tuple[Prompt, Options]:
        described = await model.pool.describe()
        rendering = request.rendering()
        if "tools" in rendering:
            rendering["tools"] = asked.tools(rendering["tools"])
        prompt = await self.prompt(model, asked.what, caller, **rendering)
        try:
            options = self._options(model, request, prompt, described.context)
        except RequestError:
            # Before a request is refused for what the upstream said some time ago, it is asked again.
            described = await model.pool.describe(fresh=True)
            options = self._options(model, request, prompt, described.context)
        return prompt, hidden_options(asked.conversation, options) if asked.conversation is not None else options

    def _options(
        self, model: Model, request: ChatRequest | CompletionRequest, prompt: Prompt, context: int | None
    ) -> Options:
        tokens = len(prompt)
        contexts = [c for c in (context, model.sgt.limit) if c]
        whole = min(contexts, default=None)
        room = self.settings.max_tokens if whole is None else whole - tokens
        wanted, most = request.wanted_tokens, min(room, self.settings.max_tokens)
        if wanted is not None and wanted > most >= 1 and self.settings.clamp_max_tokens:
            wanted = most
        if room < 1 or (wanted is not None and wanted > room):
            raise RequestError(
                f"prompt: {tokens} tokens and an answer of {brief(wanted or 1)} do not fit into {whole or room}",
                code="context_length_exceeded",
            )
        if wanted is not None and wanted > self.settings.max_tokens:
            raise RequestError(f"max_tokens: at most {self.settings.max_tokens} are allowed here", param="max_tokens")
        default = min(room, COMPLETION_DEFAULT if isinstance(request, CompletionRequest) else self.settings.max_tokens)
        more: dict[str, Any] = {"special": special_ids(model.sgt.tokenizer)}
        promise = request.promise()
        if promise is not None and promise.held:
            # A model that thinks first could not: an object begins with its brace. So that is checked here.
            thinks = isinstance(request, ChatRequest) and model.reading.thoughts
            more["json_object"] = not thinks or self._end(model, prompt).rstrip().endswith(END)
        if isinstance(request, ChatRequest) and request.tools and model.reading.special:
            more["skip_special_tokens"] = False  # the marks of a call are such, and it has to be found
        return request.options(max_tokens=default if wanted is None else wanted, **more)


@dataclass(frozen=True)
class _Turn:
    """One prompt of a request, ready to be sent."""

    model: Model
    request: ChatRequest | CompletionRequest
    asked: Asked
    prompt: Prompt
    options: Options
    caller: Caller
    deadline: float


def _as_number(member: Member) -> float:
    """For a gauge: whether a server answers."""
    return float(member.up)


async def _until(deadline: float, stream: Deltas) -> Deltas:
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
