"""The loss by torch's softmax, block by block, against the one that keeps maxima and sums apart."""

from __future__ import annotations

import pytest
import torch

from sgt_titan.objectives import whole_vocabulary
from sgt_titan.objectives.utility import difference
from sgt_titan.objectives.whole_vocabulary import first_maximum, replace_by_difference


def logits(tokens, vocab, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(2, tokens, vocab, dtype=torch.float64, generator=generator)).to(dtype).unbind(0)


@pytest.mark.parametrize("vocab", [1, 5, 128, 256, 300, 1025])
@pytest.mark.parametrize("block", [1, 2**10, 2**18])
def test_equals_the_loss_by_parts(vocab, block, monkeypatch):
    """Blocks of one row, of a few with a shorter last one, and of all."""
    monkeypatch.setattr(whole_vocabulary, "BLOCK_CPU", block)
    student, teacher = logits(7, vocab)
    gradient = torch.empty_like(student)
    expected = difference(student, teacher, None, 0, gradient, finite=True)
    before = student.clone(), teacher.clone()
    kept = replace_by_difference(student, teacher, replace=False)
    assert torch.equal(student, before[0])
    found = replace_by_difference(student, teacher, replace=True)
    assert torch.equal(teacher, before[1])
    for a, b, c in zip(found, expected, kept, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        assert torch.equal(a, c)
    torch.testing.assert_close(student, gradient, rtol=1e-12, atol=1e-15)


def test_float32_is_as_exact_as_the_loss_by_parts():
    """Sums of a large vocabulary: the softmax's own is corrected."""
    student, teacher = logits(8, 50_000, torch.float32)
    exact = difference(student.double(), teacher.double(), None, 0, None, finite=True)
    by_parts = difference(student, teacher, None, 0, None, finite=True)
    found = replace_by_difference(student, teacher, replace=False)
    for index in (0, 1):
        errors = [(values[index].double() - exact[index]).abs().max() for values in (found, by_parts)]
        assert errors[0] <= 1.5 * errors[1]


def test_bfloat16_gradient_is_rounded_once():
    student, teacher = logits(5, 400, torch.bfloat16)
    teacher = (student + 0.01 * teacher).contiguous()
    exact = student.double()
    expected = difference(exact, teacher.double(), None, 0, exact, finite=True)
    found = replace_by_difference(student, teacher, replace=True)
    torch.testing.assert_close(student.double(), exact, rtol=2**-8, atol=1e-7)
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-6, atol=1e-6)
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("vocab", [40, 256, 300])
def test_first_maximum(vocab):
    """Of several the lowest; in the first block, a later one and the rest."""
    values = torch.randn(4 * vocab, vocab, generator=torch.Generator().manual_seed(1)).round()  # many ties
    found, at = first_maximum(values)
    assert torch.equal(found, values.amax(-1))
    assert torch.equal(at, (values == found[:, None]).int().argmax(-1))
    for place in (0, vocab // 2, vocab - 1):
        row = torch.zeros(1, vocab)
        row[0, place] = 1
        assert first_maximum(row)[1].item() == place
        row[0, place] = torch.nan
        assert first_maximum(row)[0].isnan().all()


def test_nan_agrees_with_nothing():
    student, teacher = logits(3, 300)
    student[1, 299] = torch.nan
    teacher = student.nan_to_num(50.0)
    cross_entropy, _, agree = replace_by_difference(student, teacher, replace=True)
    assert cross_entropy.isnan().tolist() == [False, True, False]
    assert agree.tolist() == [True, False, True]
