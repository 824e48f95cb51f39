"""Saving and resuming from inside the trainer: SGT, optimizer, schedules, cursor, step, RNG; never a trunk weight.

Tensors go through torch's distributed checkpoint in its safetensors form, every rank writing its shards, so any world
size can read what another wrote. The directory's layout and marker are those of ``sgt_titan/checkpoint.py``.
"""

from __future__ import annotations

import errno
import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tyro
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer.base import BaseCheckpointManager
from torchtitan.tools.logging import logger

from sgt_titan import checkpoint, disk
from sgt_titan.cluster.ownership import Ownership
from sgt_titan.errors import UserError
from sgt_titan.export import SGT

from .load_trunk import named_weights
from .trunks import Family, export_name

OPTIMIZER = "optimizer."
RNG = "rng"


class SGTCheckpointManager(BaseCheckpointManager):
    """torchtitan's checkpoint contract over our directories."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseCheckpointManager.Config):
        identity: Annotated[dict[str, Any] | None, tyro.conf.Suppress] = None
        """Goes into state.json: fingerprints and versions of the run."""
        family: Annotated[Family | None, tyro.conf.Suppress] = None
        """Names of the tensors."""
        config_yaml: Annotated[str, tyro.conf.Suppress] = ""
        """The resolved config."""
        asynchronous: bool = True
        """Whether training goes on while a checkpoint is written."""

    def __init__(self, config, *, dataloader, model_parts, optimizers, lr_schedulers, states, base_folder, **kwargs):
        self.enable = config.enable
        self.save_future: Future[None] | None = None
        self.config = config
        self.dataloader = dataloader
        self.model = model_parts[0]
        self.optimizers, self.lr_schedulers = optimizers, lr_schedulers
        self.trainer = states["train_state"]
        self.output_dir = Path(base_folder)
        self.damaged: set[Path] = set()  # found while loading; their steps are saved anew
        self.owner: Ownership | None = None  # rank 0's hold on the directory, once training begins
        cuda = torch.cuda.is_available()
        self.stager = DefaultStager(StagingOptions(cuda, False, use_async_staging=False, use_non_blocking_copy=cuda))
        self.writer = ThreadPoolExecutor(1, thread_name_prefix="save")
        self.group: dist.ProcessGroup | None = None  # the writer's
        self.stall = 0.0  # seconds for which the last save held up training, if nobody waited for its files

    # -- what a checkpoint holds -----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, torch.Tensor]:
        """Live tensors by name; loading writes into them in place."""
        moments = {OPTIMIZER + k: v for k, v in self.optimizers.state_dict().items() if isinstance(v, torch.Tensor)}
        return {**self.weights(), **moments, RNG: torch.get_rng_state()}

    def weights(self) -> dict[str, torch.Tensor]:
        """What is trained."""
        named = named_weights(self.model.estimator).items()
        return {SGT + export_name(self.config.family, name): tensor.detach() for name, tensor in named}

    def state(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "train_state": self.trainer.state_dict(),
            "data": self.dataloader.state_dict(),
            "lr_scheduler": self.lr_schedulers.state_dict(),
            "skipped_steps": [self.optimizers.skipped, self.optimizers.skipped_in_a_row],
            "world_size": dist.get_world_size(),
            "metrics": self.trainer.metrics_processor.latest,
            "probe": self.trainer.metrics_processor.latest_probe,
            **(self.config.identity or {}),
        }

    # -- saving ----------------------------------------------------------------------------------------------------

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        """Copy what a checkpoint holds at this boundary; a thread writes it while training goes on.

        The last save of an attempt, and every save with ``checkpoint.asynchronous`` off, is waited for.
        """
        due = last_step or curr_step % self.config.interval == 0
        if not due or self.config.load_only:
            return False
        began = time.perf_counter()
        self.maybe_wait_for_saving()
        path = checkpoint.step_dir(self.output_dir, curr_step)
        if checkpoint.is_committed(path) and path not in self.damaged:
            return False
        if self.group is None:
            # Its own: ranks come to the thread's collectives at other moments than to the step's.
            self.group = dist.new_group(backend="gloo")
        staged: Any = self.stager.stage(self.tensors())
        state = json.dumps(self.state(curr_step), indent=1, default=str)
        self.stall = time.perf_counter() - began
        self.save_future = self.writer.submit(self._write, path, curr_step, staged, state)
        if last_step or not self.config.asynchronous:
            self.maybe_wait_for_saving()
        return True

    def failed(self) -> bool:
        """Whether a save that nobody has waited for has failed. Ranks find out at different steps: agree first."""
        return self.save_future is not None and self.save_future.done() and self.save_future.exception() is not None

    def _write(self, path: Path, step: int, tensors: dict[str, torch.Tensor], state: str) -> None:
        """In the thread, on every rank."""
        began = time.perf_counter()
        try:
            self._write_files(path, tensors, state)
        except (Exception, CheckpointException) as error:  # the latter, a distributed save's, is a BaseException
            if not _is_disk_full(error):
                raise
            if dist.get_rank() == 0:
                shutil.rmtree(path, ignore_errors=True)
            kept = checkpoint.latest_committed(self.output_dir)
            raise UserError(
                f"{path}: no space left to save step {step}; kept {kept.name if kept else 'no checkpoint'}; "
                "free space or set checkpoint.keep_latest lower, then start the same command again"
            ) from None
        self.damaged.discard(path)
        if dist.get_rank() == 0:
            took = time.perf_counter() - began
            logger.info(f"Saved step {step} to {path} in {took:.2f} s, after copying it in {self.stall:.3f} s")
            checkpoint.prune(self.output_dir, self.config.keep_latest_k, damaged=self.damaged)

    def _write_files(self, path: Path, tensors: dict[str, torch.Tensor], state: str) -> None:
        def prepare() -> None:
            shutil.rmtree(path, ignore_errors=True)  # left by an attempt that never committed it
            path.mkdir(parents=True)
            disk.write(path / checkpoint.CONFIG, self.config.config_yaml)
            disk.write(path / checkpoint.STATE, state)

        local = [_local(tensor) for tensor in tensors.values()]
        total = torch.tensor(sum(tensor.numel() * tensor.element_size() for tensor in local))
        dist.all_reduce(total, group=self.group)
        on_rank_zero(lambda: _require_space(self.output_dir, int(total)), self.group)
        on_rank_zero(prepare, self.group)
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, process_group=self.group)
        written = path.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors")
        parts = on_every_rank(lambda: checkpoint.describe_files(sorted(written)), self.group)
        files = {name: entry for part in parts for name, entry in part.items()}

        def commit() -> None:
            if self.owner is not None and not self.owner.held():
                raise UserError(f"run.output_dir: {self.output_dir} was taken over by another attempt of this job")
            present = {file.name for file in path.glob("*.safetensors")}
            assert present == set(files), f"ranks described {sorted(files)}, the directory holds {sorted(present)}"
            own = checkpoint.describe_files([path / checkpoint.CONFIG, path / checkpoint.STATE])
            checkpoint.commit(path, files | own)

        on_rank_zero(commit, self.group)

    def _wait_for_saving(self) -> None:
        future, self.save_future = self.save_future, None
        if future is not None:
            future.result()

    def _maybe_wait_for_staging(self) -> None: ...  # staging is done when ``save`` returns

    def _close(self) -> None:
        self.writer.shutdown()  # a save under way is finished, so that what it holds is not lost

    # -- loading ---------------------------------------------------------------------------------------------------

    def require_same_weights(self) -> None:
        """Before anything is written: changes that were accepted may be too large to go on.

        Raises:
            UserError: the newest checkpoint holds tensors of other names or shapes.
        """
        path = checkpoint.latest_committed(self.output_dir)
        if path is None or checkpoint.problems(path):
            return  # nothing to go on from, or ``load`` will say so
        entries: Any = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata.items()
        stored = {name: tuple(e.size) for name, e in entries if not name.startswith(OPTIMIZER) and name != RNG}
        mine = {name: tuple(tensor.shape) for name, tensor in self.weights().items()}
        if differing := sorted(name for name in stored | mine if stored.get(name) != mine.get(name)):
            there, here = (shapes.get(differing[0], "not at all") for shapes in (stored, mine))
            raise UserError(
                f"{path}: holds {differing[0]} as {there}, this run as {here}; a run whose weights have other shapes "
                "cannot go on from it: choose another run.output_dir"
            )

    def _load(self, step: int = -1) -> bool:
        damaged = []
        for path in checkpoint.list_steps(self.output_dir):
            if step not in (-1, checkpoint.step_of(path)):
                continue
            if not checkpoint.is_committed(path):
                logger.warning(f"{path}: no commit marker, so the save was interrupted; ignored")
                continue
            found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(found, checkpoint.problems(path, part=dist.get_rank(), parts=dist.get_world_size()))
            if damage := sorted({line for part in found for line in part}):
                logger.warning(f"Damaged checkpoint, looking for the one before it: {'; '.join(damage)}")
                damaged.append(path)
                self.damaged.add(path)
                continue
            self._read(path)
            logger.info(f"Resumed from {path}")
            return True
        if damaged:
            raise UserError(
                f"{self.output_dir}: every committed checkpoint is damaged, the newest being {damaged[0].name}; "
                f"restore one, or delete {self.output_dir / checkpoint.FOLDER} to start from step 0"
            )
        if step != -1:
            raise UserError(f"{self.output_dir}: no intact checkpoint of step {step}")
        return False

    def _read(self, path: Path) -> None:
        tensors = self.tensors()
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(path)))
        optimizer = self.optimizers.state_dict()
        optimizer |= {k.removeprefix(OPTIMIZER): v for k, v in tensors.items() if k.startswith(OPTIMIZER)}
        self.optimizers.load_state_dict(optimizer)
        torch.set_rng_state(tensors[RNG])
        state = checkpoint.read_state(path)
        self.optimizers.skipped, self.optimizers.skipped_in_a_row = state.get("skipped_steps", (0, 0))
        self.trainer.load_state_dict(state["train_state"])
        self.dataloader.load_state_dict(state["data"])
        self.lr_schedulers.load_state_dict(state["lr_scheduler"])
        for scheduler in self.lr_schedulers:
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
                group["lr"] = lr


def on_rank_zero(action: Callable[[], None], group: dist.ProcessGroup | None = None) -> None:
    """Run ``action`` on rank 0; every rank waits for it and every rank raises what it raised."""
    outcome: list[BaseException | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:
            outcome = [error]
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[0] is not None:
        raise outcome[0]


def on_every_rank(action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> list[Any]:
    """Run ``action`` on each rank; what it returned, by rank. Every rank raises what the first one raised."""
    try:
        mine: tuple[Any, BaseException | None] = action(), None
    except Exception as error:
        mine = None, error
    everyone: list[tuple[Any, BaseException | None]] = [mine] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    for _, problem in everyone:
        if problem is not None:
            raise problem
    return [value for value, _ in everyone]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _require_space(folder: Path, needed: int) -> None:
    if (there := disk.free(folder)) < needed:
        raise OSError(errno.ENOSPC, f"{needed} bytes needed, {there} free", str(folder))


def _is_disk_full(error: BaseException | None) -> bool:
    """ENOSPC anywhere in what a distributed save raised: wrapped, chained, or as text from the safetensors writer."""
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        for failure in getattr(error, "failures", {}).values():
            inner = failure[0] if isinstance(failure, tuple) else failure
            if _is_disk_full(inner):
                return True
        error = error.__cause__ or error.__context__
    return False
