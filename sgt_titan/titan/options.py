"""The options of torchtitan's trainer, whatever it trains.

One table says which of ours are torchtitan's: ``common`` writes them, ``read_back`` reads what its flags made of them.
"""

from __future__ import annotations

import sys
from functools import reduce
from typing import Any

from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.config.configs import CommConfig, CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.protocols.model_spec import ModelSpec

from sgt_titan.config.schema import Config

from . import startup
from .loss import SGTLoss
from .tokenizer import NoTokenizer

# ours -> torchtitan's
SHARED = {
    "run.output_dir": "dump_folder",
    "run.seed": "debug.seed",
    "run.deterministic": "debug.deterministic",
    "trunk.path": "hf_assets_path",
    "training.steps": "training.steps",
    "training.seq_len": "training.seq_len",
    "training.local_batch_size": "training.local_batch_size",
    "training.global_batch_size": "training.global_batch_size",
    "training.max_norm": "training.max_norm",
    **{
        f"parallelism.{name}": f"parallelism.{name}"
        for name in (
            "data_parallel_replicate_degree",
            "data_parallel_shard_degree",
            "tensor_parallel_degree",
            "enable_sequence_parallel",
            "expert_parallel_degree",
            "fsdp_reshard_after_forward",
        )
    },
    **{
        f"lr_scheduler.{name}": f"lr_scheduler.{name}"
        for name in ("warmup_steps", "decay_ratio", "decay_type", "min_lr_factor")
    },
    "checkpoint.interval": "checkpoint.interval",
    "checkpoint.keep_latest": "checkpoint.keep_latest_k",
    "metrics.log_every": "metrics.log_freq",
    "metrics.tensorboard": "metrics.enable_tensorboard",
    "metrics.wandb": "metrics.enable_wandb",
    "comm.init_timeout_seconds": "comm.init_timeout_seconds",
    "comm.train_timeout_seconds": "comm.train_timeout_seconds",
}


def _get(tree: Any, key: str) -> Any:
    return reduce(getattr, key.split("."), tree)


def _set(tree: Any, key: str, value: Any) -> None:
    *path, last = key.split(".")
    setattr(reduce(getattr, path, tree), last, value)


def dtypes(config: Config) -> tuple[str, str]:
    """Type of the trunk, and of the estimator's arithmetic, with "auto" decided by the device."""
    default = "bfloat16" if startup.device_type() == "cuda" else "float32"
    trunk = default if config.trunk.dtype == "auto" else config.trunk.dtype
    compute = config.training.mixed_precision_param
    return trunk, trunk if compute == "auto" else compute


def common(kind: type, config: Config, *, name: str, model, parallelize, metrics: type, **own):
    """A trainer's config, of type ``kind``; ``own`` are the parts that tasks do not share."""
    recompute = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}
    result = kind(
        model_spec=ModelSpec(
            name=name,
            flavor=config.run.name,
            model=model,
            parallelize_fn=parallelize,
            pipelining_fn=None,
            post_optimizer_build_fn=None,
            state_dict_adapter=None,
        ),
        training=TrainingConfig(
            # CUDA graphs stay off until noise drawn under graph replay is proven fresh.
            disable_cuda_graphs=True,
            mixed_precision_param=dtypes(config)[1],
        ),
        # "spmd_types" wants every parameter as a DTensor on the full mesh; the heads' shardings are per axis.
        parallelism=ParallelismConfig(spmd_backend="partial_dtensor"),
        lr_scheduler=LRSchedulersContainer.Config(),
        loss=SGTLoss.Config(objective=config.objective),
        activation_checkpoint=recompute[config.activation_checkpoint.mode],
        compile=CompileConfig(components=["model"]),
        metrics=metrics(
            total_steps=config.training.steps,
            progress=config.metrics.progress,
            disable_color_printing=not sys.stderr.isatty(),
        ),
        tokenizer=NoTokenizer.Config(),
        comm=CommConfig(),
        debug=DebugConfig(print_config=False),
        **own,
    )
    result.validator.enable = False
    for ours, theirs in SHARED.items():
        _set(result, theirs, _get(config, ours))
    result.compile.enable = config.compile.enable is True  # "auto" begins without
    return result


def read_back(ours: Config, result) -> None:
    """Write into ``ours`` what a trainer's config says now."""
    for mine, theirs in SHARED.items():
        _set(ours, mine, _get(result, theirs))
    if result.compile.enable != (ours.compile.enable is True):
        ours.compile.enable = result.compile.enable
