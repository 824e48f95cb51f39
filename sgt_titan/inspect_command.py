"""``sgt-titan inspect``: what a text of yours would reveal: nats a token, and what a nearest neighbour reads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgt_titan.arguments import Parser
from sgt_titan.config.origin import KEYS, export_of, of_run
from sgt_titan.errors import UserError
from sgt_titan.terminal import printable, quiet


def main(argv: Sequence[str] | None = None) -> int:
    """``sgt-titan inspect EXPORT [FILE] [--messages] [--results FILE] [--trunk DIR] [--json]``; text: FILE or stdin.

    Raises:
        UserError: as ``StainedGlassTransform.from_pretrained`` and ``encode``; a file that cannot be read.
    """
    parser = Parser(
        prog="sgt-titan inspect",
        description="What a text of yours would reveal: nats a token, and what a nearest neighbour reads. Nothing is "
        "sent anywhere.",
    )
    parser.add_argument("export", metavar="EXPORT", help="an exported directory, or a run's")
    # No --text: arguments can be seen by every user of a machine and stay in the shell's history.
    parser.add_argument("file", metavar="FILE", nargs="?", type=Path, help="the text (default: standard input)")
    parser.add_argument(
        "--messages", action="store_true", help="the text is a JSON list of messages, as in a chat request"
    )
    parser.add_argument("--results", metavar="FILE", help="results.json of `sgt-titan evaluate` on this export")
    parser.add_argument(
        "--trunk",
        metavar="DIR",
        help="the trunk's checkpoint or a config's name, for an export without an embedding table (default: the run's)",
    )
    parser.add_argument(
        "--private",
        metavar="A,B",
        help="surrogates for what patterns, names or a detector find; shows what becomes what",
    )
    parser.add_argument("--private-own", metavar="FILE", help="and for words and patterns of your own (YAML)")
    parser.add_argument(
        "--color",
        choices=("auto", "always", "never"),
        default="auto",
        help="of the text by what it reveals (default auto)",
    )
    parser.add_argument("--html", metavar="FILE", type=Path, help="also write that text as a page; it holds your text")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    arguments.export, run = export_of(arguments.export)
    trunk = of_run(arguments.trunk, KEYS["trunk"], run)
    from sgt_titan.client.inspect import WARNING, best_attacker, coloured, named, page, read_nearest, revealed

    best = best_attacker(arguments.results)
    what: Any = _read(arguments.file)
    if arguments.messages:
        try:
            what = json.loads(what)
        except (ValueError, RecursionError):
            raise UserError("--messages: the text is not JSON") from None
    replaced: list[tuple[str, str, str]] = []
    if arguments.private is not None or arguments.private_own:
        from sgt_titan.client.private import hide
        from sgt_titan.private import Private

        private = Private.of(arguments.private or "", own=arguments.private_own)
        what, hidden = hide(private.conversation(), what)
        replaced = [(item.span.kind, item.value, item.surrogate) for text in hidden for item in text.replaced]
    from sgt_titan.client.encoder import StainedGlassTransform

    with quiet(lambda text: print(f"sgt-titan: {text}", file=sys.stderr)):
        sgt = StainedGlassTransform.from_pretrained(arguments.export, trunk=trunk, hold_noise=False)  # nothing is sent
    prompt = sgt.prompt(what)
    reading, shown = read_nearest(sgt, prompt, sgt.encode(prompt)), revealed(sgt, prompt)
    if arguments.html:
        _write(arguments.html, page(shown))
    if arguments.json:
        facts: dict[str, Any] = {"tokens": reading.tokens, "obfuscated_tokens": reading.hidden}
        facts |= {"read_right": reading.right}
        facts |= {"pieces": shown.pieces, "nats": shown.nats, "nats_in_all": shown.total}
        if arguments.private is not None or arguments.private_own:
            facts["private"] = [dict(zip(("kind", "value", "surrogate"), item, strict=True)) for item in replaced]
        print(json.dumps({"nearest_neighbour_reads": reading.text, **facts, "warning": WARNING, "best_attacker": best}))
        return 0
    if arguments.private is not None or arguments.private_own:
        print(f"{len(replaced)} private values found; what was not found stays. On the way out:\n")
        for kind, value, surrogate in replaced:
            print(f"  {kind:<9} {printable(value)}  ->  {printable(surrogate)}")
        print()
    if reading.hidden:
        print("What one observation can tell, from dark (nothing) to bright (the token); underlined: sent in clear.\n")
        seen = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        print(coloured(shown) if arguments.color == "always" or (arguments.color == "auto" and seen) else named(shown))
        print(
            f"\nat most {shown.total:.0f} nats in all, {shown.total / reading.hidden:.2f} a hidden token "
            f"(naming a token takes up to {shown.log_vocab:.1f}); on average over the noise\n"
        )
    print("A nearest-neighbour observer reads:\n")
    print(printable(reading.text))
    if reading.hidden:
        print(f"\n{reading.right} of {reading.hidden} obfuscated tokens right ({100 * reading.share:.1f}%)")
    else:
        print("\nno token of this prompt is obfuscated: all of it is sent in clear")
    if reading.tokens > reading.hidden:
        print(f"{reading.tokens - reading.hidden} tokens (template and special tokens) are sent in clear")
    print(f"{best}\n{WARNING}")
    return 0


def _read(file: Path | None) -> str:
    try:
        content = sys.stdin.buffer.read() if file is None else file.read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{file or 'standard input'}: is not valid UTF-8") from None


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html: cannot write {file}: {error.strerror}") from None
