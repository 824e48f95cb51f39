"""Scores a guess: which tokens, which kinds of token, which private values, how much of the text.

Legend: N hidden tokens flat, K guesses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sgt_titan.errors import UserError
from sgt_titan.evaluation.scores.pii import is_in
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.evaluation.world.threat import UNKNOWN
from sgt_titan.metrics.interval import Estimate, ratio

FREQUENT = 100  # tokens that make up most of any text and tell nothing about it
UNREADABLE = "\ufffd"
GROUPS = ("marked", "content", "repeated", "unrepeated", "unneeded")  # overlap each other and the kinds of token


def frequent_tokens(corpus: Sequence[Sample], count: int = FREQUENT) -> set[int]:
    """The most frequent hidden tokens of public text: the, a comma, and. Content is what is none of these."""
    counts: Counter[int] = Counter()
    for row in corpus:
        counts.update(row.ids[row.obfuscate].tolist())
    return {token for token, _ in counts.most_common(count)}


def score(top_NK: torch.Tensor, world: World, tokenizer: Any, *, frequent: set[int]) -> dict[str, Any]:
    """The metrics of an attack as JSON values (``Estimate.as_dict``); rates 0..1, intervals by resampling prompts.

    top1, top10; content_top1: tokens with a letter or digit that are not frequent; marked_top1: of private values;
    repeated_top1, unrepeated_top1: of tokens whose text the answer holds, and of the others; span_exact: private values
    of which every token is right; unneeded_top1, unneeded_span_exact: of private values that the answer does not hold;
    classes: top-1 by kind of token; similarity: rapidfuzz's normalised edit similarity
    of each prompt's hidden text to what was read, mean over prompts; chrf: sacrebleu's. counts: hits and tokens of each
    prompt by group, for what compares two attacks.
    """
    right_NK = correct(top_NK, world)
    top1_N = right_NK[:, 0].numpy()
    kinds, unneeded = classes(world, tokenizer, frequent), with_unneeded(world, tokenizer)
    if unneeded:
        kinds["unneeded"] = _marked(unneeded)
    rows = world.observation.row_N.numpy()

    def rate(hit_N: np.ndarray, among_N: np.ndarray) -> dict[str, Any]:
        return _by_row(hit_N & among_N, among_N, rows, len(world.rows), world.seed).as_dict()

    everything = np.ones_like(top1_N)
    groups = {"": everything} | {f"{name}_": kinds[name] for name in GROUPS if name in kinds and kinds[name].any()}
    found = {
        **{f"{name}top1": rate(top1_N, group_N) for name, group_N in groups.items()},
        "content_top1": rate(top1_N, kinds["content"]),
        "top10": rate(right_NK.any(1).numpy(), everything),
        "classes": {name: rate(top1_N, kind_N) for name, kind_N in kinds.items() if name not in GROUPS[1:]},
        "counts": {
            f"{name}top1": [
                np.bincount(rows, weights=flag_N, minlength=len(world.rows)).astype(int).tolist()
                for flag_N in (top1_N & group_N, group_N)
            ]
            for name, group_N in groups.items()
        },
        **_text_scores(top_NK[:, 0], world, tokenizer),
    }
    if kinds["marked"].any():
        found["span_exact"] = _spans(top1_N, world.rows, world.seed)
        if unneeded:
            found["unneeded_span_exact"] = _spans(top1_N, unneeded, world.seed)
    return found


def top1_estimate(top_N: torch.Tensor, world: World) -> Estimate:
    """Top-1 recovery of the guesses (N,)."""
    hit_N = correct(top_N[:, None], world)[:, 0].numpy()
    rows = world.observation.row_N.numpy()
    return _by_row(hit_N, np.ones_like(hit_N), rows, len(world.rows), world.seed)


def correct(top_NK: torch.Tensor, world: World) -> torch.Tensor:
    """bool (N, K). A row of the table that equals the true one cannot be told from it by anybody, and is as good."""
    top_NK, truth_N = top_NK.cpu(), world.truth_N
    if top_NK.shape[:1] != truth_N.shape:
        raise ValueError(f"{tuple(top_NK.shape)} guesses for {len(truth_N)} tokens")
    group_V = world.groups.group_V
    return (group_V[top_NK.clamp_min(0)] == group_V[truth_N][:, None]) & (top_NK != UNKNOWN)


def classes(world: World, tokenizer: Any, frequent: set[int]) -> dict[str, np.ndarray]:
    """Kind -> bool (N,). ``GROUPS`` overlap the others; the rest part the tokens among themselves.

    A token is ``repeated`` where its text, without the spaces around it and in lower case, is that of a token of the
    prompt's own answer: such tokens an answer may need, and no transform that keeps the answer can hide them all.
    """
    truth = world.truth_N.tolist()
    text = {token: tokenizer.convert_ids_to_tokens(token) or "" for token in set(truth)}
    plain = {token: tokenizer.decode([token]) for token in text}
    begins = {token: piece.startswith(("\u2581", "\u0120", " ")) for token, piece in text.items()}

    def flags(test: Callable[[int], bool]) -> np.ndarray:
        known = {token: bool(test(token)) for token in text}
        return np.array([known[token] for token in truth], dtype=bool)

    number = flags(lambda t: any(c.isdigit() for c in plain[t]))
    letters = flags(lambda t: any(c.isalpha() for c in plain[t]))
    often = flags(lambda t: t in frequent)
    starts = flags(lambda t: begins[t])
    word = letters & ~number
    repeats = {}
    if answers_of(world):
        repeated = repeated_tokens(world, plain, tokenizer)
        repeats = {"repeated": repeated, "unrepeated": ~repeated}
    return {
        "frequent": often,
        "word": word & starts & ~often,
        "piece": word & ~starts & ~often,
        "number": number & ~often,
        "punctuation": ~letters & ~number & ~often,
        "marked": _marked(world.rows),
        "content": (letters | number) & ~often,
        **repeats,
    }


def answers_of(world: World) -> bool:
    """Whether the answers to the prompts are known."""
    return any(len(row.answer) for row in world.rows)


def repeated_tokens(world: World, plain: dict[int, str], tokenizer: Any) -> np.ndarray:
    """bool (N,): the hidden tokens whose text is that of a token of the prompt's answer. ``plain``: texts by token; one
    without any text but spaces counts by its id."""

    def key(token: int) -> str | int:
        if token not in plain:
            plain[token] = tokenizer.decode([token])
        return plain[token].strip().casefold() or token

    found = []
    for row in world.rows:
        said = {key(token) for token in row.answer.tolist()}
        found += [key(token) in said for token in row.ids[row.obfuscate].tolist()]
    return np.array(found, dtype=bool)


def with_unneeded(world: World, tokenizer: Any) -> list[Sample]:
    """The prompts with those of their private values alone that do not stand in the answer: what no answer gives
    anybody a reason to send. Nothing where the answers are not known.
    """
    if not answers_of(world):
        return []
    said = [tokenizer.decode(row.answer.tolist(), skip_special_tokens=True) for row in world.rows]
    return [
        row._replace(spans=tuple(span for span in row.spans if not is_in(span.text, text)))
        for row, text in zip(world.rows, said, strict=True)
    ]


def _marked(rows: Sequence[Sample]) -> np.ndarray:
    """bool (N,): the hidden tokens of private values."""
    return np.concatenate([row.marked[row.obfuscate] for row in rows])


def texts(top_N: torch.Tensor, world: World, tokenizer: Any) -> list[str]:
    """Each prompt as the attacker reads it: clean tokens as they are, guesses elsewhere, U+FFFD for none."""
    found, at, top = [], 0, top_N.cpu().tolist()
    for row in world.rows:
        ids = row.ids.tolist()
        for t in np.flatnonzero(row.obfuscate):
            ids[t] = top[at]
            at += 1
        found.append(_decode(ids, tokenizer))
    return found


def hidden_texts(top_N: torch.Tensor, world: World, tokenizer: Any) -> list[str]:
    """As ``texts``, of the hidden positions alone."""
    counts = [int(row.obfuscate.sum()) for row in world.rows]
    return [_decode(part.tolist(), tokenizer) for part in top_N.cpu().split(counts)]


def _decode(ids: list[int], tokenizer: Any) -> str:
    pieces, run = [], []
    for token in [*ids, UNKNOWN]:
        if token != UNKNOWN:
            run.append(token)
            continue
        if run:
            pieces.append(tokenizer.decode(run, skip_special_tokens=True))
        run = []
        pieces.append(UNREADABLE)
    return "".join(pieces[:-1])


def _by_row(hit_N: np.ndarray, among_N: np.ndarray, row_N: np.ndarray, rows: int, seed: int) -> Estimate:
    hits, counts = (np.bincount(row_N, weights=flag_N, minlength=rows) for flag_N in (hit_N, among_N))
    return ratio(hits, counts, share=True, seed=seed)


def _spans(top1_N: np.ndarray, rows: Sequence[Sample], seed: int) -> dict[str, Any]:
    hits, counts, at = [], [], 0
    for row in rows:
        right_T = np.ones(len(row.ids), dtype=bool)
        right_T[row.obfuscate] = top1_N[at : at + int(row.obfuscate.sum())]
        at += int(row.obfuscate.sum())
        # A value that no obfuscated token carries was never hidden.
        hidden = [span for span in row.spans if row.obfuscate[span.start : span.stop].any()]
        hits.append(sum(bool(right_T[span.start : span.stop].all()) for span in hidden))
        counts.append(len(hidden))
    return ratio(np.array(hits), np.array(counts), share=True, seed=seed).as_dict()


def similarities() -> tuple[Any, Any]:
    """rapidfuzz's fuzz and sacrebleu's CHRF. Raises UserError where they are not installed."""
    try:
        from rapidfuzz import fuzz
        from sacrebleu.metrics import CHRF
    except ImportError:
        raise UserError("text similarity needs rapidfuzz and sacrebleu: pip install 'sgt-titan[eval]'") from None
    return fuzz, CHRF


def _text_scores(top_N: torch.Tensor, world: World, tokenizer: Any) -> dict[str, Any]:
    fuzz, CHRF = similarities()
    truth, read = hidden_texts(world.truth_N, world, tokenizer), hidden_texts(top_N, world, tokenizer)
    chrf, ones = CHRF(), np.ones(len(truth))
    similarity = np.array([fuzz.ratio(a, b) / 100 for a, b in zip(truth, read, strict=True)])
    by_chrf = np.array([chrf.sentence_score(b, [a]).score / 100 for a, b in zip(truth, read, strict=True)])
    return {
        "similarity": ratio(similarity, ones, seed=world.seed).as_dict(),
        "chrf": ratio(by_chrf, ones, seed=world.seed).as_dict(),
    }
