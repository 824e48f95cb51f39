"""What is asked of a backend and what comes back: the one small interface of vLLM, SGLang and transformers.

A backend has ``stream(embeds_TD, options)``, which yields a ``Delta`` for every piece of text of every choice. What is
sent of the options is numbers, so that nothing a user wrote can reach the server besides the embeddings; stop strings
are looked for on this side (stops.py).

Shapes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Protocol

from sgt_titan.client.tool_calls import ToolCall
from sgt_titan.errors import UserError

if TYPE_CHECKING:
    import torch


class UpstreamError(UserError):
    """The server refused, failed or cannot be reached. ``status``: HTTP status to hand on; ``code``: a short name."""

    def __init__(self, message: str, *, status: int = 502, code: str = "upstream_error"):
        super().__init__(message)
        self.status, self.code = status, code


def brief(value: float) -> str:
    """A number as an error message may repeat it: one of a thousand digits is not."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return "an integer of more than 18 digits"
    return f"{value}"


@dataclass(frozen=True)
class Options:
    """How to generate. None: the server's own default.

    max_tokens: of one choice. n: choices. logprobs: how many alternatives to report per token (0: none but the token).
    seed: of the server's sampling; it has nothing to do with the noise. stop: looked for on this side, never sent.
    stop_token_ids: are sent, so give only ids of special tokens. json_object: the answer has to be some JSON object.
    Raises UserError for a value outside its range.
    """

    max_tokens: int = 256
    n: int = 1
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stop_token_ids: tuple[int, ...] | None = None
    json_object: bool = False
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UserError(f"{name}: {brief(value)}, must be between {low} and {high}")
        if isinstance(self.stop, str):  # else each of its characters would be a stop
            raise UserError("stop: one string; give a tuple of strings")
        if self.min_tokens is not None and self.min_tokens > self.max_tokens:
            raise UserError(f"min_tokens: {brief(self.min_tokens)}, must be at most max_tokens")
        if not all(self.stop):
            raise UserError("stop: an empty string; leave it out")

    def numbers(self) -> dict[str, int | float]:
        """Every option that is sent and set, under its own name."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NO_NUMBERS}
        return {name: value for name, value in named.items() if value is not None}


_NO_NUMBERS = ("stop", "max_tokens", "n", "json_object")
_RANGES = {
    "max_tokens": (1, 1_000_000),
    "n": (1, 128),
    "temperature": (0.0, 10.0),
    "top_p": (0.0, 1.0),
    "top_k": (-1, 1_000_000),
    "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (0.01, 10.0),
    "seed": (-(2**63), 2**63 - 1),
    "logprobs": (0, 20),
    "min_tokens": (0, 1_000_000),
}


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token's text, its log probability in nats, and the alternatives' (text, log probability)."""

    token: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """The next piece of choice ``index``. tokens: how many of this choice are generated so far, if known.

    reasoning, calls (number and ToolCall): of a chat, once ``reading.ChoiceReader`` has taken them out of the text.
    """

    index: int = 0
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    tokens: int | None = None
    reasoning: str = ""
    calls: tuple[tuple[int, ToolCall], ...] = ()


@dataclass
class Choice:
    """One answer: ``finish_reason`` is stop or length; tool_calls where there are ``calls``."""

    text: str = ""
    reasoning: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    tokens: int = 0

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.calls += [call for _, call in delta.calls]
        self.logprobs += delta.logprobs
        self.finish_reason = delta.finish_reason or self.finish_reason
        self.tokens = max(self.tokens, delta.tokens or 0)

    def whole(self, index: int) -> Delta:
        """All of it as one piece, of choice ``index``."""
        said = (self.text, tuple(self.logprobs), self.finish_reason, self.tokens, self.reasoning)
        return Delta(index, *said, tuple(enumerate(self.calls)))


@dataclass
class Answer:
    """All choices of a request."""

    choices: list[Choice]
    prompt_tokens: int = 0

    @property
    def text(self) -> str:
        """Of the first choice."""
        return self.choices[0].text

    @property
    def completion_tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    def add(self, delta: Delta) -> None:
        self.choices[delta.index].add(delta)


class Backend(Protocol):
    """Where embeddings are answered."""

    def stream(self, embeds_TD: torch.Tensor, options: Options) -> Iterator[Delta]: ...


def gather(deltas: Iterable[Delta], options: Options, prompt_tokens: int) -> Answer:
    """The whole answer of a stream."""
    answer = Answer([Choice() for _ in range(options.n)], prompt_tokens)
    for delta in deltas:
        answer.add(delta)
    return answer


def check_embeddings(embeds_TD: torch.Tensor) -> None:
    """Raise UserError unless these are finite embeddings of one prompt, ``(T, D)`` floating point with T > 0."""
    if embeds_TD.ndim != 2 or not embeds_TD.is_floating_point() or embeds_TD.shape[0] == 0:
        raise UserError(
            f"embeddings: shape {tuple(embeds_TD.shape)}, {embeds_TD.dtype}; expected (tokens, width), floating point"
        )
    if not bool(embeds_TD.isfinite().all()):
        raise UserError("embeddings: NaN or infinite values; the export is damaged or its weights overflow this type")
