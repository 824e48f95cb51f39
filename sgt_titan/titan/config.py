"""From our config of an SGT's run to torchtitan's."""

from __future__ import annotations

from torchtitan.config import TORCH_DTYPE_MAP
from transformers import PretrainedConfig

from sgt_titan.config.load import dump
from sgt_titan.config.schema import Config
from sgt_titan.transform.gaussian import Bounds

from . import startup
from .checkpoint import SGTCheckpointManager
from .dataloader import SGTDataLoader
from .float8 import to_float8_layers
from .metrics import SGTMetricsProcessor
from .model import SGTModel
from .optimizer import optimizer_config
from .options import common, dtypes
from .parallelize import parallelize_sgt
from .startup import PreparedSGT
from .trainer import SGTTrainer
from .trunks import Attention, build, build_body


def model_config(config: Config, hf: PretrainedConfig, scale: float) -> SGTModel.Config:
    """The composite model for a trunk; ``scale`` is the embedding table's per-feature std."""
    options, rate = config.estimator, config.objective.rate
    # Packed rows need a document mask, which SDPA cannot express and FlexAttention has no CPU backward for.
    attention: Attention = "flex" if config.data.packing else "sdpa"
    trunk = build(hf, attention)
    if config.trunk.float8 != "none":
        trunk = to_float8_layers(trunk, config.trunk.float8)
    return SGTModel.Config(
        trunk=trunk,
        body=build_body(hf, options.layers, attention),
        separate_bodies=options.body == "separate",
        bounds=Bounds(
            options.std_min,
            options.std_max,
            options.std_init,
            options.mean_bound,
            scale,
            closed=rate.tau if options.gate else 0.0,
        ),
        trunk_dtype=TORCH_DTYPE_MAP[dtypes(config)[0]],
        denoiser=build_body(hf, config.denoiser.layers, attention) if config.denoiser.layers else None,
        context=build_body(hf, rate.context_layers, attention) if rate.prior == "context" else None,
        prior=None if rate.prior == "broad" else rate,
        chunk_tokens=config.training.loss_chunk_tokens,
    )


def trainer_config(config: Config, model: SGTModel.Config, prepared: PreparedSGT | None) -> SGTTrainer.Config:
    """torchtitan's config of a run. Without ``prepared`` the model can be built, and nothing be trained."""
    return common(
        SGTTrainer.Config,
        config,
        name="sgt",
        model=model,
        parallelize=parallelize_sgt,
        optimizer=optimizer_config(
            config.optimizer, config.training.max_nonfinite_steps, fused=startup.device_type() == "cuda"
        ),
        dataloader=SGTDataLoader.Config(source=prepared.train_source if prepared else None),
        checkpoint=SGTCheckpointManager.Config(
            enable=prepared is not None,
            initial_load_model_only=False,
            identity=prepared.identity() if prepared else None,
            family=prepared.family if prepared else None,
            config_yaml=dump(config),
            asynchronous=config.checkpoint.asynchronous,
        ),
        metrics=SGTMetricsProcessor.Config,
        prepared=prepared,
    )


def sgt_config(config: Config) -> SGTTrainer.Config:
    """A resolved config of an SGT's run, with its trunk and data at hand, as torchtitan's.

    Raises:
        UserError: see ``startup.prepare_sgt``.
    """
    prepared = startup.prepare_sgt(config)
    model = model_config(prepared.config, prepared.hf, prepared.statistics.scale)
    return trainer_config(prepared.config, model, prepared)
