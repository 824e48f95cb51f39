"""Chunks of tokens and shards of the vocabulary against whole logits, in float64, and what is alive meanwhile."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

from sgt_titan.objectives import distillation
from sgt_titan.objectives.distillation import EAGER, attach, chunk_size, compiled_kernels, distil
from sgt_titan.objectives.utility import soft_cross_entropy

N, D, V = 23, 7, 31


def case(dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(3)
    student, teacher, weight = (
        scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (N, D), (V, D))
    )
    token_weight = torch.linspace(0.2, 3.0, N, dtype=torch.float64)
    return (*(t.to(dtype) for t in (student, teacher, weight)), token_weight)


def naive(student, teacher, weight, token_weight):
    """Logits whole: values and the student's gradient."""
    student = student.clone().requires_grad_()
    soft = soft_cross_entropy(student @ weight.T, teacher @ weight.T)
    (soft.cross_entropy_N * token_weight).sum().backward()
    return soft.cross_entropy_N.detach(), soft.teacher_entropy_N, soft.agree_N, student.grad


def fused(student, teacher, weight, token_weight, **options):
    student = student.clone().requires_grad_()
    soft = attach(distil(student, teacher, weight, **options), student)
    (soft.cross_entropy_N * token_weight).sum().backward()
    return soft.cross_entropy_N.detach(), soft.teacher_entropy_N, soft.agree_N, student.grad


@pytest.mark.parametrize("chunk", [0, 1, 5, 23, 100])
def test_equals_the_loss_of_whole_logits(chunk):
    for found, expected in zip(fused(*case(), chunk=chunk), naive(*case()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_gradient_by_finite_differences():
    student, teacher, weight, _ = case(scale=0.5)

    def values(hidden):
        return attach(distil(hidden, teacher[:4], weight, chunk=3), hidden).cross_entropy_N

    assert torch.autograd.gradcheck(values, (student[:4].clone().requires_grad_(),))


def test_bfloat16_is_as_close_as_whole_logits_are():
    """Against float64 arithmetic on the same bfloat16 inputs."""
    student, teacher, weight, token_weight = case(torch.bfloat16, scale=1.0)
    exact = naive(student.double(), teacher.double(), weight.double(), token_weight)
    whole = naive(student, teacher, weight, token_weight.float())
    chunked = fused(student, teacher, weight, token_weight.float(), chunk=4)
    for index in (0, 3):
        error_of_whole = (whole[index].double() - exact[index]).abs().max()
        assert (chunked[index].double() - exact[index]).abs().max() <= 1.5 * error_of_whole, index


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made under it has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary():
    """The largest is a chunk of both streams' logits, or lm_head's own weight seen the other way round."""
    for tokens in (64, 640):
        student, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(500, 4)
        with Largest() as largest:
            soft = attach(distil(student, torch.randn(tokens, 4), weight, chunk=8), student)
            soft.cross_entropy_N.sum().backward()
        assert largest.numel == 2 * 8 * 500


def test_without_gradient_nothing_is_kept():
    student, teacher, weight, _ = case()
    distilled = distil(student, teacher, weight, chunk=5, want_gradient=False)
    assert distilled.gradient_ND is None
    soft = attach(distilled, student)
    assert not soft.cross_entropy_N.requires_grad
    torch.testing.assert_close(soft.cross_entropy_N, naive(*case())[0], rtol=1e-12, atol=0)


def test_backward_twice_gives_the_same_gradient():
    student, teacher, weight, token_weight = case()
    student.requires_grad_()
    loss = (attach(distil(student, teacher, weight), student).cross_entropy_N * token_weight).sum()
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    (second,) = torch.autograd.grad(loss, student)
    assert torch.equal(first, second)


def test_no_tokens():
    student = torch.empty(0, D, requires_grad=True)
    soft = attach(distil(student, torch.empty(0, D), torch.randn(V, D)), student)
    soft.cross_entropy_N.sum().backward()
    assert [tensor.shape for tensor in soft] == [(0,)] * 3 and student.grad.shape == (0, D)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "on_cpu"),
    [(128_256, 512, 128), (152_064, 256, 128), (16_032, 4096, 256), (32_000, 2048, 128), (10**7, 64, 128)],
)
def test_chunk_size(vocabulary, tokens, on_cpu):
    assert (chunk_size(vocabulary, "cuda"), chunk_size(vocabulary, "cpu")) == (tokens, on_cpu)


def test_bad_arguments():
    student, teacher, weight, _ = case()
    for bad in ((student[:, :3], teacher, weight), (student, teacher[:3], weight), (student, teacher, weight[:, :3])):
        with pytest.raises(ValueError, match=r"\(N, D\)"):
            distil(*bad)
    with pytest.raises(ValueError, match="chunk"):
        distil(student, teacher, weight, chunk=-1)


SPLITS = {"even-ish": (0, 16, 31), "uneven": (0, 29, 31), "empty": (0, 31, 31), "compiled": (0, 16, 31)}


def worker(rank: int, init_file: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    found = {}
    for name, bounds in SPLITS.items():
        student, teacher, weight, token_weight = case()
        shard = slice(bounds[rank], bounds[rank + 1])
        found[name] = fused(
            student,
            teacher,
            weight[shard],
            token_weight,
            chunk=5,
            group=dist.group.WORLD,
            vocab_start=bounds[rank],
            kernels=compiled_kernels("aot_eager") if name == "compiled" else EAGER,
        )
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_vocabulary_sharded_over_two_processes(tmp_path):
    mp.spawn(worker, (str(tmp_path / "init"), str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    expected = naive(*case())
    for name in SPLITS:
        for of_one, of_other, whole in zip(first[name][:3], second[name][:3], expected[:3], strict=True):
            assert torch.equal(of_one, of_other)
            torch.testing.assert_close(of_one, whole, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(first[name][3] + second[name][3], expected[3], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("stored", [False, True])
def test_compiled_kernels_change_no_number(stored, monkeypatch):
    """Chunks of 5 and a last one of 3: one compilation for both. Of the whole vocabulary as on a GPU."""
    monkeypatch.setattr(distillation, "in_blocks", lambda logits, group: False)
    student, teacher, weight, token_weight = case()
    targets = distil(student, teacher, weight, keep=6).targets if stored else None
    inputs = student, None if stored else teacher, weight, token_weight
    expected = fused(*inputs, chunk=5, targets=targets)
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    found = fused(*inputs, chunk=5, targets=targets, kernels=compiled_kernels("aot_eager"))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    torch._dynamo.reset()
