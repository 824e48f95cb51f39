"""Parts of a step against the obvious way to write them, in one run: ``python benchmarks/pieces.py``.

    loss      Eq. 3 from hidden states in chunks of tokens, against whole logits
    pairs     the MI term over all pairs shift by shift, against a (B, B, T, D) tensor

Times alternate and are medians; peak memory is that of a process each, beyond its inputs. Minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import clock, compare, machine, peak_mib
from sgt_titan.objectives.distillation import attach, chunk_size, distil
from sgt_titan.objectives.mutual_information import group_loss, shifts

N, D = 1024, 256


def whole_logits(student_ND: torch.Tensor, teacher_ND: torch.Tensor, weight_VD: torch.Tensor) -> None:
    """Softmax and cross-entropy of torch on whole logits."""
    student_ND = student_ND.detach().requires_grad_()
    with torch.no_grad():
        target_NV = (teacher_ND @ weight_VD.T).float().softmax(-1)
    torch.nn.functional.cross_entropy((student_ND @ weight_VD.T).float(), target_NV).backward()


def in_chunks(student_ND, teacher_ND, weight_VD, chunk: int = 0) -> None:
    student_ND = student_ND.detach().requires_grad_()
    attach(distil(student_ND, teacher_ND, weight_VD, chunk=chunk), student_ND).cross_entropy_N.mean().backward()


def small_chunks(student_ND, teacher_ND, weight_VD) -> None:
    in_chunks(student_ND, teacher_ND, weight_VD, 64)


def all_pairs(x_tilde, log_std, center) -> None:
    """Every x against every y as one tensor."""
    leaves = [t.detach().requires_grad_() for t in (x_tilde, log_std, center)]
    x_tilde, log_std, center = leaves
    z = (x_tilde[:, None] - center[None]) * torch.exp(-log_std)[None]
    pairs_BB = (0.5 * z**2 + log_std[None] - log_std[:, None]).mean((-1, -2))
    pairs_BB[~torch.eye(len(x_tilde), dtype=torch.bool)].mean().backward()


def by_shifts(x_tilde, log_std, center) -> None:
    x_tilde, log_std, center = (t.detach().requires_grad_() for t in (x_tilde, log_std, center))
    rows = len(x_tilde)
    mask = torch.ones(x_tilde.shape[:2], dtype=torch.bool)
    steps = shifts("all", rows)
    group_loss(x_tilde, log_std, mask, center, log_std, mask, first=0, shifts=steps).mean().backward()


CODE = """
import torch
torch.set_num_threads({threads})
from benchmarks.pieces import *
inputs = [torch.randn(s) for s in {shapes}]
small = [torch.randn(s) for s in {small}]
{call}(*small); start()
{call}(*inputs)
"""


def compared(cases: dict, shapes: list[tuple[int, ...]], small: list[tuple[int, ...]], repeats: int) -> dict:
    """(seconds, low, high, peak MiB) of each case."""
    inputs = [torch.randn(shape) for shape in shapes]
    times = compare({name: lambda case=case: case(*inputs) for name, case in cases.items()}, repeats, now=clock)
    threads = torch.get_num_threads()
    code = {n: CODE.format(threads=threads, shapes=shapes, small=small, call=c.__name__) for n, c in cases.items()}
    return {name: (*times[name], peak_mib(code[name])) for name in cases}


def table(title: str, rows: dict[str, dict]) -> None:
    print(f"\n{title}\n\n| size | way | s, median (spread) | peak MiB |\n|---|---|---:|---:|")
    for size, found in rows.items():
        for way, (median, low, high, peak) in found.items():
            print(f"| {size} | {way} | {median:.3f} ({low:.3f} to {high:.3f}) | {peak:,.0f} |", flush=True)


def main() -> None:
    print(machine())
    rows = {}
    for vocab in (32_000, 128_256, 152_064):
        cases = {"whole logits": whole_logits, f"chunks of {chunk_size(vocab)} tokens": in_chunks}
        cases["chunks of 64 tokens"] = small_chunks
        shapes = [(N, D), (N, D), (vocab, D)]
        rows[f"V {vocab:,}"] = compared(cases, shapes, [(2, 8), (2, 8), (16, 8)], 3)
    table(f"loss: {N} tokens, D {D}, float32", rows)
    rows = {}
    for count in (4, 8, 16):
        cases = {"(B, B, T, D)": all_pairs, "shift by shift": by_shifts}
        rows[f"B {count}"] = compared(cases, [(count, 256, 256)] * 3, [(2, 4, 4)] * 3, 5)
    table("pairs: T 256, D 256, float32", rows)


if __name__ == "__main__":
    main()
