"""What clients may ask for. A field that would do nothing here, or leave the machine as text, is refused.

An ignored field is worse than a refused one: a client that asked for JSON would get prose, and one that asked for a
bias by token id would not know that his ids had been sent.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sgt_titan.client import Options
from sgt_titan.errors import UserError
from sgt_titan.serving.errors import RequestError

MAX_PROMPTS = 64

_REASONS = {
    "echo": "the upstream cannot repeat a prompt it never sees",
    "suffix": "the upstream would need it in clear",
    "logit_bias": "token ids would leave the machine in clear",
    "best_of": "use n",
    "functions": "use tools",
    "function_call": "use tools",
    "response_format": "a schema would leave the machine in clear",
    "tool_choice": "only auto and none; forcing a call needs the upstream's own chat endpoint",
    "guided_json": "a schema would leave the machine in clear",
    "structured_outputs": "a schema would leave the machine in clear",
    "prompt_logprobs": "the upstream cannot score a prompt it never sees",
    "modalities": "only text",
    "audio": "only text",
}
# Fields that ask for nothing when they hold these values; clients like to send them.
_HARMLESS = {
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "best_of": (1,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
# Meant for the provider's books: accepted, and sent nowhere.
_DROPPED = ("user", "metadata", "safety_identifier", "prompt_cache_key")


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
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    private: bool | dict[str, Any] | None = None  # private.py; never leaves

    @property
    def usage_wanted(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def options(self, *, max_tokens: int, logprobs: int | None) -> Options:
        """Raises RequestError naming the field."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 16:
            raise RequestError("stop: at most 16 strings", param="stop")
        named = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty")
        try:
            return Options(
                max_tokens=max_tokens,
                n=1 if self.n is None else self.n,
                stop=tuple(stops),
                seed=self.seed,
                repetition_penalty=self.repetition_penalty,
                logprobs=logprobs,
                **{name: getattr(self, name) for name in named},
            )
        except UserError as error:
            raise RequestError(str(error), param=str(error).split(":")[0]) from None


class ChatRequest(_Request):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report; None: no log probabilities at all."""
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """Every prompt. Raises RequestError for none or too many."""
        given = self.prompt
        many = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        if not given or not all(many):
            raise RequestError("prompt: is empty", param="prompt")
        if len(many) > MAX_PROMPTS:
            raise RequestError(f"prompt: {len(many)} prompts, at most {MAX_PROMPTS} in a request", param="prompt")
        return many


def parse(kind: type[_Request], body: Any) -> Any:
    """A checked request. Raises RequestError, which names the field and never its value."""
    if not isinstance(body, dict):
        raise RequestError("body: must be a JSON object")
    body = {key: value for key, value in body.items() if value is not None and key not in _DROPPED}
    for key in body.keys() - kind.model_fields.keys():
        if not any(body[key] == value for value in _HARMLESS.get(key, ())):
            known = key if key in _REASONS or key in _HARMLESS else "unknown field"
            reason = _REASONS.get(key, "this proxy has no such option")
            raise RequestError(f"{known}: unsupported; {reason}", code="unsupported_parameter", param=known)
    try:
        request = kind.model_validate({key: value for key, value in body.items() if key in kind.model_fields})
    except ValidationError as error:
        first = error.errors(include_input=False, include_context=False, include_url=False)[0]
        where = str(first["loc"][0]) if first["loc"] else "body"
        raise RequestError(f"{where}: {first['msg']}", param=where) from None
    if body.get("tool_choice") == "none":
        request = request.model_copy(update={"tools": None})
    return request
