"""What goes over the wire to a server and what comes back: bytes and dictionaries, no connection.

A ``Wire`` is a row: where to post, how to write the request, how to read an event of the answer. Everything in a
request is named here, so that what a server can learn is a list one can read: embeddings, the model's name, numbers.

vLLM: ``POST /v1/completions`` with ``prompt_embeds``, base64 of a ``torch.save``d tensor ``(T, D)``; as read in vLLM
0.33.0 (vllm/renderers/embed_utils.py, vllm/entrypoints/openai/completion/). SGLang: ``POST /generate`` with
``input_embeds``, nested floats; as read in SGLang 0.5.23 (sglang/srt/managers/io_struct.py, tokenizer_manager.py).

Shapes: T tokens, D model width.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sgt_titan.client.answer import Delta, Options, TokenLogprob, UpstreamError, check_embeddings
from sgt_titan.errors import UserError

WIRE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_REASON = 10_000  # characters that are looked at

Body = dict[str, Any]
Reader = Callable[[Any], Iterator[Delta]]


@dataclass(frozen=True)
class Wire:
    """How one kind of server is spoken to. ``reader`` gives a fresh function from event to deltas for every request."""

    name: str
    path: str
    body: Callable[[torch.Tensor, Options, str | None], Body]
    reader: Callable[[Options], Reader]
    embeds_flag: str


def wire_dtype(name: str | None) -> torch.dtype | None:
    """The dtype to send; None: as encoded. Raises UserError for a name that is none."""
    if name is not None and name not in WIRE_DTYPES:
        raise UserError(f"wire dtype: {name!r}, must be one of {', '.join(WIRE_DTYPES)}")
    return WIRE_DTYPES[name] if name else None


def serialise(embeds_TD: torch.Tensor) -> str:
    """base64 of what ``torch.save`` makes of the embeddings, and of nothing else.

    A copy of its own: ``torch.save`` of a view writes the whole storage under it, and that may hold other positions,
    or other prompts of a batch. Raises UserError for what is not finite embeddings ``(T, D)``.
    """
    check_embeddings(embeds_TD)
    buffer = io.BytesIO()
    torch.save(embeds_TD.detach().to("cpu").contiguous().clone(), buffer)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")


def _vllm_body(embeds_TD: torch.Tensor, options: Options, model: str | None) -> Body:
    # prompt is left out: vLLM takes embeddings where there is none, and refuses echo, suffix and prompt_logprobs.
    return {
        **({"model": model} if model else {}),
        "prompt_embeds": serialise(embeds_TD),
        "max_tokens": options.max_tokens,
        "n": options.n,
        **options.numbers(),
        # Holds the answer to some JSON object; a schema would say what the application wants, so there is none.
        **({"response_format": {"type": "json_object"}} if options.json_object else {}),
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def _vllm_reader(options: Options) -> Reader:
    def read(event: Any) -> Iterator[Delta]:
        for choice in event.get("choices") or ():
            # Usage of a chunk counts the tokens of its own choice.
            tokens = (event.get("usage") or {}).get("completion_tokens")
            yield Delta(
                index=int(choice["index"]),
                text=choice.get("text") or "",
                logprobs=_vllm_logprobs(choice.get("logprobs"), options.logprobs),
                finish_reason=_finish(choice.get("finish_reason")),
                tokens=tokens,
            )

    return read


def _finish(reason: Any) -> str | None:
    """How a whole answer ended, stop or length; None: it goes on. Raises UpstreamError for any other end."""
    if reason in (None, "stop", "length"):
        return reason
    if not isinstance(reason, str):
        raise TypeError  # no event that can be read
    aborted = reason == "abort"
    raise UpstreamError(
        "the server aborted the request" if aborted else "the server broke the answer off for a reason of its own",
        code="upstream_aborted",
    )


def _vllm_logprobs(found: Any, wanted: int | None) -> tuple[TokenLogprob, ...]:
    if not found or wanted is None:
        return ()
    tops = found.get("top_logprobs") or [None] * len(found["tokens"])
    return tuple(
        TokenLogprob(token, _nats(value), _best((top or {}).items(), wanted))
        for token, value, top in zip(found["tokens"], found["token_logprobs"], tops, strict=True)
    )


def _nats(value: float | None) -> float:
    """A log probability; vLLM's stand-in for minus infinity where JSON could not say the value."""
    return float(value) if value is not None and math.isfinite(value) else -9999.0


def _best(pairs: Any, count: int) -> tuple[tuple[str, float], ...]:
    ranked = sorted(((str(token), _nats(value)) for token, value in pairs), key=lambda pair: -pair[1])
    return tuple(ranked[:count])


def _sglang_body(embeds_TD: torch.Tensor, options: Options, model: str | None) -> Body:
    check_embeddings(embeds_TD)
    numbers = options.numbers()
    logprobs = numbers.pop("logprobs", None)
    theirs = {"seed": "sampling_seed", "min_tokens": "min_new_tokens"}
    numbers = {theirs.get(name, name): value for name, value in numbers.items()}
    sampling: dict[str, Any] = {"max_new_tokens": options.max_tokens, "n": options.n, **numbers}
    if options.json_object:
        sampling["json_schema"] = '{"type": "object"}'
    body: Body = {"input_embeds": embeds_TD.float().tolist(), "sampling_params": sampling, "stream": True}
    if logprobs is not None:
        body |= {"return_logprob": True, "top_logprobs_num": logprobs, "return_text_in_logprobs": True}
    return body


def _sglang_reader(options: Options) -> Reader:
    shown: dict[int, int] = {}
    listed: dict[int, int] = {}

    def read(event: Any) -> Iterator[Delta]:
        index, meta = int(event.get("index") or 0), event.get("meta_info") or {}
        # Text and logprobs are those of the whole answer so far (SGLang's default, without incremental output).
        text = event.get("text") or ""
        new, shown[index] = text[shown.get(index, 0) :], max(len(text), shown.get(index, 0))
        rows = meta.get("output_token_logprobs") or [] if options.logprobs is not None else []
        tops = meta.get("output_top_logprobs") or [None] * len(rows)
        first, listed[index] = listed.get(index, 0), max(len(rows), listed.get(index, 0))
        finish = meta.get("finish_reason")
        yield Delta(
            index=index,
            text=new,
            logprobs=tuple(
                TokenLogprob(
                    row[2] or "", _nats(row[0]), _best(((t[2] or "", t[0]) for t in top or ()), options.logprobs or 0)
                )
                for row, top in zip(rows[first:], tops[first:], strict=False)
            ),
            finish_reason=_finish(finish.get("type")) if isinstance(finish, dict) else None,
            tokens=meta.get("completion_tokens"),
        )

    return read


WIRES = {
    "vllm": Wire("vllm", "/v1/completions", _vllm_body, _vllm_reader, "--enable-prompt-embeds"),
    "sglang": Wire("sglang", "/generate", _sglang_body, _sglang_reader, "--disable-radix-cache"),
}


def explain(wire: Wire, status: int, payload: Any) -> UpstreamError:
    """What a server's refusal means and what to do, as the error to hand on.

    A server's 401 is about the proxy's key and its 404 about the proxy's configuration, so neither may reach the client
    as its own mistake; a 400 about lengths is the client's.
    """
    reason = _reason(payload)
    lower = reason.lower()
    if wire.embeds_flag in reason or "disable_radix_cache" in lower:
        return UpstreamError(
            f"the upstream does not accept embeddings; start it with {wire.embeds_flag}",
            code="upstream_embeds_disabled",
        )
    if ("hidden_size" in lower or "hidden size" in lower) and "2d tensor" not in lower:  # which names the axes
        return UpstreamError(
            "the upstream serves another model than this transform's trunk: its embeddings have another width",
            code="upstream_wrong_model",
        )
    if status in (401, 403):
        return UpstreamError("the upstream refuses our key; set --upstream-api-key-file", code="upstream_unauthorized")
    if status == 404:
        return UpstreamError("the upstream has no such model or route; see --model", code="upstream_not_found")
    if status == 413:
        return UpstreamError(
            "the upstream, or a proxy before it, takes no request of this size; raise its limit, send bfloat16 or less",
            status=413,
            code="upstream_body_too_large",
        )
    if status == 429 or status == 503:
        return UpstreamError("the upstream is overloaded; try again", status=status, code="upstream_overloaded")
    if any(words in lower for words in ("context length", "maximum model length", "max_model_len")):
        return UpstreamError(
            "prompt and answer do not fit the upstream's context; shorten the prompt or max_tokens",
            status=400,
            code="context_length_exceeded",
        )
    if 400 <= status < 500:
        # Not its words: an upstream's refusal may repeat the request. What is known by them is named here.
        known = next((ours for theirs, ours in REFUSALS if theirs in lower), "its own log says why")
        return UpstreamError(f"the upstream refuses the request: {known}", status=400, code="upstream_refused")
    return UpstreamError(f"the upstream failed with status {status}", code="upstream_error")


# What a refusal contains, in lower case, and what it means.
REFUSALS = (
    ("max_tokens must be at least", "max_tokens is too small"),
    ("min_tokens must be", "min_tokens is not between 0 and max_tokens"),
    ("logprobs", "it gives fewer log probabilities than asked for; lower logprobs"),
    ("temperature must be", "temperature is out of its range"),
    ("top_p must be", "top_p is out of its range"),
    ("top_k must be", "top_k is out of its range"),
    ("min_p must be", "min_p is out of its range"),
    ("penalty must be", "a penalty is out of its range"),
    ("greedy sampling", "n is more than 1 at temperature 0, where all answers would be one"),
    ("n must be", "n is out of its range"),
    ("stop_token_ids", "stop_token_ids holds an id that is none"),
    ("could not be deserialized", "it cannot read the embeddings"),
    ("2d tensor", "it cannot read the embeddings"),
    ("floating-point", "it cannot read the embeddings; another --wire-dtype?"),
)


def _reason(payload: Any) -> str:
    """The words of an error body. To be searched, never shown: a server may repeat a whole request in them."""
    for key in ("error", "detail", "message"):
        if isinstance(payload, dict) and payload.get(key):
            payload = payload[key]
    return payload[:MAX_REASON] if isinstance(payload, str) else ""


def check_event(event: Any, wire: Wire) -> None:
    """Raise UpstreamError for an event that reports an error in the middle of an answer, or is no event."""
    if not isinstance(event, dict):
        raise UpstreamError("the upstream sent an event that is not an object", code="upstream_malformed")
    if event.get("error"):
        error = event["error"]
        status = error.get("code") if isinstance(error, dict) else None
        raise explain(wire, status if isinstance(status, int) and 400 <= status < 600 else 500, event)
