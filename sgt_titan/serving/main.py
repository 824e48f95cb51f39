"""``sgt-titan serve EXPORT --upstream URL``: the proxy as a process."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from sgt_titan.arguments import http_url
from sgt_titan.errors import UserError
from sgt_titan.serving.credentials import upstream_keys
from sgt_titan.serving.keys import plain_keys, read_keys
from sgt_titan.serving.options import ModelOptions, ProxyOptions, UpstreamOptions, read_options
from sgt_titan.terminal import quiet

if TYPE_CHECKING:
    from sgt_titan.serving.settings import Served, Settings, Target

KEY_VARIABLE = "SGT_TITAN_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; answers under way are finished first.

    Raises:
        UserError: anything wrong with the arguments, the export or the port, before anything is served.
    """
    options = read_options(argv)
    keys = _keys(options)
    upstreams = [upstream for model in options.models for upstream in model.upstreams]
    theirs = upstream_keys(upstreams)
    for upstream in upstreams:
        parts = http_url(upstream.url)
        if parts is not None and parts.scheme == "http" and not is_loopback(parts.hostname):
            _say("warning: --upstream is http: embeddings and answers, in clear, can be read on the way; use https")
    listener = _listen(options.host, options.port, options.silence_timeout)
    try:
        return _serve(options, keys, theirs, listener)
    finally:
        listener.close()


def _keys(options: ProxyOptions) -> tuple[str, ...]:
    """Keys of the environment; those of a file are read, and read again, by the proxy."""
    file = options.api_key_file
    keys = () if file is not None else _lines(os.environ.get(KEY_VARIABLE, ""))
    plain_keys(keys, f"API keys in {KEY_VARIABLE}")
    if file is not None:
        read_keys(file)
    given, local = bool(keys) or file is not None, is_loopback(options.host)
    if given and options.no_auth:
        raise UserError("--no-auth: an API key is set as well; choose one")
    if not given and not options.no_auth and not local:
        raise UserError(
            f"--host {options.host} can be reached from other machines: give --api-key-file or SGT_TITAN_API_KEY, or "
            "say --no-auth"
        )
    if given and not local and not options.tls_cert:
        _say("warning: without --tls-cert, keys, prompts and answers cross the network in clear text")
    return keys


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def is_loopback(host: str | None) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int, patience_s: float) -> socket.socket:
    """Bound before the export is loaded: a port in use is found in no time. ``patience_s``: for a peer that takes
    nothing of what it is sent."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol has to be named: asyncio switches Nagle's delays off only for sockets that name it, and with them
    # every small answer and every piece of a stream would come 40 ms late.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit it: the kernel finds out about a peer that has gone without a word.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # and, on Linux, gives up one that is there and never reads
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, min(int(1e3 * patience_s), 2**31 - 1))
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from None
    return listener


def _settings(options: ProxyOptions, keys: tuple[str, ...]) -> Settings:
    from sgt_titan.private import Private
    from sgt_titan.serving.settings import Settings

    private = None
    if options.private is not None or options.private_own:
        private = Private.of(options.private or "", own=options.private_own, key_file=options.private_key_file)
    # On a public address behind a key, names nobody listed are let in: they cannot be known here, and a page that
    # rebinds one has no key.
    any_host = not is_loopback(options.host) and not options.no_auth and not options.allowed_host
    return Settings(
        api_keys=keys,
        keys_file=options.api_key_file,
        max_body=int(options.max_body_mib * (1 << 20)),
        max_prompt_tokens=options.max_prompt_tokens,
        max_tokens=options.max_tokens,
        active=options.active,
        waiting=options.waiting,
        wait_s=options.wait_timeout,
        retries=options.retries,
        answer_tries=options.answer_tries,
        encode_threads=options.encode_threads,
        silence_timeout_s=options.silence_timeout,
        total_timeout_s=options.total_timeout,
        inspect=options.inspect,
        openapi=options.openapi,
        hosts=(options.host, *options.allowed_host),
        origins=tuple(options.allowed_origin),
        any_host=any_host,
        drop_params=options.drop_params,
        clamp_max_tokens=options.clamp_max_tokens,
        private=private,
    )


def _served(model: ModelOptions, options: ProxyOptions, targets: tuple[Target, ...]) -> Served:
    """The model, loaded."""
    from sgt_titan.client import StainedGlassTransform
    from sgt_titan.serving.settings import Served

    with quiet(_say):
        sgt = StainedGlassTransform.from_pretrained(
            model.export,
            trunk=model.trunk,
            weights=model.weights,
            hold_noise=not options.fresh_noise,
            noise_key=options.noise_key,
        )
    return Served(sgt, targets, model.name, model.tool_format, model.reasoning, model.results)


def _targets(model: ModelOptions, keys: Mapping[UpstreamOptions, str | None]) -> tuple[Target, ...]:
    from sgt_titan.serving.settings import Target

    return tuple(Target(u.url, u.backend, u.model, keys[u], u.wire_dtype) for u in model.upstreams)


def _serve(
    options: ProxyOptions,
    keys: tuple[str, ...],
    theirs: Mapping[UpstreamOptions, str | None],
    listener: socket.socket,
) -> int:
    """``keys``: of clients; ``theirs``: ours at the upstreams."""
    try:
        import uvicorn

        from sgt_titan.client.inspect import best_attacker
        from sgt_titan.serving.app import create_app
        from sgt_titan.serving.protocol import PatientProtocol
        from sgt_titan.serving.telemetry import to_collector
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'sgt-titan[client]'") from None

    for model in options.models:
        best_attacker(model.results)  # a file that is none is found before anything is loaded
    telemetry = to_collector() if options.telemetry else None
    settings = _settings(options, keys)  # and so is whatever is wrong with the private values
    served = [_served(model, options, _targets(model, theirs)) for model in options.models]
    app = create_app(settings, served, telemetry=telemetry)
    if options.fresh_noise:
        _say("warning: --fresh-noise: whatever is sent twice, a client's retry too, can be averaged by the upstream")
    _log_to_stderr()
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=options.shutdown_timeout,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    listener.listen()  # before the address is printed: who reads it may come at once, and waits until we are up
    scheme, port = "https" if options.tls_cert else "http", listener.getsockname()[1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    to = ", ".join(f"{u.url} ({u.backend})" for model in options.models for u in model.upstreams)
    _say(f"{scheme}://{host}:{port}/v1 -> {to}; Ctrl-C stops")
    # uvicorn finishes what is under way and then raises the signal again; by then there is nothing left to end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(config).run(sockets=[listener])
    return 0


def _log_to_stderr() -> None:
    """Our own lines and uvicorn's errors, at levels that no option raises: httpx's debug lines would be long."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, level in (("sgt_titan.serving", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False


def _say(text: str) -> None:
    print(f"sgt-titan: {text}", file=sys.stderr, flush=True)
