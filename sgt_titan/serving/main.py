"""``sgt-titan serve EXPORT --upstream URL``: the proxy as a process."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path

from sgt_titan.arguments import Parser, http_url
from sgt_titan.errors import UserError

MIN_KEY = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; answers under way are finished first.

    Raises:
        UserError: anything wrong with the arguments, the export or the port, before anything is served.
    """
    arguments = _parser().parse_args(argv)
    _check(arguments)
    keys = _keys(arguments)
    listener = _listen(arguments.host, arguments.port)
    try:
        return _serve(arguments, keys, listener)
    finally:
        listener.close()


def _parser() -> Parser:
    parser = Parser(
        prog="sgt-titan serve",
        description="A local OpenAI-compatible proxy: prompts leave this machine only as obfuscated embeddings.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("export", metavar="EXPORT", help="an exported directory")
    add(
        "--upstream",
        metavar="URL",
        required=True,
        help="vLLM (--enable-prompt-embeds) or SGLang (--disable-radix-cache)",
    )
    add("--backend", choices=("vllm", "sglang"), default="vllm", help="what the upstream is (default vllm)")
    add("--model", metavar="NAME", help="the model's name at the upstream (default: its only one)")
    add("--served-name", metavar="NAME", help="the model's name here (default: as at the upstream)")
    add("--trunk", metavar="DIR", help="the trunk's checkpoint, for an export without an embedding table")
    add("--weights", default="stored", choices=("stored", "float32", "bfloat16", "int8"), help="of the transform")
    add("--noise-key", metavar="FILE", help="key of the held noise, made if there is none; or SGT_TITAN_NOISE_KEY")
    add("--fresh-noise", action="store_true", help="new noise with every request: repeats and retries can be averaged")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add("--port", type=int, default=8080, help="0: any free one (default 8080)")
    add("--api-key-file", metavar="FILE", type=Path, help="keys of clients, one a line; or SGT_TITAN_API_KEY")
    add("--no-auth", action="store_true", help="let anybody who reaches --host use the upstream through this proxy")
    add("--upstream-api-key-file", metavar="FILE", type=Path, help="our key; or SGT_TITAN_UPSTREAM_API_KEY")
    add("--wire-dtype", choices=("float32", "bfloat16", "float16"), help="of the embeddings sent (default: as encoded)")
    add("--max-body-mib", type=float, default=4.0, help="of a client's request (default 4)")
    add("--max-prompt-tokens", type=int, help="of a prompt (default: what fits the trunk)")
    add("--max-tokens", type=int, default=4096, help="of an answer (default 4096)")
    add("--active", type=int, default=64, help="requests answered at a time (default 64)")
    add("--waiting", type=int, default=256, help="requests that may wait; the rest gets a 503 (default 256)")
    add("--encode-threads", type=int, default=1, help="prompts encoded at a time (default 1)")
    add(
        "--silence-timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="without a byte from the upstream, or taken by a client (default 120)",
    )
    add("--total-timeout", type=float, default=600.0, metavar="S", help="for a whole answer (default 600)")
    add("--shutdown-timeout", type=int, default=30, metavar="S", help="to finish answers when stopped (default 30)")
    add("--tls-cert", metavar="FILE", help="serve https with this certificate")
    add("--tls-key", metavar="FILE", help="and this key")
    add("--private", metavar="A,B", help="surrogates for what patterns, names or a detector find; values come back")
    add("--private-own", metavar="FILE", help="and for words and patterns of your own (YAML, docs/PRIVATE_VALUES.md)")
    add("--private-key-file", metavar="FILE", help="of the surrogates, mode 600 (default: a new one with every start)")
    add("--inspect", action="store_true", help="offer /v1/inspect: what a nearest neighbour reads from a prompt")
    add("--results", metavar="FILE", help="results.json of sgt-titan evaluate, for /v1/inspect")
    return parser


def _check(arguments) -> None:
    if "@" in arguments.upstream:  # first: the next message repeats the URL
        raise UserError("--upstream: credentials in a URL end up in logs; use --upstream-api-key-file")
    parts = http_url(arguments.upstream)
    if parts is None or parts.query or parts.fragment:
        raise UserError(f"--upstream: {arguments.upstream!r} is no URL; give http(s)://host[:port]")
    for name in ("max_body_mib", "max_tokens", "active", "encode_threads", "silence_timeout", "total_timeout"):
        if not getattr(arguments, name) > 0:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(arguments, name)}, must be more than 0")
    if arguments.waiting < 0 or (arguments.max_prompt_tokens is not None and arguments.max_prompt_tokens < 1):
        raise UserError("--waiting must be at least 0, --max-prompt-tokens at least 1")
    if not 0 <= arguments.port < 65536:
        raise UserError(f"--port: {arguments.port}, must be between 0 and 65535")
    if arguments.shutdown_timeout < 0:
        raise UserError(f"--shutdown-timeout: {arguments.shutdown_timeout}, must be at least 0")
    if bool(arguments.tls_cert) != bool(arguments.tls_key):
        raise UserError("--tls-cert and --tls-key: give both or neither")
    for file in filter(None, (arguments.tls_cert, arguments.tls_key)):
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file")
    if arguments.tls_cert:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(arguments.tls_cert, arguments.tls_key)
        except OSError as error:  # ssl's are such
            raise UserError(f"--tls-cert, --tls-key: {arguments.tls_cert} cannot be used ({error})") from None
    if parts.scheme == "http" and not is_loopback(parts.hostname):
        _say("warning: --upstream is http: embeddings and, in clear text, answers can be read on the way; use https")


def _keys(arguments) -> tuple[str, ...]:
    keys = _read_keys(arguments.api_key_file, "SGT_TITAN_API_KEY")
    if any(len(key) < MIN_KEY for key in keys):
        raise UserError(f"API keys: at least {MIN_KEY} characters each; make one with `openssl rand -hex 24`")
    if keys and arguments.no_auth:
        raise UserError("--no-auth: an API key is set as well; choose one")
    if not keys and not arguments.no_auth and not is_loopback(arguments.host):
        raise UserError(
            f"--host {arguments.host} can be reached from other machines: give --api-key-file or SGT_TITAN_API_KEY, or "
            "say --no-auth"
        )
    if keys and not is_loopback(arguments.host) and not arguments.tls_cert:
        _say("warning: without --tls-cert, keys, prompts and answers cross the network in clear text")
    return keys


def _read_keys(file: Path | None, variable: str) -> tuple[str, ...]:
    text = os.environ.get(variable, "")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read ({type(error).__name__})") from None
    keys = tuple(line.strip() for line in text.splitlines() if line.strip())
    if file is not None and not keys:
        raise UserError(f"{file}: holds no key; one a line")
    if not all(key.isascii() for key in keys):
        raise UserError(f"{file or variable}: a key is not ASCII; one a line, nothing else")
    return keys


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    """Bound before the export is loaded: a port in use is found in no time."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror})") from None
    return listener


def _serve(arguments, keys: tuple[str, ...], listener: socket.socket) -> int:
    try:
        import uvicorn

        from sgt_titan.serving.app import create_app
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'sgt-titan[client]'") from None
    from sgt_titan.client import StainedGlassTransform
    from sgt_titan.client.inspect import best_attacker
    from sgt_titan.client.quiet import quiet
    from sgt_titan.private import Private
    from sgt_titan.serving.settings import Settings

    best_attacker(arguments.results)
    upstream_keys = _read_keys(arguments.upstream_api_key_file, "SGT_TITAN_UPSTREAM_API_KEY")
    if len(upstream_keys) > 1:
        raise UserError(f"--upstream-api-key-file: holds {len(upstream_keys)} keys, expected one")
    private = None
    if arguments.private is not None or arguments.private_own:
        private = Private.of(arguments.private or "", own=arguments.private_own, key_file=arguments.private_key_file)
    elif arguments.private_key_file:
        raise UserError("--private-key-file without --private: nothing would get a surrogate")
    settings = Settings(
        upstream=arguments.upstream,
        backend=arguments.backend,
        model=arguments.model,
        served_name=arguments.served_name,
        api_keys=keys,
        upstream_key=upstream_keys[0] if upstream_keys else None,
        wire_dtype=arguments.wire_dtype,
        max_body=int(arguments.max_body_mib * (1 << 20)),
        max_prompt_tokens=arguments.max_prompt_tokens,
        max_tokens=arguments.max_tokens,
        active=arguments.active,
        waiting=arguments.waiting,
        encode_threads=arguments.encode_threads,
        silence_timeout_s=arguments.silence_timeout,
        total_timeout_s=arguments.total_timeout,
        inspect=arguments.inspect,
        results=arguments.results,
        private=private,
    )
    with quiet(_say):
        sgt = StainedGlassTransform.from_pretrained(
            arguments.export,
            trunk=arguments.trunk,
            weights=arguments.weights,
            hold_noise=not arguments.fresh_noise,
            noise_key=arguments.noise_key,
        )
    if arguments.fresh_noise:
        _say("warning: --fresh-noise: whatever is sent twice, a client's retry too, can be averaged by the upstream")
    _log_to_stderr()
    config = uvicorn.Config(
        create_app(settings, sgt),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=arguments.shutdown_timeout,
        ssl_certfile=arguments.tls_cert,
        ssl_keyfile=arguments.tls_key,
    )
    listener.listen()  # before the address is printed: who reads it may come at once, and waits until we are up
    scheme, port = "https" if arguments.tls_cert else "http", listener.getsockname()[1]
    host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
    _say(f"{scheme}://{host}:{port}/v1 -> {arguments.upstream} ({arguments.backend}); Ctrl-C stops")
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
