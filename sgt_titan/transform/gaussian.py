"""Gaussian arithmetic of the Stained Glass Transform: pure functions, no module, no state.

Used by the client's model and by every training shard, so the two cannot drift apart. Only elementwise torch
operations and python floats: they work on plain tensors, on DTensor shards and under torch.compile.

Shapes: B batch, T sequence, D model width, V vocabulary. A leading ``...`` is any number of such dimensions.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from sgt_titan.errors import UserError

_GATE_START = 3.0  # logit of a gate whose head is zero
_GATE_PACE = 0.1  # of its logit to its head: at 1, gates close before the trunk's needs are learned, and stay closed
_CHUNK_ELEMENTS = 1 << 22  # 32 MB of float64 scratch at a time, whatever the size of the table


@dataclass(frozen=True)
class Bounds:
    """Range of sigma and of |mu|, in units of ``scale``, the embedding table's per-feature std.

    ``scale`` is in embedding units; ``mean_bound`` 0 means no bound. ``closed``: sigma behind a closed gate
    (:func:`gated`), same units; 0: no gate. Raises UserError when the values do not make a range:
    0 < std_min < std_init < std_max, mean_bound >= 0, scale > 0, closed 0 or between std_min and std_max, all finite.
    """

    std_min: float
    std_max: float
    std_init: float
    mean_bound: float
    scale: float
    closed: float = 0.0

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in vars(self).values()):
            raise UserError(f"estimator: {self} has a value that is not finite; every bound must be a finite number")
        if not 0 < self.std_min < self.std_init < self.std_max:
            raise UserError(
                "estimator: needs 0 < std_min < std_init < std_max, "
                f"got std_min={self.std_min:g}, std_init={self.std_init:g}, std_max={self.std_max:g}"
            )
        if self.mean_bound < 0:
            raise UserError(f"estimator.mean_bound: {self.mean_bound:g} is negative; use 0 for no bound")
        if self.closed and not self.std_min <= self.closed <= self.std_max:
            raise UserError(
                f"objective.rate.tau: {self.closed:g} is what sigma is behind a closed gate, and lies outside of "
                f"estimator.std_min={self.std_min:g} to std_max={self.std_max:g}"
            )
        if self.scale <= 0:
            raise UserError(f"estimator: scale (per-feature std of the embedding table) is {self.scale:g}, must be > 0")


@dataclass(frozen=True)
class TableStatistics:
    """``scale``: per-feature std of an embedding table; ``median_norm``: median L2 norm of its rows (Eq. 10)."""

    scale: float
    median_norm: float


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def bounded_log_std(raw: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """log sigma in embedding units from an unbounded head output, same shape, float32 (float64 stays).

    ``log(min) + (log(max) - log(min)) * sigmoid(raw + c) + log(scale)``: sigmoid in the log domain, so sigma can
    neither vanish nor explode and every decade of the range is equally reachable. ``c`` puts raw = 0 at std_init.
    """
    low, high = math.log(bounds.std_min), math.log(bounds.std_max)
    share = (math.log(bounds.std_init) - low) / (high - low)
    offset = math.log(share / (1 - share))
    return (low + math.log(bounds.scale)) + (high - low) * torch.sigmoid(_at_least_fp32(raw) + offset)


def bounded_mean(raw: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    """mu in embedding units from an unbounded head output, same shape, float32 (float64 stays).

    ``b * tanh(raw / b)`` with ``b = mean_bound * scale``: slope 1 at 0, |mu| < b. ``raw`` itself when unbounded.
    """
    raw = _at_least_fp32(raw)
    bound = bounds.mean_bound * bounds.scale
    return raw if bound == 0 else bound * torch.tanh(raw / bound)


def moments(
    x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, gate: torch.Tensor | None, bounds: Bounds
) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and log sigma of Eq. 1 from what the heads say: bounded, and behind the gate if there is one. Float32 (float64
    stays), ``(..., D)``; ``gate``: ``(..., 1)``.
    """
    mu, log_sigma = bounded_mean(mean, bounds), bounded_log_std(log_std, bounds)
    return (mu, log_sigma) if gate is None else gated(x, mu, log_sigma, gate, bounds)


def gated(
    x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, raw: torch.Tensor, bounds: Bounds
) -> tuple[torch.Tensor, torch.Tensor]:
    """mu and log sigma behind a gate: what a token says is scaled as a whole, and its noise grows as it closes.

    ``s = sigmoid(c + raw / 10)``, one a token: ``x + mu`` becomes ``s (x + mu)``, and ``log sigma`` lies ``s`` of the
    way from ``log closed`` to itself. Closed (s = 0), z is N(0, closed^2) whatever the token, which costs no rate
    against that prior; open (s = 1), nothing changes. Without it an estimator has to learn mu = -x to the last digit to
    say nothing.
    ``raw``: ``(..., 1)``, 0 at the start, where s = 0.95; the others ``(..., D)``, float32 and in embedding units.
    """
    share = torch.sigmoid(_GATE_START + _GATE_PACE * _at_least_fp32(raw))
    closed = math.log(bounds.closed * bounds.scale)
    x = _at_least_fp32(x)
    return share * (x + mean) - x, closed + share * (log_std - closed)


def obfuscate(
    x: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor, eps: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """``x + mu + sigma * eps`` where ``mask`` is true, exactly ``x`` elsewhere (Eq. 1).

    ``x``, ``mean``, ``log_std``, ``eps``: ``(..., D)``; ``mask``: ``(...)`` bool, true where obfuscated. The sum is
    formed in float32 or wider and rounded once to the dtype of ``x``. Raises ValueError when the shapes differ.
    """
    if not (x.shape == mean.shape == log_std.shape == eps.shape and mask.shape == x.shape[:-1]):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, mean, log_std, eps, mask))
        raise ValueError(f"shapes of x, mean, log_std, eps, mask do not match: {shapes}")
    x_tilde = _at_least_fp32(x) + mean + torch.exp(log_std) * eps
    return torch.where(mask.bool().unsqueeze(-1), x_tilde.to(x.dtype), x)


def secure_noise(shape: tuple[int, ...] | torch.Size, *, device: torch.device | str = "cpu") -> torch.Tensor:
    """N(0, 1) float32 of the given shape, from the operating system's cryptographic generator.

    torch's generators do not fit a secret: the CPU one uses only the low 32 bits of its seed, so all its noise can be
    tried, and a Mersenne twister can be rebuilt from the outputs that a known stretch of plaintext gives away, which
    would remove the noise from the rest of the prompt. Box-Muller on 32-bit uniforms in (0, 1); |value| < 6.8.
    """
    count = math.prod(shape)
    noise_N = torch.empty(count, dtype=torch.float32)
    for start in range(0, count, _CHUNK_ELEMENTS):
        size = min(_CHUNK_ELEMENTS, count - start)
        noise_N[start : start + size] = normals(os.urandom(8 * ((size + 1) // 2)), 1)[0, :size]
    return noise_N.view(shape).to(device)


def normals(random_bytes: bytes | bytearray, rows: int) -> torch.Tensor:
    """N(0, 1) float32 ``(rows, bytes / 4 / rows)`` from uniform bytes, each row from its own share of them.

    Box-Muller: the first half of a row's 32-bit words are radii, the second half angles. Raises ValueError unless every
    row gets a whole number of pairs of words.
    """
    if len(random_bytes) % (8 * rows):
        raise ValueError(f"{len(random_bytes)} bytes do not make {rows} rows of pairs of 32-bit words")
    words = torch.frombuffer(bytearray(random_bytes), dtype=torch.int32).double().view(rows, 2, -1)
    uniform = (words + (2.0**31 + 0.5)) / 2.0**32
    radius, angle = torch.sqrt(-2 * torch.log(uniform[:, 0])), 2 * math.pi * uniform[:, 1]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).float()


@torch.no_grad()
def table_statistics(table_VD: torch.Tensor) -> TableStatistics:
    """Per-feature std and median row norm of an embedding table ``(V, D)`` of any float dtype, in embedding units.

    The std is the square root of the mean over features of the (population) variance over the vocabulary. Float64
    arithmetic in chunks of rows, in two passes, because subtracting squared sums would lose the variance of a table
    with a large common mean. Raises UserError for an empty, non-2-D, constant or non-finite table.
    """
    if table_VD.ndim != 2 or table_VD.numel() == 0:
        raise UserError(f"embedding table: shape {tuple(table_VD.shape)}, expected (vocabulary, width)")
    rows, width = table_VD.shape
    step = max(1, _CHUNK_ELEMENTS // width)
    mean_D = sum(chunk.double().sum(0) for chunk in table_VD.split(step)) / rows
    variance = sum((chunk.double() - mean_D).square().sum() for chunk in table_VD.split(step)) / (rows * width)
    norm_V = torch.cat([chunk.double().norm(dim=1) for chunk in table_VD.split(step)]).sort().values
    # The mean of the two middle norms, where torch.median would take the lower one.
    median_norm = (norm_V[(rows - 1) // 2] + norm_V[rows // 2]) / 2
    scale = math.sqrt(float(variance))
    if not math.isfinite(scale):
        raise UserError("embedding table: contains NaN or infinite values")
    if scale == 0:
        raise UserError("embedding table: all rows are equal, so there is no scale to measure noise in")
    return TableStatistics(scale=scale, median_norm=float(median_norm))
