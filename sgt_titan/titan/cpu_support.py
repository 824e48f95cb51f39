"""Lets torchtitan 0.3.0 run on CPU and gloo.

torchtitan binds ``device_type`` and ``device_module`` at import and falls back to "cuda" where no accelerator
is found; ``torch.cpu`` lacks part of the device API it calls; and setting process-group timeouts uses a call
that gloo rejects. Nothing here has an effect on a machine with a GPU. ``tests/unit/titan/test_contract.py`` holds this
page to the torchtitan it was written against.
"""

from __future__ import annotations

import os
import resource
import sys
import types
from collections import defaultdict
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout


class CPUDeviceModule(types.ModuleType):
    """``torch.cpu`` plus the members of ``torch.cuda`` that torchtitan calls."""

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)

    def get_device_name(self, device=None) -> str:
        return "CPU"

    def get_device_properties(self, device=None) -> types.SimpleNamespace:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(name="CPU", total_memory=total)

    def device_count(self) -> int:
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def current_device(self) -> int:
        return 0

    def set_device(self, device) -> None: ...

    def synchronize(self, device=None) -> None: ...

    def empty_cache(self) -> None: ...

    def reset_peak_memory_stats(self, device=None) -> None: ...

    def memory_stats(self, device=None) -> dict:
        """The process's peak resident set as the only statistic there is."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return defaultdict(int, {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak})


def set_pg_timeouts(timeout: timedelta, parallel_dims) -> None:
    """torchtitan's ``set_pg_timeouts`` without ``barrier(device_ids=...)``, which gloo rejects."""
    dist.barrier()
    for mesh in parallel_dims.get_all_one_dimensional_meshes().values():
        _set_pg_timeout(timeout, mesh.get_group())
    _set_pg_timeout(timeout, None)


def install() -> None:
    """Point torchtitan at the CPU where there is no GPU. Idempotent; to be called before a trainer is built."""
    if torch.cuda.is_available():
        return
    import torchtitan.distributed.utils as dist_utils
    import torchtitan.tools.utils as tools

    if isinstance(tools.device_module, CPUDeviceModule):
        return
    found, device_module = tools.device_module, CPUDeviceModule("sgt_titan_cpu")
    # Modules imported so far have bound the names; those to come read them from torchtitan.tools.utils.
    for name, module in list(sys.modules.items()):
        if name.startswith("torchtitan"):
            if vars(module).get("device_module") is found:
                vars(module)["device_module"] = device_module
            if vars(module).get("device_type") == "cuda":
                vars(module)["device_type"] = "cpu"
    # "Peak flops undefined for: CPU, fallback to A100" would turn MFU on a CPU into fiction; metrics.py omits it.
    tools.get_peak_flops = lambda device_name: float("inf")
    dist_utils.set_pg_timeouts = set_pg_timeouts
