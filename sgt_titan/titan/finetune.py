"""``run.task: finetune``: training of the trunk itself, on the next token and on what its original says of it, with the
loop, data and checkpoints of an SGT's run.

What it says to ``loop.py`` is the model, the loss of a microbatch, what is probed, and what a checkpoint holds.
Legend: B rows, T tokens.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig

from sgt_titan.config.load import dump
from sgt_titan.config.schema import Config
from sgt_titan.config.trunk import read_trunk
from sgt_titan.conjformer.mark import MARK, require_original
from sgt_titan.data.tokenization import check_vocabulary, load_tokenizer
from sgt_titan.errors import UserError
from sgt_titan.export import MODEL
from sgt_titan.transform.trunk_files import TrunkFiles
from sgt_titan.trunk.check import check_checkpoint

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

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TERMS = {
    "loss": "loss/total",
    "next": "loss/next_token_nats",
    "kl": "utility/kl_nats",
    "drift": "loss/drift",
    "agreement": "utility/top1_accuracy",
}


class FinetuneMetrics(SGTMetricsProcessor):
    """The same log with the terms of a language model."""

    @dataclass(kw_only=True, slots=True)
    class Config(SGTMetricsProcessor.Config): ...

    reported, tags = tuple(TERMS), TERMS

    def line(self, terms: dict[str, float]) -> str:
        said = f"loss {terms['loss']:.4f}  perplexity {_exp(terms['next']):.3f}  right {terms['agreement']:.1%}"
        for name in ("kl", "drift"):
            said += f"  {name} {terms[name]:.4f}" if terms[name] else ""
        return said


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
        model, prepared = self.model_parts[0], self.prepared
        assert isinstance(prepared, PreparedFinetune)
        load_weights(model.lm, prepared.files)
        if prepared.teacher is not None:
            load_weights(model.teacher, prepared.teacher)
        self.metrics_processor.num_hardware_flops_per_token = self.metrics_processor.num_flops_per_token

    def evaluate_streams(self, tokens_BT: torch.Tensor, batch: dict[str, Any]):
        """Scores, loss and reported terms of a microbatch."""
        options, model = self.run.finetune, self.model_parts[0]
        found = model(tokens_BT, batch["utility_BT"], self.run.training.loss_chunk_tokens)
        next_token, kl, right = (value / max(batch["counts"].utility_tokens, 1) for value in found)
        loss = (1 - options.distil) * next_token + options.distil * kl if options.distil else next_token
        terms = {"next": next_token, "kl": kl, "agreement": right, "drift": torch.zeros_like(kl)}
        if options.drift:
            # Of the weights, not of the rows: a rank and a microbatch has its share in the sum, its gradient is whole.
            drift = model.drift(self.step) / self.gradient_accumulation_steps
            terms["drift"] = drift / self.dp_size
            if torch.is_grad_enabled():
                return found, loss + options.drift * drift, _detached({"loss": loss, **terms})
        return found, loss, _detached({"loss": loss, **terms})

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """Held-out loss in nats, perplexity, and KL to the teacher; the same on every rank. Collective."""
        found = self.metrics_processor.reduced(torch.stack([terms for _, _, terms in self.probed()]).sum(0))
        kl = {"KL": found["kl"]} if self.run.finetune.teacher else {}
        return {"held-out loss": found["next"], "perplexity": _exp(found["next"]), **kl}


def _detached(terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in terms.items()}


@dataclass(kw_only=True)
class PreparedFinetune(Prepared):
    """teacher: the original's files."""

    teacher: TrunkFiles | None = None
    teacher_hf: PretrainedConfig | None = None


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
        model=FinetuneModel.Config(hf=prepared.hf, teacher=prepared.teacher_hf),
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


def prepare_finetune(config: Config) -> PreparedFinetune:
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
    teacher, teacher_hf = _teacher(config, hf)
    if config.finetune.drift:
        setattr(hf, MARK, {"drift": config.finetune.drift})  # what is exported must not pass for the original
    tokenizer = load_tokenizer(config.trunk.path)
    check_vocabulary(tokenizer, hf.vocab_size)
    train_source, probe_source, data = startup.sources(config, tokenizer)
    told = {} if teacher is None else {"teacher": teacher.fingerprint()}
    return PreparedFinetune(
        config=config,
        hf=hf,
        files=files,
        train_source=train_source,
        probe_source=probe_source,
        fingerprints={"trunk": files.fingerprint(), "data": data, **told},
        teacher=teacher,
        teacher_hf=teacher_hf,
    )


_SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _teacher(config: Config, hf: PretrainedConfig) -> tuple[TrunkFiles | None, PretrainedConfig | None]:
    """The original's files and config.

    Raises:
        UserError: it is no checkpoint, of another shape, or was itself moved away from its original on purpose.
    """
    path = config.finetune.teacher
    if not path:
        return None, None
    key = "finetune.teacher"
    try:
        check_checkpoint(Path(path), any_family=True)
        files = TrunkFiles(path)
        theirs = startup.load_hf_config(files.path)
        for name in _SAME:
            if getattr(theirs, name, None) != getattr(hf, name, None):
                raise UserError(
                    f"{path}: {name} is {getattr(theirs, name, None)}, {getattr(hf, name, None)} in trunk.path"
                )
        require_original(files.path, theirs.to_dict())
        with torch.device("meta"):
            shapes = {
                name: tuple(t.shape)
                for name, t in weights_once(FinetuneModel(FinetuneModel.Config(hf=theirs)).lm).items()
            }
        files.check(shapes)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return files, theirs


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
