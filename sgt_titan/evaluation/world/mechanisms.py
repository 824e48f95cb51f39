"""Ways to hide a prompt, behind one door: the SGT and what it has to beat. All get the same battery and report.

    none        the embeddings as they are
    noise       Gaussian noise of one std for every token and feature (local differential privacy's mechanism)
    redaction   the tokens of marked private spans replaced by a placeholder; everything else in clear
    dropping    some of the tokens in clear, the others left out (scores/dropping.py)
    sgt         the export, called as a client calls it

Legend: B batch, T sequence, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from sgt_titan.evaluation.world.samples import Padded, Sample
from sgt_titan.transform import ExportedTransform
from sgt_titan.transform.modeling import SGTOutput
from sgt_titan.transform.trunk_files import TrunkFiles

KEPT_BYTES = 1 << 29  # of what is computed once of rows that are obfuscated again; what finds no room is computed anew


class Obfuscated(NamedTuple):
    """Embeddings to send, and the Gaussian that z was drawn from; ``log_std_BTD`` is None where there is no noise.

    z_BTD: the noisy embeddings before the client's denoiser, which are not sent. None: z is what is sent.
    """

    x_tilde_BTD: torch.Tensor
    center_BTD: torch.Tensor
    log_std_BTD: torch.Tensor | None
    z_BTD: torch.Tensor | None = None

    @property
    def noisy_BTD(self) -> torch.Tensor:
        """z, whether or not a denoiser follows it."""
        return self.x_tilde_BTD if self.z_BTD is None else self.z_BTD


@dataclass(frozen=True)
class Rotation:
    """A secret basis around a mechanism. before: what is done to the embeddings first. served, public: the rotated
    checkpoint that the server runs, and the one it was made from as the world knows it. answer: a causal language model
    for rotated embeddings: the server's half and the client's together."""

    before: Mechanism
    served: TrunkFiles
    public: TrunkFiles
    answer: Any


class Written(NamedTuple):
    """A row with other text in it, at its true length. first_N, last_N: per scored token of the original, the tokens
    ``first..last-1`` of ``row`` that stand for it and, where it begins a value, for the rest of that value; first is -1
    at the rest, which is put back together with the beginning."""

    row: Sample
    first_N: np.ndarray
    last_N: np.ndarray


@dataclass(frozen=True)
class Respelt:
    """Of a mechanism whose rows change their length: how a row is written, and what is done to it then."""

    written: Callable[[Sample], Written]
    before: Mechanism


@dataclass(frozen=True)
class Mechanism:
    """``obfuscate(batch, x_BTD, random)``: embeddings of a batch, obfuscated where ``batch.obfuscate_BT``.

    transform: the SGT, where it is one. rotation: where what is sent is in a secret basis (rotated.py). std: of a
    constant noise, embedding units; 0 where there is none. denoises: a denoiser stands between z and what is sent.
    drops: a token is sent in clear, or something in its place that says nothing of it. again: several observations of
    a batch that may come again, for the work that they share; absent: as many calls.
    rewrite: other tokens in place of a batch's own, before anything (surrogates.py); restore: the tokens of an answer
    to a prompt that was rewritten, with the values put back; respelt: where that changes a row's length, the utility is
    of those rows. facts: what else a report states about it, by name.
    """

    name: str
    title: str
    obfuscate: Callable[[Padded, torch.Tensor, torch.Generator], Obfuscated] = field(repr=False)
    transform: ExportedTransform | None = field(default=None, repr=False)
    rotation: Rotation | None = field(default=None, repr=False)
    std: float = 0.0
    denoises: bool = False
    drops: bool = False
    again: Callable[[Padded, torch.Tensor, torch.Generator, int], list[Obfuscated]] | None = field(
        default=None, repr=False
    )
    rewrite: Callable[[Padded], Padded] | None = field(default=None, repr=False)
    restore: Callable[[Sample, Sequence[int]], list[int]] | None = field(default=None, repr=False)
    respelt: Respelt | None = field(default=None, repr=False)
    facts: dict[str, float] = field(default_factory=dict)

    def repeats(self, batch: Padded, x_BTD: torch.Tensor, random: torch.Generator, times: int) -> list[Obfuscated]:
        """What ``times`` calls of ``obfuscate`` give."""
        if self.again is not None:
            return self.again(batch, x_BTD, random, times)
        return [self.obfuscate(batch, x_BTD, random) for _ in range(times)]


def nothing() -> Mechanism:
    """No obfuscation: the embeddings themselves."""
    return Mechanism("none", "no obfuscation", lambda batch, x_BTD, random: Obfuscated(x_BTD, x_BTD, None))


def constant_noise(std: float, name: str = "noise", title: str = "constant noise") -> Mechanism:
    """Gaussian noise of one std (embedding units) for every token and feature, and no mean."""

    def obfuscate(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> Obfuscated:
        eps_BTD = torch.randn(x_BTD.shape, generator=random, device=x_BTD.device)
        x_tilde_BTD = torch.where(batch.obfuscate_BT[..., None], x_BTD.float() + std * eps_BTD, x_BTD.float())
        return Obfuscated(x_tilde_BTD, x_BTD, torch.full_like(x_BTD, math.log(std), dtype=torch.float32))

    return Mechanism(name, title, obfuscate, std=std)


class Moments:
    """Mean and deviation of an export that has its table, by a row's tokens: for whoever obfuscates it again and again.
    Kept until there is no more room; they are of the tokens before and nothing else."""

    def __init__(self, transform: ExportedTransform):
        self.transform, self.kept, self.room = transform, dict[bytes, tuple[torch.Tensor, torch.Tensor]](), KEPT_BYTES

    @torch.no_grad()
    def of(self, batch: Padded) -> SGTOutput:
        """As the transform gives them; zero at padding."""
        lengths = batch.valid_BT.sum(1).tolist()
        names = [ids_T[:T].cpu().numpy().tobytes() for ids_T, T in zip(batch.tokens_BT, lengths, strict=True)]
        found = {name: self.kept[name] for name in names if name in self.kept}
        if new := [b for b, name in enumerate(names) if name not in found]:
            longest = max(lengths[b] for b in new)
            part = batch.tokens_BT[new, :longest], batch.valid_BT[new, :longest].long()
            out = self.transform(input_ids=part[0], attention_mask=part[1])
            for i, b in enumerate(new):
                found[names[b]] = one = out.mean_BTD[i, : lengths[b]].clone(), out.log_std_BTD[i, : lengths[b]].clone()
                if (size := sum(t.nbytes for t in one)) <= self.room:
                    self.kept[names[b]] = one
                    self.room -= size
        mean_BTD = pad_sequence([found[name][0] for name in names], batch_first=True)
        log_std_BTD = pad_sequence([found[name][1] for name in names], batch_first=True)
        return SGTOutput(mean_BTD, log_std_BTD)


def learned(transform: ExportedTransform) -> Mechanism:
    """The export, called as a client calls it."""
    known = Moments(transform) if transform.embed_tokens is not None else None

    def draws(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator, moments: Any) -> Iterator[Obfuscated]:
        inputs = batch.tokens_BT if transform.embed_tokens is not None else x_BTD
        given: dict[str, Any] = {"generator": random, "attention_mask": batch.valid_BT.long()}
        while True:
            one = transform.release(inputs, batch.obfuscate_BT, moments=moments, **given)
            moments = one.moments  # the same for every draw of the noise
            yield Obfuscated(one.sent_BTD, one.center_BTD, one.log_std_BTD, one.z_BTD)

    def again(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator, times: int) -> list[Obfuscated]:
        return list(islice(draws(batch, x_BTD, random, known and known.of(batch)), times))

    return Mechanism(
        "sgt",
        "this SGT",
        lambda batch, x_BTD, random: next(draws(batch, x_BTD, random, None)),
        transform=transform,
        denoises=transform.denoiser is not None,
        again=again,
    )


def redaction(placeholder_D: torch.Tensor) -> Mechanism:
    """The tokens of marked private values replaced by a placeholder's embedding (D,); the rest is sent in clear.

    The common practice, with a perfect detector: what it protects is what was marked, and only that.
    """

    def obfuscate(batch: Padded, x_BTD: torch.Tensor, random: torch.Generator) -> Obfuscated:
        hidden_BT = batch.marked_BT & batch.obfuscate_BT
        sent_BTD = torch.where(hidden_BT[..., None], placeholder_D.to(x_BTD), x_BTD)
        return Obfuscated(sent_BTD, sent_BTD, None)

    return Mechanism("redaction", "redaction of marked values", obfuscate)


# -- constant noise as local differential privacy ----------------------------------------------------------------------

DELTA = 1e-5


def noise_grid(table_VD: torch.Tensor, scale: float, sigmas: Sequence[float]) -> list[Mechanism]:
    """Constant noise at several sigmas (units of ``scale``), each with the epsilon that it gives one token.

    The first is named "noise", the others by their sigma. Neighbouring inputs are two tokens at one position, so the
    sensitivity is the largest distance between two rows of the table; a prompt of T tokens gets T times the epsilon
    by composition.
    """
    sensitivity = largest_distance(table_VD)
    found = []
    for i, sigma in enumerate(sigmas):
        std = sigma * scale
        name, title = (
            ("noise", "constant noise, this SGT's mean std")
            if i == 0
            else (f"noise-{sigma:g}", f"constant noise, std {sigma:g}")
        )
        mechanism = constant_noise(std, name, title)
        mechanism.facts.update(
            std=sigma,
            delta=DELTA,
            epsilon=gaussian_epsilon(sensitivity / std, DELTA),
            epsilon_classical=classical_epsilon(sensitivity / std, DELTA),
        )
        found.append(mechanism)
    return found


@torch.no_grad()
def largest_distance(table_VD: torch.Tensor, chunk: int = 2048) -> float:
    """The largest L2 distance between two rows, exactly, in blocks of (2048, V)."""
    table_VD = table_VD.double()
    norm_V, largest = table_VD.square().sum(-1), 0.0
    for start in range(0, table_VD.shape[0], chunk):
        rows = slice(start, start + chunk)
        largest = max(largest, (norm_V[rows, None] + norm_V - 2 * table_VD[rows] @ table_VD.T).max().item())
    return math.sqrt(max(largest, 0.0))


def classical_epsilon(shift: float, delta: float) -> float:
    """``shift sqrt(2 ln(1.25 / delta))`` (Dwork and Roth, 2014, Theorem A.1): proven only below 1, quoted well above.

    shift: sensitivity over sigma.
    """
    return shift * math.sqrt(2 * math.log(1.25 / delta))


def gaussian_epsilon(shift: float, delta: float) -> float:
    """The smallest epsilon for which Gaussian noise is (epsilon, delta)-DP, exactly.

    The analytic Gaussian mechanism (Balle and Wang, arXiv 1805.06530, Theorem 8): the epsilon at which
    ``Phi(shift/2 - eps/shift) - e^eps Phi(-shift/2 - eps/shift) = delta``. shift: sensitivity over sigma.
    """

    def excess(epsilon: float) -> float:
        first, second = (torch.tensor(sign * shift / 2 - epsilon / shift, dtype=torch.float64) for sign in (1, -1))
        # e^eps overflows long before the product does.
        return torch.special.ndtr(first).item() - math.exp(epsilon + torch.special.log_ndtr(second).item())

    if excess(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while excess(high) > delta:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > delta else (low, middle)
    return high
