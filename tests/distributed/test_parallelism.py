"""The same run on every layout of ranks: each reported term, the gradient norm and the probe, for ten steps."""

from __future__ import annotations

import math

import launch
import pytest

pytestmark = pytest.mark.distributed

TERMS = (
    "loss/total",
    "loss/utility",
    "utility/kl_nats",
    "loss/mi_nats_per_feature",
    "loss/abs_cos",
    "loss/norm",
    "loss/comp_entr",
    "loss/cos_sim",
    "noise/std_over_table_std",
    "noise/mean_norm_over_median_norm",
    "optimizer/grad_norm",
)
AGREEMENT = "utility/top1_agreement"
TOLERANCE = 1e-4
TP2 = ("--parallelism.tensor_parallel_degree", "2")
NO_SP = ("--parallelism.enable_sequence_parallel", "false")
HSDP = ("--parallelism.data_parallel_replicate_degree", "2")
ROWS = "--training.local_batch_size"

# Name: ranks and overrides. Rows of a rank other than 8 divided by the data-parallel ranks mean accumulation; with one
# row a rank, the two rows of a pair are on different ranks.
LAYOUTS = {
    "accumulation": (1, (ROWS, "2")),
    "fsdp2 x2": (2, (ROWS, "4")),
    "fsdp2 x2, pairs across ranks": (2, (ROWS, "1")),
    "tp x2": (2, TP2),
    "tp x2 without sequence parallel": (2, (*TP2, *NO_SP, ROWS, "4")),
    "fsdp2 2 x tp 2, pairs across ranks": (4, (*TP2, ROWS, "1")),
    "hsdp 2x2": (4, (*HSDP, ROWS, "2")),
    "hsdp 2x2, pairs across ranks": (4, (*HSDP, ROWS, "1")),
}
OTHER = (
    *("--estimator.body", "separate", "--estimator.init_from_trunk", "true", "--estimator.layers", "2"),
    *("--estimator.mean_bound", "3", "--objective.mi_pairs", "shift", "--objective.mi_group", "4"),
    *("--objective.utility", "kl", "--objective.utility_positions", "response", "--optimizer.lr", "3e-4"),
)
OTHER_LAYOUTS = {
    "fsdp2 2 x tp 2": (4, (*OTHER, *TP2, ROWS, "2")),
    "fsdp2 2 x tp 2, full recomputation": (
        4,
        (*OTHER, *TP2, ROWS, "2", "--activation_checkpoint.mode", "full", "--parallelism.fsdp_reshard_after_forward", "always"),
    ),
}


@pytest.fixture(scope="module")
def reference(small):
    """One process, no accumulation."""
    return small.finish(1, hooks=(launch.record_samples,))


@pytest.fixture(scope="module")
def other_reference(small):
    """Another model and objective on one process."""
    return small.finish(1, *OTHER)


def test_the_reference_trains(reference):
    """Parity of a run in which nothing happens would prove nothing: every term has to move."""
    found = reference.scalars
    assert sorted(found) == list(range(1, 11))
    for tag in (*TERMS, AGREEMENT):
        values = [found[step][tag] for step in found]
        assert max(values) - min(values) > 20 * TOLERANCE * max(map(abs, values)), (tag, values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_term_is_that_of_one_process(layout, reference, small):
    ranks, overrides = LAYOUTS[layout]
    run = small.finish(ranks, *overrides, hooks=(launch.record_samples,))
    assert launch.samples(run.folder) == launch.samples(reference.folder)
    assert_same_terms(run.scalars, reference.scalars)


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_every_term_of_another_estimator_and_objective(layout, other_reference, small):
    ranks, overrides = OTHER_LAYOUTS[layout]
    assert_same_terms(small.finish(ranks, *overrides).scalars, other_reference.scalars)


def assert_same_terms(found, expected, steps=range(1, 11)) -> None:
    """Each term within 1e-4 relative; the agreement within one token of the step's 400 or so."""
    differences = {}
    for step in steps:
        for tag in TERMS:
            differences[step, tag] = relative(found[step][tag], expected[step][tag])
        assert abs(found[step][AGREEMENT] - expected[step][AGREEMENT]) < 1 / 200, step
    worst = max(differences, key=differences.get)
    print(f"largest relative difference {differences[worst]:.1e} (step, term {worst})")
    assert differences[worst] <= TOLERANCE, {key: value for key, value in differences.items() if value > TOLERANCE}
    last = max(steps)
    probed = {tag for tag in expected[last] if tag.startswith("probe/")}
    assert len(probed) >= 7
    for tag in probed:
        assert found[last][tag] == pytest.approx(expected[last][tag], rel=1e-3, abs=0.01), tag


def relative(a: float, b: float) -> float:
    assert math.isfinite(a) and math.isfinite(b)
    return abs(a - b) / max(abs(a), abs(b), 1e-12)
