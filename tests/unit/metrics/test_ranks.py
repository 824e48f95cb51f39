import math
from fractions import Fraction

import pytest
import torch

from sgt_titan.metrics.ranks import (
    most_probable_rank,
    nn_failure_rate,
    rank_histogram_entropy,
    sym_ttr,
    token_ranks,
    ttr,
)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def brute_force(x_tilde, table, tokens):
    """Ranks by squared L2 distance in exact rational arithmetic."""
    ranks, ties, nearest = [], [], []
    rows = [[Fraction(value) for value in row] for row in table.double().tolist()]
    for point, token in zip(x_tilde.double().tolist(), tokens.tolist(), strict=True):
        distances = [sum((Fraction(a) - b) ** 2 for a, b in zip(point, row, strict=True)) for row in rows]
        ranks.append(1 + sum(distance < distances[token] for distance in distances))
        ties.append(sum(distance == distances[token] for distance in distances) - 1)
        nearest.append(distances.index(min(distances)))
    return [torch.tensor(values) for values in (ranks, ties, nearest)]


def assert_same(result, expected):
    for name, values, others in zip(result._fields, result, expected, strict=True):
        assert torch.equal(values, others), name
        assert values.dtype == torch.int64


@pytest.mark.parametrize("chunks", [(1, 1), (3, 4), (2, 23), (1000, 1000), (7, 22)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_l2_equals_exact_arithmetic_for_any_chunks(chunks, dtype):
    table, x_tilde = randn(23, 5, seed=1, dtype=dtype), randn(7, 5, seed=2, dtype=dtype)
    tokens = torch.tensor([0, 22, 3, 3, 11, 21, 4])
    result = token_ranks(x_tilde, table, tokens, chunk_tokens=chunks[0], chunk_vocab=chunks[1])
    assert_same(result, brute_force(x_tilde, table, tokens))
    assert len(set(result.rank_N.tolist())) > 3


@pytest.mark.parametrize("chunks", [(1, 1), (3, 4), (1000, 1000)])
def test_exact_ties_of_a_lattice(chunks):
    """Small integers: many different rows at exactly the same distance."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(-1, 2, (30, 4), generator=generator).float()
    x_tilde = torch.randint(-1, 2, (20, 4), generator=generator).float()
    tokens = torch.randint(0, 30, (20,), generator=generator)
    expected = brute_force(x_tilde, table, tokens)
    assert expected[1].max() > 2
    assert_same(token_ranks(x_tilde, table, tokens, chunk_tokens=chunks[0], chunk_vocab=chunks[1]), expected)


def test_duplicate_rows_are_ties_wherever_they_stand():
    """167 equal rows, as in a table with untrained tokens; widths at which blocked products round unequally."""
    table = randn(301, 193, seed=1)
    table[::2] = table[0]
    x_tilde = table[[0, 100, 300, 1]] + 0.5 * randn(4, 193, seed=2)
    result = token_ranks(x_tilde, table, torch.tensor([0, 100, 300, 1]), chunk_tokens=3, chunk_vocab=64)
    assert result.ties_N.tolist() == [150, 150, 150, 0]
    assert result.rank_N.tolist() == [1, 1, 1, 1]
    assert result.nearest_N.tolist() == [0, 0, 0, 1]


def test_far_from_the_table_cancellation_does_not_flip_ranks():
    """Distances differ in the 8th digit, where float32 has none left."""
    table = 1e-6 * randn(40, 16, seed=1)
    x_tilde = 30.0 * randn(12, 16, seed=2)
    tokens = torch.arange(12)
    expected = brute_force(x_tilde, table, tokens)
    assert_same(token_ranks(x_tilde, table, tokens), expected)
    in_float32 = torch.cdist(x_tilde, table)
    naive = 1 + (in_float32 < in_float32[tokens, tokens, None]).sum(-1)
    assert not torch.equal(naive, expected[0])  # the case is hard enough to catch what it is for


def test_one_unit_in_the_last_place_is_not_a_tie():
    table = randn(6, 512, seed=1)
    table[3] = table[2]
    table[3, 7] = torch.nextafter(table[2, 7], torch.tensor(torch.inf))
    x_tilde = table[[2, 3]].clone()
    x_tilde[0, 7] -= 1.0
    x_tilde[1, 7] += 1.0
    tokens = torch.tensor([3, 3])
    result = token_ranks(x_tilde, table, tokens)
    assert_same(result, brute_force(x_tilde, table, tokens))
    assert result.rank_N.tolist() == [2, 1]
    assert result.ties_N.tolist() == [0, 0]


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_is_found(metric, dtype):
    table, tokens = randn(50, 8, dtype=dtype), torch.arange(50).flip(0)
    result = token_ranks(table[tokens], table, tokens, metric=metric, chunk_tokens=7, chunk_vocab=9)
    assert result.rank_N.tolist() == [1] * 50
    assert result.ties_N.tolist() == [0] * 50
    assert torch.equal(result.nearest_N, tokens)
    assert nn_failure_rate(result.rank_N) == 0.0


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_antipodes_are_farthest(metric):
    table, tokens = torch.nn.functional.normalize(randn(50, 8), dim=-1), torch.arange(50)
    result = token_ranks(-table, table, tokens, metric=metric, chunk_tokens=7, chunk_vocab=9)
    assert result.rank_N.tolist() == [50] * 50
    assert sym_ttr(result.rank_N, 1, 50) == 0.0
    assert ttr(result.rank_N, 1) == 1.0


def test_cosine_equals_sorting_by_cosine_and_ignores_lengths():
    table, x_tilde, tokens = randn(23, 5, seed=1), randn(7, 5, seed=2), torch.arange(7)
    cosines = torch.nn.functional.cosine_similarity(x_tilde.double()[:, None], table.double()[None], dim=-1)
    expected = 1 + (cosines > cosines[torch.arange(7), tokens, None]).sum(-1)
    scales = torch.linspace(0.1, 10, 23)[:, None]
    for scaled, factor in ((table, 1.0), (table * scales, 100.0)):
        result = token_ranks(factor * x_tilde, scaled, tokens, metric="cosine", chunk_tokens=2, chunk_vocab=4)
        assert torch.equal(result.rank_N, expected)
        assert torch.equal(result.nearest_N, cosines.argmax(-1))
        assert result.ties_N.tolist() == [0] * 7
    assert not torch.equal(token_ranks(x_tilde, table, tokens).rank_N, expected)


def test_cosine_sees_parallel_rows_and_zero_rows_as_ties():
    table = torch.tensor([[1.0, 2.0], [2.0, 4.0], [0.0, 0.0], [-2.0, 1.0], [-1.0, -2.0]])
    x_tilde = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    result = token_ranks(x_tilde, table, torch.tensor([1, 2, 4]), metric="cosine")
    assert result.rank_N.tolist() == [1, 3, 1]
    assert result.ties_N.tolist() == [1, 1, 4]
    assert result.nearest_N.tolist() == [0, 0, 0]


def test_the_full_matrix_never_exists(monkeypatch):
    sizes = []
    addmm = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: sizes.append(addmm(*args, **kwargs)) or sizes[-1])
    token_ranks(randn(10, 3), randn(17, 3, seed=1), torch.arange(10), chunk_tokens=4, chunk_vocab=5)
    assert max(block.shape[0] for block in sizes) == 4
    assert max(block.shape[1] for block in sizes) == 5
    assert sum(block.numel() for block in sizes) == 10 * 17


def test_no_tokens():
    result = token_ranks(torch.empty(0, 3), torch.ones(5, 3), torch.empty(0, dtype=torch.int64))
    assert [values.shape for values in result] == [(0,)] * 3
    assert math.isnan(nn_failure_rate(result.rank_N))
    assert math.isnan(rank_histogram_entropy(result.rank_N, 5).normalised)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "dot"}, "metric"),
        ({"tokens_N": torch.tensor([0, 5])}, r"0\.\.4"),
        ({"tokens_N": torch.tensor([0, -1])}, r"0\.\.4"),
        ({"tokens_N": torch.tensor([0])}, "expected"),
        ({"x_tilde_ND": torch.zeros(2, 4)}, "expected"),
        ({"x_tilde_ND": torch.tensor([[0.0, 0.0, torch.nan]] * 2)}, "finite"),
        ({"x_tilde_ND": torch.tensor([[0.0, 0.0, torch.inf]] * 2)}, "finite"),
        ({"chunk_vocab": 0}, "chunks"),
    ],
)
def test_bad_input(change, message):
    good = {"x_tilde_ND": torch.zeros(2, 3), "table_VD": randn(5, 3), "tokens_N": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        token_ranks(**{**good, **change})


def test_rates_by_hand():
    rank = torch.tensor([1, 2, 3, 5, 8, 9, 10, 10])
    assert nn_failure_rate(rank) == 7 / 8
    assert ttr(rank, 2) == 6 / 8
    assert ttr(rank, 10) == 0
    assert sym_ttr(rank, 2, 10) == 3 / 8  # 3, 5 and 8
    assert sym_ttr(rank, 5, 10) == 0


def test_histogram_entropy_by_hand():
    assert rank_histogram_entropy(torch.tensor([3, 3, 3]), 10) == (0.0, math.log(3) / math.log(10))
    result = rank_histogram_entropy(torch.tensor([1, 1, 2, 10]), 10)
    assert result.normalised == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(4)) / math.log(10))
    assert rank_histogram_entropy(torch.arange(1, 11).repeat(3), 10) == pytest.approx((1.0, 1.0))


def test_histogram_entropy_ceiling_of_the_method_page_is_reached_by_distinct_ranks():
    result = rank_histogram_entropy(torch.arange(1, 10_001), 128_256)
    assert result.normalised == pytest.approx(result.ceiling)
    assert result.ceiling == pytest.approx(0.783, abs=5e-4)


@pytest.mark.parametrize(("rank", "vocab"), [([0], 5), ([6], 5), ([1], 1)])
def test_histogram_entropy_refuses(rank, vocab):
    with pytest.raises(ValueError, match=r"vocabulary|ranks"):
        rank_histogram_entropy(torch.tensor(rank), vocab)


def test_most_probable_rank():
    """Calibrated elsewhere; the lowest of equally frequent ranks."""
    assert most_probable_rank(torch.tensor([5, 2, 5, 2, 9])) == 2
    with pytest.raises(ValueError):
        most_probable_rank(torch.tensor([], dtype=torch.int64))


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """An (N, V) matrix of float64 would be 640 MB here; what exists at a time is a block."""
    import resource

    torch.manual_seed(0)
    table, tokens = torch.randn(20_000, 8), torch.arange(4_000)
    token_ranks(table[:8], table, torch.arange(8), chunk_tokens=256, chunk_vocab=2048)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = token_ranks(table[tokens], table, tokens, chunk_tokens=256, chunk_vocab=2048)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024  # MiB
    assert (found.rank_N == 1).all() and grown < 150
