"""torchtitan's trainer with hooks, whatever it trains: one owner of the directory, an end that all ranks agree on, a
probe on held-out rows, steps without a finite loss left out.

A task (``tasks.py``) is a subclass that says what a microbatch and a probe are.
"""

from __future__ import annotations

import copy
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro
from torchtitan.distributed import ParallelDims
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from sgt_titan.cluster import status
from sgt_titan.cluster.ownership import Ownership
from sgt_titan.config import schema
from sgt_titan.config.check import validate
from sgt_titan.config.load import dump
from sgt_titan.config.resolve import resolve
from sgt_titan.config.trunk import read_trunk
from sgt_titan.data.batch import BatchSource
from sgt_titan.errors import UserError

from . import chatter, run_directory
from .checkpoint import on_rank_zero
from .compilation import Watch, kept_code
from .dataloader import microbatch_inputs
from .interruption import Reason, StopRequest
from .optimizer import NonFiniteError
from .options import read_back
from .startup import Prepared, device_type
from .watchdog import Watchdog


class Loop(Trainer, ABC):
    """The loop, the meshes and the schedules are torchtitan's; no line of its loop is copied here."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        prepared: Annotated[Prepared | None, tyro.conf.Suppress] = field(default=None, repr=False)
        anew: Annotated[Callable[[schema.Config], Any] | None, tyro.conf.Suppress] = field(default=None, repr=False)
        """Makes a config like this one from another of ours: ``tasks.to_trainer_config``."""

        def to_dict(self) -> dict[str, Any]:
            return asdict(self.ready().config)

        def ready(self) -> Prepared:
            """What a run needs beside options. Raises ValueError for a config that can only build a model."""
            if self.prepared is None:
                raise ValueError("made without trunk and data: there is nothing to train on")
            return self.prepared

    prepared: Prepared
    dp_rank: int
    dp_size: int

    def __init__(self, config: Config):
        chatter.install()
        config = follow_flags(config)
        run_directory.check(config.ready())
        super().__init__(config)
        self.prepared = config.ready()
        self.run = self.prepared.config
        self.prepared.timeline.mark("build")
        same_on_all_ranks(self.prepared.fingerprints)
        batch_mesh = self.parallel_dims.get_optional_mesh("batch")
        self.dp_rank, self.dp_size = (batch_mesh.get_local_rank(), batch_mesh.size()) if batch_mesh else (0, 1)

    # -- what a task says --------------------------------------------------------------------------------------------

    @abstractmethod
    def evaluate_streams(self, tokens_BT: torch.Tensor, batch: dict[str, Any]) -> tuple[Any, torch.Tensor, dict]:
        """Forward pass and loss of a microbatch: (what the model returned, loss, reported terms).

        Loss and terms are divided by the counts of the step's global batch, so that those of all microbatches and
        ranks sum to the step's.
        """

    @abstractmethod
    def probe(self) -> dict[str, float]:
        """What is measured on held-out rows every ``metrics.probe_every`` steps, the same on every rank. Collective."""

    # -- torchtitan's hooks ------------------------------------------------------------------------------------------

    def init_distributed(self) -> ParallelDims:
        timeline = self.config.ready().timeline
        timeline.mark("build")
        dims = super().init_distributed()
        timeline.mark("rendezvous")
        return dims

    def train(self) -> None:
        """Until the last step, or until asked to stop (``stopped``); then export and say how it ended."""
        owner = Ownership(self.run.run.output_dir)
        on_rank_zero(lambda: self._claim(owner))
        self.owner = self.checkpointer.owner = owner
        self.stop, self.stopped = StopRequest(), Reason.NONE
        self.watchdog = Watchdog()
        self.steps_here = 0
        self.watch: Watch | None = None
        if self.run.compile.enable == "auto":
            if self.run.run.deterministic:
                logger.info("compile.enable auto: not compiled: run.deterministic, and a verdict depends on the clock")
            else:
                self.watch = Watch(self.device)
        self.compiles = self.run.compile.enable is True  # the next step does
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
        first, began = self.metrics_processor.first_step is None, time.perf_counter()
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
        if self.compiles:
            logger.info(f"compile.enable: {kept_code(self.device)}")
            self.compiles = False
        self.patience = self.run.comm.train_timeout_seconds
        self._consider_compiling(time.perf_counter() - began)
        self.watchdog.beat(self.patience)  # a save or a probe has as long as a step
        self.metrics_processor.show_progress(self.step)
        every = self.run.metrics.probe_every
        if every and (self.step % every == 0 or self.step in (1, self.config.training.steps)):
            self.metrics_processor.log_probe(self.step, self.probe())
            self.watchdog.beat(self.patience)

    def _consider_compiling(self, seconds: float) -> None:
        """``compile.enable: auto``, once a few steps were seen; ``seconds`` is what the last one took."""
        if self.watch is None:
            return
        found = self.watch.add(seconds, self.config.training.steps - self.step)
        if found is None:
            return
        self.watch = None
        logger.info(f"compile.enable auto: {found.words}")
        if found.compile:
            # Nobody asked for it by name: what cannot be compiled stays as it is, with dynamo's warning.
            torch._dynamo.config.suppress_errors = True
            self.model_parts[0].compile_blocks(self.config.compile.backend, whole=False)
            self.compiles = True
            self.patience = self.run.comm.init_timeout_seconds

    def _forward_backward_body(self, inputs, labels, global_valid_tokens, extra_kwargs):
        with self.train_context():
            _, loss, terms = self.evaluate_streams(inputs, extra_kwargs)
            loss.backward()
        self.metrics_processor.add(terms)
        self.optimizers.observe(loss)
        # torchtitan raises on a non-finite loss, but only on steps it logs; the optimizer guards every step.
        return torch.nan_to_num(loss.detach(), nan=0.0, posinf=0.0, neginf=0.0)

    def _claim(self, owner: Ownership) -> None:
        if self.run.checkpoint.accept_changes:
            self.checkpointer.require_same_weights()
        owner.acquire()
        run_directory.claim(self.prepared)
        status.write(self.run.run.output_dir, "running", attempt=owner.attempt, step=self.step)

    def _finish(self) -> None:
        """Rank 0, after the last step of this attempt."""
        folder = Path(self.run.run.output_dir)
        if self.step < self.config.training.steps:
            reason = f"SIG{self.stopped.name}"
            logger.info(f"Stopped at step {self.step} of {self.config.training.steps} on {reason}; saved, go on later")
            status.write(folder, "stopped", attempt=self.owner.attempt, step=self.step, reason=reason)
            return
        run_directory.finish(self.run, self.owner.attempt, self.step)

    # -- for probes --------------------------------------------------------------------------------------------------

    def probed(self) -> Iterator[tuple[dict[str, Any], Any, torch.Tensor]]:
        """Held-out rows through the model in evaluation mode: batch, what it returned, and the reported terms, one
        number each, by microbatch of this rank.

        Every rank has as many, since they meet in collectives: the last rows repeat, without a position that counts.
        """
        source: BatchSource = self.prepared.probe_source
        total, rows, model = source.global_batch_size, self.run.training.local_batch_size, self.model_parts[0]
        model.eval()
        for start in range(0, total, rows * self.dp_size):
            first = start + self.dp_rank * rows
            batch = microbatch_inputs(source, 0, [min(i, total - 1) for i in range(first, first + rows)])
            batch = {k: v.to(self.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            surplus_B1 = torch.arange(first, first + rows, device=self.device)[:, None] >= total
            for name in ("obfuscate_BT", "utility_BT"):
                batch[name] = batch[name] & ~surplus_B1
            returned, _, terms = self.evaluate_streams(batch["input"], batch)
            yield batch, returned, torch.stack([terms[name].float() for name in self.metrics_processor.reported])
        model.train()


def follow_flags(config: Loop.Config) -> Loop.Config:
    """``config`` itself, or one made anew if torchtitan's flags changed what ours decided.

    Raises:
        UserError: the flags do not fit the trunk, the number of ranks or each other; what ``anew`` refuses.
    """
    before = config.ready().config
    ours = copy.deepcopy(before)
    read_back(ours, config)
    if dump(ours) == dump(before):
        return config
    if config.anew is None:
        raise ValueError("flags changed a config that does not know its task: make it with tasks.to_trainer_config")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    ours = resolve(ours, world_size=ranks)
    validate(ours, ranks, read_trunk(ours), device=device_type())
    return config.anew(ours)


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
