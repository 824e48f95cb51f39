import math

import pytest
import torch
from worlds import random_rows

from sgt_titan.demo import TRUNK
from sgt_titan.evaluation import privacy
from sgt_titan.evaluation.mechanisms import constant_noise, nothing
from sgt_titan.evaluation.samples import generator, load_trunk, padded
from sgt_titan.metrics.information import pac_advantage
from sgt_titan.metrics.interval import Estimate
from sgt_titan.metrics.ranks import token_ranks

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trunk():
    return load_trunk(TRUNK, CPU)


@pytest.fixture(scope="module")
def batches():
    return [padded(random_rows(4, 20, 2048, seed), 0, CPU) for seed in (1, 2)]


@pytest.fixture(scope="module")
def calibration():
    return [padded(random_rows(4, 20, 2048, 9), 0, CPU)]


def measured(trunk, batches, calibration, mechanism, **more):
    return privacy.measure_privacy(trunk, batches, calibration, mechanism, generator(0, CPU), **more)


def test_identity(trunk, batches, calibration):
    found = measured(trunk, batches, calibration, nothing())
    for name in ("nn_fr", "mrp_fr", "ttr_10", "sym_ttr_100", "rank_entropy"):
        assert found["privacy"][name]["value"] == 0.0 and found["privacy"][name]["n"] == 2 * 4 * 19
    assert found["privacy"]["mi"]["value"] == "inf" and found["privacy"]["pac_adv_uniform"] == 1.0
    assert "mi_log_mean_exp" not in found["privacy"]
    assert found["histogram"]["counts"][0] == sum(found["histogram"]["counts"]) == 152


def test_noise_against_the_parts(trunk, batches, calibration):
    """Each number is what its own function gives on the same draw."""
    std = 3 * trunk.get_input_embeddings().weight.std().item()
    mechanism, lm = constant_noise(std), Estimate(0.5, 0.4, 0.6, 100)
    found = measured(trunk, batches, calibration, mechanism, lm_top1=lm)["privacy"]
    random, ranks, totals = generator(0, CPU), [], []
    for batch in batches:
        sent = mechanism.obfuscate(batch, trunk.get_input_embeddings()(batch.tokens_BT), random)
        hidden = batch.obfuscate_BT
        ranks.append(
            token_ranks(sent.x_tilde_BTD[hidden], trunk.get_input_embeddings().weight, batch.tokens_BT[hidden]).rank_N
        )
        totals.append(privacy.mutual_information_sum(sent, hidden))
    rank = torch.cat(ranks)
    assert found["nn_fr"]["value"] == pytest.approx((rank > 1).double().mean().item())
    assert found["sym_ttr_10"]["value"] == pytest.approx(((rank > 10) & (rank <= 2038)).double().mean().item())
    mi = sum(t for t, _ in totals) / sum(n for _, n in totals)
    assert found["mi"]["value"] == pytest.approx(mi) and found["mi"]["n"] == 24
    assert found["pac_adv_uniform"] == pytest.approx(pac_advantage(mi, 1 / 2048))
    assert found["pac_adv_lm"] == pytest.approx(pac_advantage(mi, 0.5))
    assert 0 <= found["mi_log_mean_exp"]["value"] <= found["mi_log_mean_exp_ceiling"] == pytest.approx(math.log(4))
    for name in ("nn_fr", "mrp_fr", "rank_entropy", "mi"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]


def test_a_single_row_has_no_pairs(trunk, calibration):
    batch = [padded(random_rows(1, 12, 2048, 3), 0, CPU)]
    found = measured(trunk, batch, calibration, constant_noise(0.1))["privacy"]
    assert found["mi"]["value"] is None and found["pac_adv_uniform"] is None and found["nn_fr"]["n"] == 11


def test_language_model_top1_is_that_of_unpadded_rows(trunk):
    rows = random_rows(3, 9, 2048, 5)
    rows = [rows[0], rows[1].cut(6), rows[2]]
    found = privacy.language_model_top1(trunk, [padded(rows, 0, CPU)])
    hits = 0
    for row in rows:
        ids = torch.from_numpy(row.ids)[None]
        read = trunk(input_ids=ids).logits[0, :-1].argmax(-1)
        hits += int((read == ids[0, 1:]).sum())
    assert found.n == 8 + 5 + 8 and found.value == pytest.approx(hits / found.n)
