"""What each suite measures: rows, baselines, and which attacks on which mechanism. Effort per attack: ``attacks``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgt_titan.evaluation.attacks import ATTACKS, ROTATION, Attack
from sgt_titan.evaluation.options import GLANCE, UNSENT
from sgt_titan.evaluation.world.threat import kind_of

# On baselines whose noise is known and constant: maximum likelihood, alone and with a prior.
EXACT = ("nearest_l2", "nearest_mahalanobis", "map_search")

# Behind a secret rotation, those of the battery that do not presume to know the basis; and all of ``ROTATION``.
BLIND = ("nearest_l2", "nearest_cosine", "known_plaintext", "inverter")


@dataclass(frozen=True)
class Suite:
    """rows: prompts under attack, at most. corpus: public rows an attacker trains on, at most. sigmas: of constant
    noise, units of the table's per-feature std, beside the SGT's own mean std. whole: baselines that get the whole
    battery; the others get ``EXACT``. read: those that the sequence attacker reads too, since what they leave out or
    drown is guessed from the rest. greedy: prompts answered greedily; questions: per benchmark.
    drops: shares of the tokens that token dropping sends in clear."""

    rows: int
    corpus: int
    sigmas: tuple[float, ...]
    whole: tuple[str, ...]
    read: tuple[str, ...]
    greedy: int
    questions: int
    about: str
    drops: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5)


SUITES: dict[str, Suite] = {
    GLANCE: Suite(128, 128, (), (), (), 0, 50, "seconds: cost, and the nearest neighbour alone", ()),
    "quick": Suite(
        32,
        6_000,
        (0.25, 1.0, 4.0),
        (),
        ("noise-4", "dropping-30", "choosing-30"),
        16,
        50,
        "minutes: is anything badly wrong?",
        (0.3,),
    ),
    "standard": Suite(
        128,
        10_000,
        (0.25, 1.0, 4.0),
        ("redaction",),
        ("choosing-30",),
        64,
        200,
        "hours for a small trunk: what a report says",
    ),
    "full": Suite(
        512,
        100_000,
        (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        ("redaction", "noise"),
        ("noise-4", "dropping-30", "choosing-30", "choosing-50"),
        128,
        0,
        "hours: for publication",
    ),
}


def battery(
    suite: str, mechanism: str, only: Sequence[str] = (), *, rotated: bool = False, denoises: bool = False
) -> dict[str, Attack]:
    """The attacks of a suite on a mechanism, by name, in the order of the table. Without a denoiser z is what is sent,
    and none is run at z."""
    if rotated:
        table = {name: ATTACKS[name] for name in BLIND} | ROTATION
        return {
            name: attack
            for name, attack in table.items()
            if attack.arguments(suite) is not None and (not only or name in only)
        }
    whole = mechanism == "sgt" or mechanism in SUITES[suite].whole
    own = mechanism == "sgt"  # what is guessed without looking is the same for all, and found with the SGT
    return {
        name: attack
        for name, attack in ATTACKS.items()
        if attack.arguments(suite) is not None
        and (whole or name in EXACT or (name == "sequence" and mechanism in SUITES[suite].read))
        and (own or name not in UNSENT)
        and (denoises or kind_of(attack.run) != "noisy")
        and (not only or name in only)
    }
