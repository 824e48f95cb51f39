"""An attack's type is its threat model: what the runner hands over, and nothing else."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import torch

from sgt_titan.evaluation.attacks import ATTACKS, SUITES
from sgt_titan.evaluation.options import GLANCE
from sgt_titan.evaluation.world.mechanisms import Mechanism, constant_noise, nothing
from sgt_titan.evaluation.world.threat import (
    KINDS,
    UNKNOWN,
    Answered,
    Corpus,
    Guess,
    KnownPairs,
    Noisy,
    Observation,
    Repeats,
    Size,
    Table,
    Unseen,
    grants,
    kind_of,
)
from tests.unit.evaluation.worlds import tiny_trunk, world


@pytest.fixture(scope="module")
def trunk(trunk_dir):
    return tiny_trunk(trunk_dir)


def averaging(observation: Observation, repeats: Repeats, *, most: int = 4) -> Guess:
    return Guess(torch.zeros(1, 1, dtype=torch.int64))


def test_the_signature_is_the_threat_model():
    assert grants(averaging) == {"observation": Observation, "repeats": Repeats}


def test_a_parameter_that_is_no_grant_is_a_defect():
    def greedy(truth_N: torch.Tensor) -> Guess: ...

    with pytest.raises(TypeError, match="truth_N is no grant"):
        grants(greedy)


def test_the_runner_grants_exactly_that(trunk):
    granted = world(constant_noise(0.1), trunk).granted(averaging)
    assert set(granted) == {"observation", "repeats"}


def test_an_observation_has_no_hidden_tokens(trunk):
    here = world(constant_noise(0.1), trunk)
    seen = here.observation
    for row, tokens_T, hidden_T in zip(here.rows, seen.tokens, seen.hidden, strict=True):
        assert (tokens_T[hidden_T] == UNKNOWN).all() and hidden_T.any()
        assert (tokens_T[~hidden_T] == torch.from_numpy(row.ids)[~hidden_T]).all()
    assert seen.x_tilde_ND.shape == (len(here.truth_N), here.size.width)
    assert seen.row_N.tolist() == sorted(seen.row_N.tolist())


def test_repeats_are_new_noise_of_the_same_prompts_and_reproducible(trunk):
    here = world(constant_noise(0.5), trunk)
    repeats = here.granted(averaging)["repeats"]
    first, again, second = repeats.draw(0), repeats.draw(0), repeats.draw(1)
    assert torch.equal(first.x_tilde_ND, again.x_tilde_ND)
    assert not torch.allclose(first.x_tilde_ND, second.x_tilde_ND)
    assert not torch.allclose(first.x_tilde_ND, here.observation.x_tilde_ND)
    mean = torch.stack([repeats.draw(k).x_tilde_ND for k in range(64)]).mean(0)
    clean = world(nothing(), trunk).observation.x_tilde_ND
    assert (mean - clean).std().item() == pytest.approx(0.5 / 8, rel=0.1)


def told(answered: Answered) -> Guess: ...


def test_z_is_what_the_denoiser_was_given_and_is_granted_only_where_asked_for(trunk):
    def single(observation: Observation) -> Guess: ...
    def noisy(observation: Noisy) -> Guess: ...
    def blind(unseen: Unseen) -> Guess: ...

    before = constant_noise(0.5)

    def obfuscate(batch, x_BTD, random):
        sent = before.obfuscate(batch, x_BTD, random)
        return sent._replace(x_tilde_BTD=sent.x_tilde_BTD / 2, z_BTD=sent.x_tilde_BTD)

    here = world(Mechanism("halved", "noise, then halved", obfuscate, denoises=True), trunk)
    sent, z = (here.granted(attack)["observation"] for attack in (single, noisy))
    assert torch.equal(2 * sent.x_tilde_ND, z.x_tilde_ND)
    plain = world(before, trunk)  # without a denoiser z is what is sent
    assert torch.equal(plain.granted(noisy)["observation"].x_tilde_ND, plain.observation.x_tilde_ND)
    unseen = here.granted(blind)["unseen"]
    assert not hasattr(unseen, "x_tilde")
    assert all((tokens[hidden] == UNKNOWN).all() for tokens, hidden in zip(unseen.tokens, unseen.hidden, strict=True))
    assert [kind_of(attack) for attack in (blind, told, single, averaging, noisy)] == list(KINDS)


def test_whoever_is_told_the_answer_sees_nothing_else(trunk):
    here = world(nothing(), trunk, rows=2)
    here = replace(here, rows=[row._replace(answer=np.array([7, 8])) for row in here.rows])
    answered = here.granted(told)["answered"]
    for row, hidden_T, tokens_T in zip(here.rows, answered.hidden, answered.tokens, strict=True):
        assert tokens_T[-2:].tolist() == [7, 8] and not hidden_T[-2:].any()
        assert hidden_T[:-2].tolist() == row.obfuscate.tolist() and (tokens_T[hidden_T] == UNKNOWN).all()
    assert not hasattr(answered, "x_tilde")
    assert all(not len(row.answer) for row in world(nothing(), trunk).rows)


def test_known_pairs_are_of_other_rows(trunk):
    def attack(pairs: KnownPairs, corpus: Corpus) -> Guess: ...

    here = world(nothing(), trunk)
    granted = here.granted(attack)
    pairs = granted["pairs"]
    assert torch.equal(pairs.x_tilde_MD, here.table_VD[pairs.tokens_M])
    assert granted["corpus"].rows is here.corpus and here.corpus is not here.rows


def test_clean_positions_are_sent_as_they_are(trunk):
    here = world(constant_noise(3.0), trunk)
    for row, x_TD, hidden_T in zip(here.rows, here.observation.x_tilde, here.observation.hidden, strict=True):
        assert torch.equal(x_TD[~hidden_T], here.table_VD[torch.from_numpy(row.ids)[~hidden_T]])


SMALL = Size(rows=4, tokens=40, longest=12, width=32, vocab=300, trunk=10_000, transform=5_000)
LARGE = Size(rows=8, tokens=400, longest=24, width=64, vocab=3000, trunk=100_000, transform=50_000)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_declares_what_it_sees_and_costs(name):
    attack = ATTACKS[name]
    assert any(issubclass(kind, (Observation, Unseen)) for kind in grants(attack.run).values())
    assert attack.title and attack.source
    assert set(attack.effort) - {GLANCE} <= set(SUITES) and attack.effort
    # What an attack takes beside its grants, or hands on to another: then its cost knows the names.
    keywords = {k for k, p in inspect.signature(attack.run).parameters.items() if p.kind is p.KEYWORD_ONLY}
    if hands_on := any(p.kind is p.VAR_KEYWORD for p in inspect.signature(attack.run).parameters.values()):
        with pytest.raises(TypeError):
            attack.cost(SMALL, nonsense=1)
    for suite in attack.effort:
        arguments = attack.arguments(suite)
        assert hands_on or set(arguments) <= keywords
        small, large = attack.cost(SMALL, **arguments), attack.cost(LARGE, **arguments)
        assert 0 < small.flops < large.flops and 0 < small.bytes <= large.bytes


@pytest.mark.parametrize("name", ATTACKS)
def test_effort_grows_with_the_suite(name):
    attack = ATTACKS[name]
    costs = [attack.cost(SMALL, **attack.arguments(suite)).flops for suite in SUITES if suite in attack.effort]
    assert costs == sorted(costs)


def test_table_is_the_trunks(trunk):
    def attack(table: Table) -> Guess: ...

    assert torch.equal(world(nothing(), trunk).granted(attack)["table"].rows_VD, trunk.get_input_embeddings().weight)
