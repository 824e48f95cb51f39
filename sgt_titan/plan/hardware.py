"""The GPUs of the usual 8-GPU machines, from their makers' data sheets, and what runs make of them."""

from __future__ import annotations

from dataclasses import dataclass

from sgt_titan.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of its node's links; bytes per second are of one direction."""

    flops: float  # dense bf16 with fp32 accumulation, per second
    memory: float  # bytes
    nvlink: float  # to the other GPUs of the node
    network: float  # to other nodes: 8 x 200 or 8 x 400 Gbit/s a node


# NVIDIA A100 data sheet (312 Tflop/s, NVLink 600 GB/s both ways), H100 SXM and H200 SXM data sheets (1,979 Tflop/s with
# sparsity, half of it dense; NVLink 900 GB/s both ways; 80 and 141 GB); DGX A100 and DGX H100 for the networks.
GPUS = {
    "A100-40GB": Gpu(312e12, 40e9, 300e9, 25e9),
    "A100-80GB": Gpu(312e12, 80e9, 300e9, 25e9),
    "H100-80GB": Gpu(989e12, 80e9, 450e9, 50e9),
    "H200-141GB": Gpu(989e12, 141e9, 450e9, 50e9),
}
KINDS = {"a100-40g": "A100-40GB", "a100-80g": "A100-80GB", "h100": "H100-80GB", "h200": "H200-141GB"}
NO_GPU = Gpu(float("nan"), float("inf"), float("nan"), float("nan"))  # sized for CPUs: nothing is promised

# Share of the peak flops that a step reaches, counting recomputation (HFU). The low end is a run that nobody has tuned;
# the high end what Megatron-LM reports for its best layouts on A100 (arXiv 2205.05198, 52% to 57%).
HFU_RANGE = (0.30, 0.55)
HFU = 0.4  # for a single figure
LINK_RANGE = (0.5, 0.9)  # share of a link that large collectives reach
EXPOSED_RANGE = (0.5, 0.0)  # share of the communication that does not hide behind the work

HOST_COPY = 10e9  # bytes per second from a GPU to the host's pinned memory, with all GPUs of a node copying
STORAGE = 1e9  # bytes per second that one node writes to shared storage: a slow parallel file system
START_SECONDS = 600.0  # from a failure to the first step of the next attempt: noticing, requeue, loading a trunk

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
