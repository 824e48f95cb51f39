"""The order of samples and the seed of their noise, as pure functions of (seed, epoch, position).

A run must not depend on how many ranks it has, nor on where it was interrupted, so nothing here has state:
sample k of the run is computed from k. The permutation is fixed for ever (a pinned test guards it): changing
it would silently change every resumed run.

Legend: N positions asked for at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import overload

import numpy as np

# Halves of a few bits mix slowly: with 6 rounds orders of 5 samples are visibly uneven over 30,000 keys.
ROUNDS, ROUNDS_SMALL, SMALL_HALF_BITS = 6, 24, 6
_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def hash64(*values: int | str) -> int:
    """A 64-bit hash of integers and strings, the same on every machine and in every version of Python."""
    text = "\x1f".join(f"{type(v).__name__}:{v}" for v in values)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(x_N: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 on uint64."""
    x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x_N ^ (x_N >> np.uint64(31))


def _feistel(x_N: np.ndarray, half_bits: int, key: int) -> np.ndarray:
    """A keyed bijection of ``range(4**half_bits)``: a balanced Feistel network."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left_N, right_N = x_N >> shift, x_N & mask
    for r in range(1, 1 + (ROUNDS_SMALL if half_bits < SMALL_HALF_BITS else ROUNDS)):
        round_key = np.uint64((key + r * _GOLDEN) & _MASK64)
        # The high bits of the mix: the low ones of a small input are its weakest.
        f_N = _mix(_mix(right_N + round_key) ^ round_key) >> np.uint64(64 - half_bits)
        left_N, right_N = right_N, left_N ^ f_N
    return (left_N << shift) | right_N


@overload
def permute(i: int, n: int, key: int) -> int: ...
@overload
def permute(i: np.ndarray, n: int, key: int) -> np.ndarray: ...
def permute(i: int | np.ndarray, n: int, key: int) -> int | np.ndarray:
    """Where position i goes in the permutation of ``range(n)`` that ``key`` (64 bits) selects.

    O(1) memory: a Feistel network permutes the next power of four, and values that land outside ``range(n)``
    are sent through again until they land inside (cycle walking, fewer than four rounds on average).

    Args:
        i: an int, or an integer array (N,), in ``range(n)``.

    Returns:
        An int for an int, an int64 array (N,) for an array.

    Raises:
        ValueError: n < 1 or i outside ``range(n)``.
    """
    x_N = np.atleast_1d(np.asarray(i))
    if n < 1 or (x_N.size and (x_N.min() < 0 or x_N.max() >= n)):
        raise ValueError(f"position outside range({n})")
    x_N = x_N.astype(np.uint64)
    if n > 1:
        half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        x_N = _feistel(x_N, half_bits, key)
        outside = np.flatnonzero(x_N >= n)
        while outside.size:
            x_N[outside] = _feistel(x_N[outside], half_bits, key)
            outside = outside[x_N[outside] >= n]
    return x_N.astype(np.int64) if isinstance(i, np.ndarray) else int(x_N[0])


def epoch_key(seed: int, epoch: int) -> int:
    """The key of an epoch's permutation."""
    return hash64("order", seed, epoch)


def samples_at(k: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and index of global samples k (N,): int64 arrays (N,). ``n`` samples make an epoch."""
    k = np.asarray(k, dtype=np.int64)
    epochs = k // n
    indices = np.empty_like(k)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = permute(k[here] - epoch * n, n, epoch_key(seed, int(epoch)))
    return epochs, indices


def quotas(n: int, weights: Sequence[float]) -> np.ndarray:
    """``n`` shared out in proportion to weights: int64 (sources,), by largest remainders, the first of equal ones."""
    exact = n * np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
    found = np.floor(exact).astype(np.int64)
    # Rounded, so that remainders which are equal on paper are so here.
    found[np.argsort(np.round(found - exact, 9), kind="stable")[: n - int(found.sum())]] += 1
    return found


def mixed_at(k: np.ndarray, sizes: np.ndarray, shares: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch and index of global samples k (N,) of a mixture: int64 arrays (N,).

    Source j has ``sizes[j]`` samples, numbered behind those of the sources before it, and ``shares[j]`` places of an
    epoch; as many places as there are samples make an epoch. A source's samples come in an order of its own, through
    all of them before any comes again, whatever the others do: the epoch that is returned is the sample's, the number
    of times that it has been seen. Still a function of k alone, so that nothing is to be counted on resuming.
    """
    epochs, places = samples_at(k, int(np.sum(shares)), seed)
    ends = np.cumsum(shares)
    source = np.searchsorted(ends, places, side="right")
    own_epochs, indices = np.empty_like(places), np.empty_like(places)
    for j in np.unique(source):
        here = source == j
        size, share = int(sizes[j]), int(shares[j])
        drawn = epochs[here] * share + places[here] - (ends[j] - share)  # from this source, before this sample
        rounds, at = drawn // size, drawn % size
        for r in np.unique(rounds):
            this = rounds == r
            at[this] = permute(at[this], size, hash64("source", seed, int(j), int(r)))
        own_epochs[here], indices[here] = rounds, int(np.sum(sizes[:j])) + at
    return own_epochs, indices


def noise_seed(seed: int, epoch: int, sample: int) -> int:
    """Seed of one sample's noise in one epoch: 63 bits, so that torch's generators take it."""
    return hash64("noise", seed, epoch, sample) >> 1
