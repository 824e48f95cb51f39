"""Token dropping: exactly the share is sent, as it is; a choice that has learned beats one at random."""

import math

import numpy as np
import pytest
import torch

from sgt_titan.evaluation.attacks import map_search
from sgt_titan.evaluation.attacks.nearest import l2
from sgt_titan.evaluation.scores.dropping import at_random, dropping, first, learned_choice
from sgt_titan.evaluation.scores.utility import measured
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import nothing
from sgt_titan.evaluation.world.samples import Sample, padded
from sgt_titan.evaluation.world.threat import Guess, Observation, Repeats
from tests.unit.evaluation.worlds import Counting, random_rows, tiny_trunk, top1, world


@pytest.fixture(scope="module")
def trunk(trunk_dir):
    return tiny_trunk(trunk_dir)


def zeros(batch, x_BTD):
    return torch.where(batch.obfuscate_BT[..., None], 0.0, x_BTD)


def test_the_first_of_each_row_rounded_up():
    score = torch.tensor([[9.0, 1.0, 3.0, 2.0, 8.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    hidden = torch.tensor([[False, True, True, True, False], [True, True, True, True, True]])
    assert first(score, hidden, 0.5).tolist() == [[False, False, True, True, False], [True, True, True, False, False]]
    assert not first(score, hidden, 0.0).any() and torch.equal(first(score, hidden, 1.0), hidden)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_who_looks_reads_the_share_and_nothing_else(trunk, share):
    here = world(dropping(share, zeros, at_random, name="d", title="d"), trunk, rows=16, length=13)
    kept = math.ceil(12 * share) / 12
    assert kept <= top1(l2(**here.granted(l2)), here) <= kept + 0.03


def test_a_search_knows_what_was_sent_and_guesses_the_rest_by_the_prior(trunk):
    """No constant is taken for the noise of a token: with a prior that knows the language all is read."""
    ids = [(np.arange(12) + 20 * b) % 300 for b in range(8)]
    rows = [Sample(i, np.arange(12) > 0, np.zeros(12, dtype=bool)) for i in ids]
    here = World(rows, random_rows(32, 12, 300, 5), dropping(0.5, zeros, at_random, name="d", title="d"), trunk, 0)
    granted = here.granted(map_search.map_search)
    alone = map_search.map_search(**granted, candidates=32, prior_weight=0.0)
    sent = (here.observation.x_tilde_ND != 0).any(-1)
    assert torch.equal(alone.top_NK[sent, 0], here.truth_N[sent]) and 0.4 < sent.double().mean() < 0.7
    granted["prior"] = type(granted["prior"])(Counting(trunk))
    for candidates in (0, 32):
        assert top1(map_search.map_search(**granted, candidates=candidates), here) == 1.0


def test_another_draw_drops_others(trunk):
    here = world(dropping(0.5, zeros, at_random, name="d", title="d"), trunk)
    first, second = (here.granted(with_repeats)["repeats"].draw(k).x_tilde_ND for k in (0, 1))
    assert not torch.equal(first, second)


def with_repeats(observation: Observation, repeats: Repeats) -> Guess: ...


def test_a_learned_choice_keeps_more_of_the_answer(trunk):
    """Of a random trunk, whose response hangs on some positions more than on others."""
    rows = [
        row._replace(obfuscate=(torch.arange(12) < 8).numpy(), target=(torch.arange(12) >= 8).numpy())
        for row in random_rows(96, 12, 300, 3)
    ]
    batches = [padded(rows[i : i + 16], 0, trunk.device) for i in range(0, 96, 16)]

    def nats(mechanism):
        found = measured(trunk, batches[4:], mechanism, torch.Generator().manual_seed(0))
        clean = measured(trunk, batches[4:], nothing(), torch.Generator().manual_seed(0))
        return (found.cross_entropy_N - clean.cross_entropy_N).mean().item()

    with torch.no_grad():  # as it is fitted, within a measurement
        chosen = learned_choice(trunk, batches[:4], zeros)
    at_half = {
        name: nats(dropping(0.5, zeros, choose, name=name, title=name))
        for name, choose in {"random": at_random, "learned": chosen}.items()
    }
    assert 0 < at_half["learned"] < at_half["random"]
    batch = batches[5]
    cut = batch._replace(tokens_BT=batch.tokens_BT.clone())
    cut.tokens_BT[:, 8:] = 7  # another response: the choice does not see it
    x_BTD = trunk.get_input_embeddings()(batch.tokens_BT)
    assert torch.allclose(chosen(batch, x_BTD, None)[:, :8], chosen(cut, x_BTD, None)[:, :8], atol=1e-5)
