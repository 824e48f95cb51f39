import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from sgt_titan.objectives.utility import soft_cross_entropy


def logits(tokens=7, vocab=11, dtype=torch.float64, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, tokens, vocab, dtype=torch.float64, generator=generator)).to(dtype).unbind(0)


def test_value_and_gradient_equal_torch():
    student, teacher = logits()
    student.requires_grad_()
    weight = torch.linspace(0.1, 2.0, 7, dtype=torch.float64)
    result = soft_cross_entropy(student, teacher)
    (grad,) = torch.autograd.grad((result.cross_entropy_N * weight).sum(), student)
    expected = F.cross_entropy(student, teacher.softmax(-1), reduction="none")
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), student)
    torch.testing.assert_close(result.cross_entropy_N, expected)
    torch.testing.assert_close(grad, expected_grad)
    torch.testing.assert_close(result.teacher_entropy_N, torch.distributions.Categorical(logits=teacher).entropy())
    assert torch.equal(result.agree_N, student.argmax(-1) == teacher.argmax(-1))
    assert result.cross_entropy_N.dtype == torch.float64


def test_gradcheck():
    student, teacher = logits(3, 5)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_cross_entropy(s, teacher).cross_entropy_N, (student,))


def test_kl_to_itself_is_zero_and_flat():
    student, _ = logits()
    student.requires_grad_()
    result = soft_cross_entropy(student, student)
    (grad,) = torch.autograd.grad(result.cross_entropy_N.sum(), student)
    torch.testing.assert_close(result.cross_entropy_N, result.teacher_entropy_N)
    assert grad.abs().max() < 1e-15
    assert result.agree_N.all()


def test_only_the_student_gets_a_gradient():
    student, teacher = (x.clone().requires_grad_() for x in logits())
    result = soft_cross_entropy(student, teacher)
    assert result.cross_entropy_N.requires_grad
    assert not result.teacher_entropy_N.requires_grad
    assert not result.agree_N.requires_grad
    result.cross_entropy_N.sum().backward()
    assert teacher.grad is None


def test_extreme_logits_do_not_overflow():
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e30, 0.0, 0.0]])
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0.0, 88.0, 88.0]])
    result = soft_cross_entropy(student, teacher)
    torch.testing.assert_close(result.cross_entropy_N, torch.tensor([0.0, math.log(2)]))


def test_padded_vocabulary():
    student, teacher = (x.clone() for x in logits())
    student[:, 9:] = teacher[:, 9:] = -torch.inf
    student.requires_grad_()
    result = soft_cross_entropy(student, teacher)
    expected = F.cross_entropy(student[:, :9], teacher[:, :9].softmax(-1), reduction="none")
    torch.testing.assert_close(result.cross_entropy_N, expected)
    (grad,) = torch.autograd.grad(result.cross_entropy_N.sum(), student)
    assert grad.isfinite().all()
    assert grad[:, 9:].abs().max() == 0
    # Ruled out by the student alone: infinitely surprising, and said so.
    student, _ = logits()
    student[0, 0] = -torch.inf
    assert soft_cross_entropy(student, teacher).cross_entropy_N[0] == torch.inf


def test_nan_comes_out_as_nan_and_agrees_with_nothing():
    student, teacher = (x.clone() for x in logits())
    student[1, 3] = teacher[1, 3] = torch.nan
    result = soft_cross_entropy(student, teacher)
    assert result.cross_entropy_N.isnan().tolist() == [row == 1 for row in range(7)]
    assert not result.agree_N[1]
    assert torch.isnan(soft_cross_entropy(student, logits()[1]).cross_entropy_N[1])
    assert torch.isnan(soft_cross_entropy(logits()[0], teacher).cross_entropy_N[1])


def test_ties_go_to_the_lowest_id():
    result = soft_cross_entropy(torch.tensor([[1.0, 2.0, 2.0]] * 2), torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 5.0]]))
    assert result.agree_N.tolist() == [True, False]


def test_bfloat16_is_computed_in_float32_and_its_gradient_rounded_late():
    student, teacher = logits(5, 1000, torch.bfloat16)
    student.requires_grad_()
    weight = torch.linspace(1e-3, 1.0, 5)
    result = soft_cross_entropy(student, teacher)
    (grad,) = torch.autograd.grad((result.cross_entropy_N * weight).sum(), student)
    wide = student.detach().double()
    expected = F.cross_entropy(wide, teacher.double().softmax(-1), reduction="none")
    expected_grad = weight.double()[:, None] * (wide.softmax(-1) - teacher.double().softmax(-1))
    assert result.cross_entropy_N.dtype == torch.float32
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(result.cross_entropy_N.double(), expected, atol=1e-5, rtol=1e-5)
    # Two roundings of at most 2^-8 relative: the saved difference and its product with the incoming gradient.
    torch.testing.assert_close(grad.double(), expected_grad, atol=1e-9, rtol=2**-7)


def test_saves_one_tensor_of_logits_and_nothing_without_gradient():
    student, teacher = logits(4, 9, torch.bfloat16)
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        soft_cross_entropy(student, teacher)
        assert saved == []
        soft_cross_entropy(student.requires_grad_(), teacher)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in saved] == [((4, 9), torch.bfloat16)]


def test_backward_twice_gives_the_same_gradient():
    student, teacher = logits()
    loss = soft_cross_entropy(student.requires_grad_(), teacher).cross_entropy_N.sum()
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)


def test_no_tokens():
    student = torch.empty(0, 5, requires_grad=True)
    result = soft_cross_entropy(student, torch.empty(0, 5))
    result.cross_entropy_N.sum().backward()
    assert [tensor.shape for tensor in result] == [(0,)] * 3
    assert student.grad.shape == (0, 5)


@pytest.mark.parametrize("shapes", [((3, 4), (3, 5)), ((2, 3, 4), (2, 3, 4))])
def test_bad_shapes(shapes):
    with pytest.raises(ValueError, match=r"\(N, V\)"):
        soft_cross_entropy(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def sharded_case(dtype):
    student, teacher = (x.clone() for x in logits(dtype=dtype))
    student[0], teacher[0] = 1.0, 2.0  # ties across the shards
    student[2, 1], teacher[2, 8] = 50.0, 50.0  # id 1 of either shard, which is not the same token
    student[1, 8:] = teacher[1, 8:] = -torch.inf
    return student, teacher


def shard_worker(rank, world_size, init_file, out_dir):
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world_size)
    pending = {}
    for name, dtype, start, stop in (
        ("uneven", torch.float64, (0, 7), (7, 11)),
        ("uneven32", torch.float32, (0, 7), (7, 11)),
        ("empty", torch.float64, (0, 11), (11, 11)),
    ):
        student, teacher = sharded_case(dtype)
        shard = slice(start[rank], stop[rank])
        local = student[:, shard].clone().requires_grad_()
        pending[name] = (
            local,
            soft_cross_entropy(local, teacher[:, shard], group=dist.group.WORLD, vocab_start=start[rank]),
        )
    # The backward pass must do without the group.
    dist.destroy_process_group()
    results = {}
    for name, (local, result) in pending.items():
        (result.cross_entropy_N * torch.arange(1.0, 8.0)).sum().backward()
        results[name] = (*(tensor.detach() for tensor in result), local.grad)
    torch.save(results, f"{out_dir}/{rank}.pt")


@pytest.mark.distributed
def test_uneven_shards_of_the_vocabulary_equal_one_process(tmp_path):
    mp.spawn(shard_worker, (2, tmp_path / "init", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, dtype in (("uneven", torch.float64), ("uneven32", torch.float32), ("empty", torch.float64)):
        student, teacher = sharded_case(dtype)
        student.requires_grad_()
        whole = soft_cross_entropy(student, teacher)
        (whole.cross_entropy_N * torch.arange(1.0, 8.0)).sum().backward()
        for rank in range(2):
            torch.testing.assert_close(ranks[rank][name][0], whole.cross_entropy_N.detach())
            torch.testing.assert_close(ranks[rank][name][1], whole.teacher_entropy_N)
            assert torch.equal(ranks[rank][name][2], whole.agree_N)
        for first, second in zip(ranks[0][name][:3], ranks[1][name][:3], strict=True):
            assert torch.equal(first, second)
        torch.testing.assert_close(torch.cat([ranks[rank][name][3] for rank in range(2)], dim=1), student.grad)
