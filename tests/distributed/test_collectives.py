"""What a step sends: every frozen layer is gathered twice, whatever the number of streams, and nothing of the trunk is
ever reduced.

FSDP's collectives are recorded where they leave FSDP, with the parameters they carry; those of all process groups where
they enter torch.distributed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

LAYERS = 2  # of the trunk that `small` trains against
ROWS, TP = "--training.local_batch_size", "--parallelism.tensor_parallel_degree"
SHORT = ("--training.steps", "2", "--metrics.probe_every", "0")


def record_collectives(rank: int, folder: Path) -> None:
    """Write collectives-RANK.json: for each step, FSDP's (kind, parameters, bytes an element) and all kinds counted."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as fsdp
    from torch.distributed.tensor import DTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    from sgt_titan.titan.trainer import SGTTrainer

    class Collectives(TorchDispatchMode):
        """Counts what reaches a process group, by operator."""

        def __init__(self):
            super().__init__()
            self.counts = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if DTensor in types:
                return NotImplemented  # it comes back as what it does to its local part
            if func.namespace in ("c10d", "_c10d_functional"):
                self.counts[func._opname] += 1
            return func(*args, **(kwargs or {}))

    steps: dict[int, dict[str, list]] = {}
    now: dict[str, list] = {"fsdp": []}

    names: dict[int, str] = {}

    def parameters(fsdp_params) -> list[str]:
        infos = [p._module_info for p in fsdp_params]
        return [f"{names.get(id(info.module))}.{info.param_name}" for info in infos]

    gather, reduce = fsdp.foreach_all_gather, fsdp.foreach_reduce

    def foreach_all_gather(fsdp_params, *args, **kwargs):
        result = gather(fsdp_params, *args, **kwargs)
        if result is not None:
            elements = [p._orig_size.numel() for p in fsdp_params]
            sizes = [n * p.sharded_param.element_size() for n, p in zip(elements, fsdp_params, strict=True)]
            now["fsdp"].append(["gather", parameters(fsdp_params), sum(sizes) / sum(elements)])
        return result

    def foreach_reduce(fsdp_params, *args, **kwargs):
        now["fsdp"].append(["reduce", parameters(fsdp_params), 4.0])
        return reduce(fsdp_params, *args, **kwargs)

    fsdp.foreach_all_gather, fsdp.foreach_reduce = foreach_all_gather, foreach_reduce

    original = SGTTrainer.train_step

    def train_step(self, data_iterator):
        now["fsdp"] = []
        for name, module in self.model_parts[0].named_modules():
            names[id(module)] = re.sub(r"_checkpoint_wrapped_module\.|_orig_mod\.", "", name)
        with Collectives() as seen:
            original(self, data_iterator)
        frozen = [p for p in self.model_parts[0].trunk.parameters() if p.grad is not None or p.requires_grad]
        steps[self.step] = {**now, "counts": seen.counts, "trunk_gradients": len(frozen)}
        (folder / f"collectives-{rank}.json").write_text(json.dumps(steps))

    SGTTrainer.train_step = train_step


LAYOUTS = {  # ranks, options, gathers of the pair exchange
    "FSDP2 2, recomputed": (2, (ROWS, "2", "--activation_checkpoint.mode", "full"), 0),
    "FSDP2 2, float8": (2, (ROWS, "2", "--trunk.float8", "weights"), 0),
    "FSDP2 2, untied, pairs across ranks": (2, (ROWS, "1", "--training.global_batch_size", "2"), 3),
    "FSDP2 2 x TP 2": (4, (ROWS, "2", TP, "2"), 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gathers_per_layer_and_no_reduction_of_the_trunk(layout, small, trunk_dir):
    ranks, options, exchanges = LAYOUTS[layout]
    layers = LAYERS
    if "untied" in layout:
        options, layers = (*options, "--trunk.path", str(trunk_dir("llama"))), 3
    run = small.finish(ranks, *SHORT, *options, hooks=(record_collectives,))
    for rank in range(ranks):
        step = json.loads((run.folder / f"collectives-{rank}.json").read_text())["2"]
        gathered = Counter(name for kind, names, _ in step["fsdp"] if kind == "gather" for name in names)
        reduced = Counter(name for kind, names, _ in step["fsdp"] if kind == "reduce" for name in names)
        for layer in range(layers):
            counts = {n for name, n in gathered.items() if name.startswith(f"trunk.layers.{layer}.")}
            assert counts == {2}, (layer, gathered)
        # A matrix in float8 is a byte a number, and four a row of 128 or more for its scale; norms are few.
        sizes = [size for _, names, size in step["fsdp"] if names[0].startswith("trunk.layers.")]
        assert all(1 < size < 1.1 for size in sizes) if "float8" in layout else set(sizes) == {4.0}
        # Table, norm and lm_head are needed in the forward pass alone; tied, the table and lm_head are one parameter.
        ends = {name: n for name, n in gathered.items() if name.startswith("trunk.") and ".layers." not in name}
        assert set(ends.values()) == {1} and len(ends) == (3 if "untied" in layout else 2), ends
        assert reduced and all(name.startswith("estimator.") for name in reduced), reduced
        assert set(reduced.values()) == {1}
        assert step["trunk_gradients"] == 0
        # Nothing else gathers or scatters on plain tensors; tensor parallelism's go through DTensor.
        kinds = Counter(kind for kind, _, _ in step["fsdp"])
        assert step["counts"]["_allgather_base_"] == kinds["gather"] + exchanges + ("TP" in layout)
        assert step["counts"]["_reduce_scatter_base_"] == kinds["reduce"] + (2 if exchanges else 0)
