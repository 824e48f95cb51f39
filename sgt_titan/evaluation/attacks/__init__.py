"""The attack battery: one file each, and this table.

An attack is a function whose parameter types are its threat model (``world/threat.py``). ``effort`` gives its
keyword-only parameters by suite; ``cost`` estimates them before anything runs. The order is roughly from weak to
strong; the last two see nothing of what was sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sgt_titan.evaluation.attacks import (
    averaging,
    beamclean,
    echo,
    farthest,
    inverter,
    known_plaintext,
    map_search,
    nearest,
    rotation_invariants,
    rotation_inverter,
    rotation_procrustes,
    rotation_spectral,
    rotation_substitution,
    sequence,
)
from sgt_titan.evaluation.options import ANSWER, GLANCE, GUESSING, SUITES
from sgt_titan.evaluation.world.threat import Cost, Guess


@dataclass(frozen=True)
class Attack:
    """``cost(size, **effort)`` -> Cost."""

    title: str
    run: Callable[..., Guess]
    cost: Callable[..., Cost]
    source: str
    effort: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # suite -> keyword arguments; absent: skipped
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of every suite

    def arguments(self, suite: str) -> dict[str, Any] | None:
        """Keyword arguments in a suite; None where the suite leaves it out."""
        return {**self.options, **self.effort[suite]} if suite in self.effort else None


EVERY: Mapping[str, Mapping[str, Any]] = {suite: {} for suite in SUITES}
ALSO_AT_A_GLANCE = {GLANCE: {}, **EVERY}

PAPER = "arXiv 2506.09452, section 6.1"
FOLKLORE = "the textbook attack"
BEAMCLEAN = "arXiv 2505.13758"


def _by_suite(key: str, *values: Any) -> dict[str, dict[str, Any]]:
    return {suite: {key: value} for suite, value in zip(SUITES, values, strict=True)}


SEQUENCE = "arXiv 2004.00053, with a posterior over the vocabulary"

# z is the Gaussian that MAP takes what it sees for; what a denoiser made of z is not.
MAP: Mapping[str, Mapping[str, Any]] = {
    "quick": {"beams": 2, "candidates": 64},
    "standard": {"beams": 4, "candidates": 256},
    "full": {"beams": 8, "candidates": 1024},
}

# Of the sequence attacker and of those who see nothing: equal, so that their difference is what was sent.
READER: Mapping[str, Mapping[str, Any]] = {
    "quick": {"first": 100, "most": 400, "layers": 4, "width": 128, "lr": 2e-3},
    "standard": {"first": 200, "most": 3200, "layers": 4, "width": 192, "lr": 2e-3},
    "full": {"first": 1000, "most": 16_000, "layers": 6, "width": 384},
}
# Of who goes on from the sequence attacker: half as many steps again. From left to right little is left to learn.
GOES_ON: Mapping[str, Mapping[str, Any]] = {
    suite: {
        **READER[suite],
        "first": READER[suite]["most"] // 8,
        "most": READER[suite]["most"] // 2,
        "after": READER[suite],
    }
    for suite in SUITES[1:]
}
BEFORE = "sequence"  # the attack that they go on from
# Of those who see nothing. What one of them misses makes every mechanism look worse, so he may end sooner.
SEES_NOTHING: Mapping[str, Mapping[str, Any]] = {suite: {**READER[suite], "enough": 0.02} for suite in SUITES}

ATTACKS: dict[str, Attack] = {
    "nearest_l2": Attack("nearest neighbour, L2", nearest.l2, nearest.cost, PAPER, ALSO_AT_A_GLANCE),
    "nearest_cosine": Attack("nearest neighbour, cosine", nearest.cosine, nearest.cost, PAPER, EVERY),
    "nearest_mahalanobis": Attack(
        "nearest neighbour, Mahalanobis", nearest.mahalanobis, nearest.cost, FOLKLORE, EVERY, {"rows": 64}
    ),
    "farthest": Attack("farthest neighbours", farthest.farthest, farthest.cost, PAPER, EVERY),
    "mrp": Attack(
        "most probable rank (MRP)", farthest.most_probable_rank, farthest.cost, PAPER, EVERY, {"known": 8192}
    ),
    "beamclean_gaussian": Attack(
        "BeamClean, Gaussian surrogate", beamclean.beamclean, beamclean.cost, BEAMCLEAN,
        _by_suite("rounds", 2, 3, 5), {"affine": False},
    ),
    "beamclean_affine": Attack(
        "BeamClean, affine surrogate", beamclean.beamclean, beamclean.cost, BEAMCLEAN + ", with a surrogate of ours",
        _by_suite("rounds", 2, 3, 5), {"affine": True},
    ),
    "echo": Attack("echo: the trunk goes on", echo.echo, echo.cost, FOLKLORE, EVERY),
    "logit_reading": Attack(
        "reading the trunk's hidden states", echo.logit_reading, echo.cost, FOLKLORE, EVERY, {"rows": 64}
    ),
    "averaging": Attack(
        "averaging K repeats", averaging.averaging, averaging.cost, FOLKLORE, _by_suite("most", 16, 64, 256)
    ),
    "known_plaintext": Attack(
        "known-plaintext regression", known_plaintext.regression, known_plaintext.cost, FOLKLORE,
        _by_suite("most", 16_384, 65_536, 65_536),
    ),
    "averaging_regression": Attack(
        "averaging K repeats, then regression", averaging.averaging_regression, averaging.cost, FOLKLORE,
        _by_suite("most", 16, 64, 256), {"known": 65_536},
    ),
    "map_search": Attack(
        "MAP beam search, SGT known", map_search.map_search, map_search.cost, FOLKLORE, MAP
    ),
    "inverter": Attack(
        "learned inverter", inverter.inverter, inverter.cost, "arXiv 2004.00053",
        {
            "quick": {"steps": 300, "layers": 3, "width": 256},
            "standard": {"steps": 1500, "layers": 3, "width": 256},
            "full": {"steps": 10_000, "layers": 6, "width": 384},
        },
    ),
    "sequence": Attack("sequence attacker", sequence.sequence, sequence.cost, SEQUENCE, READER),
    "autoregressive": Attack(
        "sequence attacker, left to right", sequence.autoregressive, sequence.cost, SEQUENCE,
        {suite: {**GOES_ON[suite], "most": GOES_ON[suite]["first"], "beams": beams, "lr": 5e-4}
         for suite, beams in (("standard", 4), ("full", 8))},
        {"from_trunk": True},
    ),
    "sequence_repeats": Attack(
        "sequence attacker, mean of K repeats", sequence.sequence_repeats, sequence.cost, SEQUENCE,
        {suite: READER[suite] for suite in SUITES[1:]}, {"times": 8, "fresh": 4},
    ),
    "map_search_at_z": Attack(
        "MAP beam search at z", map_search.map_search_at_z, map_search.cost, FOLKLORE,
        {suite: MAP[suite] for suite in SUITES[1:]},
    ),
    "sequence_at_z": Attack(
        "sequence attacker at z", sequence.sequence_at_z, sequence.cost, SEQUENCE, GOES_ON
    ),
    GUESSING: Attack(
        "guessing: the same without what was sent", sequence.guess, sequence.unsent_cost, SEQUENCE, SEES_NOTHING
    ),
    ANSWER: Attack(
        "the answer: the same with the answer alone", sequence.answer, sequence.answered_cost, SEQUENCE, SEES_NOTHING
    ),
}  # fmt: skip

CONJFORMER = "docs/CONJFORMER.md"

# On what was sent in a secret basis, and only there.
ROTATION: dict[str, Attack] = {
    "norm_matching": Attack(
        "norm matching", rotation_invariants.norm_matching, nearest.cost, FOLKLORE, EVERY
    ),
    "gram_matching": Attack(
        "Gram matching, then Procrustes", rotation_invariants.gram_matching, rotation_invariants.cost, FOLKLORE,
        _by_suite("candidates", 32, 64, 256),
    ),
    "fingerprints": Attack(
        "attention-logit fingerprints", rotation_invariants.fingerprints, nearest.cost, CONJFORMER, EVERY
    ),
    "procrustes": Attack(
        "Procrustes from known pairs", rotation_procrustes.procrustes, rotation_procrustes.cost, FOLKLORE,
        _by_suite("most", 4_096, 4_096, 65_536),
    ),
    "substitution": Attack(
        "a substitution cipher, deciphered", rotation_substitution.substitution, rotation_substitution.cost,
        "Ravi and Knight, ACL 2011", _by_suite("words", 800, 1_500, 3_000), {"rounds": 15},
    ),
    "substitution_table": Attack(
        "the cipher, then Procrustes with what it read", rotation_substitution.substitution_table,
        rotation_substitution.cost, CONJFORMER, _by_suite("words", 800, 1_500, 3_000), {"rounds": 15},
    ),
    "invariant_inverter": Attack(
        "learned inverter without the secret", rotation_inverter.invariant_inverter, rotation_inverter.cost, CONJFORMER,
        _by_suite("steps", 300, 1_500, 10_000),
    ),
    "spectral": Attack(
        "spectral weight matching", rotation_spectral.spectral, rotation_spectral.cost, CONJFORMER, EVERY
    ),
    "spectral_sequence": Attack(
        "spectral matching, then the sequence attacker", rotation_spectral.spectral_sequence, rotation_spectral.cost,
        CONJFORMER, READER,
    ),
}  # fmt: skip
