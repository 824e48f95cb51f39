"""What a proxy is started with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sgt_titan.private import Private

if TYPE_CHECKING:
    from sgt_titan.client import StainedGlassTransform


@dataclass(frozen=True)
class Target:
    """One server. backend: vllm or sglang. model: its name there; None: its only one. wire_dtype: of the embeddings,
    None as encoded."""

    url: str
    backend: str = "vllm"
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    wire_dtype: str | None = None


@dataclass(frozen=True)
class Served:
    """One model as clients see it: a transform, and servers of its trunk, any of which may answer. name: None: as the
    first of them calls it. tool_format: how its calls are written (client/tool_calls.py); None: as its template says.
    """

    sgt: StainedGlassTransform
    targets: tuple[Target, ...]
    name: str | None = None
    tool_format: str | None = None
    reasoning: str | None = None
    results: str | None = None


@dataclass(frozen=True)
class Settings:
    """One proxy.

    upstream, backend, model, served_name, upstream_key, wire_dtype, results: of the one model of a proxy that serves no
    list of them. api_keys: any of them is accepted; empty: no authentication. keys_file: named keys with limits, read
    again when it changes. Sizes in bytes and tokens, times in seconds. active: requests answered at a time; waiting:
    how many more may wait, for wait_s at most. retries: servers that are tried after one that failed before its answer
    began. answer_tries: answers that are asked for until one fits its schema or call. hosts, origins: names that
    requests may come by, and pages they may come from, besides this machine's own; any_host: all names. private: what
    gets surrogates in every request that does not say otherwise.
    """

    upstream: str = ""
    backend: str = "vllm"
    model: str | None = None
    served_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    keys_file: str | None = None
    upstream_key: str | None = field(default=None, repr=False)
    wire_dtype: str | None = None
    max_body: int = 4 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int = 4096
    active: int = 64
    waiting: int = 256
    wait_s: float = 30.0
    encode_threads: int = 1
    connect_timeout_s: float = 5.0
    silence_timeout_s: float = 120.0
    total_timeout_s: float = 600.0
    retries: int = 2
    retry_pause_s: float = 0.2
    answer_tries: int = 3
    inspect: bool = False
    openapi: bool = False
    results: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    any_host: bool = False
    drop_params: bool = False
    clamp_max_tokens: bool = False
    tool_format: str | None = None
    reasoning: str | None = None
    private: Private | None = field(default=None, repr=False)

    def served(self, sgt: StainedGlassTransform | Sequence[Served]) -> tuple[Served, ...]:
        """The models: as given, or the one that these settings describe."""
        if isinstance(sgt, Sequence):
            return tuple(sgt)
        target = Target(self.upstream, self.backend, self.model, self.upstream_key, self.wire_dtype)
        return (Served(sgt, (target,), self.served_name, self.tool_format, self.reasoning, self.results),)
