"""What a proxy is started with."""

from __future__ import annotations

from dataclasses import dataclass, field

from sgt_titan.private import Private


@dataclass(frozen=True)
class Settings:
    """One proxy.

    upstream: URL of the server. backend: vllm or sglang. model: its name there; None: its only one. served_name: the
    name clients use. api_keys: any of them is accepted; empty: no authentication. wire_dtype: of the embeddings sent,
    None as encoded. Sizes in bytes and tokens, times in seconds. active: requests answered at a time; waiting: how many
    more may wait, for wait_s at most. results: results.json of an evaluation, for /v1/inspect.
    private: what gets surrogates in every request that does not say otherwise.
    """

    upstream: str
    backend: str = "vllm"
    model: str | None = None
    served_name: str | None = None
    api_keys: tuple[str, ...] = field(default=(), repr=False)
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
    inspect: bool = False
    results: str | None = None
    private: Private | None = field(default=None, repr=False)
