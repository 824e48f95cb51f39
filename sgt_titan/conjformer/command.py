"""``sgt-titan conjformer``, and its first command: a checkpoint into a rotated basis, or scalar norms to fine-tune."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sgt_titan import disk
from sgt_titan.arguments import Parser, number
from sgt_titan.config.origin import trunk_directory
from sgt_titan.conjformer import talk
from sgt_titan.errors import UserError
from sgt_titan.terminal import say

DTYPES = ("float32", "bfloat16", "float16")


def parser() -> argparse.ArgumentParser:
    """The options; imports nothing heavy."""
    found = Parser(
        prog="sgt-titan conjformer convert",
        description="Write a checkpoint in a secretly rotated basis: OUT is for the server, --secret and --client for "
        "the client. The server answers inputs_embeds with a rotated output and never sees a token.",
        epilog="docs/CONJFORMER.md says what this protects against and what it does not: against a server that knows "
        "the public checkpoint it does not protect.",
    )
    found.add_argument(
        "trunk",
        metavar="TRUNK",
        help="checkpoint of Llama, Qwen2, Qwen3 or GPT-2; or a config's name (demo: the one that ships)",
    )
    found.add_argument("out", metavar="OUT", type=Path, help="the server's directory, to be made")
    found.add_argument("--secret", metavar="FILE", type=Path, help="where to write the secret (mode 0600), not in OUT")
    found.add_argument("--client", metavar="DIR", type=Path, help="the client's directory (default: OUT-client)")
    found.add_argument(
        "--norms",
        choices=("fold", "mean"),
        default="fold",
        help="gains folded into the next linears, exact (default); or their mean, as published, to be fine-tuned",
    )
    found.add_argument(
        "--symmetries", default="all", metavar="NAMES",
        help="maps beside the rotation that change no output: all that the family has (default), none, or some of "
        "values, units, queries, heads",
    )  # fmt: skip
    found.add_argument("--plain", action="store_true", help="scalar norms but no rotation: the start of a fine-tuning")
    found.add_argument(
        "--shake", type=float, default=0.0, metavar="SHARE",
        help="with --plain: replace this share of every matrix's variance by noise that is not kept, the start of a "
        "fine-tuning with finetune.drift",
    )  # fmt: skip
    found.add_argument("--dtype", choices=DTYPES, help="of the written weights (default: as stored)")
    found.add_argument(
        "--compute", choices=("float64", "float32"), default="float64", help="of the products (default float64)"
    )
    found.add_argument("--device", default="cpu", help="where the products are computed (default cpu)")
    found.add_argument(
        "--shard-size", type=number(float, above=0), default=2.0, metavar="GB", help="of a written file (default 2)"
    )
    return found


def convert(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0.

    Raises:
        UserError: bad options, a trunk that cannot be converted, targets in use, a disk without room.
    """
    arguments = parser().parse_args(argv)
    out, file = arguments.out, arguments.secret
    if not out.name:
        raise UserError(f"OUT {out}: name a new directory")
    client = arguments.client or out.with_name(f"{out.name}-client")
    _checked(arguments, client)
    import torch

    from sgt_titan.conjformer import secret as secrets
    from sgt_titan.conjformer.convert import Conversion
    from sgt_titan.conjformer.write import write_client, write_server

    disk.check_target(out, "OUT")
    if not arguments.plain:
        disk.check_target(client, "--client")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {arguments.device}: torch finds no such device here") from None
    secret = None if arguments.plain else secrets.Secret.fresh()
    conversion = Conversion(
        trunk_directory(arguments.trunk),
        secret,
        norms=arguments.norms,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        compute=getattr(torch, arguments.compute),
        device=arguments.device,
        symmetries=arguments.symmetries,
        shake=arguments.shake,
    )
    if secret is not None:
        secrets.save(secret, file)  # first: a server without its secret is of no use
    try:
        if secret is not None:
            write_client(conversion, client)
        write_server(conversion, out, shard_bytes=int(arguments.shard_size * 1e9), say=say)
    except BaseException:
        if secret is not None and not (out / "config.json").exists():
            shutil.rmtree(client, ignore_errors=True)  # it was missing or empty
            file.unlink(missing_ok=True)
        raise
    if secret is None:
        print(f"scalar norms, plain basis: {out}")
    else:
        print(f"server: {out}\nclient: {client}\nsecret: {file} (give it to nobody who runs the server)")
    return 0


def _checked(arguments: argparse.Namespace, client: Path) -> None:
    out, file = arguments.out, arguments.secret
    if arguments.plain == (file is not None):
        raise UserError("give --secret FILE to rotate, or --plain for scalar norms without a rotation")
    if arguments.plain and arguments.symmetries != "all":
        raise UserError("--symmetries belongs to a rotation, not to --plain")
    if arguments.plain and arguments.client:
        raise UserError("--client belongs to a rotation, not to --plain")
    if arguments.shake and not arguments.plain:
        raise UserError("--shake belongs to --plain: a rotation is made of what was fine-tuned")
    if not 0 <= arguments.shake < 1:
        raise UserError(f"--shake must be in [0, 1), got {arguments.shake:g}")
    if file is not None:
        if out.resolve() in file.resolve().parents:
            raise UserError(f"--secret {file}: lies in {out}, which the server gets; keep the secret elsewhere")
        if client.resolve() in file.resolve().parents:
            raise UserError(
                f"--secret {file}: lies in the client's directory {client}, which must be new; keep it beside"
            )
        if client.resolve() == out.resolve() or out.resolve() in client.resolve().parents:
            raise UserError(f"--client {client}: lies in {out}, which the server gets; choose another directory")
        if file.exists():
            raise UserError(f"--secret {file}: exists; a conversion makes a new secret, choose another file")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "convert": (convert, "Write a checkpoint in a secretly rotated basis, or with scalar norms."),
    "serve": (talk.serve, "Serve a rotated checkpoint, to try it out."),
    "generate": (talk.generate, "Answer a prompt with a served rotated checkpoint."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of ``COMMANDS``; returns its exit code.

    Raises:
        UserError: no such command, or what it refuses.
    """
    found = Parser(
        prog="sgt-titan conjformer",
        description="Inference in a secretly rotated basis (docs/CONJFORMER.md says what that is worth).",
        epilog="\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("command", choices=tuple(COMMANDS), metavar="|".join(COMMANDS), help="see `COMMAND --help`")
    argv = list(sys.argv[2:] if argv is None else argv)
    return COMMANDS[found.parse_args(argv[:1]).command][0](argv[1:])
