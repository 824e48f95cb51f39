"""GPUs in their usual machines, and what runs make of them.

The sources are the makers' data sheets. The flops of all but the A10 are also those of torchtitan's table, which names
the same pages (`tests/unit/plan/test_hardware.py`); B200, GB200 and MI300X were compared with public tables of those
sheets besides (2026-11-26). Nobody has measured them here.
"""

from __future__ import annotations

from dataclasses import dataclass

from sgt_titan.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of its node's links; bytes per second are of one direction."""

    flops: float  # dense bf16 with fp32 accumulation, per second
    memory: float  # bytes
    nvlink: float  # to the other GPUs of the node; PCIe where there is no NVLink
    network: float  # to other nodes: this GPU's share of what its usual machine has
    source: str = ""  # where flops, memory and links are from; dense is half of what sheets give "with sparsity"


GPUS = {
    "A10-24GB": Gpu(
        125e12, 24e9, 32e9, 1.56e9, "NVIDIA A10 data sheet (AWS has the A10G); PCIe 4 x16, no NVLink; 100 Gbit/s for 8"
    ),
    "L40S-48GB": Gpu(
        362e12, 48e9, 32e9, 12.5e9, "NVIDIA L40S data sheet; PCIe 4 x16, no NVLink; 400 Gbit/s for 4 (OVX)"
    ),
    "A100-40GB": Gpu(
        312e12, 40e9, 300e9, 25e9, "NVIDIA A100 data sheet; NVLink 600 GB/s both ways; 8 x 200 Gbit/s (DGX A100)"
    ),
    "A100-80GB": Gpu(
        312e12, 80e9, 300e9, 25e9, "NVIDIA A100 data sheet; NVLink 600 GB/s both ways; 8 x 200 Gbit/s (DGX A100)"
    ),
    "H100-80GB": Gpu(
        989e12, 80e9, 450e9, 50e9, "NVIDIA H100 SXM data sheet; NVLink 900 GB/s both ways; 8 x 400 Gbit/s (DGX H100)"
    ),
    "H200-141GB": Gpu(
        989e12, 141e9, 450e9, 50e9, "NVIDIA H200 SXM data sheet; NVLink 900 GB/s both ways; 8 x 400 Gbit/s (DGX H200)"
    ),
    "B200-180GB": Gpu(
        2250e12,
        180e9,
        900e9,
        50e9,
        "NVIDIA DGX B200 data sheet (1,440 GB of 8); NVLink 1.8 TB/s both ways; 8 x 400 Gbit/s",
    ),
    "GB200-186GB": Gpu(
        2500e12,
        186e9,
        900e9,
        50e9,
        "NVIDIA GB200 NVL72 data sheet, a 72nd; NVLink 1.8 TB/s both ways, here within a node alone",
    ),
    "MI300X-192GB": Gpu(
        1307e12, 192e9, 448e9, 50e9, "AMD MI300X data sheet; Infinity Fabric 7 x 128 GB/s both ways; 8 x 400 Gbit/s"
    ),
}
KINDS = {
    "a10": "A10-24GB",
    "l40s": "L40S-48GB",
    "a100-40g": "A100-40GB",
    "a100-80g": "A100-80GB",
    "h100": "H100-80GB",
    "h200": "H200-141GB",
    "b200": "B200-180GB",
    "gb200": "GB200-186GB",
    "mi300x": "MI300X-192GB",
}
NO_GPU = Gpu(float("nan"), float("inf"), float("nan"), float("nan"))  # sized for CPUs: nothing is promised

# Share of the peak flops that a step reaches, counting recomputation (HFU). The low end is a run that nobody has tuned;
# the high end what Megatron-LM reports for its best layouts on A100 (arXiv 2205.05198, 52% to 57%).
HFU_RANGE = (0.30, 0.55)
HFU = 0.4  # for a single figure
LINK_RANGE = (0.5, 0.9)  # share of a link that large collectives reach
EXPOSED_RANGE = (0.5, 0.0)  # share of the communication that does not hide behind the work

HOST_COPY = 10e9  # bytes per second from a GPU to the host's pinned memory, with all GPUs of a node copying
STORAGE = 1e9  # bytes per second that one node writes to shared storage: a slow parallel file system
# From a failure to the first step of the next attempt: until somebody knows, the queue, the checks, loading a trunk.
NOTICE_SECONDS, REQUEUE_SECONDS, PREFLIGHT_SECONDS, LOAD_SECONDS = 120.0, 60.0, 60.0, 360.0
START_SECONDS = NOTICE_SECONDS + REQUEUE_SECONDS + PREFLIGHT_SECONDS + LOAD_SECONDS

# Llama 3 405B lost 419 of its attempts to failures in 54 days on 2,048 nodes (arXiv 2407.21783, section 3.3.4).
NODE_MTBF_DAYS = 54 * 2048 / 419


def gpu_name(kind: str) -> str:
    """The table's name of ``--gpu KIND``.

    Raises:
        UserError: a kind that is not in the table.
    """
    by_any_name = KINDS | {name.lower(): name for name in GPUS}
    if kind.lower() not in by_any_name:
        raise UserError(f"--gpu: {kind!r} is unknown; known are {', '.join(KINDS)}")
    return by_any_name[kind.lower()]
