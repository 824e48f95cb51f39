"""vLLM and SGLang over HTTP, for programs that are not asynchronous."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sgt_titan import outgoing
from sgt_titan.client.answer import Answer, Delta, Options, UpstreamError, gather
from sgt_titan.client.sse import DONE, EventDecoder
from sgt_titan.client.stops import StopScanner
from sgt_titan.client.wire import WIRES, Wire, check_event, explain, wire_dtype

if TYPE_CHECKING:
    import httpx
    import torch


MAX_COUNT = 1 << 53
MAX_ERROR = 1 << 20  # bytes that are read of an answer that is none
TOKEN_BYTES = 4096  # of an event for one token, generously
ALTERNATIVE_BYTES = 512  # of each log probability in it


def most_bytes(options: Options) -> int:
    """More than any honest answer takes on the wire."""
    per_token = TOKEN_BYTES + ALTERNATIVE_BYTES * ((options.logprobs or 0) + 1)
    return (1 << 20) + options.n * options.max_tokens * per_token


class Remote:
    """A server that answers embeddings. Use :class:`VLLM` or :class:`SGLang`.

    url: of the server, without a path. model: its name there; None: vLLM's only one. api_key: sent as a bearer token.
    dtype: of the embeddings on the wire (float32, bfloat16, float16; None: as encoded); a server that computes in
    bfloat16 rounds to it anyway, and half the bytes travel. timeout: seconds without a byte; total_timeout: for a whole
    answer.
    """

    wire: Wire

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        dtype: str | None = None,
        timeout: float = 60.0,
        total_timeout: float = 600.0,
        client: httpx.Client | None = None,
    ):
        self._url = url.rstrip("/").removesuffix("/v1") + self.wire.path
        self._model, self._dtype = model, wire_dtype(dtype)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._total_timeout = total_timeout
        self._client = client or outgoing.client(timeout=timeout)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._url!r})"

    def generate(self, embeds_TD: torch.Tensor, options: Options | None = None, **changes: Any) -> Answer:
        """The whole answer to ``(T, D)`` embeddings; ``changes`` are fields of ``Options``.

        Raises UpstreamError (a UserError) when the server refuses, fails or cannot be reached.
        """
        options = options or Options(**changes)
        return gather(self.stream(embeds_TD, options), options, embeds_TD.shape[0])

    def stream(self, embeds_TD: torch.Tensor, options: Options | None = None, **changes: Any) -> Iterator[Delta]:
        """The answer piece by piece; leaving the loop closes the connection, and the server stops. Raises as above."""
        options = options or Options(**changes)
        body = self.wire.body(embeds_TD.to(self._dtype or embeds_TD.dtype), options, self._model)
        scanners = [StopScanner(options.stop) for _ in range(options.n)]
        read = self.wire.reader(options)
        with connection_errors(), self._client.stream("POST", self._url, json=body, headers=self._headers) as response:
            del body
            if response.status_code != 200:
                said = outgoing.whole(response, MAX_ERROR, self._total_timeout)
                raise explain(self.wire, response.status_code, parsed(said))
            decoder, bounds = EventDecoder(), outgoing.Bounds(response, most_bytes(options), self._total_timeout)
            for chunk in response.iter_bytes():
                for data in decoder.feed(bounds.take(chunk)):
                    bounds.check()
                    if data == DONE:
                        check_complete(scanners)
                        return
                    yield from deltas(data, read, scanners, self.wire)
                    if all(scanner.stopped for scanner in scanners) and options.stop:
                        return
        check_complete(scanners)


class VLLM(Remote):
    """vLLM, started with ``--enable-prompt-embeds``."""

    wire = WIRES["vllm"]


class SGLang(Remote):
    """SGLang, started with ``--disable-radix-cache``."""

    wire = WIRES["sglang"]


def deltas(data: str, read: Any, scanners: list[StopScanner], wire: Wire) -> Iterator[Delta]:
    """The deltas of one event's data, stops applied. Raises UpstreamError for an event that cannot be read."""
    try:
        event = json.loads(data)
        check_event(event, wire)
        found = [_checked(delta) for delta in read(event)]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError):
        raise UpstreamError("the upstream sent an event that cannot be read", code="upstream_malformed") from None
    for delta in found:
        if not 0 <= delta.index < len(scanners):
            raise UpstreamError("the upstream sent a choice that was not asked for", code="upstream_malformed")
        shown = scanners[delta.index].feed(delta)
        if shown is not None:
            yield shown


def _checked(delta: Delta) -> Delta:
    """A delta that can be added up and written out again. Raises TypeError or ValueError."""
    if not isinstance(delta.finish_reason, str | None):
        raise TypeError
    if delta.tokens is not None and (type(delta.tokens) is not int or not 0 <= delta.tokens <= MAX_COUNT):
        raise ValueError  # Python writes no integer of thousands of digits, and no counter adds one
    texts = [delta.text]
    for entry in delta.logprobs:
        texts += [entry.token, *(token for token, _ in entry.top)]
    "".join(texts).encode()  # half a character, which JSON can escape, is none
    return delta


def check_complete(scanners: list[StopScanner]) -> None:
    """Raise UpstreamError if an answer ended without saying so: half an answer must not pass for a whole one."""
    if not all(scanner.stopped for scanner in scanners):
        raise UpstreamError("the upstream closed the connection in the middle of an answer", code="upstream_cut_off")


def parsed(content: bytes) -> Any:
    """JSON, or None for what is none, or holds a number of thousands of digits."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


@contextmanager
def connection_errors() -> Iterator[None]:
    """httpx's exceptions as UpstreamError. Their own words hold addresses and nothing of a request."""
    httpx = outgoing.require_httpx()
    try:
        yield
    except httpx.ConnectTimeout:
        raise UpstreamError(
            "the upstream does not answer (connecting timed out)", status=504, code="upstream_down"
        ) from None
    except httpx.TimeoutException:
        raise UpstreamError("the upstream is too slow (timed out)", status=504, code="upstream_timeout") from None
    except httpx.ConnectError as error:
        why = "its certificate is not accepted; SSL_CERT_FILE names the authorities to trust"
        raise UpstreamError(
            f"the upstream cannot be reached; {why if 'CERTIFICATE_VERIFY' in str(error) else 'is it running?'}",
            status=502,
            code="upstream_down",
        ) from None
    except httpx.DecodingError as error:  # of outgoing.Bounds
        raise UpstreamError(f"the upstream's answer is {error}", code="upstream_malformed") from None
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise UpstreamError(
            f"the connection to the upstream broke ({type(error).__name__})", code="upstream_cut_off"
        ) from None
