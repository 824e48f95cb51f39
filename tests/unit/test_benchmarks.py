"""Every way of the benchmark makes a step, and the work it is said to do is that of the model it builds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import arms
from sgt_titan.titan.flops import hardware_flops_per_token

SIZE = replace(arms.CPU, width=128, layers=2, hidden=256, vocab=500, length=16)


@pytest.mark.parametrize("name", [name for name in arms.ARMS if "compile" not in name])
def test_an_arm_makes_a_step(name, gloo):
    arm = arms.ARMS[name](SIZE)
    arm.step()
    assert arm.flops > 0


@pytest.mark.parametrize("float8", ["weights", "products"])
def test_float8_is_a_way_of_its_own(float8, gloo):
    model, *_ = arms.model_of(SIZE, chunk=8, recompute="none", compiled=False, float8=float8)
    types = {p.dtype for p in model.trunk.layers.parameters()}
    assert torch.float8_e4m3fn in types
    arms.ours(SIZE, chunk=8, float8=float8).step()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_work_is_counted_as_the_model_counts_it(recompute, gloo):
    """Norms and biases, which the benchmark leaves out, are 1% here."""
    model, *_ = arms.model_of(SIZE, chunk=0, recompute=recompute, compiled=False, float8="none")
    full = recompute == "full"
    expected = hardware_flops_per_token(model, full_recompute=full) * SIZE.tokens
    assert arms.work(SIZE, recompute=full) == pytest.approx(expected, rel=0.02)
