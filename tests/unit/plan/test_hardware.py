"""The table of GPUs against one that others keep from the same data sheets."""

from __future__ import annotations

import importlib.util

import pytest

from sgt_titan.plan.hardware import GPUS

# As drivers name them. torchtitan has no A10, and looks for an L40S in lower case.
NAMES = {
    "L40S-48GB": "nvidia l40s",
    "A100-40GB": "NVIDIA A100-SXM4-40GB",
    "A100-80GB": "NVIDIA A100-SXM4-80GB",
    "H100-80GB": "NVIDIA H100 80GB HBM3",
    "H200-141GB": "NVIDIA H200",
    "B200-180GB": "NVIDIA B200",
    "GB200-186GB": "NVIDIA GB200",
    "MI300X-192GB": "AMD Instinct MI300X",
}


@pytest.fixture(scope="module")
def utils():
    """A copy of torchtitan's module of its own: on a CPU ours has other flops put into the one that is shared."""
    spec = importlib.util.find_spec("torchtitan.tools.utils")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_torchtitan_s(name, monkeypatch, utils):
    monkeypatch.setattr(utils.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))  # lspci
    assert GPUS[name].flops == pytest.approx(utils.get_peak_flops(NAMES[name]), rel=0.01)


def test_every_gpu_names_its_source():
    assert set(GPUS) == {*NAMES, "A10-24GB"}
    assert all("data sheet" in gpu.source for gpu in GPUS.values())
