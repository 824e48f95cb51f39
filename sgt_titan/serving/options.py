"""What ``sgt-titan serve`` can be told, by flags or a TOML file; flags override the file.

In the file an option has its flag's name with underscores. Several models, each with its export and one or more servers
of its trunk, are tables:

    keys_file = "keys.toml"
    noise_key = "noise.key"

    [[models]]
    name = "llama"
    export = "exports/llama"

    [[models.upstreams]]
    url = "https://gpu-1:8000"
    api_key_file = "upstream.key"
    wire_dtype = "bfloat16"
"""

from __future__ import annotations

import argparse
import ssl
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from sgt_titan.arguments import Parser, http_url, number
from sgt_titan.client.tool_calls import FORMATS
from sgt_titan.errors import UserError

BACKENDS = ("vllm", "sglang")
Weights = Literal["stored", "float32", "bfloat16", "int8"]
WEIGHTS = get_args(Weights)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class UpstreamOptions:
    """A server of a model. Its key: of a file, or of the environment's variable ``api_key_env`` (credentials.py)."""

    url: str
    backend: str = "vllm"
    model: str | None = None
    api_key_file: str | None = None
    api_key_env: str | None = None
    wire_dtype: str | None = None


@dataclass(frozen=True)
class ModelOptions:
    """A model to serve."""

    export: str
    upstreams: tuple[UpstreamOptions, ...]
    name: str | None = None
    trunk: str | None = None
    weights: Weights = "stored"
    tool_format: str | None = None
    reasoning: str | None = None
    results: str | None = None


# Flag without dashes -> default. None: none.
DEFAULTS: dict[str, Any] = {
    "export": None,
    "upstream": [],
    "backend": "vllm",
    "model": None,
    "served_name": None,
    "trunk": None,
    "weights": "stored",
    "tool_format": None,
    "reasoning": None,
    "noise_key": None,
    "fresh_noise": False,
    "host": "127.0.0.1",
    "port": 8080,
    "allowed_host": [],
    "allowed_origin": [],
    "api_key_file": None,
    "no_auth": False,
    "upstream_api_key_file": None,
    "wire_dtype": None,
    "max_body_mib": 4.0,
    "max_prompt_tokens": None,
    "max_tokens": 4096,
    "clamp_max_tokens": False,
    "drop_params": False,
    "active": 64,
    "waiting": 256,
    "wait_timeout": 30.0,
    "retries": 2,
    "answer_tries": 3,
    "encode_threads": 1,
    "silence_timeout": 120.0,
    "total_timeout": 600.0,
    "shutdown_timeout": 30,
    "tls_cert": None,
    "tls_key": None,
    "private": None,
    "private_own": None,
    "private_key_file": None,
    "inspect": False,
    "openapi": False,
    "telemetry": False,
    "results": None,
}
# What [[models]] say themselves.
_OF_ONE_MODEL = (
    *("export", "upstream", "backend", "model", "served_name", "trunk", "weights", "tool_format", "reasoning"),
    *("upstream_api_key_file", "wire_dtype", "results"),
)
_CHOICES = {"backend": BACKENDS, "weights": WEIGHTS, "wire_dtype": DTYPES, "reasoning": ("think", "none")}
_CHOICES |= {"tool_format": (*FORMATS, "none")}
_COUNT = number(int, 1)


def parser() -> Parser:
    """Of the command line; options that are not given leave no trace."""
    made = Parser(
        prog="sgt-titan serve",
        description="A local OpenAI-compatible proxy: prompts leave this machine only as obfuscated embeddings.",
        argument_default=argparse.SUPPRESS,
    )
    add = made.add_argument
    add("export", metavar="EXPORT", nargs="?", help="an exported directory (or [[models]] in --config)")
    add("--config", metavar="FILE", help="options in TOML; flags override them")
    add(
        "--upstream",
        metavar="URL",
        action="append",
        help="vLLM (--enable-prompt-embeds) or SGLang (--disable-radix-cache); again for more that serve the same",
    )
    add("--backend", choices=BACKENDS, help="what the upstream is (default vllm)")
    add("--model", metavar="NAME", help="the model's name at the upstream (default: its only one)")
    add("--served-name", metavar="NAME", help="the model's name here (default: as at the upstream)")
    add("--trunk", metavar="DIR", help="the trunk's checkpoint, for an export without an embedding table")
    add("--weights", choices=WEIGHTS, help="of the transform (default as stored)")
    add("--tool-format", choices=_CHOICES["tool_format"], help="how calls are written (default: as the template does)")
    add("--reasoning", choices=_CHOICES["reasoning"], help="thoughts apart from answers (default: as the template has)")
    add("--noise-key", metavar="FILE", help="key of the held noise, made if there is none; or SGT_TITAN_NOISE_KEY")
    add("--fresh-noise", action="store_true", help="new noise with every request: repeats and retries can be averaged")
    add("--host", help="address to listen on (default 127.0.0.1)")
    add("--port", type=number(int, 0, 65535), help="0: any free one (default 8080)")
    add(
        "--allowed-host",
        metavar="NAME",
        action="append",
        help="a name this proxy is reached by",
    )
    add("--allowed-origin", metavar="URL", action="append", help="a site whose pages may ask")
    add("--api-key-file", metavar="FILE", help="keys of clients: one a line, or FILE.toml with names and limits")
    add("--no-auth", action="store_true", help="let anybody who reaches --host use the upstream through this proxy")
    add("--upstream-api-key-file", metavar="FILE", help="our key; or SGT_TITAN_UPSTREAM_API_KEY")
    add("--wire-dtype", choices=DTYPES, help="of the embeddings sent (default: as encoded)")
    add("--max-body-mib", type=number(float, above=0), help="of a client's request (default 4)")
    add("--max-prompt-tokens", type=_COUNT, help="of a prompt (default: what fits the trunk)")
    add("--max-tokens", type=_COUNT, help="of an answer (default 4096)")
    add("--clamp-max-tokens", action="store_true", help="answer with what fits where a client asks for more")
    add("--drop-params", action="store_true", help="leave out what is unsupported, said in X-Dropped-Params; no 400")
    add("--active", type=_COUNT, help="requests answered at a time (default 64)")
    add("--waiting", type=number(int, 0), help="requests that may wait; the rest gets a 503 (default 256)")
    add("--wait-timeout", type=number(float, 0), metavar="S", help="for a request that waits for its turn (default 30)")
    add(
        "--retries",
        type=number(int, 0),
        help="times the same embeddings are sent again while no answer has begun (default 2)",
    )
    add("--answer-tries", type=_COUNT, help="answers that are asked for until one fits its schema or call (default 3)")
    add("--encode-threads", type=_COUNT, help="prompts encoded at a time (default 1)")
    add(
        "--silence-timeout",
        type=number(float, above=0),
        metavar="S",
        help="without a byte from the upstream, or taken by a client (default 120)",
    )
    add("--total-timeout", type=number(float, above=0), metavar="S", help="for a whole answer (default 600)")
    add("--shutdown-timeout", type=number(int, 0), metavar="S", help="to finish answers when stopped (default 30)")
    add("--tls-cert", metavar="FILE", help="serve https with this certificate")
    add("--tls-key", metavar="FILE", help="and this key")
    add("--private", metavar="A,B", help="surrogates for what patterns, names or a detector find; values come back")
    add("--private-own", metavar="FILE", help="and for words and patterns of your own (YAML, docs/PRIVATE_VALUES.md)")
    add("--private-key-file", metavar="FILE", help="of the surrogates, mode 600 (default: a new one with every start)")
    add("--inspect", action="store_true", help="offer /v1/inspect: what a nearest neighbour reads from a prompt")
    add("--openapi", action="store_true", help="offer /openapi.json")
    add("--telemetry", action="store_true", help="OpenTelemetry spans, without content (OTEL_EXPORTER_OTLP_ENDPOINT)")
    add("--results", metavar="FILE", help="results.json of sgt-titan evaluate, for /v1/inspect")
    return made


@dataclass(frozen=True)
class ProxyOptions:
    """Everything, checked. ``values``: by the names of ``DEFAULTS``."""

    values: dict[str, Any] = field(repr=False)
    models: tuple[ModelOptions, ...] = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


def read_options(argv: Sequence[str] | None) -> ProxyOptions:
    """Flags over the file over the defaults. Raises UserError naming the flag or the key."""
    given = vars(parser().parse_args(argv))
    file = given.pop("config", None)
    content = _file(Path(file)) if file is not None else {}
    tables = content.pop("models", None)
    values = {**DEFAULTS, **content, **given}
    if tables is None:
        models: tuple[ModelOptions, ...] = (_one(values),)
    else:
        if beside := [name for name in _OF_ONE_MODEL if name in given or name in content]:
            names = ", ".join("EXPORT" if name == "export" else f"--{name.replace('_', '-')}" for name in beside)
            raise UserError(f"{file}: has [[models]], which say so themselves; leave out {names}")
        models = _models(tables, file)
    _check(values, models)
    return ProxyOptions(values, models)


def _file(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({type(error).__name__})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--config {path}: is not valid TOML ({error})") from None
    read = {action.dest: action.type for action in parser()._actions}
    for name, value in content.items():
        if name == "models":
            continue
        if name not in DEFAULTS:
            raise UserError(f"--config {path}: {name}: no such option; known are {', '.join(DEFAULTS)}, models")
        _check_type(f"--config {path}: {name}", name, value, read[name])
    return content


def _check_type(where: str, name: str, value: Any, read: Any) -> None:
    """``read``: type of the flag, where it takes a number of a range; else None."""
    if read is not None:
        try:
            read(repr(value))  # in which a text or a truth is no number
        except argparse.ArgumentTypeError as error:
            raise UserError(f"{where}: {error}") from None
        return
    wanted: type = str if DEFAULTS[name] is None else type(DEFAULTS[name])
    fits = type(value) is wanted
    if wanted is list:
        fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if not fits:
        names = {str: "text", bool: "true or false", list: "a list of texts"}
        raise UserError(f"{where}: must be {names[wanted]}")
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UserError(f"{where}: must be one of {', '.join(_CHOICES[name])}")


def _one(values: dict[str, Any]) -> ModelOptions:
    if values["export"] is None:
        raise UserError("EXPORT is missing: give an exported directory, or [[models]] in --config")
    if not values["upstream"]:
        raise UserError("--upstream is missing: the URL of a server of the trunk")
    upstreams = tuple(
        UpstreamOptions(
            url,
            values["backend"],
            values["model"],
            values["upstream_api_key_file"],
            wire_dtype=values["wire_dtype"],
        )
        for url in values["upstream"]
    )
    same = {f.name: values[f.name] for f in fields(ModelOptions) if f.name in values}
    return ModelOptions(**same, upstreams=upstreams, name=values["served_name"])


def _models(tables: Any, file: str) -> tuple[ModelOptions, ...]:
    where = f"--config {file}: models"
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{where}: must be one or more tables [[models]]")
    found = []
    for i, table in enumerate(tables):
        table = dict(table)
        upstreams = table.pop("upstreams", None)
        if not isinstance(upstreams, list) or not upstreams or not all(isinstance(u, dict) for u in upstreams):
            raise UserError(f"{where}[{i}]: needs one or more tables [[models.upstreams]]")
        servers = tuple(
            _made(UpstreamOptions, u, f"{where}[{i}].upstreams[{j}]", "url") for j, u in enumerate(upstreams)
        )
        found.append(_made(ModelOptions, table, f"{where}[{i}]", "export", upstreams=servers))
    names = [model.name for model in found]
    if len(found) > 1 and (None in names or len(set(names)) < len(names)):
        raise UserError(f"{where}: several models need a name each, and no two the same")
    return tuple(found)


def _made(kind: type, table: dict[str, Any], where: str, needed: str, **more: Any) -> Any:
    known = {f.name for f in fields(kind)} - more.keys()
    unknown = sorted(table.keys() - known)
    if unknown:
        raise UserError(f"{where}: {unknown[0]}: no such key; known are {', '.join(sorted(known))}")
    if needed not in table:
        raise UserError(f"{where}: {needed} is missing")
    for name, value in table.items():
        if not isinstance(value, str):
            raise UserError(f"{where}.{name}: must be text")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UserError(f"{where}.{name}: must be one of {', '.join(_CHOICES[name])}")
    return kind(**table, **more)


def _check(values: dict[str, Any], models: Sequence[ModelOptions]) -> None:
    for model in models:
        for upstream in model.upstreams:
            _check_url(upstream.url)
    if values["fresh_noise"] and values["noise_key"] is not None:
        raise UserError("--noise-key: a key is given, but --fresh-noise holds none; choose one")
    if values["private_key_file"] and values["private"] is None and not values["private_own"]:
        raise UserError("--private-key-file without --private: nothing would get a surrogate")
    for origin in values["allowed_origin"]:
        parts = http_url(origin)
        if parts is None or parts.path not in ("", "/") or parts.query:
            raise UserError(f"--allowed-origin: {origin!r}; give http(s)://host[:port]")
    if bool(values["tls_cert"]) != bool(values["tls_key"]):
        raise UserError("--tls-cert and --tls-key: give both or neither")
    for file in filter(None, (values["tls_cert"], values["tls_key"])):
        if not Path(file).is_file():
            raise UserError(f"{file}: no such file")
    if values["tls_cert"]:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(values["tls_cert"], values["tls_key"])
        except OSError as error:  # ssl's are such
            raise UserError(f"--tls-cert, --tls-key: {values['tls_cert']} cannot be used ({error})") from None


def _check_url(url: str) -> None:
    if "@" in url:  # first: the next message repeats the URL
        raise UserError("--upstream: credentials in a URL end up in logs; use --upstream-api-key-file")
    parts = http_url(url)
    if parts is None or parts.query or parts.fragment:
        raise UserError(f"--upstream: {url!r} is no URL; give http(s)://host[:port]")
