import json
import math

import numpy as np
import pytest
import torch

from sgt_titan.data.cache import prepare
from sgt_titan.demo import TRUNK
from sgt_titan.evaluation.scores import utility, zero
from sgt_titan.evaluation.scores.utility import Reference
from sgt_titan.evaluation.world.mechanisms import constant_noise, nothing
from sgt_titan.evaluation.world.samples import Sample, generator, padded, read_samples, shorten

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows(demo_config):
    return read_samples(prepare(demo_config, str(TRUNK), progress=False).validation, demo_config, 6)


@pytest.fixture(scope="module")
def batches(rows):
    return [padded(rows[:4], 0, CPU), padded(rows[4:], 0, CPU)]


@pytest.fixture(scope="module")
def constant(trunk, demo_config):
    """The best constant prompt, fitted shortly."""
    training = read_samples(prepare(demo_config, str(TRUNK), progress=False).train, demo_config, 64)
    return zero.fit(trunk, training, 20).mechanism()


@pytest.fixture(scope="module")
def removed(trunk, rows, batches, constant):
    short = [padded([shorten(row) for row in part], 0, CPU) for part in (rows[:4], rows[4:])]
    return utility.without_prompt(trunk, batches, short, constant)


@pytest.fixture(scope="module")
def reference(trunk, batches, removed):
    return utility.reference_utility(trunk, batches, removed)


def measured(trunk, batches, rows, mechanism, reference):
    clean = utility.greedy_answers(trunk, utility.compared(rows, 3), nothing(), generator(0, CPU))
    return utility.measure_utility(
        trunk, batches, rows, mechanism, generator(0, CPU), reference=reference, clean_answers=clean
    )


def test_clean_is_one_and_costs_nothing(trunk, batches, rows, reference):
    found = measured(trunk, batches, rows, nothing(), reference)
    assert found["kept"]["value"] == pytest.approx(1.0) and found["kl"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert found["agreement"]["value"] == found["greedy_agreement"]["value"] == 1.0
    assert found["perplexity"]["n"] == sum(int(row.target.sum()) for row in rows)


def test_the_zero_is_the_kindest_of_all(trunk, batches, rows, reference, removed, constant):
    """Never kinder than taking out, hiding or zeroing alone; the constant, which says nothing, keeps nothing."""
    assert set(removed) == {"taken out", "hidden", "zeroed", utility.CONSTANT}
    total = reference.without_B.sum() / reference.tokens_B.sum()
    assert total == pytest.approx(min(found.nll_N.mean().item() for found in removed.values()))
    assert reference.ways[utility.CONSTANT] < min(reference.ways[way] for way in ("taken out", "hidden", "zeroed"))
    found = measured(trunk, batches, rows, constant, reference)["kept"]
    assert found["value"] == pytest.approx(0.0, abs=1e-6)
    old = utility.reference_utility(trunk, batches, {k: v for k, v in removed.items() if k != utility.CONSTANT})
    assert utility.kept(old, reference.without_B).value > 0.02


def test_a_reference_survives_its_file(reference):
    again = utility.Reference.from_dict(json.loads(json.dumps(reference.as_dict())))
    assert all(np.array_equal(a, b) for a, b in zip(again[:3], reference[:3], strict=True))
    stake = reference.as_dict()["stake"]["value"]
    assert stake == pytest.approx((reference.without_B.sum() - reference.clean_B.sum()) / len(reference.tokens_B))


def test_drowned_keeps_nothing(trunk, batches, rows, reference):
    found = measured(trunk, batches, rows, constant_noise(20.0), reference)
    assert found["kept"]["value"] < 0.3 and found["kl"]["value"] > 0.5 and found["greedy_agreement"]["value"] < 0.5
    assert found["kept"]["low"] <= found["kept"]["value"] <= found["kept"]["high"]


def test_per_row_values_are_those_of_single_rows(trunk, rows, reference):
    for b, row in enumerate(rows):
        ids = torch.from_numpy(row.ids)
        logits = torch.log_softmax(trunk(input_ids=ids[None]).logits[0], -1)
        nats = -sum(logits[t - 1, ids[t]].item() for t in np.flatnonzero(row.target))
        assert reference.clean_B[b] == pytest.approx(nats, rel=1e-4)
        assert reference.tokens_B[b] == row.target.sum()
    assert reference.without_B.sum() > reference.clean_B.sum() and set(reference.ways) >= {"taken out", "zeroed"}


def test_kept_in_closed_form():
    reference = Reference(np.array([10.0, 10.0]), np.array([10.0, 20.0]), np.array([30.0, 40.0]), {})
    assert utility.kept(reference, np.array([15.0, 25.0])).value == pytest.approx(0.75)
    useless = Reference(np.array([10.0]), np.array([5.0]), np.array([5.0]), {})
    assert math.isnan(utility.kept(useless, np.array([5.0])).value)


def test_described_in_closed_form():
    values = utility.Utility(
        nll_N=torch.tensor([1.0, 2.0], dtype=torch.float64),
        cross_entropy_N=torch.tensor([2.0, 3.0], dtype=torch.float64),
        teacher_entropy_N=torch.tensor([0.5, 0.5], dtype=torch.float64),
        agree_N=torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    row = Sample(np.array([1, 2, 3]), np.array([True, False, False]), np.array([False, True, True]))
    reference = Reference(np.array([2.0]), np.array([2.0]), np.array([6.0]), {})
    found = utility.described(values, [padded([row], 0, CPU)], reference)
    assert found["perplexity"]["value"] == pytest.approx(math.exp(1.5))
    assert {key: found[key]["value"] for key in ("kept", "cross_entropy", "kl", "agreement")} == pytest.approx(
        {"kept": 0.75, "cross_entropy": 2.5, "kl": 2.0, "agreement": 0.5}
    )
    assert all(estimate["n"] == 2 for estimate in found.values())


def test_answers_side_by_side_are_those_of_each_alone(trunk, rows):
    prompts, mechanism = [row.prompt() for row in rows[:4]], constant_noise(0.02)
    assert len({len(prompt.ids) for prompt in prompts}) > 1
    random = generator(1, CPU)  # the noise is drawn prompt by prompt
    alone = [utility.greedy(trunk, prompt, mechanism, random, 44) for prompt in prompts]
    together = utility.greedy_answers(trunk, prompts, mechanism, generator(1, CPU), 44)
    assert together == alone and len({len(ids) for ids in alone}) > 1


def test_answers_end_where_the_model_ends(trunk, rows):
    ids = utility.greedy(trunk, rows[0].prompt(), nothing(), generator(0, CPU), 48)
    whole = trunk.generate(
        input_ids=torch.from_numpy(rows[0].prompt().ids)[None], max_new_tokens=48, do_sample=False, pad_token_id=0
    )[0, len(rows[0].prompt().ids) :].tolist()
    ends = trunk.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    assert ids == whole[: next((i for i, t in enumerate(whole) if t in ends), len(whole))]
