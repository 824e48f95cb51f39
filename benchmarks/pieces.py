"""Parts of a step against the obvious way to write them, each in one run: ``python benchmarks/pieces.py [PART]``.

    loss      Eq. 3 from hidden states in chunks of tokens, against whole logits
    pairs     the MI term over all pairs shift by shift, against a (B, B, T, D) tensor

Times alternate and are medians; memory is what torch holds at most beyond the inputs. Minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import Tables, add_out, written
from benchmarks.timing import clock, compare, machine, peak_bytes
from sgt_titan.objectives.distillation import EAGER, attach, chunk_size, compiled_kernels, distil
from sgt_titan.objectives.mutual_information import group_loss, shifts

N, D = 1024, 256


def whole_logits(student_ND: torch.Tensor, teacher_ND: torch.Tensor, weight_VD: torch.Tensor) -> None:
    """Softmax and cross-entropy of torch on whole logits."""
    student_ND = student_ND.detach().requires_grad_()
    with torch.no_grad():
        target_NV = (teacher_ND @ weight_VD.T).float().softmax(-1)
    torch.nn.functional.cross_entropy((student_ND @ weight_VD.T).float(), target_NV).backward()


def in_chunks(student_ND, teacher_ND, weight_VD, chunk: int = 0, kernels=EAGER) -> None:
    student_ND = student_ND.detach().requires_grad_()
    soft = attach(distil(student_ND, teacher_ND, weight_VD, chunk=chunk, kernels=kernels), student_ND)
    soft.cross_entropy_N.mean().backward()


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


def compared(cases: dict, shapes: list[tuple[int, ...]], repeats: int) -> dict:
    """(median, low, high, peak MiB) of each case: seconds, and what torch holds at most beyond the inputs."""
    inputs = [torch.randn(shape) for shape in shapes]
    calls = {name: lambda case=case: case(*inputs) for name, case in cases.items()}
    times = compare(calls, repeats, now=clock)
    return {name: (*times[name], peak_bytes(call) / 2**20) for name, call in calls.items()}


COLUMNS = {"size": "", "way": "", "s, median (spread)": ".3f", "peak MiB": ",.0f"}


def show(tables: Tables, size: str, found: dict) -> None:
    for way, (*times, peak) in found.items():
        tables.row(size, way, tuple(times), peak)


def loss(tables: Tables) -> None:
    tables.start(f"loss: {N} tokens, D {D}, float32", COLUMNS)
    fused = compiled_kernels()
    for vocab in (32_000, 128_256, 152_064):
        cases = {"whole logits": whole_logits}
        for chunk in (chunk_size(vocab, "cuda"), chunk_size(vocab, "cpu")):
            cases[f"chunks of {chunk}"] = lambda *inputs, chunk=chunk: in_chunks(*inputs, chunk)
            cases[f"chunks of {chunk}, compiled"] = lambda *inputs, chunk=chunk: in_chunks(*inputs, chunk, fused)
        show(tables, f"V {vocab:,}", compared(cases, [(N, D), (N, D), (vocab, D)], 3))


def pairs(tables: Tables) -> None:
    tables.start("pairs: T 256, D 256, float32", COLUMNS)
    for count in (4, 8, 16):
        cases = {"(B, B, T, D)": all_pairs, "shift by shift": by_shifts}
        show(tables, f"B {count}", compared(cases, [(count, 256, 256)] * 3, 5))


PARTS = {"loss": loss, "pairs": pairs}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all")
    add_out(parser)
    words = parser.parse_args()
    with written(words.out, machine()) as found:
        for part in PARTS if words.part == "all" else (words.part,):
            PARTS[part](found)
