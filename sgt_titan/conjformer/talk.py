"""``sgt-titan conjformer serve`` and ``sgt-titan conjformer generate``: a rotated trunk served, and its client."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sgt_titan.arguments import Parser
from sgt_titan.errors import UserError

_TYPES = ("float32", "bfloat16")


def serve(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; returns 0.

    Raises:
        UserError: no such directory, not a rotated checkpoint, or the port is taken.
    """
    parser = Parser(
        prog="sgt-titan conjformer serve",
        description="Serve a rotated checkpoint over HTTP, in plain transformers: for trying out, not for load.",
    )
    parser.add_argument("server", metavar="SERVER", type=Path, help="OUT of `sgt-titan conjformer convert`")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine only; there is no authentication")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--dtype", choices=_TYPES, default="float32", help="to compute in (default float32)")
    arguments = parser.parse_args(argv)
    if not (arguments.server / "config.json").is_file():
        raise UserError(f"{arguments.server}: no config.json; give OUT of `sgt-titan conjformer convert`")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from sgt_titan.conjformer.serve import make_server

    try:
        model = AutoModelForCausalLM.from_pretrained(
            arguments.server, dtype=getattr(torch, arguments.dtype), local_files_only=True, use_safetensors=True
        ).eval()
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{arguments.server}: cannot be loaded ({type(error).__name__}); convert again") from None
    if model.config.vocab_size != model.config.hidden_size:
        raise UserError(f"{arguments.server}: is not a rotated checkpoint; give OUT of `sgt-titan conjformer convert`")
    try:
        server = make_server(model, arguments.host, arguments.port)
    except (OSError, OverflowError) as error:
        where = f"--host {arguments.host} --port {arguments.port}"
        raise UserError(f"{where}: cannot listen there ({getattr(error, 'strerror', error)})") from None
    host, port = server.socket.getsockname()[:2]
    print(f"http://{host}:{port}", flush=True)
    with server:
        server.serve_forever()
    return 0


def generate(argv: Sequence[str] | None = None) -> int:
    """Answer one prompt from standard input; returns 0.

    Raises:
        UserError: files that are no client's, an unreadable secret, a server that does not answer.
    """
    parser = Parser(
        prog="sgt-titan conjformer generate",
        description="Read a prompt from standard input and write the answer of a served rotated trunk.",
    )
    parser.add_argument("client", metavar="CLIENT", type=Path, help="what `conjformer convert` wrote for the client")
    parser.add_argument("--secret", metavar="FILE", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8100")
    parser.add_argument("--wire", choices=_TYPES, default="float32", help="type of the vectors sent (default float32)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--traffic", action="store_true", help="say afterwards how many bytes went each way")
    arguments = parser.parse_args(argv)
    if arguments.max_tokens < 1 or not arguments.temperature >= 0 or not 0 < arguments.top_p <= 1:
        raise UserError("--max-tokens must be at least 1, --temperature at least 0, --top-p in (0, 1]")
    from sgt_titan.conjformer import generate as loop
    from sgt_titan.conjformer.client import Client
    from sgt_titan.conjformer.secret import load
    from sgt_titan.transform.tokenizer import load_tokenizer

    client = Client.load(arguments.client, load(arguments.secret))
    tokenizer = load_tokenizer(arguments.client, "--client")
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError:
        raise UserError("standard input: is not valid UTF-8") from None
    prompt = tokenizer(text.rstrip("\n"))["input_ids"]
    if not prompt and client.about.get("bos_token_id") is not None:
        prompt = [client.about["bos_token_id"]]
    server = loop.RotatedRemote(arguments.url, wire=arguments.wire, secret=client.about.get("secret"))
    answer = loop.generate(
        client,
        server,
        prompt,
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        ends=loop.end_tokens(client),
    )
    print(tokenizer.decode(list(answer), skip_special_tokens=True))
    server.close()
    if arguments.traffic:
        t = server.traffic
        print(f"{t.tokens} positions in {t.requests} requests: {t.up} bytes up, {t.down} down", file=sys.stderr)
    return 0
