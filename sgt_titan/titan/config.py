"""From our config to torchtitan's, and back from torchtitan's flags.

One table says which options are torchtitan's. ``to_trainer_config`` writes them, ``follow_flags`` reads them back when
the run was started by torchtitan's own launcher with flags of its own.
"""

from __future__ import annotations

import copy
import os
import sys
from functools import reduce
from typing import Any

from torchtitan.components.optimizer import LRSchedulersContainer
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.config.configs import CommConfig, CompileConfig, DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.protocols.model_spec import ModelSpec
from transformers import PretrainedConfig

from sgt_titan.config.load import dump, read_trunk, resolve, validate
from sgt_titan.config.schema import Config
from sgt_titan.transform.gaussian import Bounds

from . import cpu_support, startup
from .checkpoint import SGTCheckpointManager
from .dataloader import SGTDataLoader
from .float8 import to_float8_layers
from .loss import SGTLoss
from .metrics import SGTMetricsProcessor
from .model import SGTModel
from .optimizer import optimizer_config
from .parallelize import parallelize_sgt
from .startup import Prepared
from .trainer import SGTTrainer
from .trunks import build, build_body

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
    "compile.enable": "compile.enable",
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


def model_config(config: Config, hf: PretrainedConfig, scale: float) -> SGTModel.Config:
    """The composite model for a trunk; ``scale`` is the embedding table's per-feature std."""
    options = config.estimator
    # Packed rows need a document mask, which SDPA cannot express and FlexAttention has no CPU backward for.
    attention = "flex" if config.data.packing else "sdpa"
    trunk = build(hf, attention)
    if config.trunk.float8 != "none":
        trunk = to_float8_layers(trunk, config.trunk.float8)
    return SGTModel.Config(
        trunk=trunk,
        body=build_body(hf, options.layers, attention),
        separate_bodies=options.body == "separate",
        bounds=Bounds(options.std_min, options.std_max, options.std_init, options.mean_bound, scale),
        trunk_dtype=TORCH_DTYPE_MAP[dtypes(config)[0]],
        chunk_tokens=config.training.loss_chunk_tokens,
    )


def trainer_config(config: Config, model: SGTModel.Config, prepared: Prepared | None) -> SGTTrainer.Config:
    """torchtitan's config of a run. Without ``prepared`` the model can be built, and nothing be trained."""
    recompute = {"none": None, "selective": SelectiveAC.Config(), "full": FullAC.Config()}
    result = SGTTrainer.Config(
        model_spec=ModelSpec(
            name="sgt",
            flavor=config.run.name,
            model=model,
            parallelize_fn=parallelize_sgt,
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
        optimizer=optimizer_config(
            config.optimizer, config.training.max_nonfinite_steps, fused=startup.device_type() == "cuda"
        ),
        lr_scheduler=LRSchedulersContainer.Config(),
        loss=SGTLoss.Config(objective=config.objective),
        dataloader=SGTDataLoader.Config(source=prepared.train_source if prepared else None),
        checkpoint=SGTCheckpointManager.Config(
            enable=prepared is not None,
            initial_load_model_only=False,
            identity=prepared.identity() if prepared else None,
            family=prepared.family if prepared else None,
            config_yaml=dump(config),
            asynchronous=config.checkpoint.asynchronous,
        ),
        activation_checkpoint=recompute[config.activation_checkpoint.mode],
        compile=CompileConfig(components=["model"]),
        metrics=SGTMetricsProcessor.Config(
            total_steps=config.training.steps,
            progress=config.metrics.progress,
            disable_color_printing=not sys.stderr.isatty(),
        ),
        comm=CommConfig(),
        debug=DebugConfig(print_config=False),
        prepared=prepared,
    )
    result.validator.enable = False
    set_shared(result, config)
    return result


def set_shared(result: SGTTrainer.Config, config: Config) -> None:
    """Write the options that are torchtitan's."""
    for ours, theirs in SHARED.items():
        _set(result, theirs, _get(config, ours))


def to_trainer_config(config: Config) -> SGTTrainer.Config:
    """A resolved config, with its trunk and data at hand, as torchtitan's.

    Raises:
        UserError: see ``startup.prepare``.
    """
    cpu_support.install()
    if config.run.task == "finetune":
        from . import finetune

        return finetune.to_trainer_config(config)
    prepared = startup.prepare(config)
    model = model_config(prepared.config, prepared.hf, prepared.statistics.scale)
    return trainer_config(prepared.config, model, prepared)


def follow_flags(config: SGTTrainer.Config) -> SGTTrainer.Config:
    """``config`` itself, or one made anew if torchtitan's flags changed what ours decided.

    Raises:
        UserError: the flags do not fit the trunk, the number of ranks or each other; see ``startup.prepare``.
    """
    ours = copy.deepcopy(config.prepared.config)
    for mine, theirs in SHARED.items():
        _set(ours, mine, _get(config, theirs))
    if dump(ours) == dump(config.prepared.config):
        return config
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    ours = resolve(ours, world_size=ranks)
    validate(ours, ranks, read_trunk(ours), device=startup.device_type())
    return to_trainer_config(ours)
