"""Spectral weight matching: the secret rotation from the served weights and the public ones, without any prompt.

Every weight that reads the stream gives G' = W'^T W' = U (W^T W) U^T, every one that writes it W' W'^T likewise: the
other secrets (per head, per unit) cancel. Four steps:

1. eigenvectors of the sums of all G' and of all G, in the order of their eigenvalues, agree up to a sign each;
2. the signs: in these bases a further pair of matrices has entries s_i s_j g_ij, whose products with g_ij have the
   signs as their leading eigenvector (angular synchronisation, Singer, arXiv 0905.3174);
3. U <- polar(sum G' U G), until it stays: uses all matrices, and survives weights that were fine-tuned a little;
4. the sign of U as a whole, and a last polish, from the MLP's rows: they are permuted, but not turned.

Legend: D width, F units of an MLP, N hidden tokens flat.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, get_args

import torch

from sgt_titan.conjformer.convert import Conversion, Norms
from sgt_titan.evaluation.attacks import inverter as learned
from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.attacks.rotation_procrustes import orthogonal
from sgt_titan.evaluation.world.threat import (
    Corpus,
    Cost,
    Guess,
    Observation,
    Public,
    Seed,
    Served,
    Size,
    Table,
    Transform,
    WithoutSecret,
)
from sgt_titan.transform.trunk_files import TrunkFiles

GUESSES = 10
ROUNDS = 200
SETTLED = 1e-10


class Recovered(NamedTuple):
    """U_DD: the estimate. agreement: mean cosine of the MLP rows that it brings together, 1 where it is right."""

    U_DD: torch.Tensor
    agreement: float


def spectral(observation: Observation, served: Served, public: Public, table: Table) -> Guess:
    """Undo the recovered rotation, then the nearest row."""
    found = recover(served.files, public.files)
    x_ND = observation.x_tilde_ND.double() @ found.U_DD.to(observation.x_tilde_ND.device)
    top_NK = top_rows(x_ND, table.rows_VD, GUESSES)
    return Guess(top_NK.cpu(), flops=_flops(found.U_DD), notes=(_note(found),))


def spectral_inverter(
    observation: Observation,
    served: Served,
    public: Public,
    without: WithoutSecret,
    corpus: Corpus,
    table: Table,
    seed: Seed,
    *,
    layers: int = 3,
    width: int = 256,
    steps: int = 400,
) -> Guess:
    """Undo the recovered rotation, then the learned inverter of the SGT before it."""
    found = recover(served.files, public.files)
    undone = tuple((x_TD.double() @ found.U_DD.to(x_TD.device)).float() for x_TD in observation.x_tilde)
    seen = Observation(undone, observation.hidden, observation.tokens)
    guess = learned.inverter(
        seen, Transform(without.mechanism), corpus, table, seed, layers=layers, width=width, steps=steps
    )
    return Guess(guess.top_NK, guess.curve, guess.flops + _flops(found.U_DD), (_note(found), *guess.notes))


def recover(served: TrunkFiles, public: TrunkFiles) -> Recovered:
    """The rotation between two checkpoints; of the two conversions the one that fits better is taken."""
    return max((_recover(served, public, norms) for norms in get_args(Norms)), key=lambda found: found.agreement)


def _recover(served: TrunkFiles, public: TrunkFiles, norms: Norms) -> Recovered:
    theirs, ours = Conversion(served.path, None), Conversion(public.path, None, norms=norms)
    secret, known = zip(*_grams(theirs, ours), strict=True)
    secret_KDD, known_KDD = torch.stack(secret), torch.stack(known)
    turned_DD, plain_DD = (torch.linalg.eigh(grams.sum(0)).eigenvectors for grams in (secret_KDD, known_KDD))
    same_DD = ((turned_DD.T @ secret_KDD @ turned_DD) * (plain_DD.T @ known_KDD @ plain_DD)).sum(0)
    signs_D = torch.linalg.eigh(same_DD.fill_diagonal_(0)).eigenvectors[:, -1].sign()
    signs_D[signs_D == 0] = 1
    U_DD = (turned_DD * signs_D) @ plain_DD.T
    for _ in range(ROUNDS):
        after_DD = orthogonal((secret_KDD @ U_DD @ known_KDD).sum(0))
        moved, U_DD = (after_DD - U_DD).norm() / U_DD.norm(), after_DD
        if moved < SETTLED:
            break
    return _polished(theirs, ours, U_DD)


def _grams(theirs: Conversion, ours: Conversion) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(D, D) each, of every projection of every layer, traces 1, rotated and public."""
    for layer in range(ours.sizes.layers):
        for module, rule in ours.family.linears.items():
            weights = theirs.linear(layer, module), _absorbed(ours, layer, module)
            reads = rule.reads == "residual"
            # Several projections in one tensor have a secret each, and their Grams add up.
            secret, known = (w.T @ w if reads else w @ w.T for w in weights)
            yield secret / secret.trace(), known / known.trace()


def _absorbed(ours: Conversion, layer: int, module: str) -> torch.Tensor:
    """The public weight as the conversion uses it: a LayerNorm's centring is in what writes the stream."""
    weight = ours.linear(layer, module)
    writes = ours.family.linears[module].out == ("residual",)
    return weight - weight.mean(0, keepdim=True) if writes and ours.family.centred else weight


def _polished(theirs: Conversion, ours: Conversion, U_DD: torch.Tensor) -> Recovered:
    """Sign and Procrustes from the rows of the first MLP projection of every layer, matched by cosine."""
    module = next(name for name, rule in ours.family.linears.items() if rule.out == ("unit",))
    rows = [
        tuple(torch.nn.functional.normalize(c.linear(layer, module), dim=-1) for c in (theirs, ours))
        for layer in range(ours.sizes.layers)
    ]
    for turn in range(4):
        cosines = [secret_FD @ U_DD @ known_FD.T for secret_FD, known_FD in rows]
        if turn == 0 and sum(c.max(-1).values.sum() + c.min(-1).values.sum() for c in cosines) < 0:
            U_DD, cosines = -U_DD, [-c for c in cosines]
        matches = [c.argmax(-1) for c in cosines]
        U_DD = orthogonal(sum((s.T @ k[m] for (s, k), m in zip(rows, matches, strict=True)), torch.zeros_like(U_DD)))
    agreement = torch.cat([(s @ U_DD * k[m]).sum(-1) for (s, k), m in zip(rows, matches, strict=True)]).mean().item()
    return Recovered(U_DD, agreement)


def _note(found: Recovered) -> str:
    return f"the rows of the MLPs agree to a cosine of {found.agreement:.3f} under the rotation it found"


def _flops(U_DD: torch.Tensor) -> float:
    return 40.0 * len(U_DD) ** 3


def cost(size: Size, *, layers: int = 0, width: int = 256, steps: int = 0) -> Cost:
    matrices = max(1.0, size.trunk / (4.0 * size.width**2))
    flops = 4.0 * matrices * ROUNDS * size.width**3 + 2.0 * size.tokens * size.vocab * size.width
    more = learned.cost(size, layers=layers, width=width, steps=steps) if steps else Cost(0.0, 0.0)
    return Cost(flops + more.flops, 32.0 * matrices * size.width**2 + more.bytes)
