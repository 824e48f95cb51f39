"""The end-to-end loop: the client embeds, rotates and sends; the server answers with one rotated vector; the client
unrotates it, applies its head, samples, and sends the next token's rotated embedding.

A server is a function of (embeddings, session): ``Local`` runs the checkpoint in this process, ``RotatedRemote`` over
HTTP (``serve.py``). Legend: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import DynamicCache, PreTrainedModel

from sgt_titan import outgoing
from sgt_titan.arguments import http_url
from sgt_titan.conjformer.client import Client
from sgt_titan.errors import UserError

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_ANSWER = 1 << 22  # bytes: one vector


@dataclass
class Traffic:
    """Bytes of bodies, without HTTP's own lines. tokens: positions sent."""

    up: int = 0
    down: int = 0
    tokens: int = 0
    requests: int = 0


class Server(Protocol):
    """``step``: the rotated output (D,) behind the last of the embeddings (T, D), which follow those sent before."""

    def step(self, x_TD: torch.Tensor) -> torch.Tensor: ...

    def close(self) -> None: ...


class Local:
    """An unmodified transformers model of the rotated checkpoint, with its own key-value cache."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.cache = model, DynamicCache(config=model.config)

    @torch.no_grad()
    def step(self, x_TD: torch.Tensor) -> torch.Tensor:
        x_1TD = x_TD[None].to(self.model.device, self.model.dtype)
        out = self.model(inputs_embeds=x_1TD, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1]

    def close(self) -> None:
        self.cache = DynamicCache(config=self.model.config)


class RotatedRemote:
    """A served rotated trunk. wire: type in which vectors are sent; half the bytes in bfloat16. secret: the name of the
    client's (a hash), for the server to refuse where it has another."""

    def __init__(self, url: str, *, wire: str = "float32", timeout: float = 60.0, secret: str | None = None):
        parts = http_url(url)
        if parts is None:
            raise UserError(f"--url {url}: not an address like http://host:port")
        self.url, self.timeout, self.connection = url.rstrip("/"), timeout, outgoing.client(timeout=timeout)
        self.named = {} if secret is None else {"Secret": secret}
        self.session, self.wire, self.traffic = secrets.token_hex(16), TYPES[wire], Traffic()

    def step(self, x_TD: torch.Tensor) -> torch.Tensor:
        body = save({"x": x_TD.to(self.wire).contiguous()})
        answer = self._request("POST", body)
        try:
            h_D = load(answer)["h"]
        except (SafetensorError, KeyError):
            raise UserError(f"--url {self.url}: answered without a vector; is it a rotated trunk's server?") from None
        self.traffic.up += len(body)
        self.traffic.down += len(answer)
        self.traffic.tokens += len(x_TD)
        self.traffic.requests += 1
        return h_D

    def close(self) -> None:
        self._request("DELETE", b"")
        self.connection.close()

    def _request(self, method: str, body: bytes) -> bytes:
        try:
            status, answer = outgoing.exchange(
                self.connection,
                method,
                f"{self.url}/sessions/{self.session}",
                content=body,
                headers={"Start": str(self.traffic.tokens), **self.named},
                most=MAX_ANSWER,
                seconds=self.timeout,
            )
        except outgoing.require_httpx().HTTPError as error:
            raise UserError(f"--url {self.url}: no answer ({type(error).__name__}); is the server up?") from None
        if status != 200:
            raise UserError(f"--url {self.url}: {answer[:200].decode(errors='replace')} (HTTP {status})")
        return answer


def generate(
    client: Client, server: Server, prompt_T: Sequence[int], *, max_tokens: int = 64, temperature: float = 0.0,
    top_p: float = 1.0, ends: Sequence[int] = (), random: torch.Generator | None = None,
) -> Iterator[int]:  # fmt: skip
    """Token ids of the answer, as they come; stops before an end token. temperature 0: greedy.

    Raises:
        UserError: an empty prompt.
    """
    if not len(prompt_T):
        raise UserError("the prompt is empty; send at least a beginning-of-text token")
    new, at = list(prompt_T), 0
    for _ in range(max_tokens):
        x_TD = client.encode(torch.tensor([new]), at)[0]
        at += len(new)
        logits_V = client.decode(server.step(x_TD))
        token = sample(logits_V, temperature, top_p, random)
        if token in ends:
            return
        yield token
        new = [token]


def sample(logits_V: torch.Tensor, temperature: float, top_p: float, random: torch.Generator | None) -> int:
    """One token: the most probable (temperature 0), or drawn from the smallest set that has ``top_p`` of the mass."""
    if temperature == 0:
        return int(logits_V.argmax())
    share_V, token_V = (logits_V.double() / temperature).softmax(-1).sort(descending=True)
    share_V[share_V.cumsum(-1) - share_V >= top_p] = 0
    return int(token_V[torch.multinomial(share_V, 1, generator=random)])


def end_tokens(client: Client) -> tuple[int, ...]:
    found: Any = client.about.get("eos_token_id")
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)
