"""``run.task: finetune``: next-token training of the trunk itself, with the loop, data and checkpoints of an SGT's run.

What differs from ``trainer.py`` is the model, the loss of a microbatch, what is probed, and what a checkpoint holds.
Legend: B rows, T tokens, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torchtitan
import transformers
from torch.nn.functional import cross_entropy
from torchtitan.components.optimizer import ParamGroupConfig
from torchtitan.trainer import Trainer
from transformers import PretrainedConfig

import sgt_titan
from sgt_titan.config.load import dump
from sgt_titan.config.resolve import read_trunk
from sgt_titan.config.schema import Config
from sgt_titan.data.batch import BatchSource
from sgt_titan.data.tokenization import check_vocabulary, load_tokenizer
from sgt_titan.errors import UserError
from sgt_titan.export import MODEL
from sgt_titan.transform.trunk_files import TrunkFiles

from . import startup
from .checkpoint import SGTCheckpointManager
from .dataloader import SGTDataLoader, microbatch_inputs
from .finetune_model import FinetuneModel, parallelize_finetune
from .load_trunk import local_region, named_weights
from .metrics import SGTMetricsProcessor
from .optimizer import GuardedOptimizers
from .options import common
from .startup import check_output_dir
from .timeline import Timeline
from .trainer import SGTTrainer, same_on_all_ranks

TERMS = {"loss": "loss/total", "agreement": "utility/top1_accuracy"}


@dataclass
class Prepared:
    """As ``startup.Prepared``, of a trunk that need not be of a family that torchtitan has."""

    config: Config
    hf: PretrainedConfig
    files: TrunkFiles
    train_source: BatchSource
    probe_source: BatchSource
    fingerprints: dict[str, str]
    timeline: Timeline = field(default_factory=Timeline)

    def identity(self) -> dict[str, Any]:
        versions = {module.__name__: module.__version__ for module in (sgt_titan, torch, torchtitan, transformers)}
        return {"fingerprints": self.fingerprints, "hf_config": self.hf.to_dict(), "versions": versions}


class FinetuneMetrics(SGTMetricsProcessor):
    """The same log with the terms of a language model."""

    @dataclass(kw_only=True, slots=True)
    class Config(SGTMetricsProcessor.Config): ...

    reported, tags = tuple(TERMS), TERMS

    def line(self, terms: dict[str, float]) -> str:
        return f"loss {terms['loss']:.4f}  perplexity {_exp(terms['loss']):.3f}  right {terms['agreement']:.1%}"


class FinetuneCheckpoints(SGTCheckpointManager):
    """Holds the model's weights, frozen norms too, under their Hugging Face names."""

    @dataclass(kw_only=True, slots=True)
    class Config(SGTCheckpointManager.Config): ...

    def weights(self) -> dict[str, torch.Tensor]:
        return {MODEL + name: tensor.detach() for name, tensor in weights_once(self.model.lm).items()}


class FinetuneTrainer(SGTTrainer):
    """Trains a ``FinetuneModel``."""

    @dataclass(kw_only=True, slots=True)
    class Config(SGTTrainer.Config): ...

    def __init__(self, config: Config):
        from .config import follow_flags

        config = follow_flags(config)
        check_output_dir(config.prepared)
        Trainer.__init__(self, config)  # not SGTTrainer's, which loads a trunk beside an estimator
        prepared = config.prepared
        same_on_all_ranks(prepared.fingerprints)
        self.prepared, self.run = prepared, prepared.config
        load_weights(self.model_parts[0].lm, prepared.files)
        batch_mesh = self.parallel_dims.get_optional_mesh("batch")
        self.dp_rank, self.dp_size = (batch_mesh.get_local_rank(), batch_mesh.size()) if batch_mesh else (0, 1)
        self.metrics_processor.num_hardware_flops_per_token = self.metrics_processor.num_flops_per_token

    def evaluate_streams(self, tokens_BT: torch.Tensor, batch: dict[str, Any]):
        """Logits, loss and reported terms of a microbatch; summed over microbatches and ranks they are the step's."""
        logits_BTV = self.model_parts[0](tokens_BT)
        chosen_BT = batch["utility_BT"]
        target_N = tokens_BT.roll(-1, 1)[chosen_BT]
        logits_NV = logits_BTV[chosen_BT].float()
        count = max(batch["counts"].utility_tokens, 1)
        loss = cross_entropy(logits_NV, target_N, reduction="sum") / count
        right = (logits_NV.detach().argmax(-1) == target_N).sum() / count
        return logits_BTV, loss, {"loss": loss.detach(), "agreement": right}

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """Held-out loss, nats per token, and perplexity; the same on every rank. Collective."""
        total, rows = self.prepared.probe_source.global_batch_size, self.run.training.local_batch_size
        sums = torch.zeros(len(TERMS), device=self.device)
        for start in range(0, total, rows * self.dp_size):
            first = start + self.dp_rank * rows
            picks = [min(i, total - 1) for i in range(first, first + rows)]
            batch = microbatch_inputs(self.prepared.probe_source, 0, picks)
            batch = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            surplus_B1 = torch.arange(first, first + rows, device=self.device)[:, None] >= total
            batch["utility_BT"] = batch["utility_BT"] & ~surplus_B1
            _, _, terms = self.evaluate_streams(batch["input"], batch)
            sums += torch.stack([terms[name].float() for name in TERMS])
        loss = self.metrics_processor.reduced(sums)["loss"]
        return {"held-out loss": loss, "perplexity": _exp(loss)}


def to_trainer_config(config: Config) -> FinetuneTrainer.Config:
    """A resolved config with its data at hand, as torchtitan's.

    Raises:
        UserError: see ``prepare``.
    """
    prepared = prepare(config)
    config = prepared.config
    options = config.optimizer
    adamw = {
        "lr": options.lr,
        "betas": (options.beta1, options.beta2),
        "eps": options.eps,
        "weight_decay": options.weight_decay,
    }
    return common(
        FinetuneTrainer.Config,
        config,
        name="finetune",
        model=FinetuneModel.Config(hf=prepared.hf),
        parallelize=parallelize_finetune,
        optimizer=GuardedOptimizers.Config(
            param_groups=[ParamGroupConfig(pattern=r".", optimizer_name="AdamW", optimizer_kwargs=adamw)],
            implementation="fused" if startup.device_type() == "cuda" else "foreach",
            max_skipped=config.training.max_nonfinite_steps,
        ),
        dataloader=SGTDataLoader.Config(source=prepared.train_source),
        checkpoint=FinetuneCheckpoints.Config(
            enable=True,
            initial_load_model_only=False,
            identity=prepared.identity(),
            config_yaml=dump(config),
            asynchronous=config.checkpoint.asynchronous,
        ),
        metrics=FinetuneMetrics.Config,
        prepared=prepared,
    )


def prepare(config: Config) -> Prepared:
    """Read, check and tokenize whatever the run needs.

    Raises:
        UserError: anything wrong with the trunk, the tokenizer or the data.
    """
    config = copy.deepcopy(config)
    read_trunk(config)
    files = TrunkFiles(config.trunk.path)
    hf = startup.load_hf_config(files.path)
    with torch.device("meta"):
        model = FinetuneModel(FinetuneModel.Config(hf=hf))
    files.check({name: tuple(tensor.shape) for name, tensor in weights_once(model.lm).items()})
    for name, tensor in model.lm.named_parameters():
        if not tensor.requires_grad and name.endswith("weight") and not _final(name):
            gain = files.read(name)
            if gain.max() != gain.min() and not _per_head(name):
                raise UserError(
                    f"trunk.path: {files.path}: {name} has a gain per feature; run `sgt-titan conjform --plain` first"
                )
    tokenizer = load_tokenizer(config.trunk.path)
    check_vocabulary(tokenizer, hf.vocab_size)
    train_source, probe_source, data = startup.sources(config, tokenizer)
    return Prepared(config, hf, files, train_source, probe_source, {"trunk": files.fingerprint(), "data": data})


def _final(name: str) -> bool:
    """The last norm's gain may stay: a rotation gives it to the client."""
    return name in ("model.norm.weight", "transformer.ln_f.weight")


def _per_head(name: str) -> bool:
    return name.endswith(("q_norm.weight", "k_norm.weight"))


def weights_once(lm: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters by their Hugging Face name, a tied one under its first."""
    found, seen = {}, set()
    tied = lm.config.tie_word_embeddings
    for name, tensor in named_weights(lm).items():
        if id(tensor) in seen or (tied and name == "lm_head.weight"):
            continue
        seen.add(id(tensor))
        found[name] = tensor
    return found


@torch.no_grad()
def load_weights(lm: torch.nn.Module, files: TrunkFiles) -> None:
    """Each rank reads its shards."""
    for name, tensor in weights_once(lm).items():
        local, region = local_region(tensor)
        if local.numel():
            local.copy_(files.read(name, region))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
