"""``run.task: finetune``: next-token training of the trunk itself, with the loop, data and checkpoints of an SGT's run.

What it says to ``loop.py`` is the model, the loss of a microbatch, what is probed, and what a checkpoint holds.
Legend: B rows, T tokens, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from sgt_titan.config.load import dump
from sgt_titan.config.schema import Config
from sgt_titan.config.trunk import read_trunk
from sgt_titan.data.tokenization import check_vocabulary, load_tokenizer
from sgt_titan.errors import UserError
from sgt_titan.export import MODEL
from sgt_titan.transform.trunk_files import TrunkFiles

from . import startup
from .checkpoint import SGTCheckpointManager
from .dataloader import SGTDataLoader
from .finetune_model import FinetuneModel, parallelize_finetune
from .load_trunk import local_region, named_weights
from .loop import Loop
from .metrics import SGTMetricsProcessor
from .optimizer import adamw, guarded_adamw
from .options import common
from .startup import Prepared

TERMS = {"loss": "loss/total", "agreement": "utility/top1_accuracy"}


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


class FinetuneTrainer(Loop):
    """Trains a ``FinetuneModel``."""

    @dataclass(kw_only=True, slots=True)
    class Config(Loop.Config): ...

    def __init__(self, config: Config):
        super().__init__(config)
        load_weights(self.model_parts[0].lm, self.prepared.files)
        self.metrics_processor.num_hardware_flops_per_token = self.metrics_processor.num_flops_per_token

    def evaluate_streams(self, tokens_BT: torch.Tensor, batch: dict[str, Any]):
        """Logits, loss and reported terms of a microbatch."""
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
        sums = torch.stack([terms for _, _, terms in self.probed()]).sum(0)
        loss = self.metrics_processor.reduced(sums)["loss"]
        return {"held-out loss": loss, "perplexity": _exp(loss)}


def finetune_config(config: Config) -> FinetuneTrainer.Config:
    """A resolved config with its data at hand, as torchtitan's.

    Raises:
        UserError: see ``prepare_finetune``.
    """
    prepared = prepare_finetune(config)
    config, optimizer = prepared.config, prepared.config.optimizer
    return common(
        FinetuneTrainer.Config,
        config,
        name="finetune",
        model=FinetuneModel.Config(hf=prepared.hf),
        parallelize=parallelize_finetune,
        optimizer=guarded_adamw(
            [adamw(r".", optimizer, optimizer.weight_decay)],
            config.training.max_nonfinite_steps,
            fused=startup.device_type() == "cuda",
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


def prepare_finetune(config: Config) -> Prepared:
    """Read, check and tokenize whatever a fine-tuning needs: of a trunk that need not be of a trained family.

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
                    f"trunk.path: {files.path}: {name} has a gain per feature; "
                    "run `sgt-titan conjformer convert --plain` first"
                )
    tokenizer = load_tokenizer(config.trunk.path)
    check_vocabulary(tokenizer, hf.vocab_size)
    train_source, probe_source, data = startup.sources(config, tokenizer)
    return Prepared(
        config=config,
        hf=hf,
        files=files,
        train_source=train_source,
        probe_source=probe_source,
        fingerprints={"trunk": files.fingerprint(), "data": data},
    )


def _final(name: str) -> bool:
    """The last norm's gain may stay: a rotation gives it to the client."""
    return name in ("model.norm.weight", "transformer.ln_f.weight")


def _per_head(name: str) -> bool:
    return name.endswith(("q_norm.weight", "k_norm.weight"))


def weights_once(lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters by their Hugging Face name, a tied one under its first."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    tied = lm.config.tie_word_embeddings
    for name, tensor in named_weights(lm).items():
        if id(tensor) in seen or (tied and name == "lm_head.weight"):
            continue
        seen.add(id(tensor))
        found[name] = tensor
    return found


@torch.no_grad()
def load_weights(lm: PreTrainedModel, files: TrunkFiles) -> None:
    """Each rank reads its shards."""
    for name, tensor in weights_once(lm).items():
        local, region = local_region(tensor)
        if local.numel():
            local.copy_(files.read(name, region))


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))
