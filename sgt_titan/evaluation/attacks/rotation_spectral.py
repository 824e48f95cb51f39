"""Spectral weight matching: the secret rotation from the served weights and the public ones, without any prompt.

What a model computes by products between its weights no symmetry changes, only U does, as M' = U M U^T:

    gate^T gate     units are permuted and cannot be scaled in front of their nonlinearity
    Wo Wv           summed over heads: whatever stands between values and output
    Wq^T Wk         the score of two tokens at one place, summed over heads
    Wdown Wup       summed over units: whatever scales them

Where no symmetry but rotations was used each weight's own Gram matrix is a further one, and U agrees with more. Then:

1. a start: eigenvectors of the sums of symmetric M' and M, of all and of each kind alone, in the order of their
   eigenvalues, which agree up to a sign each; and the vectors that no permutation moves, sums over units, with their
   images under M, by Procrustes;
2. the signs: in these bases a further pair of matrices has entries s_i s_j m_ij, whose products with m_ij have the
   signs as their leading eigenvector (angular synchronisation, Singer, arXiv 0905.3174);
3. U <- polar(sum M' U M + M'^T U M^T), from the start that fits best until it stays: uses all matrices, and survives
   weights that were fine-tuned;
4. the sign of U as a whole, and a last polish, from the gate's rows: they are permuted, but not turned.

Legend: D width, F units of an MLP, N hidden tokens flat, K matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch

from sgt_titan.conjformer.convert import Conversion, Norms
from sgt_titan.evaluation.attacks import sequence
from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.attacks.rotation_procrustes import orthogonal
from sgt_titan.evaluation.attacks.rotation_products import Kinds, gate_rows, grams, products
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
TRIAL, ROUNDS = 5, 200
SETTLED = 1e-10
CERTAIN = 0.999  # agreement above which nothing else has to be tried


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


def spectral_sequence(
    observation: Observation,
    served: Served,
    public: Public,
    without: WithoutSecret,
    corpus: Corpus,
    table: Table,
    seed: Seed,
    **effort: Any,
) -> Guess:
    """Undo the recovered rotation, then the sequence attacker of the SGT before it."""
    found = recover(served.files, public.files)
    undone = tuple((x_TD.double() @ found.U_DD.to(x_TD.device)).float() for x_TD in observation.x_tilde)
    seen = Observation(undone, observation.hidden, observation.tokens)
    guess = sequence.trained(seen, Transform(without.mechanism), corpus, table, seed, **effort)
    return Guess(guess.top_NK, guess.curve, guess.flops + _flops(found.U_DD), (_note(found), *guess.notes))


def recover(served: TrunkFiles, public: TrunkFiles) -> Recovered:
    """The rotation between two checkpoints; of both conversions, with and without symmetries, what fits best."""
    theirs = Conversion(served.path, None)
    best: Recovered | None = None
    for norms in get_args(Norms):
        ours = Conversion(public.path, None, norms=norms)
        for invariants in (products, grams):
            found = _recover(theirs, ours, invariants)
            best = found if best is None or found.agreement > best.agreement else best
            if best.agreement > CERTAIN:
                return best
    assert best is not None
    return best


def _recover(theirs: Conversion, ours: Conversion, invariants: Callable[[Conversion], Kinds]) -> Recovered:
    secret, known = invariants(theirs), invariants(ours)
    secret_KDD, known_KDD = (torch.stack([m for kind in kinds.values() for m in kind]) for kinds in (secret, known))
    starts = [_by_eigenvectors(secret_KDD, known_KDD, secret_KDD, known_KDD)]
    for kind in secret:
        starts.append(_by_eigenvectors(torch.stack(secret[kind]), torch.stack(known[kind]), secret_KDD, known_KDD))
    starts.append(_by_sums(theirs, ours, secret_KDD, known_KDD))
    tried = [_iterated(secret_KDD, known_KDD, U_DD, TRIAL) for U_DD in starts]
    best = max(tried, key=lambda U_DD: _fit(secret_KDD, known_KDD, U_DD))
    return _polished(theirs, ours, _iterated(secret_KDD, known_KDD, best, ROUNDS))


def _by_eigenvectors(
    secret_KDD: torch.Tensor, known_KDD: torch.Tensor, further_KDD: torch.Tensor, further_known_KDD: torch.Tensor
) -> torch.Tensor:
    """Steps 1 and 2; signs from the further pair."""
    turned_DD, plain_DD = (torch.linalg.eigh(_symmetric(m.sum(0))).eigenvectors for m in (secret_KDD, known_KDD))
    same_DD = ((turned_DD.T @ further_KDD @ turned_DD) * (plain_DD.T @ further_known_KDD @ plain_DD)).sum(0)
    signs_D = torch.linalg.eigh(_symmetric(same_DD).fill_diagonal_(0)).eigenvectors[:, -1].sign()
    signs_D[signs_D == 0] = 1
    return (turned_DD * signs_D) @ plain_DD.T


def _by_sums(theirs: Conversion, ours: Conversion, secret_KDD: torch.Tensor, known_KDD: torch.Tensor) -> torch.Tensor:
    """Known pairs without a known token: the sum of each gate's rows, u' = U u, and its images M' u' = U M u. Where
    these span no basis the rest of U is arbitrary."""
    found = []
    for layer in range(ours.sizes.layers):
        pair = [gate_rows(c, layer).sum(0) for c in (theirs, ours)]
        images = [m_KDD @ u_D for m_KDD, u_D in zip((secret_KDD, known_KDD), pair, strict=True)]
        found.append([torch.cat([u_D[None], i_KD]) for u_D, i_KD in zip(pair, images, strict=True)])
    secret_XD, known_XD = (torch.cat([pair[i] for pair in found]) for i in (0, 1))
    length_X1 = known_XD.norm(dim=-1, keepdim=True).clamp_min(1e-30)  # each weighs the same
    return orthogonal((secret_XD / length_X1).T @ (known_XD / length_X1))


def _iterated(secret_KDD: torch.Tensor, known_KDD: torch.Tensor, U_DD: torch.Tensor, rounds: int) -> torch.Tensor:
    """Step 3."""
    for _ in range(rounds):
        half_KDD = U_DD @ known_KDD
        product_DD = (secret_KDD.mT @ half_KDD).sum(0) + (secret_KDD @ (U_DD @ known_KDD.mT)).sum(0)
        after_DD = orthogonal(product_DD)
        moved, U_DD = (after_DD - U_DD).norm() / U_DD.norm(), after_DD
        if moved < SETTLED:
            break
    return U_DD


def _fit(secret_KDD: torch.Tensor, known_KDD: torch.Tensor, U_DD: torch.Tensor) -> float:
    return (secret_KDD * (U_DD @ known_KDD @ U_DD.T)).sum().item()


def _polished(theirs: Conversion, ours: Conversion, U_DD: torch.Tensor) -> Recovered:
    """Step 4: rows matched by cosine."""
    rows = [
        tuple(torch.nn.functional.normalize(gate_rows(c, layer), dim=-1) for c in (theirs, ours))
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


def _symmetric(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix + matrix.mT) / 2


def _note(found: Recovered) -> str:
    return f"the rows of the MLPs agree to a cosine of {found.agreement:.3f} under the rotation it found"


def _flops(U_DD: torch.Tensor) -> float:
    return 40.0 * len(U_DD) ** 3


def cost(size: Size, **effort: Any) -> Cost:
    """effort: of the sequence attacker behind it, if there is one."""
    matrices = max(1.0, size.trunk / (4.0 * size.width**2))
    flops = 4.0 * matrices * ROUNDS * size.width**3 + 2.0 * size.tokens * size.vocab * size.width
    more = sequence.cost(size, **effort) if effort else Cost(0.0, 0.0)
    return Cost(flops + more.flops, 32.0 * matrices * size.width**2 + more.bytes)
