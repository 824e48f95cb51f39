from __future__ import annotations

import numpy as np
import pytest

from sgt_titan.data.order import epoch_key, hash64, mixed_at, noise_seed, permute, quotas, samples_at


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 16, 17, 31, 64, 97, 100, 255, 256, 257, 1000, 4096, 4097, 65537])
@pytest.mark.parametrize("key", [0, 1, 2**64 - 1, 0xDEADBEEF12345678])
def test_is_a_bijection(n, key):
    out = permute(np.arange(n), n, key)
    assert out.dtype == np.int64
    assert np.array_equal(np.sort(out), np.arange(n))


def test_scalar_equals_array():
    for n in (1, 2, 13, 1000):
        assert [permute(i, n, 99) for i in range(n)] == permute(np.arange(n), n, 99).tolist()


def test_order_of_the_request_does_not_matter():
    i = np.array([5, 0, 99, 5])
    assert permute(i, 100, 3).tolist() == [permute(int(k), 100, 3) for k in i]


def test_pinned_for_ever():
    """Changing any of these changes the data order of every run that is resumed. Do not update them."""
    assert permute(np.arange(10), 10, 1).tolist() == PINNED_10
    assert [permute(i, 4_233_923, epoch_key(0, 0)) for i in range(4)] == PINNED_ORCA
    assert hash64("a", 1) == PINNED_HASH
    assert noise_seed(0, 1, 2) == PINNED_NOISE


PINNED_10 = [8, 9, 6, 4, 0, 5, 1, 7, 3, 2]
PINNED_ORCA = [2448012, 1368908, 1223520, 2177920]
PINNED_HASH = 5981427342772527336
PINNED_NOISE = 1712716875110715877


def test_keys_differ():
    orders = {tuple(permute(np.arange(50), 50, key)) for key in range(200)}
    assert len(orders) == 200


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_every_place_is_equally_likely(n):
    keys = 800
    table = np.zeros((n, n))
    for key in range(keys):
        table[np.arange(n), permute(np.arange(n), n, hash64("uniform", key))] += 1
    expected = keys / n
    # Rows and columns of the table sum to a constant, hence the factor.
    chi2 = (n - 1) / n * ((table - expected) ** 2 / expected).sum()
    freedom = (n - 1) ** 2
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_all_orders_of_four_occur():
    counts: dict[tuple, int] = {}
    for key in range(2400):
        order = tuple(permute(np.arange(4), 4, hash64("orders", key)))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi2 = sum((c - 100) ** 2 / 100 for c in counts.values())
    assert chi2 < 23 + 5 * np.sqrt(46)


def test_neighbours_are_scattered():
    n = 100_000
    out = permute(np.arange(n), n, 7)
    correlation = np.corrcoef(out[:-1], out[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), out)[0, 1]) < 5 / np.sqrt(n)


def test_samples_cover_each_epoch_once():
    n, seed = 37, 5
    epochs, indices = samples_at(np.arange(3 * n), n, seed)
    for epoch in range(3):
        part = slice(epoch * n, (epoch + 1) * n)
        assert (epochs[part] == epoch).all()
        assert sorted(indices[part]) == list(range(n))
    assert indices[:n].tolist() != indices[n : 2 * n].tolist()
    assert indices.tolist() == [permute(k % n, n, epoch_key(seed, k // n)) for k in range(3 * n)]


def test_noise_seeds_are_distinct_and_fit():
    seeds = {noise_seed(s, e, i) for s in range(3) for e in range(10) for i in range(500)}
    assert len(seeds) == 15_000
    assert all(0 <= s < 2**63 for s in seeds)
    # Concatenation without separators would confuse these.
    assert noise_seed(1, 11, 1) != noise_seed(1, 1, 11)


@pytest.mark.parametrize(("i", "n"), [(5, 5), (-1, 5), (0, 0)])
def test_outside_is_refused(i, n):
    with pytest.raises(ValueError):
        permute(i, n, 0)


@pytest.mark.parametrize("weights", [(1, 1, 1), (5, 1, 2), (0.1, 3, 0.4)])
def test_a_mixture_goes_through_each_source_before_it_repeats(weights):
    sizes = np.array([7, 40, 13])
    shares = quotas(60, weights)
    assert shares.sum() == 60 and np.abs(shares - 60 * np.array(weights) / sum(weights)).max() < 1
    k = np.arange(60 * 9)
    epochs, indices = mixed_at(k, sizes, shares, seed=3)
    firsts = np.cumsum([0, *sizes])
    for j, share in enumerate(shares):
        mine = (indices >= firsts[j]) & (indices < firsts[j + 1])
        assert (mine.reshape(9, 60).sum(1) == share).all()
        pairs = sorted(zip(epochs[mine].tolist(), indices[mine].tolist(), strict=True))
        rounds, rest = divmod(len(pairs), sizes[j])
        assert pairs[: rounds * sizes[j]] == [(r, i) for r in range(rounds) for i in range(firsts[j], firsts[j + 1])]
        assert len(set(pairs)) == len(pairs) == rounds * sizes[j] + rest
    # A function of k alone, and of the seed.
    for a, b in ((0, 1), (59, 64), (301, 422)):
        again = mixed_at(k[a:b], sizes, shares, seed=3)
        assert (again[0] == epochs[a:b]).all() and (again[1] == indices[a:b]).all()
    assert (mixed_at(k, sizes, shares, seed=4)[1] != indices).any()


def test_quotas_by_largest_remainders():
    assert quotas(10, [1]).tolist() == [10] and quotas(3, [1, 1]).tolist() == [2, 1]
    assert quotas(10, [1, 1, 4]).tolist() == [2, 2, 6] and quotas(2, [1, 1, 1e6]).tolist() == [0, 0, 2]
