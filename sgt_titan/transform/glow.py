"""A text whose tokens glow by what they reveal: the nats that one observation can tell of each (``modeling.rate``).

What the answer needs is bright, the rest is dark, what is sent in clear is underlined. A token is taken for wholly
readable at ln V nats, what naming one of V tokens takes. Legend: T tokens.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from sgt_titan.terminal import printable

RAMP = (240, 244, 137, 173, 214, 226)  # of a terminal's 256 colours, grey to yellow
RESET, BOLD, UNDERLINE = "\x1b[0m", "\x1b[1m", "\x1b[4m"

STYLE = """
.glow { background: #151515; color: #6b6b6b; padding: .7rem .9rem; line-height: 1.7; white-space: pre-wrap;
  overflow-wrap: anywhere; border-radius: .3rem; }
.glow span { border-radius: .2rem; } .glow u { color: #8ab; text-decoration-style: dotted; }
"""


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text; characters of several tokens stand at the last of them."""
    found, before = [], ""
    for stop in range(1, len(ids) + 1):
        after = tokenizer.decode(list(ids[:stop]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        whole = after.rstrip("\ufffd")  # the beginning of a character that the next token ends
        found.append(whole[len(before) :] if whole.startswith(before) else tokenizer.decode([ids[stop - 1]]))
        before = whole
    return found


def level(nats: float, log_vocab: float) -> float:
    """0 dark, 1 readable."""
    return min(max(nats / log_vocab, 0.0), 1.0) if log_vocab > 0 else 0.0


def terminal(words: Sequence[str], nats: Sequence[float | None], log_vocab: float) -> str:
    """The text in a terminal's colours. nats: None where sent in clear."""
    parts = []
    for word, value in zip(words, nats, strict=True):
        text = printable(word)
        if value is None:
            parts.append(f"{UNDERLINE}{text}{RESET}")
            continue
        at = round(level(value, log_vocab) * (len(RAMP) - 1))
        parts.append(f"{BOLD if at >= len(RAMP) - 2 else ''}\x1b[38;5;{RAMP[at]}m{text}{RESET}")
    return "".join(parts)


def page(words: Sequence[str], nats: Sequence[float | None], log_vocab: float) -> str:
    """The text as HTML of class ``glow``; a token's nats are its tooltip."""
    parts = []
    for word, value in zip(words, nats, strict=True):
        text = html.escape(printable(word))
        if value is None:
            parts.append(f"<u title='sent in clear'>{text}</u>")
            continue
        share = level(value, log_vocab)
        bright = f"rgb({107 + round(148 * share)},{107 + round(103 * share)},{107 - round(60 * share)})"
        back = f"background:rgba(230,159,0,{0.35 * share:.2f});" if share > 0.05 else ""
        parts.append(f"<span style='{back}color:{bright}' title='{value:.1f} nats'>{text}</span>")
    return f"<div class='glow'>{''.join(parts)}</div>"
