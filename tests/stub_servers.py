"""Servers that answer embeddings over a real transformers trunk, with the checks and the formats of the real ones.

``vllm_app``: what vLLM 0.33.0 does at /v1/completions (vllm/renderers/embed_utils.py, online_renderer.py,
entrypoints/openai/completion/). ``sglang_app``: what SGLang 0.5.23 does at /generate (managers/io_struct.py,
tokenizer_manager.py). Written from reading them; `make test-vllm` is to hold the first against a real vLLM on a
CPU: the same requests, the same events and refusals.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import torch
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, StreamingResponse


@dataclass
class Trunk:
    """A causal language model and what the tests want to know of its use.

    endless: its end-of-text token ends nothing. An untrained trunk may draw it at once, and fresh noise changes when: a
    test that needs an answer of some length or duration needs this.
    """

    model: torch.nn.Module
    tokenizer: object
    name: str = "trunk"
    context: int = 128
    delay_s: float = 0.0
    embeds: bool = True
    endless: bool = False
    key: str | None = None
    bodies: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    received: list[torch.Tensor] = field(default_factory=list)
    started: int = 0
    finished: int = 0
    finished_ids: list[str | None] = field(default_factory=list)  # X-Request-Id of what was generated to its end
    cancelled: int = 0
    steps: int = 0
    break_after: int | None = None

    async def generate(self, embeds_TD, *, n, max_tokens, temperature, seed, logprobs, request_id=None):
        """(choice, token id, text so far, top logprobs, finish reason) for every token of every choice."""
        self.started += 1
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        tokens, done = [[] for _ in range(n)], [False] * n
        past, step_input = None, {"inputs_embeds": embeds_TD[None].repeat(n, 1, 1).to(self.model.dtype)}
        ends = None if self.endless else self.tokenizer.eos_token_id
        try:
            for _ in range(max_tokens):
                out = await asyncio.to_thread(self._step, step_input, past)
                await asyncio.sleep(self.delay_s)
                self.steps += 1
                past, raw_NV = out.past_key_values, out.logits[:, -1].float()
                if temperature == 0:
                    chosen = raw_NV.argmax(-1)
                else:
                    chosen = torch.multinomial((raw_NV / temperature).softmax(-1), 1, generator=generator)[:, 0]
                log_NV = raw_NV.log_softmax(-1)
                step_input = {"input_ids": chosen[:, None]}
                for i, token in enumerate(chosen.tolist()):
                    if done[i]:
                        continue
                    tokens[i].append(token)
                    reason = "stop" if token == ends else "length" if len(tokens[i]) == max_tokens else None
                    done[i] = reason is not None
                    top = {}
                    if logprobs is not None:
                        ids = [token, *log_NV[i].topk(logprobs).indices.tolist()]
                        top = {j: log_NV[i, j].item() for j in ids}
                    yield i, token, self.tokenizer.decode(tokens[i], skip_special_tokens=True), top, reason
                if all(done):
                    break
            self.finished += 1
            self.finished_ids.append(request_id)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    @torch.inference_mode()
    def _step(self, step_input, past):
        return self.model(**step_input, past_key_values=past, use_cache=True)


class Refused(Exception):
    def __init__(self, message, status=400, kind="BadRequestError", param=None):
        super().__init__(message)
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}
        self.status = status


def load_embeds(trunk: Trunk, encoded: str) -> torch.Tensor:
    """The checks of safe_load_prompt_embeds, in its order and words."""
    where = {"param": "prompt_embeds"}
    if not trunk.embeds:
        raise Refused("You must set `--enable-prompt-embeds` to input `prompt_embeds`.", **where)
    try:
        payload = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise Refused(str(error)) from error
    with torch.sparse.check_sparse_tensor_invariants():
        try:
            tensor = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
        except Exception as error:
            raise Refused(
                f"`prompt_embeds` could not be deserialized as a torch tensor: {str(error)[:200]}", **where
            ) from error
        tensor = tensor.to_dense()
    if tensor.dim() > 2:
        tensor = tensor.squeeze(0)
    if tensor.dim() != 2:
        raise Refused(
            f"`prompt_embeds` must be a 2D tensor of shape (num_tokens, hidden_size); got shape {tuple(tensor.shape)}.",
            **where,
        )
    width = trunk.model.config.hidden_size
    if tensor.shape[1] != width:
        raise Refused(
            f"`prompt_embeds` hidden_size {tensor.shape[1]} does not match the model's hidden_size {width}.", **where
        )
    if not tensor.is_floating_point():
        raise Refused(f"`prompt_embeds` dtype {tensor.dtype} is not a floating-point type", **where)
    return tensor.to(trunk.model.dtype)


def check_completion(trunk: Trunk, body: dict) -> torch.Tensor:
    if body.get("model") not in (None, trunk.name):
        raise Refused(f"The model `{body['model']}` does not exist.", 404, "NotFoundError", "model")
    if body.get("stream_options") and not body.get("stream"):
        raise Refused("Stream options can only be defined when `stream=True`.", param="stream_options")
    if not body.get("prompt") and not body.get("prompt_embeds"):
        raise Refused("Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
    if body.get("suffix") is not None:
        raise Refused("suffix is not supported with prompt_embeds")
    if body.get("echo"):
        raise Refused("Echo is unsupported with prompt embeds.")
    if body.get("n", 1) > 1 and body.get("temperature", 1.0) < 1e-5:
        raise Refused(f"n must be 1 when using greedy sampling, got {body['n']}.")
    if body.get("prompt_logprobs") is not None:
        raise Refused("prompt_logprobs is not compatible with prompt embeds.")
    embeds_TD = load_embeds(trunk, body["prompt_embeds"])
    wanted = embeds_TD.shape[0] + (body.get("max_tokens") or 16)
    if wanted > trunk.context:
        raise Refused(
            f"This model's maximum context length is {trunk.context} tokens. However, you requested {wanted}."
        )
    return embeds_TD


def authorised(trunk: Trunk, request: Request) -> bool:
    return trunk.key is None or request.headers.get("authorization") == f"Bearer {trunk.key}"


def _models(app: FastAPI, trunk: Trunk) -> None:
    @app.get("/v1/models")
    async def models(request: Request):
        if not authorised(trunk, request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        card = {"id": trunk.name, "object": "model", "owned_by": "vllm", "root": trunk.name}
        return {"object": "list", "data": [card | {"max_model_len": trunk.context}]}


def vllm_app(trunk: Trunk) -> FastAPI:
    app = FastAPI()
    _models(app, trunk)

    @app.post("/v1/completions")
    async def completions(request: Request):
        if not authorised(trunk, request):
            return JSONResponse({"error": "Unauthorized"}, 401)
        body = await request.json()
        trunk.bodies.append(body)
        trunk.headers.append(dict(request.headers))
        try:
            embeds_TD = check_completion(trunk, body)
        except Refused as error:
            return JSONResponse(error.body, error.status)
        trunk.received.append(embeds_TD)
        events = _vllm_events(trunk, body, embeds_TD, request.headers.get("x-request-id"))
        if body.get("stream"):
            return StreamingResponse(events, media_type="text/event-stream")
        return await _vllm_whole(trunk, body, embeds_TD)

    return app


def _vllm_logprobs(trunk, token, top, count):
    text = {i: trunk.tokenizer.decode([i]) for i in top}
    return {
        "text_offset": [0],
        "tokens": [text[token]],
        "token_logprobs": [top[token]],
        # One more than asked for: the chosen token, then the best.
        "top_logprobs": [{text[i]: value for i, value in list(top.items())[: count + 1]}],
    }


def _arguments(body):
    temperature = body.get("temperature")
    return {
        "n": body.get("n", 1),
        "max_tokens": body.get("max_tokens") or 16,
        "temperature": 1.0 if temperature is None else temperature,
        "seed": body.get("seed"),
        "logprobs": body.get("logprobs"),
    }


async def _vllm_events(trunk, body, embeds_TD, request_id=None):
    head = {"id": "cmpl-stub", "object": "text_completion", "created": int(time.time()), "model": trunk.name}
    n, prompt_tokens = body.get("n", 1), embeds_TD.shape[0]
    shown, counts = [""] * n, [0] * n
    async for i, token, text, top, reason in trunk.generate(embeds_TD, **_arguments(body), request_id=request_id):
        counts[i] += 1
        if trunk.break_after is not None and sum(counts) > trunk.break_after:
            yield 'data: {"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}\n\n'
            return
        if text.endswith("\ufffd") and reason is None:
            text = shown[i]
        choice = {"index": i, "text": text[len(shown[i]) :], "logprobs": None, "finish_reason": reason}
        shown[i] = text
        if body.get("logprobs") is not None:
            choice["logprobs"] = _vllm_logprobs(trunk, token, top, body["logprobs"])
        chunk = head | {"choices": [choice]}
        if (body.get("stream_options") or {}).get("continuous_usage_stats"):
            total = prompt_tokens + counts[i]
            chunk["usage"] = {"prompt_tokens": prompt_tokens, "completion_tokens": counts[i], "total_tokens": total}
        yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    if (body.get("stream_options") or {}).get("include_usage"):
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": sum(counts)}
        yield f"data: {json.dumps(head | {'choices': [], 'usage': usage})}\n\n"
    yield "data: [DONE]\n\n"


async def _vllm_whole(trunk, body, embeds_TD):
    texts, reasons = {}, {}
    async for i, _, text, _, reason in trunk.generate(embeds_TD, **_arguments(body)):
        texts[i], reasons[i] = text, reason
    choices = [{"index": i, "text": texts[i], "finish_reason": reasons[i]} for i in sorted(texts)]
    return {"id": "cmpl-stub", "object": "text_completion", "model": trunk.name, "choices": choices}


class Scripted:
    """For ``httpx.MockTransport``: an upstream that says ``says`` in pieces of three characters, and keeps what it was
    asked. A list: one after the other; the last one stays."""

    def __init__(self, context: int = 4096):
        self.says: str | list[str] = ""
        self.asked: list[dict] = []
        self.finish, self.context = "stop", context

    def __call__(self, request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "m", "max_model_len": self.context}]})
        self.asked.append(json.loads(request.content))
        says = self.says
        if isinstance(says, list):
            says = says.pop(0) if len(says) > 1 else says[0]
        texts = [says[i : i + 3] for i in range(0, len(says), 3)]
        events = []
        for index in range(self.asked[-1].get("n", 1)):
            choices = [{"index": index, "text": text, "finish_reason": None} for text in texts]
            choices.append({"index": index, "text": "", "finish_reason": self.finish})
            events += [{"choices": [c], "usage": {"completion_tokens": i + 1}} for i, c in enumerate(choices)]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return httpx.Response(200, content=text.encode())


def sglang_app(trunk: Trunk) -> FastAPI:
    app = FastAPI()
    _models(app, trunk)

    @app.post("/generate")
    async def generate(request: Request):
        body = await request.json()
        trunk.bodies.append(body)
        if not trunk.embeds:
            message = "input_embeds is provided while disable_radix_cache is False. Please add `--disable-radix-cache`"
            return JSONResponse({"error": {"message": message}}, 400)
        # GenerateReqInput.normalize takes a prompt for a batch unless its first number is a float.
        assert isinstance(body["input_embeds"][0][0], float), "would be taken for a batch"
        embeds_TD = torch.tensor(body["input_embeds"])
        if embeds_TD.shape[1] != trunk.model.config.hidden_size:
            return JSONResponse({"error": {"message": "hidden size mismatch"}}, 400)
        trunk.received.append(embeds_TD)
        return StreamingResponse(_sglang_events(trunk, body, embeds_TD), media_type="text/event-stream")

    return app


async def _sglang_events(trunk, body, embeds_TD):
    params = body["sampling_params"]
    unknown = params.keys() - {
        *("max_new_tokens", "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty"),
        *("frequency_penalty", "repetition_penalty", "sampling_seed", "min_new_tokens", "ignore_eos"),
        *("skip_special_tokens", "stop_token_ids", "json_schema"),
    }
    assert not unknown, unknown
    n = params.get("n", 1)
    wanted = body.get("top_logprobs_num") if body.get("return_logprob") else None
    arguments = {"max_tokens": params.get("max_new_tokens", 128), "seed": params.get("sampling_seed"), "n": n}
    arguments |= {"temperature": params.get("temperature", 1.0), "logprobs": wanted}
    counts, rows, tops, shown = [0] * n, [[] for _ in range(n)], [[] for _ in range(n)], [""] * n
    async for i, token, text, top, reason in trunk.generate(embeds_TD, **arguments):
        counts[i] += 1
        meta = {
            "id": f"r{i}",
            "prompt_tokens": embeds_TD.shape[0],
            "completion_tokens": counts[i],
            "finish_reason": None,
        }
        if reason:
            meta["finish_reason"] = {"type": reason}
        if wanted is not None:
            rows[i].append([top[token], token, trunk.tokenizer.decode([token])])
            ranked = sorted(top.items(), key=lambda pair: -pair[1])[:wanted]
            tops[i].append([[value, j, trunk.tokenizer.decode([j])] for j, value in ranked])
            meta |= {"output_token_logprobs": rows[i], "output_top_logprobs": tops[i]}
        if reason or not text.endswith("\ufffd"):  # half a character waits for its other half
            shown[i] = text
        # The whole text so far, which is SGLang's default.
        event = {"text": shown[i], "output_ids": [], "meta_info": meta, **({"index": i} if n > 1 else {})}
        yield f"data: {json.dumps(event)}\n\n"
    yield "data: [DONE]\n\n"


@contextmanager
def running(app, **options):
    """The app behind a real socket, in a thread; its URL."""
    options = {"port": 0, **options}
    config = uvicorn.Config(app, host="127.0.0.1", log_config=None, access_log=False, **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
