"""torchtitan's trainer with hooks: what one microbatch does, where the trunk comes from, what is probed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import FlexAttention
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from sgt_titan.cluster import status
from sgt_titan.cluster.ownership import Ownership
from sgt_titan.config.resolve import pair_groups_fit
from sgt_titan.data.batch import BatchSource
from sgt_titan.errors import UserError
from sgt_titan.metrics.ranks import nn_failure_rate, sym_ttr, token_ranks, ttr

from .checkpoint import on_rank_zero
from .dataloader import microbatch_inputs
from .flops import matmul_parameters
from .initialize import initialize_estimator, initialize_from_trunk
from .interruption import Reason, StopRequest
from .load_trunk import load_trunk
from .loss import REPORTED
from .noise import draw
from .optimizer import NonFiniteError
from .pairs import make_pair_groups
from .startup import Prepared, check_output_dir, claim_output_dir, finish
from .teacher_cache import open_teacher_cache
from .watchdog import Watchdog


class SGTTrainer(Trainer):
    """Trains the estimator of an ``SGTModel``; the loop, the meshes and the schedules are torchtitan's."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        prepared: Annotated[Prepared | None, tyro.conf.Suppress] = field(default=None, repr=False)

        def to_dict(self) -> dict[str, Any]:
            return asdict(self.prepared.config)

    def __init__(self, config: Config):
        from .config import follow_flags

        config = follow_flags(config)
        check_output_dir(config.prepared)
        super().__init__(config)
        prepared, model = config.prepared, self.model_parts[0]
        prepared.timeline.mark("build")
        same_on_all_ranks(prepared.fingerprints)
        self.prepared, self.run = prepared, prepared.config
        load_trunk(model.trunk, prepared.family, prepared.files)
        initialize_estimator(model.estimator, self.run.run.seed, prepared.log_frequency_V)
        if self.run.estimator.init_from_trunk:
            initialize_from_trunk(model.estimator.bodies, "The estimator", prepared.family, prepared.files)
        if self.run.denoiser.layers and self.run.denoiser.init_from_trunk:
            initialize_from_trunk([model.estimator.denoiser.body], "The denoiser", prepared.family, prepared.files)
        dims = self.parallel_dims
        self.tp_group = dims.get_mesh("tp").get_group() if dims.tp_enabled else None
        tp_rank = self.tp_group.rank() if self.tp_group else 0
        batch_mesh = dims.get_optional_mesh("batch")
        self.dp_rank, self.dp_size = (batch_mesh.get_local_rank(), batch_mesh.size()) if batch_mesh else (0, 1)
        # Rows that make no whole groups are refused only where the MI term has a weight; elsewhere it is not measured.
        group = self.run.objective.mi_group if pair_groups_fit(self.run, self.dp_size) else 1
        self.pairs = make_pair_groups(group, self.run.training.local_batch_size, batch_mesh)
        self.metrics_processor.num_hardware_flops_per_token = prepared.hardware_flops(model)
        self.metrics_processor.teacher_flops_per_token = 2 * matmul_parameters(model.trunk)
        self.teacher_cache = open_teacher_cache(prepared, model.config.trunk_dtype, writer=tp_rank == 0)
        self.uses_flex = any(isinstance(module, FlexAttention) for module in model.trunk.modules())
        prepared.timeline.mark("trunk")

    def init_distributed(self) -> ParallelDims:
        self.config.prepared.timeline.mark("build")
        dims = super().init_distributed()
        self.config.prepared.timeline.mark("rendezvous")
        return dims

    def train(self) -> None:
        """Until the last step, or until asked to stop (``stopped``); then export and say how it ended."""
        owner = Ownership(self.run.run.output_dir)
        on_rank_zero(lambda: self._claim(owner))
        self.owner = self.checkpointer.owner = owner
        self.stop, self.stopped = StopRequest(), Reason.NONE
        self.watchdog = Watchdog()
        self.steps_here = 0
        self.patience = self.run.comm.init_timeout_seconds  # compiling may take longer than any step after it
        try:
            super().train()
            on_rank_zero(self._finish)
        finally:
            self.watchdog.close()
            self.stop.close()
            owner.release()

    def should_continue_training(self) -> bool:
        """Also the step boundary at which a request to stop takes effect."""
        self.watchdog.beat(self.patience)
        reason, more = self.stop.agreed(), super().should_continue_training()
        if reason is Reason.LOST:
            raise UserError(f"run.output_dir: {self.run.run.output_dir} was taken over by another attempt of this job")
        if reason is Reason.UNSAVED:
            self.checkpointer.maybe_wait_for_saving()
        if more and reason:
            self.stopped = reason
            self.checkpointer.save(self.step, last_step=True)
            return False
        if more:
            lost, unsaved = self.owner.lost.is_set(), self.checkpointer.failed()
            self.stop.begin(Reason.UNSAVED if unsaved else Reason.LOST if lost else Reason.NONE)
        return more

    def train_step(self, data_iterator) -> None:
        first = self.metrics_processor.first_step is None
        self.steps_here += 1
        if first:
            self.skipped_before = self.optimizers.skipped  # in attempts before this one
            self.prepared.timeline.mark("checkpoint")
        self.metrics_processor.start_step(self.step)
        super().train_step(data_iterator)
        if self.step >= self.config.training.steps and self.optimizers.skipped - self.skipped_before == self.steps_here:
            # Before it is saved: a checkpoint of the last step would be exported by the next start.
            raise NonFiniteError(
                f"all {self.steps_here} steps of this run had a non-finite loss or gradient and were skipped: nothing "
                "was learned; look at the trunk (its values in trunk.dtype) and at the data"
            )
        if first:
            self.prepared.timeline.mark("first step")
            logger.info(self.prepared.timeline.summary())
        self.patience = self.run.comm.train_timeout_seconds
        self.watchdog.beat(self.patience)  # a save or a probe has as long as a step
        self.metrics_processor.show_progress(self.step)
        every = self.run.metrics.probe_every
        if every and (self.step % every == 0 or self.step in (1, self.config.training.steps)):
            self.metrics_processor.log_probe(self.step, self.probe())
            self.watchdog.beat(self.patience)

    def _claim(self, owner: Ownership) -> None:
        if self.run.checkpoint.accept_changes:
            self.checkpointer.require_same_weights()
        owner.acquire()
        claim_output_dir(self.prepared)
        status.write(self.run.run.output_dir, "running", attempt=owner.attempt, step=self.step)

    def _finish(self) -> None:
        """Rank 0, after the last step of this attempt."""
        folder = Path(self.run.run.output_dir)
        if self.step < self.config.training.steps:
            reason = f"SIG{self.stopped.name}"
            logger.info(f"Stopped at step {self.step} of {self.config.training.steps} on {reason}; saved, go on later")
            status.write(folder, "stopped", attempt=self.owner.attempt, step=self.step, reason=reason)
            return
        finish(self.run, self.owner.attempt, self.step)

    # -- one microbatch ----------------------------------------------------------------------------------------------

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
        if streams.targets is not None:
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

    def _forward_backward_body(self, inputs, labels, global_valid_tokens, extra_kwargs):
        with self.train_context():
            _, loss, terms = self.evaluate_streams(inputs, extra_kwargs)
            loss.backward()
        self.metrics_processor.add(terms)
        self.optimizers.observe(loss)
        # torchtitan raises on a non-finite loss, but only on steps it logs; the optimizer guards every step.
        return torch.nan_to_num(loss.detach(), nan=0.0, posinf=0.0, neginf=0.0)

    # -- around a step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def probe(self) -> dict[str, float]:
        """Held-out utility and what a nearest-neighbour attacker reads, the same on every rank. Collective."""
        source: BatchSource = self.prepared.probe_source
        total, rows = source.global_batch_size, self.run.training.local_batch_size
        table_VD = self.prepared.files.embedding_table().to(self.device)
        ranks, sums = [], torch.zeros(len(REPORTED), device=self.device)
        model = self.model_parts[0]
        model.eval()
        for start in range(0, total, rows * self.dp_size):
            first = start + self.dp_rank * rows
            batch = microbatch_inputs(source, 0, [min(i, total - 1) for i in range(first, first + rows)])
            batch = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            surplus_B1 = torch.arange(first, first + rows, device=self.device)[:, None] >= total
            for name in ("obfuscate_BT", "utility_BT"):
                batch[name] = batch[name] & ~surplus_B1
            streams, _, terms = self.evaluate_streams(batch["input"], batch)
            sums += torch.stack([terms[name].float() for name in REPORTED])
            part = model.sequence_slice(batch["input"].shape[1])
            mask_BT = batch["obfuscate_BT"][:, part]
            if mask_BT.any() and (model.enable_sp or self.tp_group is None or self.tp_group.rank() == 0):
                x_tilde_ND, tokens_N = streams.x_tilde_BTD[mask_BT], batch["input"][:, part][mask_BT]
                finite_N = x_tilde_ND.isfinite().all(-1)  # a probe must not end a run that may still recover
                ranks.append(token_ranks(x_tilde_ND[finite_N], table_VD, tokens_N[finite_N]).rank_N)
        model.train()
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


def same_on_all_ranks(fingerprints: dict[str, str]) -> None:
    """Ranks that read different files would train on a mixture that no seed describes.

    Raises:
        UserError: naming the first rank that differs from rank 0.
    """
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, fingerprints)
    for rank, found in enumerate(everyone):
        for name, value in found.items():
            if value != everyone[0][name]:
                raise UserError(
                    f"rank {rank} found another {name} than rank 0 (fingerprint {value[:12]}, not "
                    f"{everyone[0][name][:12]}); trunk.path and data.cache_dir must be the same files on every node"
                )
