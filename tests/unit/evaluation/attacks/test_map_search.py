"""MAP and BeamClean: the search against exhaustive search, the cached step against the whole prefix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sgt_titan.evaluation.attacks import beam, beamclean, map_search
from sgt_titan.evaluation.attacks.beam import search
from sgt_titan.evaluation.attacks.map_search import Causal, ContextFree, log_normal
from sgt_titan.evaluation.attacks.nearest import l2
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated, constant_noise, learned
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.evaluation.world.threat import Table, kind_of
from sgt_titan.transform import ExportedTransform, SGTConfig, estimator_config
from tests.unit.evaluation.worlds import Counting, linear, random_rows, top1, world


def random_sgt(model, *, mean: float, std: float) -> ExportedTransform:
    """A causal SGT with random heads: a mean of about ``mean`` table stds that depends on the whole prefix."""
    table = model.get_input_embeddings().weight.detach()
    config = SGTConfig(
        trunk_config=estimator_config(model.config, 1),
        std_min=std / 10, std_max=std * 10, std_init=std, scale=table.std().item(), median_norm=1.0,
        vocab_size=table.shape[0], hidden_size=table.shape[1], embeddings=False,
    )  # fmt: skip
    torch.manual_seed(3)
    transform = ExportedTransform(config).eval().requires_grad_(False)
    transform.mean_head.weight.normal_(0, mean * table.std().item() / table.shape[1] ** 0.5)
    transform.log_std_head.weight.normal_(0, 0.3 / table.shape[1] ** 0.5)
    return transform


@pytest.fixture(scope="module")
def moving(trunk):
    return learned(random_sgt(trunk, mean=6.0, std=0.05))


def test_the_cached_step_is_the_whole_forward(trunk, moving):
    """Every candidate of every beam at every position, with beams that changed parents on the way."""
    table_VD = trunk.get_input_embeddings().weight
    beams = [[5, 17, 3], [5, 9, 200]]
    emission = Causal(moving, Table(table_VD), [torch.zeros(4, 32)], None, 0)
    for t, (parents, tokens) in enumerate([([0], [5]), ([0, 0], [9, 17]), ([1, 0], [3, 200])]):
        emission.advance(t, torch.zeros(1), torch.tensor(parents), torch.tensor(tokens))
    candidates = torch.tensor([[1, 2, 299], [40, 41, 42]])
    center, log_std = emission.gaussian(3, candidates)
    assert emission.caches[0].get_seq_length() == 3
    for b, c in itertools.product(range(2), range(3)):
        ids = torch.tensor([[*beams[b], int(candidates[b, c])]])
        out = moving.transform(inputs_embeds=table_VD[ids])
        assert torch.allclose(center[b, c], table_VD[candidates[b, c]] + out.mean_BTD[0, -1], atol=1e-5)
        assert torch.allclose(log_std[b, c], out.log_std_BTD[0, -1], atol=1e-5)


def test_an_sgt_that_hides_from_neighbours_is_read_whole(trunk, moving):
    here = world(moving, trunk, rows=4, length=8)
    assert top1(l2(**here.granted(l2)), here) < 0.3
    guess = map_search.map_search(**here.granted(map_search.map_search), beams=2, candidates=0, prior_weight=0.0)
    assert top1(guess, here) == 1.0
    short = map_search.map_search(**here.granted(map_search.map_search), beams=2, candidates=64, prior_weight=0.0)
    assert top1(short, here) >= 0.9 and "scored 64 of 300" in short.notes[0]


def test_at_z_a_denoiser_hides_nothing_from_it(trunk):
    """What a denoiser makes of z is no Gaussian around the embeddings; z is."""
    before = constant_noise(0.02)

    def obfuscate(batch, x_BTD, random):
        z = before.obfuscate(batch, x_BTD, random)
        sent_BTD = torch.where(batch.obfuscate_BT[..., None], -5 * z.x_tilde_BTD.flip(-1), z.x_tilde_BTD)
        return Obfuscated(sent_BTD, z.center_BTD, z.log_std_BTD, z.x_tilde_BTD)

    here = world(Mechanism("flip", "flipped", obfuscate, std=0.02), trunk, rows=4)
    effort = {"beams": 2, "candidates": 0, "prior_weight": 0.0}
    sent = map_search.map_search(**here.granted(map_search.map_search), **effort)
    z = map_search.map_search_at_z(**here.granted(map_search.map_search_at_z), **effort)
    assert top1(sent, here) < 0.3 and top1(z, here) == 1.0
    assert kind_of(map_search.map_search_at_z) == "noisy"


def test_the_search_is_exhaustive_when_the_beam_is(tmp_path):
    """All 5^3 sequences of a tiny vocabulary, scored one by one with the whole forward."""
    config = AutoConfig.for_model(
        "llama", vocab_size=5, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    model.get_input_embeddings().weight.normal_(0, 0.3)
    model.lm_head.weight.normal_(0, 3.0)
    mechanism = learned(random_sgt(model, mean=2.0, std=1.5))
    row = Sample(*(torch.tensor(x).numpy() for x in ([2, 4, 1, 3], [False, True, True, True], [False] * 4)))
    here = World([row], random_rows(8, 4, 5, 0), mechanism, model, 0)
    x_TD, table_VD = here.observation.x_tilde[0].double(), here.table_VD
    scores = {}
    for tail in itertools.product(range(5), repeat=3):
        ids = torch.tensor([[2, *tail]])
        out = mechanism.transform(inputs_embeds=table_VD[ids])
        center = (table_VD[ids] + out.mean_BTD).double()
        log_likelihood = log_normal(x_TD, center, out.log_std_BTD.double())[0, 1:].sum()
        logits = torch.log_softmax(model(input_ids=ids).logits[0], -1)
        prior = sum(logits[t, token] for t, token in enumerate(tail))
        scores[tail] = (log_likelihood + 0.7 * prior.double()).item()
    best = max(scores, key=scores.__getitem__)
    emission = Causal(mechanism, Table(table_VD), here.observation.x_tilde, None, 0)
    (path,) = search(model, here.observation.tokens, emission, beams=125, weight=0.7)
    assert tuple(path.tokens_T[1:].tolist()) == best and path.tokens_T[0] == 2
    assert path.score == pytest.approx(scores[best], abs=1e-3)
    assert path.guesses_TK[1:, 0].tolist() == list(best)


def test_prompts_searched_side_by_side_are_found_as_alone(trunk, moving, monkeypatch):
    """Of different lengths, clean at different places, one of them to its end."""
    random, rows = np.random.default_rng(3), []
    for length, clean in ((9, (0,)), (5, (0, 1, 4)), (7, (0, 3)), (7, (0, 5, 6)), (4, (0, 1, 2))):
        hidden = ~np.isin(np.arange(length), clean)
        rows.append(Sample(random.integers(0, 300, length), hidden, np.zeros(length, dtype=bool)))
    # Noise that leaves choices to the prior: the beams change parents.
    for mechanism in (moving, learned(random_sgt(trunk, mean=2.0, std=3.0)), constant_noise(0.3)):
        here = World(rows, random_rows(64, 9, 300, 5), mechanism, trunk, 0)
        granted, cleaned = here.granted(map_search.map_search), here.granted(beamclean.beamclean)
        found = []
        for side_by_side in (16, 2, 1):
            monkeypatch.setattr(beam, "PROMPTS", side_by_side)
            by_map = map_search.map_search(**granted, beams=3, candidates=32)
            found.append((by_map, beamclean.beamclean(**cleaned, candidates=8, rounds=2)))
        for others in found[1:]:
            for one, other in zip(found[0], others, strict=True):
                assert torch.equal(one.top_NK, other.top_NK)
        assert 0.0 < top1(found[0][0], here) < 1.0 or mechanism is moving


def test_without_a_prior_it_is_maximum_likelihood_per_token(trunk):
    here = world(constant_noise(0.4), trunk, rows=5)
    guess = map_search.map_search(**here.granted(map_search.map_search), beams=3, candidates=0, prior_weight=0.0)
    brute = torch.cdist(here.observation.x_tilde_ND.double(), here.table_VD.double()).argmin(-1)
    assert torch.equal(guess.top_NK[:, 0], brute)


def test_a_prior_that_knows_the_language_helps(trunk):
    """Counting sequences under noise that drowns single tokens."""
    ids = [(torch.arange(12) + 20 * b) % 300 for b in range(6)]
    rows = [Sample(i.numpy(), (torch.arange(12) > 0).numpy(), torch.zeros(12, dtype=torch.bool).numpy()) for i in ids]
    here = World(rows, random_rows(32, 12, 300, 5), constant_noise(1.2), trunk, 0)
    granted = here.granted(map_search.map_search)
    alone = map_search.map_search(**granted, beams=4, candidates=0, prior_weight=0.0)
    granted["prior"] = type(granted["prior"])(Counting(trunk))
    helped = map_search.map_search(**granted, beams=4, candidates=0, prior_weight=1.0)
    assert top1(alone, here) < 0.8 and top1(helped, here) == 1.0


def test_beamclean_estimates_noise_and_shift(trunk):
    """x~ = x + b + noise: the shift defeats the nearest neighbour, and is found; sigma within a tenth."""
    torch.manual_seed(1)
    D, std = trunk.config.hidden_size, 0.15
    shift = 0.8 * torch.randn(D)
    here = world(linear(torch.eye(D), shift, std), trunk, rows=60)
    assert top1(l2(**here.granted(l2)), here) < 0.6
    guess = beamclean.beamclean(**here.granted(beamclean.beamclean), affine=False, prior_weight=0.0, rounds=3)
    assert top1(guess, here) > 0.95
    clean = here.table_VD[guess.top_NK[:, 0]].double()
    fitted = beamclean.refit(here.observation.x_tilde_ND.double(), clean, affine=False)
    assert fitted.std_D.mean().item() == pytest.approx(std, rel=0.1)
    assert (fitted.bias_D - shift).norm() < 0.1 * shift.norm()


def test_the_affine_surrogate_follows_a_mild_map(trunk):
    torch.manual_seed(2)
    D = trunk.config.hidden_size
    twist = torch.eye(D) + 0.5 * torch.randn(D, D) / D**0.5
    here = world(linear(twist, torch.zeros(D), 0.15), trunk, rows=120)
    options = {"prior_weight": 0.0, "rounds": 4}
    plain = top1(beamclean.beamclean(**here.granted(beamclean.beamclean), affine=False, **options), here)
    affine = top1(beamclean.beamclean(**here.granted(beamclean.beamclean), affine=True, **options), here)
    assert affine > plain


def test_a_mechanism_without_noise_matches_exactly(trunk):
    from sgt_titan.evaluation.world.mechanisms import nothing

    emission = ContextFree(nothing(), Table(trunk.get_input_embeddings().weight), [torch.zeros(1, 32)], None, 0)
    center, log_std = emission.gaussian(0, torch.tensor([[3, 4]]))
    assert torch.equal(center[0, 0], trunk.get_input_embeddings().weight[3]) and log_std.isfinite().all()
