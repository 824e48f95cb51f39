"""The SGT's trainer: what one microbatch does, where the trunk comes from, what is probed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.models.common.attention import FlexAttention
from torchtitan.tools.logging import logger

from sgt_titan.config.degrees import pair_groups_fit
from sgt_titan.metrics.ranks import nn_failure_rate, sym_ttr, token_ranks, ttr

from .flops import matmul_parameters
from .initialize import initialize_estimator, initialize_from_trunk
from .load_trunk import load_trunk
from .loop import Loop
from .loss import REPORTED
from .noise import draw
from .pairs import make_pair_groups
from .startup import PreparedSGT
from .teacher_cache import open_teacher_cache


class SGTTrainer(Loop):
    """Trains the estimator of an ``SGTModel``."""

    prepared: PreparedSGT

    @dataclass(kw_only=True, slots=True)
    class Config(Loop.Config): ...

    def __init__(self, config: Config):
        super().__init__(config)
        prepared, model = self.prepared, self.model_parts[0]
        dims = self.parallel_dims
        replicate = dims.get_optional_mesh("dp_replicate") if self.run.trunk.read == "once" else None
        replicas = replicate.get_group() if replicate is not None and replicate.size() > 1 else None
        source = prepared.family, prepared.files
        tally = load_trunk(model.trunk, *source, replicas)
        initialize_estimator(model.estimator, self.run.run.seed, prepared.log_frequency_V)
        if self.run.estimator.init_from_trunk:
            tally += initialize_from_trunk(model.estimator.bodies, "The estimator", *source, replicas)
        if self.run.denoiser.layers and self.run.denoiser.init_from_trunk:
            tally += initialize_from_trunk([model.estimator.denoiser.body], "The denoiser", *source, replicas)
        logger.info(tally.summary(replicas.size() if replicas is not None else 1, self.device))
        self.tp_group = dims.get_mesh("tp").get_group() if dims.tp_enabled else None
        tp_rank = self.tp_group.rank() if self.tp_group else 0
        # Rows that make no whole groups are refused only where the MI term has a weight; elsewhere it is not measured.
        group = self.run.objective.mi_group if pair_groups_fit(self.run, self.dp_size) else 1
        self.pairs = make_pair_groups(group, self.run.training.local_batch_size, dims.get_optional_mesh("batch"))
        self.metrics_processor.num_hardware_flops_per_token = prepared.hardware_flops(model)
        self.metrics_processor.teacher_flops_per_token = 2 * matmul_parameters(model.trunk)
        self.teacher_cache = open_teacher_cache(prepared, model.config.trunk_dtype, writer=tp_rank == 0)
        self.uses_flex = any(isinstance(module, FlexAttention) for module in model.trunk.modules())
        prepared.timeline.mark("trunk")

    def evaluate_streams(self, tokens_BT: torch.Tensor, batch: dict[str, Any]):
        """Forward pass and loss of a microbatch: (streams, loss, reported terms)."""
        model = self.model_parts[0]
        part = model.sequence_slice(tokens_BT.shape[1])
        noise_BTD = draw(
            batch["documents"],
            seed=self.run.run.seed,
            length=tokens_BT.shape[1],
            width=self.prepared.hf.hidden_size,
            part=part,
            device=self.device,
        )
        masks = model.trunk.get_attention_masks(batch["positions"]) if self.uses_flex else None
        cache, targets = self.teacher_cache if model.training else None, None
        if cache is not None:
            targets = cache.lookup(batch["documents"], batch["utility_BT"], device=self.device, group=self.tp_group)
        streams = model(
            tokens_BT,
            positions_BT=batch["positions"],
            attention_masks=masks,
            obfuscate_BT=batch["obfuscate_BT"],
            utility_BT=batch["utility_BT"],
            noise_BTD=noise_BTD,
            pairs=self.pairs,
            targets=targets,
            keep=cache.k if cache is not None and targets is None else 0,
        )
        if cache is not None and streams.targets is not None:
            cache.store(batch["documents"], batch["utility_BT"], streams.targets)
        if targets is not None:
            self.metrics_processor.teacher_tokens_read += tokens_BT.numel()
        loss, terms = self.loss_fn(
            streams,
            None,
            step=self.step,
            obfuscate_BT=batch["obfuscate_BT"],
            private_BT=batch.get("private_BT"),
            counts=batch["counts"],
            median_norm=self.prepared.statistics.median_norm,
            bounds=model.bounds,
            pairs=self.pairs,
            part=part,
            tp_size=self.parallel_dims.tp,
        )
        return streams, loss, terms

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """Held-out utility and what a nearest-neighbour attacker reads, the same on every rank. Collective."""
        table_VD = self.prepared.files.embedding_table().to(self.device)
        ranks, sums = [], torch.zeros(len(REPORTED), device=self.device)
        model = self.model_parts[0]
        for batch, streams, terms in self.probed():
            sums += terms
            part = model.sequence_slice(batch["input"].shape[1])
            mask_BT = batch["obfuscate_BT"][:, part]
            if mask_BT.any() and (model.enable_sp or self.tp_group is None or self.tp_group.rank() == 0):
                x_tilde_ND, tokens_N = streams.x_tilde_BTD[mask_BT], batch["input"][:, part][mask_BT]
                finite_N = x_tilde_ND.isfinite().all(-1)  # a probe must not end a run that may still recover
                ranks.append(token_ranks(x_tilde_ND[finite_N], table_VD, tokens_N[finite_N]).rank_N)
        terms = self.metrics_processor.reduced(sums)
        rank_N = torch.cat(ranks) if ranks else torch.zeros(0, dtype=torch.int64, device=self.device)
        vocab = table_VD.shape[0]
        shares = {
            "NN-FR": nn_failure_rate,
            "TTR-10": lambda rank: ttr(rank, 10),
            "SymTTR-100": lambda rank: sym_ttr(rank, 100, vocab),
        }
        counts = [share(rank_N) * rank_N.numel() if rank_N.numel() else 0.0 for share in shares.values()]
        summed = torch.tensor([*counts, rank_N.numel()], dtype=torch.float64, device=self.device)
        dist.all_reduce(summed)
        *counts, tokens = summed.tolist()
        return {
            **{name: count / max(tokens, 1) for name, count in zip(shares, counts, strict=True)},
            **{f"held-out {name}": terms[name] for name in ("kl", "agreement", "mi", "abs_cos", "rate")},
        }
