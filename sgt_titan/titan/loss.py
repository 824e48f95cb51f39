"""The objectives on shards: Eq. 3 and 11 from the tensors of one rank, normalised over the global batch.

Each term is a sum over this rank's tokens divided by the count of the whole optimizer step, which every rank knows
from the dataset without communication. Summed over microbatches and ranks the terms are those of the global batch,
however it was split. The utility is computed by the tensor-parallel ranks together and is the same on each; the
obfuscation terms are this rank's slice of the sequence.

Shape suffixes: B rows, T this rank's tokens, D width, V this rank's vocabulary, G rows of a pair group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import tyro
from torchtitan.components.loss import BaseLoss
from torchtitan.config import CompileConfig

from sgt_titan.config.schema import TERMS, Objective, Term
from sgt_titan.data.batch import Counts
from sgt_titan.objectives.geometry import absolute_cosine, component_entropy, cosine, norm_deviation
from sgt_titan.objectives.mutual_information import common_positions, group_loss, group_offset, shifts
from sgt_titan.objectives.rate import broad_rate, exchange
from sgt_titan.transform.gaussian import Bounds

from .model import Streams
from .pairs import PairGroups

# What is logged: name -> how ranks of a tensor-parallel group combine. Order is the order in the log.
REPORTED = (
    *("loss", "utility", "kl", "agreement", *TERMS, "rate_prompt", "rate_exchange"),
    *("std", "std_spread", "std_saturated", "mean_norm"),
)


def weight_at(step: int, term: Term) -> float:
    """The weight at ``step`` (counted from 0) of a linear ramp from ``start`` to ``weight`` over ``ramp_steps``.

    A function of the step alone, so a resumed run continues its ramp.
    """
    weight, step = term.weight or 0.0, max(step, 0)
    if step >= term.ramp_steps:
        return weight
    share = step / term.ramp_steps
    return (1.0 - share) * term.start + share * weight


class SGTLoss(BaseLoss):
    """Adapter between torchtitan's trainer and the objectives."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        objective: Annotated[Objective, tyro.conf.Suppress]

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None):
        self.objective = config.objective

    def weights(self, step: int) -> dict[str, float]:
        """Weight of each obfuscation term after ``step`` optimizer steps."""
        terms = {name: getattr(self.objective, name) for name in TERMS}
        return {name: weight_at(step, term) for name, term in terms.items()}

    def __call__(
        self,
        pred: Streams,
        labels: torch.Tensor,
        global_valid_tokens: torch.Tensor | None = None,
        *,
        step: int,
        obfuscate_BT: torch.Tensor,
        counts: Counts,
        median_norm: float,
        bounds: Bounds,
        pairs: PairGroups,
        part: slice,
        tp_size: int,
        private_BT: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss to call backward on, and the reported terms (detached).

        Args:
            pred: output of ``SGTModel``.
            step: optimizer step, from 1, for the weight schedules.
            obfuscate_BT: bool over the whole row.
            counts: denominators of the optimizer step.
            median_norm: of the embedding table.
            bounds: of the transform.
            pairs: partners of the MI term.
            part: this rank's slice of the row.
            tp_size: tensor-parallel ranks, which computed the utility together.
            private_BT: bool over the whole row, where the data marks private values; None: nowhere.

        Returns:
            The loss, whose gradient summed over all ranks is that of the global batch; and a dict of ``REPORTED`` terms
            that are to be summed over all ranks of the world.
        """
        objective, weights = self.objective, self.weights(step - 1)
        soft = pred.soft
        n_utility = max(counts.utility_tokens, 1)
        cross_entropy = soft.cross_entropy_N.sum() / n_utility
        entropy = soft.teacher_entropy_N.sum() / n_utility
        utility = cross_entropy - entropy if objective.utility == "kl" else cross_entropy

        mask_BT = obfuscate_BT[:, part]
        n_tokens = max(counts.obfuscated_tokens, 1)

        def per_token(values_BT: torch.Tensor) -> torch.Tensor:
            return (values_BT * mask_BT).sum() / n_tokens

        mi_offset = torch.zeros((), device=cross_entropy.device)

        def mutual_information() -> torch.Tensor:
            nonlocal mi_offset
            if pairs.size == 1:
                return torch.full_like(mi_offset, torch.nan)  # shown as not measured; it has no weight
            loss, mi_offset = self._mi(pred, obfuscate_BT, mask_BT, part, pairs)
            mi_offset = mi_offset / counts.rows
            return loss / counts.rows

        with torch.set_grad_enabled(weights["rate"] != 0 and torch.is_grad_enabled()):
            rate_BT = pred.rate_BT
            if rate_BT is None:
                center_BTD = pred.x_BTD + pred.mean_BTD
                rate_BT = broad_rate(center_BTD, pred.log_std_BTD, objective.rate.tau * bounds.scale)
        price_BT: torch.Tensor | float = 1.0
        if private_BT is not None and objective.rate.private != 1:
            price_BT = 1 + (objective.rate.private - 1) * private_BT[:, part]
        computed = {
            "mi": mutual_information,
            "abs_cos": lambda: per_token(absolute_cosine(pred.x_BTD, pred.x_tilde_BTD)),
            "norm": lambda: per_token(norm_deviation(pred.x_BTD, pred.mean_BTD, median_norm)),
            "comp_entr": lambda: per_token(component_entropy(pred.log_std_BTD)),
            "cos_sim": lambda: per_token(cosine(pred.x_BTD, pred.x_tilde_BTD)),
            "rate": lambda: per_token(rate_BT * price_BT),
        }
        values, obfuscation = {}, torch.zeros((), device=cross_entropy.device)
        for name, compute in computed.items():
            with torch.set_grad_enabled(weights[name] != 0 and torch.is_grad_enabled()):
                values[name] = compute()
            if weights[name] != 0:
                obfuscation = obfuscation + weights[name] * values[name]

        with torch.no_grad():
            slices = tp_size if part.stop - part.start == obfuscate_BT.shape[1] else 1  # TP without SP: no slices
            values["rate"] = per_token(rate_BT.detach())  # what is told; what it cost is in the loss
            rows = obfuscate_BT.shape[0] / counts.rows
            price = exchange(weights["rate"], counts.utility_tokens, counts.obfuscated_tokens)
            reported = {
                "loss": utility / tp_size + obfuscation / slices,
                "utility": utility / tp_size,
                "kl": (cross_entropy - entropy) / tp_size,
                "agreement": soft.agree_N.sum() / n_utility / tp_size,
                **{name: values[name] / slices for name in TERMS},
                "rate_prompt": values["rate"] * n_tokens / counts.rows / slices,
                "rate_exchange": torch.full_like(mi_offset, price * rows / tp_size),
                "std": per_token(pred.log_std_BTD.exp().mean(-1)) / bounds.scale / slices,
                "std_spread": per_token(pred.log_std_BTD.std(-1)) / slices,
                "std_saturated": per_token(_saturated(pred.log_std_BTD, bounds)) / slices,
                "mean_norm": per_token(pred.mean_BTD.norm(dim=-1)) / median_norm / slices,
            }
            # Eq. 8 drops a constant; what is shown is Algorithm 1's estimate in nats per feature.
            reported["mi"] = (values["mi"] - mi_offset) / slices
        return utility + obfuscation, reported

    def _mi(self, pred: Streams, obfuscate_BT, mask_BT, part: slice, pairs: PairGroups):
        """Sums over this rank's rows and positions: Eq. 8, and its excess over Algorithm 1."""
        size, steps = pairs.size, shifts(self.objective.mi_pairs, pairs.size)
        whole_BT, y_center, y_log_std = (exchange.finish() for exchange in pred.pairs)
        whole_BT = whole_BT.bool()
        loss, offset = torch.zeros((), device=y_center.device), torch.zeros((), device=y_center.device)
        # The groups that this rank holds whole, or the one it is part of.
        for start in range(0, y_center.shape[0], size):
            group = slice(start, start + size)
            rows = group if pairs.process_group is None else slice(None)
            masks = mask_BT[rows], whole_BT[group][:, part]
            positions = common_positions(obfuscate_BT[rows], whole_BT[group], first=pairs.first, shifts=steps)
            loss = (
                loss
                + group_loss(
                    pred.z_BTD[rows],
                    pred.log_std_BTD[rows],
                    masks[0],
                    y_center[group],
                    y_log_std[group],
                    masks[1],
                    first=pairs.first,
                    shifts=steps,
                    positions=positions,
                ).sum()
            )
            offset = offset + group_offset(*masks, first=pairs.first, shifts=steps, positions=positions).sum()
        return loss, offset


def _saturated(log_std_BTD: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """Share of features within 1% of either end of sigma's range, (B, T): there the gradient has gone."""
    low, high = math.log(bounds.std_min * bounds.scale), math.log(bounds.std_max * bounds.scale)
    margin = 0.01 * (high - low)
    return ((log_std_BTD < low + margin) | (log_std_BTD > high - margin)).float().mean(-1)
