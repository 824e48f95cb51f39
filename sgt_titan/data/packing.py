"""Several samples in one row: best-fit decreasing bin packing over whole length classes at a time.

Samples of one length are interchangeable, so bins are filled a class at a time with array operations: the time
grows with the number of samples for sorting only, and 4 million samples pack in seconds. The result is that of
the one-by-one algorithm (longest first, each into the fullest row it fits in).
"""

from __future__ import annotations

import numpy as np

from sgt_titan.data.order import hash64, permute


def pack(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Group samples into rows of at most ``seq_len`` tokens.

    Args:
        lengths: tokens of each sample, integers (number of samples,), each in 1..seq_len.

    Returns:
        ``(row_offsets, sample_ids)``, int64: row r holds ``sample_ids[row_offsets[r]:row_offsets[r + 1]]``.
        Every sample is in exactly one row. The same input gives the same rows, always.

    Raises:
        ValueError: a length outside 1..seq_len.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    n = len(lengths)
    if n == 0:
        return np.zeros(1, dtype=np.int64), np.zeros(0, dtype=np.int64)
    if lengths.min() < 1 or lengths.max() > seq_len:
        raise ValueError(f"sample lengths must be in 1..{seq_len}, got {lengths.min()}..{lengths.max()}")
    # A fixed shuffle: which samples of one length share a row must not follow the order of the file.
    shuffled = permute(np.arange(n, dtype=np.int64), n, hash64("pack", n))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    row_of = _best_fit_decreasing(lengths[order], seq_len)
    rows = int(row_of.max()) + 1
    by_sample = np.empty(n, dtype=np.int64)
    by_sample[order] = row_of
    # Back to the shuffled order within a row, or the longest sample would always come first.
    sample_ids = shuffled[np.argsort(by_sample[shuffled], kind="stable")]
    row_offsets = np.zeros(rows + 1, dtype=np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=row_offsets[1:])
    return row_offsets, sample_ids


def efficiency(lengths: np.ndarray, row_offsets: np.ndarray, seq_len: int) -> float:
    """Share of the rows' tokens that are samples' tokens, 0..1."""
    rows = len(row_offsets) - 1
    return float(np.sum(lengths, dtype=np.int64)) / (rows * seq_len) if rows else 1.0


def _best_fit_decreasing(descending: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each sample, for lengths sorted in descending order."""
    row_of = np.empty(len(descending), dtype=np.int64)
    # free[r]: stack of arrays of rows with r tokens left. open_: which r have any.
    free: list[list[np.ndarray]] = [[] for _ in range(seq_len + 1)]
    open_ = np.zeros(seq_len + 1, dtype=bool)
    rows = 0
    starts = np.flatnonzero(np.r_[True, descending[1:] != descending[:-1]])
    for start, stop in zip(starts, np.r_[starts[1:], len(descending)], strict=True):
        length, at = int(descending[start]), int(start)
        while at < stop:
            # The least room that is enough; a row that was just filled has even less, so it stays the best fit for
            # as long as it fits: a row takes all the samples of this length it can before the next one is touched.
            fit = int(np.argmax(open_[length:])) + length
            count, per_row = int(stop - at), (fit if open_[fit] else seq_len) // length
            needed = -(-count // per_row)
            if open_[fit]:
                ids = free[fit].pop()
                ids, rest = ids[:needed], ids[needed:]
                if len(rest):
                    free[fit].append(rest)
                open_[fit] = bool(free[fit])
            else:
                fit = seq_len
                ids = np.arange(rows, rows + needed)
                rows += needed
            placed = np.repeat(ids, per_row)[:count]
            row_of[at : at + len(placed)] = placed
            full = len(placed) // per_row
            _put(free, open_, fit - per_row * length, ids[:full])
            _put(free, open_, fit - (len(placed) - full * per_row) * length, ids[full:])
            at += len(placed)
    return row_of


def _put(free: list[list[np.ndarray]], open_: np.ndarray, space: int, ids: np.ndarray) -> None:
    if space > 0 and len(ids):
        free[space].append(ids)
        open_[space] = True
