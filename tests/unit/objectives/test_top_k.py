"""Stored targets against the teacher itself: exact with the whole vocabulary, a lower bound of KL otherwise."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sgt_titan.objectives.distillation import attach, distil
from sgt_titan.objectives.top_k import Targets, difference_from, top_k
from sgt_titan.objectives.utility import soft_cross_entropy

N, D, V = 13, 6, 29


def case():
    generator = torch.Generator().manual_seed(11)
    return tuple(
        1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (N, D), (V, D))
    )


def results(soft, student):
    (gradient,) = torch.autograd.grad((soft.cross_entropy_N * torch.linspace(1, 2, N)).sum(), student)
    return soft.cross_entropy_N.detach(), soft.teacher_entropy_N, soft.agree_N, gradient


def stored(k, **options):
    student, teacher, weight = case()
    targets = distil(student, teacher, weight, keep=k, chunk=4).targets
    student.requires_grad_()
    return results(attach(distil(student, None, weight, targets=targets, **options), student), student)


def asked():
    student, teacher, weight = case()
    student.requires_grad_()
    return results(soft_cross_entropy(student @ weight.T, teacher @ weight.T), student)


@pytest.mark.parametrize("chunk", [0, 5])
def test_the_whole_vocabulary_is_exact(chunk):
    for found, expected in zip(stored(V, chunk=chunk), asked(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_fewer_are_a_coarser_divergence(k):
    """Computed by lumping the tail into one event, with autograd's gradient; never above the full KL."""
    student, teacher, weight = case()
    student.requires_grad_()
    p, q = (teacher @ weight.T).softmax(-1), (student @ weight.T).softmax(-1)
    top, ids = p.topk(k)
    t, t_of_student = 1 - top.sum(-1), 1 - q.gather(1, ids).sum(-1)
    loss = -(top * q.gather(1, ids).log()).sum(-1) - t * t_of_student.log()
    (gradient,) = torch.autograd.grad((loss * torch.linspace(1, 2, N)).sum(), student)
    found = stored(k)
    torch.testing.assert_close(found[0], loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[3], gradient, rtol=1e-9, atol=1e-11)
    exact = asked()
    assert torch.equal(found[2], exact[2])
    kl, full = found[0] - found[1], exact[0] - exact[1]
    assert (kl >= -1e-12).all() and (kl <= full + 1e-12).all() and kl.sum() < full.sum()


def test_gradient_by_finite_differences():
    student, teacher, weight = case()
    targets = top_k(teacher @ weight.T, 5)

    def values(hidden):
        return attach(distil(hidden, None, weight, targets=targets), hidden).cross_entropy_N

    assert torch.autograd.gradcheck(values, (student.requires_grad_(),))


def test_a_tail_that_the_student_rules_out_is_infinitely_surprising():
    targets = Targets(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([0.5]))
    loss, *_ = difference_from(torch.tensor([[0.0, -torch.inf]]), targets, None, 0, torch.empty(1, 2))
    assert loss.item() == torch.inf


def test_ties_of_the_teacher_go_to_the_lowest_id():
    targets = Targets(torch.tensor([[3, 1]]), torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]))
    assert difference_from(torch.tensor([[0.0, 2.0, 0.0, 1.0]]), targets, None, 0, None)[2].item()


SPLITS = {"two": (0, 15, 29), "short": (0, 27, 29), "empty": (0, 29, 29)}


def worker(rank: int, init_file: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    found = {}
    for name, bounds in SPLITS.items():
        for k in (5, V):
            student, teacher, weight = case()
            shard = weight[bounds[rank] : bounds[rank + 1]]
            options = {"group": dist.group.WORLD, "vocab_start": bounds[rank], "chunk": 6}
            targets = distil(student, teacher, shard, keep=k, **options).targets
            student.requires_grad_()
            soft = attach(distil(student, None, shard, targets=targets, **options), student)
            found[f"{name} {k}"] = results(soft, student)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_vocabulary_sharded_over_two_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path / "init"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name in first:
        expected = stored(int(name.split()[1]))
        for one, other, whole in zip(first[name][:3], second[name][:3], expected[:3], strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, whole, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(first[name][3] + second[name][3], expected[3], rtol=1e-11, atol=1e-13)
