from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from sgt_titan.data.batch import BatchSource, local_positions
from sgt_titan.data.cache import View
from sgt_titan.data.order import samples_at
from sgt_titan.data.tokenization import role_counts
from sgt_titan.transform.prompts import PROMPT, RESPONSE, TEMPLATE, response_start

SEQ_LEN = 24
PAD = 9999


def make_view(samples: int, seed: int = 0) -> View:
    """Random samples as the cache would hold them; every second one of the data set is in the view."""
    from sgt_titan.data.cache import TokenizedDataset

    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, SEQ_LEN + 1, size=2 * samples)
    offsets = np.r_[0, np.cumsum(lengths)]
    tokens = np.arange(offsets[-1], dtype=np.uint32) % 9000
    roles = rng.choice([TEMPLATE, PROMPT, RESPONSE], size=offsets[-1], p=[0.3, 0.4, 0.3]).astype(np.uint8)
    counts = np.array([role_counts(roles[a:b]) for a, b in pairwise(offsets)], dtype=np.int32)
    # A value on the last token of every third sample, and one on its first two.
    marked = np.arange(2 * samples) % 3 == 0
    marks = np.array([m for n in lengths[marked] for m in ((n - 1, n, 0, 1, 0), (0, 2, 0, 3, 0))], dtype=np.int32)
    mark_offsets = np.r_[0, np.cumsum(2 * marked)]
    dataset = TokenizedDataset(directory=None, meta={"fingerprint": "x"}, tokens=tokens, roles=roles, offsets=offsets,
                               counts=counts, hashes=offsets[:-1].astype(np.uint64), sources=offsets[:-1],
                               marks=marks, mark_offsets=mark_offsets, validation_samples=0)  # fmt: skip
    return View(dataset, np.arange(1, 2 * samples, 2))


def make_source(view=None, **options) -> BatchSource:
    defaults = dict(seq_len=SEQ_LEN, global_batch_size=12, seed=3, packing=False, obfuscate="prompt",
                    obfuscate_template=False, utility_positions="all", pad_id=PAD)  # fmt: skip
    return BatchSource(make_view(29) if view is None else view, **(defaults | options))


OPTIONS = [(p, o, t, u) for p in (False, True) for o in ("prompt", "all") for t in (False, True)
           for u in ("all", "response")]  # fmt: skip


@pytest.mark.parametrize(("packing", "obfuscate", "template", "utility"), OPTIONS)
def test_every_token_by_brute_force(packing, obfuscate, template, utility):
    view = make_view(29)
    source = make_source(
        view, packing=packing, obfuscate=obfuscate, obfuscate_template=template, utility_positions=utility
    )
    number = {int(view.index[i]): i for i in range(len(view))}
    for step in (0, 1, 4):
        batch, counts = source.rows_batch(step, range(12)), source.counts(step)
        totals = [0, 0, 0]
        for b, documents in enumerate(batch.documents):
            at = 0
            for document in documents:
                assert document.start == at and document.epoch == source.row_ids(step)[b][0]
                i = number[document.sample_id]
                tokens, roles = view.tokens(i), view.roles(i)
                assert document.length == len(tokens)
                start = response_start(roles)
                for t in range(len(tokens)):
                    assert batch.tokens_BT[b, at + t] == tokens[t]
                    assert batch.positions_BT[b, at + t] == t
                    content = roles[t] == PROMPT or (obfuscate == "all" and roles[t] == RESPONSE)
                    frame = template and roles[t] == TEMPLATE and (obfuscate == "all" or t < start)
                    assert bool(batch.obfuscate_BT[b, at + t]) == (content or frame)
                    has_next = t + 1 < len(tokens) and (utility == "all" or roles[t + 1] == RESPONSE)
                    assert bool(batch.utility_BT[b, at + t]) == has_next
                    private = document.sample_id % 3 == 0 and (t < 2 or t == len(tokens) - 1)
                    assert bool(batch.private_BT[b, at + t]) == private
                    totals[0] += has_next
                    totals[1] += content or frame
                totals[2] += len(tokens)
                at += len(tokens)
            assert batch.valid_BT[b].tolist() == [t < at for t in range(SEQ_LEN)]
            assert (batch.tokens_BT[b, at:] == PAD).all()
            assert not batch.private_BT[b, at:].any()
            assert not batch.obfuscate_BT[b, at:].any() and not batch.utility_BT[b, at:].any()
            assert batch.positions_BT[b, at:].tolist() == list(range(SEQ_LEN - at))
        assert [counts.utility_tokens, counts.obfuscated_tokens, counts.tokens, counts.rows] == [*totals, 12]


@pytest.mark.parametrize("packing", [False, True])
def test_any_number_of_ranks_sees_the_same_global_batch(packing):
    source = make_source(packing=packing)
    size = source.global_batch_size
    for step in (0, 3):
        whole = source.rows_batch(step, range(size))
        for local in (1, 2, 3, 4, 6, 12):
            for ranks in (r for r in range(1, size // local + 1) if size % (local * r) == 0):
                parts, positions = [], []
                for micro in range(size // (local * ranks)):
                    for rank in range(ranks):
                        mine = local_positions(micro, rank, ranks, local)
                        positions += mine
                        parts.append(source.rows_batch(step, mine))
                assert positions == list(range(size))
                for name in ("tokens_BT", "positions_BT", "obfuscate_BT", "utility_BT", "valid_BT"):
                    assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name))
                assert [d for p in parts for d in p.documents] == whole.documents


@pytest.mark.parametrize("packing", [False, True])
def test_an_epoch_has_every_sample_once(packing):
    source = make_source(packing=packing, global_batch_size=1)
    samples = [d.sample_id for step in range(source.rows) for d in source.rows_batch(step, [0]).documents[0]]
    assert sorted(samples) == sorted(source.view.index.tolist())
    assert source.rows < 29 if packing else source.rows == 29


def test_rows_follow_the_global_order():
    source = make_source()
    for step in range(6):  # 12 rows a step of 29: steps straddle epochs
        epochs, indices = samples_at(np.arange(step * 12, step * 12 + 12), source.rows, 3)
        assert source.row_ids(step) == list(zip(epochs.tolist(), indices.tolist(), strict=True))
    assert {e for e, _ in source.row_ids(2)} == {0, 1}


def test_a_bigger_batch_size_keeps_the_sample_order():
    small, large = make_source(global_batch_size=4), make_source(global_batch_size=8)
    assert large.row_ids(1) == small.row_ids(2) + small.row_ids(3)


def test_an_epochs_counts_are_those_of_its_steps():
    source = make_source(global_batch_size=1)
    steps = [source.counts(step) for step in range(source.rows)]
    for name in ("utility_tokens", "obfuscated_tokens", "rows", "tokens"):
        assert getattr(source.epoch_counts, name) == sum(getattr(counts, name) for counts in steps) > 0


def test_types():
    batch = make_source().rows_batch(0, [0])
    assert batch.tokens_BT.dtype == batch.positions_BT.dtype == torch.int64
    assert batch.obfuscate_BT.dtype == batch.utility_BT.dtype == batch.valid_BT.dtype == torch.bool
    assert batch.tokens_BT.shape == (1, SEQ_LEN)


def test_steps_and_efficiency():
    source = make_source()
    assert [source.steps(e) for e in (0.01, 0.5, 1.0, 2.0)] == [1, 2, 3, 5]
    assert source.efficiency == pytest.approx(source.view.lengths.mean() / SEQ_LEN)


def test_misuse():
    source = make_source()
    with pytest.raises(ValueError, match="positions must be in"):
        source.rows_batch(0, [12])
    with pytest.raises(ValueError, match="more than seq_len"):
        make_source(seq_len=5)
    with pytest.raises(ValueError, match="need samples"):
        make_source(replace(make_view(3), index=np.zeros(0, dtype=np.int64)))
