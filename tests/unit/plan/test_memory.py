"""The estimated part of ``plan``: what a step allocates, traced with fake tensors through the real model and loss.

Fake tensors have shapes and storages but no data, so a rank of 512 with all of its width is traced on a laptop. Layers
are few: what grows with them is found from two counts. Attention is SDPA here and FlexAttention on a GPU; they keep
the same. The trace runs in a process of its own (this file as a script): process group and device are global.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from sgt_titan.config.load import load
from sgt_titan.config.resolve import resolve
from sgt_titan.config.trunk import read_trunk
from sgt_titan.plan import plan

REPO = Path(__file__).resolve().parents[3]
KEEP_ALL = ["--activation_checkpoint.mode", "none"]
CASES = {  # name -> config, overrides, layers
    "one GPU, 1": ("llama3_1b", [], 1),
    "one GPU, 3": ("llama3_1b", [], 3),
    "512 GPUs, recomputed, 2": ("llama3_70b_64x8", [], 2),
    "512 GPUs, recomputed, float8, 2": ("llama3_70b_64x8", ["--trunk.float8", "weights"], 2),
    "one GPU, float8, 1": ("llama3_1b", ["--trunk.float8", "weights"], 1),
    "512 GPUs, 1": ("llama3_70b_64x8", KEEP_ALL, 1),
    "512 GPUs, 3": ("llama3_70b_64x8", KEEP_ALL, 3),
}


def prepared(name: str, overrides: list[str], layers: int):
    config = load(str(REPO / "train_configs" / f"{name}.yaml"), overrides)
    config = resolve(config, world_size=config.cluster.nodes * config.cluster.gpus_per_node)
    return config, read_trunk(config, weights=False) | {"num_hidden_layers": layers}


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("traced")
    env = os.environ | {"SGT_TRUNKS": str(folder / "nothing"), "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "peaks.json")],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "peaks.json").read_text())


def planned(case: str, monkeypatch):
    monkeypatch.setenv("SGT_TRUNKS", "nothing")
    return plan(*prepared(*CASES[case])).memory


@pytest.mark.parametrize("case", CASES)
def test_a_step_allocates_what_is_planned(case, traced, monkeypatch):
    """Never more than planned, and no less than three quarters of it."""
    memory = planned(case, monkeypatch)
    assert traced[case]["before"] == memory.trunk + memory.estimator + memory.buffers
    step = memory.gathered + memory.saved + memory.transform + max(memory.layer, memory.logits)
    assert 0.75 * step < traced[case]["peak"] - traced[case]["before"] < step


@pytest.mark.parametrize("case", ["one GPU", "512 GPUs"])
def test_a_layer_keeps_what_is_planned(case, traced, monkeypatch):
    few, many = f"{case}, 1", f"{case}, 3"
    kept = traced[many]["after forward"] - traced[few]["after forward"]
    shards = planned(many, monkeypatch).trunk - planned(few, monkeypatch).trunk
    buffers = planned(many, monkeypatch).buffers - planned(few, monkeypatch).buffers
    expected = planned(many, monkeypatch).saved - planned(few, monkeypatch).saved
    assert kept - shards - buffers == pytest.approx(expected, rel=0.05)


def trace(name: str, overrides: list[str], layers: int) -> dict[str, int]:
    """Bytes alive before a step, after its forward pass, and at its peak, on rank 0."""
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torchtitan.distributed import utils as dist_utils
    from transformers import CONFIG_MAPPING

    from sgt_titan.data.batch import Counts
    from sgt_titan.objectives import whole_vocabulary
    from sgt_titan.objectives.distillation import chunk_size
    from sgt_titan.titan import cpu_support
    from sgt_titan.titan.build import meta_model, parallelize
    from sgt_titan.titan.pairs import PairGroups

    class Storages(TorchDispatchMode):
        """Storages that are alive, and the most they ever held. FSDP2 frees by resizing, so sizes are read again."""

        def __init__(self):
            super().__init__()
            self.alive, self.peak = {}, 0

        def add(self, tensor) -> None:
            tensor = getattr(tensor, "_local_tensor", tensor)
            tensor = getattr(tensor, "elem", tensor)
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, lambda _: self.alive.pop(key, None))

        def total(self) -> int:
            found = [reference() for reference in list(self.alive.values())]
            return sum(storage.nbytes() for storage in found if storage is not None)

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf)
            self.peak = max(self.peak, self.total())
            return result

    cpu_support.install()
    config, trunk = prepared(name, overrides, layers)
    config.trunk.dtype, config.data.packing = "bfloat16", False
    hf = CONFIG_MAPPING[trunk["model_type"]].from_dict(trunk)
    world_size = config.cluster.nodes * config.cluster.gpus_per_node
    # The trace runs on a CPU, whose automatic chunk is smaller.
    vocabulary = -(-trunk["vocab_size"] // config.parallelism.tensor_parallel_degree)
    config.training.loss_chunk_tokens = config.training.loss_chunk_tokens or chunk_size(vocabulary, "cuda")
    whole_vocabulary.BLOCK_CPU = config.training.loss_chunk_tokens * vocabulary  # as on a GPU: no blocks
    dist_utils.init_fake_mode(world_size)
    try:
        model, trainer, dims = meta_model(config, hf, scale=1.0, world_size=world_size)
        parallelize(model, trainer, dims)
        rows, length, width = config.training.local_batch_size, config.training.seq_len, trunk["hidden_size"]
        with FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
            model.to_empty(device="cpu").train()
            model.tie()
            for tensor in (*model.parameters(), *model.buffers()):
                storages.add(tensor)
            before, storages.peak = storages.total(), 0
            part = model.sequence_slice(length)
            at = torch.arange(rows * length)
            pairs = PairGroups(config.objective.mi_group)
            tokens_BT = torch.zeros(rows, length, dtype=torch.int64)
            mask_BT = torch.ones(rows, length, dtype=torch.bool)
            streams = model(
                tokens_BT,
                positions_BT=tokens_BT,
                attention_masks=None,
                obfuscate_BT=mask_BT,
                utility_BT=(at // length, at % length),  # a mask's size is unknown without data; its places are not
                noise_BTD=torch.randn(rows, length, width)[:, part],
                pairs=pairs,
            )
            after_forward = storages.total()
            loss, _ = trainer.loss.build()(
                streams,
                None,
                step=1 + max(config.objective.mi.ramp_steps, config.objective.rate.ramp_steps),  # every term at work
                obfuscate_BT=mask_BT,
                counts=Counts(rows * length, rows * length, rows, rows * length),
                median_norm=1.0,
                bounds=model.bounds,
                pairs=pairs,
                part=part,
                tp_size=dims.tp,
            )
            loss.backward()
        return {"before": before, "after forward": after_forward, "peak": storages.peak}
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({case: trace(*arguments) for case, arguments in CASES.items()}))
