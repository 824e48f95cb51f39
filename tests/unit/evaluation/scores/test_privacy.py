import math

import numpy as np
import pytest
import torch

from sgt_titan.evaluation.scores import privacy
from sgt_titan.evaluation.world.mechanisms import Obfuscated, constant_noise, nothing
from sgt_titan.evaluation.world.samples import generator, padded
from sgt_titan.metrics.information import pac_advantage
from sgt_titan.metrics.interval import Estimate
from sgt_titan.metrics.ranks import token_ranks
from tests.unit.evaluation.worlds import random_rows

CPU = torch.device("cpu")


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
        totals.append([part.sum() for part in privacy.pair_information(sent, hidden)])
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


def test_mutual_information_against_a_loop_over_pairs():
    torch.manual_seed(0)
    B, T, D = 3, 5, 4
    center, log_std, eps = torch.randn(3, B, T, D, dtype=torch.float64).unbind(0)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    x_tilde = center + log_std.exp() * eps
    values = []
    for i in range(B):
        for j in range(B):
            common = mask[i] & mask[j]
            if i == j or not common.any():
                continue
            own = log_std[i][common] + 0.5  # conditional entropy, and -log p(x~|y), without the log 2 pi of both
            other = log_std[j][common] + 0.5 * ((x_tilde[i] - center[j])[common] / log_std[j][common].exp()) ** 2
            values.append((other - own).mean().item())
    found, is_pair = privacy.pair_information(Obfuscated(x_tilde, center, log_std), mask)
    assert is_pair.tolist() == [[False, True, False], [True, False, False], [False, False, False]]
    assert found[is_pair] == pytest.approx(values, rel=1e-5) and not found[~is_pair].any()


def rows_that_differ(random: np.random.Generator, rows: int, size: int, T: int = 6, D: int = 8):
    """Batches in which a row's center and std are the same at all its positions: its tokens say one thing T times."""
    parts = []
    for _ in range(rows // size):
        center = torch.from_numpy(random.normal(size=(size, 1, D))).expand(size, T, D)
        log_std = torch.from_numpy(random.normal(0, 0.3, (size, 1, 1))).expand(size, T, D)
        x_tilde = center + log_std.exp() * torch.from_numpy(random.normal(size=(size, 1, D)))
        parts.append((Obfuscated(x_tilde, center, log_std), torch.ones(size, T, dtype=torch.bool)))
    return parts


@pytest.mark.parametrize("size", [16, 32])
def test_intervals_of_information_cover_the_truth_about_as_often_as_they_say(size):
    """32 rows, in two batches as in the quick suite or in one: neither batches nor positions are independent."""
    random = np.random.default_rng(0)
    many = rows_that_differ(random, 6400, size)
    truth_mi, truth_lme = privacy._mutual_information(many, 0).value, privacy._log_mean_exp(many, 0)[0]["value"]
    covered = [0, 0]
    for trial in range(60):
        parts = rows_that_differ(random, 32, size)
        mi, (lme, _) = privacy._mutual_information(parts, trial), privacy._log_mean_exp(parts, trial)
        covered[0] += mi.low <= truth_mi <= mi.high
        covered[1] += lme["low"] <= truth_lme <= lme["high"]
    assert min(covered) >= 0.8 * 60, covered


def test_two_rows_are_one_pair_and_no_interval():
    found = privacy._mutual_information(rows_that_differ(np.random.default_rng(0), 2, 2), 0)
    assert math.isfinite(found.value) and math.isnan(found.low) and math.isnan(found.high) and found.n == 2


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
