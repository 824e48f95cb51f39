"""What clients may ask for. A field that would do nothing here, or leave the machine as text, is refused.

An ignored field is worse than a refused one: a client that asked for JSON would get prose, and one that asked for a
bias by token id would not know that his ids had been sent. For clients that cannot be changed there is
``--drop-params``, which says in a header of the answer what was left out.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from sgt_titan.client import Options
from sgt_titan.errors import UserError
from sgt_titan.serving.errors import RequestError
from sgt_titan.serving.promise import Promise, promise_of

MAX_PROMPTS = 64

_SCHEMA = "it would leave the machine in clear; give a chat's response_format a json_schema, which is checked here"
_REASONS = {
    "echo": "the upstream cannot repeat a prompt it never sees",
    "suffix": "the upstream would need it in clear",
    "logit_bias": "token ids would leave the machine in clear",
    "allowed_token_ids": "token ids would leave the machine in clear",
    "bad_words": "they would leave the machine in clear",
    "best_of": "use n",
    "functions": "use tools",
    "function_call": "use tools",
    "response_format": "text, json_object or, of a chat, json_schema with a schema",
    "tool_choice": "auto, none, required or a function of tools",
    "guided_json": _SCHEMA,
    "guided_regex": _SCHEMA,
    "guided_choice": _SCHEMA,
    "guided_grammar": _SCHEMA,
    "structured_outputs": _SCHEMA,
    "structural_tag": _SCHEMA,
    "prompt_logprobs": "the upstream cannot score a prompt it never sees",
    "modalities": "only text",
    "audio": "only text",
    "stop_token_ids": "ids leave the machine in clear, so only those of special tokens",
    "chat_template": "prompts are rendered as the transform was trained",
    "documents": "put them into messages",
    "web_search_options": "the upstream has no such tool",
    "prediction": "the upstream would need it in clear",
    "prompt_embeds": "embeddings are made here",
    "add_generation_prompt": "false only together with continue_final_message: true",
    "continue_final_message": "needs add_generation_prompt: false, or none",
}
# Names that an error may repeat, since they are no one's secret: OpenAI's and vLLM's fields that do nothing here.
_KNOWN = {
    *("verbosity", "thinking", "thinking_budget", "priority", "request_id", "cache_salt", "add_special_tokens"),
    *("length_penalty", "use_beam_search", "truncate_prompt_tokens", "detokenize", "mm_processor_kwargs", "top_a"),
    *("include_stop_str_in_output", "return_tokens_as_token_ids", "return_token_ids", "kv_transfer_params", "mirostat"),
    *("prompt_cache_retention", "extra_body", "extra_headers", "extra_query", "timeout", "typical_p", "repeat_penalty"),
    *("logits_processors", "include_reasoning", "guided_decoding_backend", "guided_whitespace_pattern", "num_ctx"),
    *("max_output_tokens", "instructions", "input", "text", "reasoning", "previous_response_id", "conversation"),
    *("text.verbosity", "reasoning.summary", "reasoning.generate_summary"),
    *(
        "background",
        "include",
        "truncation",
        "max_tool_calls",
        "prompt",
        "prompts",
        "moderation",
        "options",
        "keep_alive",
    ),
}
# Fields that ask for nothing when they hold these values; clients like to send them.
_HARMLESS = {
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (False,),
    "spaces_between_special_tokens": (True, False),
    "include_reasoning": (True,),
    "detokenize": (True,),
    "background": (False,),
    "truncation": ("disabled",),
    "include": ([],),
    "functions": ([],),
    "documents": ([],),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "text.verbosity": ("medium",),
    "reasoning.summary": ("auto",),  # thoughts themselves are in the answer
}
# Meant for the provider's books: accepted, and sent nowhere.
_BOOKS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, hide_input_in_errors=True)

    model: str
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stop_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    private: bool | dict[str, Any] | None = None  # private.py; never leaves

    _dropped: list[str] = PrivateAttr(default_factory=list)

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def dropped(self) -> list[str]:
        """Fields that ``--drop-params`` left out: names that are known, and a count of the others."""
        return self._dropped

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def rendering(self) -> dict[str, Any]:
        """Arguments of ``StainedGlassTransform.prompt``."""
        return {}

    def promise(self) -> Promise | None:
        """What its answer has to be. Raises RequestError."""
        return promise_of(self.response_format, None, None)

    def options(self, *, max_tokens: int, special: frozenset[int] = frozenset(), **more: Any) -> Options:
        """Raises RequestError naming the field. ``special``: ids that may be sent."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 16:
            raise RequestError("stop: at most 16 strings", param="stop")
        if not set(self.stop_token_ids or ()) <= special:
            raise RequestError(f"stop_token_ids: unsupported; {_REASONS['stop_token_ids']}", param="stop_token_ids")
        named: tuple[str, ...] = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
        named += ("repetition_penalty", "seed", "min_tokens", "ignore_eos", "skip_special_tokens")
        fields = {name: getattr(self, name) for name in named} | more
        try:
            return Options(
                max_tokens=max_tokens,
                n=1 if self.n is None else self.n,
                stop=tuple(stops),
                stop_token_ids=None if not self.stop_token_ids else tuple(self.stop_token_ids),
                **fields,
            )
        except UserError as error:
            raise RequestError(str(error), param=str(error).split(":")[0]) from None


class ChatRequest(_Request):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def logprobs_wanted(self) -> bool:
        return bool(self.logprobs)

    def prompts(self) -> list[Any]:
        return [self.messages]

    def rendering(self) -> dict[str, Any]:
        arguments = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            arguments["reasoning_effort"] = self.reasoning_effort
        return {"tools": self.tools or (), "arguments": arguments, "continued": bool(self.continue_final_message)}

    def promise(self) -> Promise | None:
        found = promise_of(self.response_format, self.tool_choice, self.tools)
        if found is not None and found.told:
            if (self.n or 1) > 1:
                raise RequestError("n: only 1 where the answer is checked here", param="n")
            if self.continue_final_message:
                raise RequestError(
                    "continue_final_message: not with a schema or a call that is asked for", param="response_format"
                )
        return found

    def options(self, **arguments: Any) -> Options:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs: true", param="top_logprobs")
        # How many alternatives to report; None: no log probabilities at all.
        return super().options(logprobs=(self.top_logprobs or 0) if self.logprobs else None, **arguments)


class CompletionRequest(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    @property
    def logprobs_wanted(self) -> bool:
        return self.logprobs is not None

    def prompts(self) -> list[str | list[int]]:
        """Every prompt. Raises RequestError for none or too many."""
        given = self.prompt
        many: list[Any] = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if not given or not all(many):
            raise RequestError("prompt: is empty", param="prompt")
        if len(many) > MAX_PROMPTS:
            raise RequestError(f"prompt: {len(many)} prompts, at most {MAX_PROMPTS} in a request", param="prompt")
        return many

    def options(self, **arguments: Any) -> Options:
        return super().options(logprobs=self.logprobs, **arguments)


def parse(kind: type[_Request], body: Any, *, drop: bool = False) -> Any:
    """A checked request. ``drop``: leave out what is unsupported, and list it, instead of refusing it.

    Raises RequestError, which names the field and never its value.
    """
    if not isinstance(body, dict):
        raise RequestError("body: must be a JSON object")
    body = {key: value for key, value in body.items() if value is not None and key not in _BOOKS}
    refused = [key for key in body if not _supported(kind, key, body)]
    for key in refused:
        known = key if key in _REASONS or key in _HARMLESS or key in _KNOWN else "unknown field"
        if not drop:
            reason = _REASONS.get(key, "this proxy has no such option")
            raise RequestError(f"{known}: unsupported; {reason}", code="unsupported_parameter", param=known)
    try:
        kept = {key: body[key] for key in body if key in kind.model_fields and key not in refused}
        request = kind.model_validate(kept)
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "body"
        raise RequestError(f"{where}: {first['msg']}", param=where) from None
    if body.get("tool_choice") == "none":
        request = request.model_copy(update={"tools": None})
    public = sorted(key for key in refused if key in _REASONS or key in _HARMLESS or key in _KNOWN)
    unknown = len(refused) - len(public)
    request._dropped = public + ([f"{unknown} unknown"] if unknown else [])
    return request


def _supported(kind: type[_Request], key: str, body: dict[str, Any]) -> bool:
    value = body[key]
    if any(type(value) is type(harmless) and value == harmless for harmless in _HARMLESS.get(key, ())):
        return True
    if key == "response_format":
        return value == {"type": "json_object"} or (kind is ChatRequest and _has_schema(value))
    if key == "tool_choice":
        return kind is ChatRequest and (value in ("auto", "none", "required") or _names_function(value))
    if key == "add_generation_prompt":
        return value is not body.get("continue_final_message", False)
    if key == "continue_final_message":
        return value is False or body.get("add_generation_prompt", False) is False
    return key in kind.model_fields


def _has_schema(value: Any) -> bool:
    form = value.get("json_schema") if isinstance(value, dict) and value.get("type") == "json_schema" else None
    return isinstance(form, dict) and isinstance(form.get("schema"), dict)


def _names_function(value: Any) -> bool:
    function = value.get("function") if isinstance(value, dict) and value.get("type") == "function" else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)
