"""``sgt-titan readings``: one prompt through the whole client, and who reads what of it.

What the user writes; what a nearest-neighbour server sees of what is sent; what the better of two cheap attackers reads
(the other fits a linear map on his own obfuscations of public text, in a second); the answer as it comes back, and as
the user sees it. Everything runs here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgt_titan.arguments import Parser, number, seed_argument
from sgt_titan.config.origin import settle
from sgt_titan.errors import UserError
from sgt_titan.terminal import printable, quiet

CHEAP = ("nearest_l2", "known_plaintext")
CORPUS = 300  # public rows that the linear map is fitted on


def main(argv: Sequence[str] | None = None) -> int:
    """Print the readings of the text in FILE.

    Raises:
        UserError: as ``Private.of``, ``data_config`` and ``encode``; a file that cannot be read.
    """
    parser = Parser(
        prog="sgt-titan readings",
        description="One prompt through the client: what a server sees, a cheap attacker reads, and what comes back.",
    )
    parser.add_argument("export", metavar="EXPORT", help="an exported directory, or a run's")
    parser.add_argument("file", metavar="FILE", type=Path, help="the prompt, one turn of a user")
    parser.add_argument(
        "--trunk", metavar="PATH", help="directory of the trunk, or a config's name (default: the run's own)"
    )
    parser.add_argument(
        "--data", metavar="SOURCE", help="text that is public, as data.source, or a config's name (default: the run's)"
    )
    parser.add_argument("--private", metavar="A,B", default="patterns,names", help="default patterns,names; '': none")
    parser.add_argument("--private-own", metavar="FILE", help="words, patterns and surrogates of your own (YAML)")
    parser.add_argument("--max-tokens", type=number(int, 1), default=64, help="of the answer (default 64)")
    seed_argument(parser, "the attackers' noise")
    arguments, overrides = parser.parse_known_args(argv)
    settle(arguments)
    from sgt_titan.private import Private

    private = Private.of(arguments.private, own=arguments.private_own)
    try:
        text = arguments.file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{arguments.file}: cannot be read as text ({type(error).__name__})") from None
    for title, lines in _readings(arguments, overrides, private.conversation(), text):
        print(f"\n{title}\n  {printable(lines)}")
    return 0


def _readings(arguments: Any, overrides: Sequence[str], talk: Any, text: str) -> list[tuple[str, str]]:
    from transformers.utils.logging import disable_progress_bar

    from sgt_titan.client import StainedGlassTransform, Transformers, read_nearest
    from sgt_titan.client.private import hide
    from sgt_titan.evaluation.world.samples import data_config

    disable_progress_bar()
    config = data_config(arguments.export, arguments.trunk, arguments.data, list(overrides))
    with quiet(lambda line: None):
        sgt = StainedGlassTransform.from_pretrained(arguments.export, trunk=config.trunk.path, hold_noise=False)
    backend = Transformers.from_pretrained(config.trunk.path)
    sent, hidden = hide(talk, [{"role": "user", "content": text}])
    prompt = sgt.prompt(sent)
    embeds_TD = sgt.encode(prompt)
    reading = read_nearest(sgt, prompt, embeds_TD)
    attacker, read, share = _best(config, sgt, backend, prompt, arguments.seed)
    options = {"temperature": 0.0, "max_tokens": arguments.max_tokens}
    answer = backend.generate(embeds_TD, **options).text.strip()
    restorer = talk.restorer()
    shown = restorer.feed(answer, last=True)
    count, left = len(hidden[0].replaced), sum(restorer.left.values())
    return [
        ("The user writes:", text),
        (
            f"With surrogates ({count} values found; what was not found stays), obfuscated before it leaves:",
            hidden[0].text,
        ),
        (f"The server sees (nearest row; {100 * reading.share:.0f}% of the hidden tokens right):", reading.text),
        (f"The best cheap attacker reads ({attacker}; {100 * share:.0f}% right):", read),
        ("The answer comes back:", answer),
        (f"The user sees ({sum(restorer.restored.values())} values put back, {left} left as surrogates):", shown),
    ]


def _best(config: Any, sgt: Any, backend: Any, prompt: Any, seed: int) -> tuple[str, str, float]:
    """Title, reading and share of tokens right of the better cheap attacker."""
    import numpy as np

    from sgt_titan.data.cache import prepare
    from sgt_titan.evaluation.attacks import ATTACKS
    from sgt_titan.evaluation.scores import recovery
    from sgt_titan.evaluation.world.granted import World
    from sgt_titan.evaluation.world.mechanisms import learned
    from sgt_titan.evaluation.world.samples import Sample, read_samples

    dataset = prepare(config, config.trunk.path, progress=False)
    ids = np.array(prompt.ids)
    corpus = [row.prompt() for row in read_samples(dataset.train, config, CORPUS)]
    world = World([Sample(ids, prompt.mask, np.zeros(len(ids), bool))], corpus, learned(sgt), backend.model, seed)
    found = []
    for name in CHEAP:
        attack = ATTACKS[name]
        guess = attack.run(**world.granted(attack.run), **(attack.arguments("quick") or {}))
        right = recovery.top1_estimate(guess.top_NK[:, 0], world).value
        found.append((right, attack.title, recovery.texts(guess.top_NK[:, 0], world, sgt.tokenizer)[0]))
    right, title, read = max(found)
    return title, read, right
