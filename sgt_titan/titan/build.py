"""The model of a config without its weights or data, as torchtitan's trainer would build it: for arithmetic, tests,
benchmarks. The trainer itself builds its own.
"""

from __future__ import annotations

import torch
from torchtitan.distributed import ParallelDims
from transformers import PretrainedConfig

from sgt_titan.config.schema import Config

from .config import model_config, trainer_config
from .model import SGTModel
from .parallelize import parallelize_sgt
from .trainer import SGTTrainer


def meta_model(
    config: Config, hf: PretrainedConfig, *, scale: float, world_size: int
) -> tuple[SGTModel, SGTTrainer.Config, ParallelDims]:
    """On the meta device, whole; ``parallelize`` makes it a rank's. There is a process group of ``world_size`` ranks.

    Args:
        config: resolved.
        hf: the trunk's.
        scale: the embedding table's std per feature.
    """
    options = model_config(config, hf, scale)
    trainer = trainer_config(config, options, prepared=None)
    options.update_from_config(config=trainer)
    dims = ParallelDims.from_config(trainer.parallelism, world_size)
    dims.build_mesh()
    with torch.device("meta"):
        return options.build(), trainer, dims


def parallelize(model: SGTModel, trainer: SGTTrainer.Config, dims: ParallelDims) -> SGTModel:
    """Tensor parallelism, recomputation, compilation and FSDP2, as ``trainer`` has them; in place."""
    return parallelize_sgt(
        model,
        parallel_dims=dims,
        training=trainer.training,
        parallelism=trainer.parallelism,
        compile_config=trainer.compile,
        ac_config=trainer.activation_checkpoint,
        dump_folder="",
    )
