"""What a run shows: every term of the loss, throughput and utilisation by SGT's own arithmetic, a progress line."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtitan.components.metrics import BaseLogger, LoggerContainer, MetricsProcessor, WandBLogger
from torchtitan.tools.logging import logger

from sgt_titan.cluster import progress
from sgt_titan.cluster.ownership import attempt_name

from .curves import Curve, same_wandb_run
from .loss import REPORTED

# Name in TensorBoard for each reported term.
TAGS = {
    "loss": "loss/total",
    "utility": "loss/utility",
    "kl": "utility/kl_nats",
    "agreement": "utility/top1_agreement",
    "mi": "loss/mi_nats_per_feature",
    "abs_cos": "loss/abs_cos",
    "norm": "loss/norm",
    "comp_entr": "loss/comp_entr",
    "cos_sim": "loss/cos_sim",
    "rate": "rate/nats_per_token",
    "rate_prompt": "rate/nats_per_prompt",
    "rate_exchange": "rate/utility_nats_per_nat",
    "std": "noise/std_over_table_std",
    "std_spread": "noise/std_of_log_std_over_features",
    "std_saturated": "noise/share_at_a_bound",
    "mean_norm": "noise/mean_norm_over_median_norm",
}


class SGTMetricsProcessor(MetricsProcessor):
    """torchtitan's metrics with the terms of the step instead of one loss. reported, tags: their names, in a log."""

    reported: tuple[str, ...] = REPORTED
    tags: Mapping[str, str] = TAGS

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        total_steps: int = 0
        progress: bool = True

    def __init__(self, config: Config, **kwargs):
        super().__init__(config, **kwargs)
        self.num_hardware_flops_per_token = self.teacher_flops_per_token = -1
        self.teacher_tokens_read = 0  # since the last log: the teacher's forward was not run for them
        self.ntokens_since_last_log: int
        self.sums: torch.Tensor | None = None
        self.started = time.perf_counter()
        self.first_step: int | None = None
        self.latest_probe: dict[str, float] = {}
        self.latest: dict[str, float] = {}
        self.live = config.progress and dist.get_rank() == 0 and sys.stderr.isatty()

    def _build_metric_logger(
        self, *, config: Config, dump_folder: str, config_dict: dict[str, Any] | None = None, **_: Any
    ) -> BaseLogger:
        """One curve a run, not one an attempt; and a logger that cannot be had is an error, not a line in a log."""
        self.output_dir, self.curve = dump_folder, None
        container = LoggerContainer()
        if dist.get_rank() != 0:
            return container
        if config.enable_wandb:
            same_wandb_run(dump_folder)
            container.add_logger(WandBLogger(str(Path(dump_folder, "wandb")), config_dict=config_dict))
        if config.enable_tensorboard:
            self.curve = Curve(Path(dump_folder, config.save_tb_folder))
            container.add_logger(self.curve)
        return container

    def start_step(self, step: int) -> None:
        self.sums = None
        if self.first_step is None:
            if self.curve is not None:
                self.curve.begin(step)
            self.first_step, self.started = step, time.perf_counter()
            self.time_last_log = self.started

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Terms of one microbatch on this rank."""
        stacked = torch.stack([terms[name].detach().float() for name in self.reported])
        self.sums = stacked if self.sums is None else self.sums + stacked

    def reduced(self, sums: torch.Tensor) -> dict[str, float]:
        """Terms of the whole step: the sum over all ranks. Collective."""
        sums = sums.clone()
        dist.all_reduce(sums)
        return dict(zip(self.reported, sums.tolist(), strict=True))

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        now = time.perf_counter()
        elapsed = now - self.time_last_log
        if self.sums is None:
            raise RuntimeError(f"step {step} is logged and had no microbatch")
        terms = self.reduced(self.sums)
        if math.isfinite(terms["loss"]) and math.isfinite(grad_norm):
            self.latest = _finite({"step": step, **terms, "grad_norm": grad_norm})
        per_rank = self.ntokens_since_last_log / (elapsed * self.parallel_dims.non_data_parallel_size)
        ranks = dist.get_world_size()
        memory = self.device_memory_monitor.get_peak_stats()
        metrics = {
            **{self.tags[name]: value for name, value in terms.items()},
            "optimizer/grad_norm": grad_norm,
            "optimizer/skipped_steps": float(self.optimizers.skipped),
            "throughput/tokens_per_second": per_rank * ranks,
            "throughput/tokens_per_second_per_rank": per_rank,
            "throughput/data_loading_percent": 100 * sum(self.data_loading_times) / elapsed,
            "memory/max_reserved_gib": memory.max_reserved_gib,
            **(extra_metrics or {}),
        }
        busy = ""
        if math.isfinite(self.gpu_peak_flops):
            ranks_of_a_row = self.parallel_dims.non_data_parallel_size
            saved = self.teacher_tokens_read * self.teacher_flops_per_token / (elapsed * ranks_of_a_row)
            for name, flops in (("mfu", self.num_flops_per_token), ("hfu", self.num_hardware_flops_per_token)):
                metrics[f"throughput/{name}_percent"] = 100 * (per_rank * flops - saved) / self.gpu_peak_flops
            busy = "  mfu {throughput/mfu_percent:.1f}%  hfu {throughput/hfu_percent:.1f}%".format(**metrics)
        self.logger.log(metrics, step)
        probe = "".join(f"  {name} {value:.1%}" for name, value in self.latest_probe.items() if name == "NN-FR")
        self._clear_line()
        logger.info(
            f"step {step}/{self.config.total_steps}  {self.line(terms)}{probe}  "
            f"grad {grad_norm:.3f}  {per_rank * ranks:,.0f} tok/s{busy}  "
            f"data {metrics['throughput/data_loading_percent']:.2f}%  {memory.max_reserved_gib:.1f} GiB  "
            f"eta {self.eta(step)}"
        )
        if dist.get_rank() == 0:
            progress.write(self.output_dir, self.progress(step, terms, per_rank * ranks))
        self.ntokens_since_last_log = self.teacher_tokens_read = 0
        self.data_loading_times.clear()
        self.time_last_log = now
        self.device_memory_monitor.reset_peak_stats()

    def progress(self, step: int, terms: dict[str, float], tokens_per_second: float) -> dict[str, Any]:
        """For ``sgt-titan status`` and a job's log."""
        return {
            "attempt": attempt_name(),
            "step": step,
            "steps": self.config.total_steps,
            "first_step": self.first_step,
            "tokens_per_second": tokens_per_second,
            "seconds_per_step": self.seconds_per_step(step),
            "terms": _finite(terms),
            "probe": self.latest_probe,
            "at": time.time(),
        }

    def line(self, terms: dict[str, float]) -> str:
        """The step's terms in the log."""
        return (
            f"loss {terms['loss']:.4f}  kl {terms['kl']:.4f}  agree {terms['agreement']:.1%}  mi {terms['mi']:.3f}  "
            f"|cos| {terms['abs_cos']:.3f}  std {terms['std']:.2f}  rate {terms['rate']:.3g} nats/token, "
            f"{terms['rate_prompt']:.3g}/prompt at {terms['rate_exchange']:.2g}"
        )

    def log_probe(self, step: int, values: dict[str, float]) -> None:
        """Held-out measurements."""
        self.latest_probe = _finite(values)
        self.logger.log({f"probe/{name}": value for name, value in values.items()}, step)
        self._clear_line()
        logger.info(f"probe at step {step}:  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items()))
        self.ntokens_since_last_log = self.teacher_tokens_read = 0  # the probe's time is not training time
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()

    def seconds_per_step(self, step: int) -> float:
        """Of this attempt so far, with everything that it did between steps."""
        return (time.perf_counter() - self.started) / (step - (self.first_step or 1) + 1)

    def eta(self, step: int) -> str:
        return progress.clock(self.seconds_per_step(step) * (self.config.total_steps - step))

    def show_progress(self, step: int) -> None:
        """The line that a person watching a terminal sees move."""
        if self.live:
            share = step / max(self.config.total_steps, 1)
            bar = "#" * int(30 * share)
            sys.stderr.write(f"\r[{bar:<30}] step {step}/{self.config.total_steps}  eta {self.eta(step)}  ")
            sys.stderr.flush()

    def _clear_line(self) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[K")


def _finite(values: dict[str, float]) -> dict[str, float]:
    """What goes into checkpoints, where no NaN belongs: a term that was not measured is NaN."""
    return {name: value for name, value in values.items() if math.isfinite(value)}
