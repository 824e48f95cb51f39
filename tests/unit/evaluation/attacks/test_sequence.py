"""The sequence attacker against posteriors that can be computed, and where there is nothing to read."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sgt_titan.evaluation.attacks import beam, sequence, sequence_reader
from sgt_titan.evaluation.attacks.linear_start import linear_start
from sgt_titan.evaluation.attacks.own_text import OwnText, of_a_length
from sgt_titan.evaluation.attacks.sequence_reader import Reader, new_body, trunk_body
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated, constant_noise, nothing
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.evaluation.world.threat import Table, Transform, Trunk
from tests.unit.evaluation.worlds import linear, pure_noise, top1

LENGTH = 8
STATES = 5  # of the Markov source: tokens 20..24
SMALL = {"layers": 1, "width": 64, "batch_rows": 64, "lr": 6e-3}


def sample(ids) -> Sample:
    return Sample(np.asarray(ids), np.arange(len(ids)) >= 1, np.zeros(len(ids), dtype=bool))


def worlds(trunk, draw, mechanism, *, rows=64, corpus=800) -> World:
    random = np.random.default_rng(5)
    drawn = [sample(draw(random)) for _ in range(rows + corpus)]
    return World(drawn[:rows], drawn[rows:], mechanism, trunk, seed=0)


# -- independent tokens through Gaussian noise -------------------------------------------------------------------------


def zipf(vocab: int) -> np.ndarray:
    share = 1 / np.arange(1, vocab + 1)
    return share / share.sum()


def test_independent_tokens_through_noise_are_read_at_bayes_rate(trunk):
    table_VD = trunk.get_input_embeddings().weight.detach()
    std, p = 2.5 * table_VD.std().item(), zipf(300)
    here = worlds(trunk, lambda random: random.choice(300, LENGTH, p=p), constant_noise(std), corpus=1500)
    found = sequence.sequence(**here.granted(sequence.sequence), first=20, most=40, **SMALL)
    x_ND = here.observation.x_tilde_ND
    logits_NV = -torch.cdist(x_ND.double(), table_VD.double()).square() / (2 * std**2) + torch.from_numpy(p).log()
    exact = (logits_NV.argmax(-1) == here.truth_N).double().mean().item()
    assert 0.3 < exact < 0.9
    assert top1(found, here) >= exact - 0.03
    # Nothing has a lower expected loss than the posterior.
    loss = torch.nn.functional.cross_entropy(logits_NV, here.truth_N).item()
    assert min(found.curve.extra) == pytest.approx(loss, abs=0.25)


# -- a Markov source through Gaussian noise ----------------------------------------------------------------------------


def transitions() -> np.ndarray:
    """Each state goes on to the next but one with 0.7, or to any."""
    return 0.7 * np.roll(np.eye(STATES), 2, axis=1) + 0.3 / STATES


def markov(random) -> np.ndarray:
    states = [random.integers(STATES)]
    for _ in range(LENGTH - 1):
        states.append(random.choice(STATES, p=transitions()[states[-1]]))
    return 20 + np.array(states)


def posteriors(here: World, std: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per hidden token, from the definition: log p(state | everything sent), log p(state | that, the states before),
    and the most probable sequence (N,). The first state of a row is sent in clear."""
    rows_SD = here.table_VD[20 : 20 + STATES].double()
    marginal, following, viterbi = [], [], []
    a_SS = transitions()
    for row, x_TD in zip(here.rows, here.observation.x_tilde, strict=True):
        like_TS = np.exp(-torch.cdist(x_TD.double(), rows_SD).square().numpy() / (2 * std**2))
        like_TS[0] = np.eye(STATES)[row.ids[0] - 20]
        beta_TS = np.ones_like(like_TS)
        for t in range(LENGTH - 2, -1, -1):
            beta_TS[t] = a_SS @ (like_TS[t + 1] * beta_TS[t + 1])
            beta_TS[t] /= beta_TS[t].sum()
        alpha_S = like_TS[0]
        best_S, back = np.log(like_TS[0] + 1e-300), []
        for t in range(1, LENGTH):
            alpha_S = like_TS[t] * (alpha_S @ a_SS)
            alpha_S = alpha_S / alpha_S.sum()
            post_S = alpha_S * beta_TS[t]
            marginal.append(np.log(post_S / post_S.sum()))
            next_S = a_SS[row.ids[t - 1] - 20] * like_TS[t] * beta_TS[t]
            following.append(np.log(next_S / next_S.sum()))
            step_SS = best_S[:, None] + np.log(a_SS)
            back.append(step_SS.argmax(0))
            best_S = step_SS.max(0) + np.log(like_TS[t] + 1e-300)
        path = [int(best_S.argmax())]
        for come_S in reversed(back[1:]):
            path.append(int(come_S[path[-1]]))
        viterbi += path[::-1]
    return np.array(marginal), np.array(following), np.array(viterbi) + 20


@pytest.fixture(scope="module")
def source(trunk):
    std = 5.0 * trunk.get_input_embeddings().weight.detach().std().item()
    return worlds(trunk, markov, constant_noise(std)), std


def test_a_markov_source_is_read_at_the_rate_of_forward_and_backward(source):
    here, std = source
    marginal_NS, _, _ = posteriors(here, std)
    truth_N = here.truth_N.numpy()
    exact = (marginal_NS.argmax(-1) + 20 == truth_N).mean()
    found = sequence.sequence(**here.granted(sequence.sequence), first=80, most=320, **SMALL)
    alone = found.curve.top_N[0]  # the linear start: each token for itself
    assert 0.5 < exact < 0.95
    assert top1(found, here) >= exact - 0.04
    assert (alone.numpy() == truth_N).mean() < exact - 0.1
    exact_loss = -marginal_NS[np.arange(len(truth_N)), truth_N - 20].mean()
    assert found.curve.extra[-1] == pytest.approx(exact_loss, abs=0.15)


def test_from_left_to_right_it_finds_the_most_probable_sequence(source):
    here, std = source
    _, following_NS, viterbi_N = posteriors(here, std)
    truth_N = here.truth_N.numpy()
    run = sequence.autoregressive
    found = run(**here.granted(run), first=80, most=160, beams=3, from_trunk=False, **SMALL)
    assert top1(found, here) >= (viterbi_N == truth_N).mean() - 0.04
    exact_loss = -following_NS[np.arange(len(truth_N)), truth_N - 20].mean()
    assert found.curve.extra[-1] == pytest.approx(exact_loss, abs=0.12)


def test_one_who_sees_nothing_guesses_at_the_rate_of_the_prior(source):
    here, _ = source
    found = sequence.guess(**here.granted(sequence.guess), first=80, most=320, **SMALL)
    # Of p(x_t | x_0) for a clean x_0: the best guess of t steps ahead.
    power_SS, exact = np.eye(STATES), []
    for _ in range(1, LENGTH):
        power_SS = power_SS @ transitions()
        exact.append(power_SS.max(-1).mean())
    spread = 3 * math.sqrt(0.25 / len(here.truth_N))
    assert top1(found, here) == pytest.approx(np.mean(exact), abs=spread + 0.02)


# -- not weaker than something simpler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identity", "rotation", "shift"])
def test_without_noise_it_reads_all_that_a_neighbour_or_a_regression_reads(trunk, kind):
    torch.manual_seed(0)
    D = trunk.config.hidden_size
    matrix_DD = torch.linalg.qr(torch.randn(D, D))[0] if kind == "rotation" else torch.eye(D)
    mechanism = nothing() if kind == "identity" else linear(matrix_DD, 50 * torch.ones(D), 0.0)
    here = worlds(trunk, lambda random: random.integers(0, 300, LENGTH), mechanism)
    found = sequence.sequence(**here.granted(sequence.sequence), first=4, most=8, **SMALL)
    assert all((top_N == here.truth_N).double().mean() == 1.0 for top_N in found.curve.top_N)


def test_what_says_nothing_is_read_at_chance_and_not_better(trunk):
    here = worlds(trunk, lambda random: random.integers(0, 300, LENGTH), pure_noise(), corpus=200)
    for attack, more in ((sequence.sequence, {}), (sequence.autoregressive, {"beams": 2, "from_trunk": True})):
        found = attack(**here.granted(attack), first=10, most=20, **(SMALL | {"layers": 1}), **more)
        assert top1(found, here) <= 1 / 300 + 3.3 * math.sqrt(1 / 300 / len(here.truth_N)) + 1 / len(here.truth_N)


def test_at_z_it_reads_what_the_denoiser_threw_away(trunk):
    before = constant_noise(0.2)

    def obfuscate(batch, x_BTD, random):
        z_BTD = before.obfuscate(batch, x_BTD, random).x_tilde_BTD
        sent_BTD = torch.where(batch.obfuscate_BT[..., None], torch.zeros_like(z_BTD), z_BTD)
        return Obfuscated(sent_BTD, x_BTD, torch.full_like(x_BTD, math.log(0.2)), z_BTD)

    here = worlds(trunk, lambda random: random.integers(0, 300, LENGTH), Mechanism("zero", "", obfuscate), corpus=200)
    tiny = SMALL | {"layers": 1}
    sent = sequence.sequence(**here.granted(sequence.sequence), first=4, most=8, **tiny)
    z = sequence.sequence_at_z(**here.granted(sequence.sequence_at_z), first=4, most=8, **tiny)
    assert top1(sent, here) < 0.05 and top1(z, here) > 0.9


def test_repeats_are_read_as_one_observation_of_less_noise(trunk):
    noise = 3 * float(trunk.get_input_embeddings().weight.std())
    here = worlds(trunk, lambda random: random.integers(0, 300, LENGTH), constant_noise(noise), corpus=200)
    tiny = SMALL | {"layers": 1}
    once = sequence.sequence(**here.granted(sequence.sequence), first=4, most=8, **tiny)
    often = sequence.sequence_repeats(**here.granted(sequence.sequence_repeats), times=16, first=4, most=8, **tiny)
    quiet = worlds(trunk, lambda random: random.integers(0, 300, LENGTH), constant_noise(noise / 4), corpus=200)
    less = sequence.sequence(**quiet.granted(sequence.sequence), first=4, most=8, **tiny)
    assert top1(often, here) > top1(once, here) + 0.2
    assert top1(often, here) == pytest.approx(top1(less, quiet), abs=0.15)


TINY = {"layers": 1, "width": 32, "batch_rows": 8, "first": 2, "most": 4, "lr": 1e-3}


def test_a_mean_of_equal_observations_is_one_of_them(trunk):
    here = worlds(trunk, markov, nothing(), rows=4, corpus=80)
    once = sequence.sequence(**here.granted(sequence.sequence), **TINY)
    often = sequence.sequence_repeats(**here.granted(sequence.sequence_repeats), times=8, **TINY)
    assert here.repeats_itself and torch.equal(once.top_NK, often.top_NK) and once.curve.extra == often.curve.extra
    assert often is once  # nor is he trained twice
    assert not worlds(trunk, markov, constant_noise(0.1), rows=4, corpus=80).repeats_itself


def test_others_go_on_from_who_reads_one_observation_and_train_him_once(trunk, monkeypatch):
    here = worlds(trunk, markov, constant_noise(0.5), rows=4, corpus=80)
    trained, original = [], sequence.trained
    monkeypatch.setattr(sequence, "trained", lambda *a, **k: trained.append(k) or original(*a, **k))
    goes_on, found = TINY | {"most": 2, "after": TINY}, {}
    for name in ("sequence_at_z", "autoregressive"):
        attack = getattr(sequence, name)
        found[name] = attack(**here.granted(attack), **goes_on)
    once = sequence.sequence(**here.granted(sequence.sequence), **TINY)
    assert trained == [TINY]
    behind = dict(zip(once.curve.extra, once.curve.at, strict=True))[min(once.curve.extra)]
    for guess in found.values():
        assert guess.curve.at == (behind, behind + 2) and "starts as the reader of what is sent" in guess.notes[0]
        assert guess.flops > once.flops
    # z is what is sent here, so it begins where the other ended, but for a temperature of its own; and one cycle is no
    # doubling.
    assert found["sequence_at_z"].curve.extra[0] == pytest.approx(min(once.curve.extra), abs=0.01)
    assert not any(note.startswith("converged") for note in found["sequence_at_z"].notes)


def test_going_on_reads_what_a_training_of_all_the_steps_reads(source):
    """By half of the steps: the other half was spent on what is sent, which is z here."""
    here, _ = source
    attack, anew = sequence.sequence_at_z, SMALL | {"first": 80, "most": 160}
    whole = attack(**here.granted(attack), **anew)
    after = SMALL | {"first": 80, "most": 80}
    half = attack(**here.granted(attack), **anew | {"most": 80, "after": after})
    assert top1(half, here) == pytest.approx(top1(whole, here), abs=0.03)
    assert half.curve.extra[-1] == pytest.approx(whole.curve.extra[-1], abs=0.1)


# -- how it works ------------------------------------------------------------------------------------------------------


def test_it_ends_when_a_doubling_does_not_help_and_says_so(trunk, source):
    here, _ = source
    tiny = {"layers": 1, "width": 32, "batch_rows": 8, "lr": 1e-3}
    easy = worlds(trunk, markov, nothing(), rows=4, corpus=80)
    found = sequence.sequence(**easy.granted(sequence.sequence), first=4, most=400, **tiny)
    assert found.curve.at == (0.0, 4.0, 8.0) and any(note.startswith("converged") for note in found.notes)
    hard = sequence.sequence(**here.granted(sequence.sequence), first=4, most=20, **(tiny | {"lr": 3e-3}))
    assert hard.curve.at == (0.0, 4.0, 8.0, 16.0, 20.0)
    assert any("has not converged within its budget" in note for note in hard.notes)
    # Who sees nothing may end where a doubling brings less than his share, and does not call it converged.
    early = sequence.guess(**here.granted(sequence.guess), first=4, most=20, **tiny, enough=0.9)
    assert early.curve.at[-1] < 20.0 and any(note.startswith("ended before its budget") for note in early.notes)


def test_who_sees_nothing_ends_half_way_where_a_doubling_teaches_him_his_own_text(trunk, monkeypatch):
    here = worlds(trunk, lambda random: random.integers(0, 300, LENGTH), constant_noise(0.1), rows=4, corpus=40)
    looks, original = [], sequence._held_out
    monkeypatch.setattr(sequence, "_held_out", lambda *a: looks.append(1) or original(*a))
    effort = {"layers": 1, "width": 64, "batch_rows": 36, "first": 8, "most": 512, "lr": 1e-2, "enough": 0.02}
    by_heart = sequence.guess(**here.granted(sequence.guess), **effort)
    assert by_heart.curve.at[-1] < 512 and "learnt its own text by heart" in by_heart.notes[-1]
    assert "half way through a cycle" in by_heart.notes[-1] and len(looks) > len(by_heart.curve.at)
    looks.clear()
    seeing = sequence.sequence(**here.granted(sequence.sequence), **TINY)
    assert len(looks) == len(seeing.curve.at), "who sees is not judged before a cycle has ended"
    flat, learns = sequence.Half(12, 2.0, 2.0), sequence.Half(24, 2.0, 1.5)
    assert sequence._by_heart([flat, learns], 0.02) and not sequence._by_heart([learns], 0.02)
    assert not sequence._by_heart([flat, flat], 0.02), "one who learns nothing at all may begin to yet"
    assert not sequence._by_heart([flat, sequence.Half(24, 1.9, 1.5)], 0.02)


def test_who_goes_on_from_one_that_learns_does_not_call_a_few_steps_converged(trunk, source):
    here, _ = source
    attack, still = sequence.sequence_at_z, TINY | {"lr": 0.0}
    found = attack(**here.granted(attack), after=TINY | {"lr": 3e-3}, **still | {"most": 8})
    assert len(found.curve.at) == 4 and "has not converged within its budget" in found.notes[-1]
    easy = worlds(trunk, markov, constant_noise(1e-4), rows=4, corpus=80)
    after = TINY | {"first": 4, "most": 400}
    found = attack(**easy.granted(attack), after=after, **still | {"most": 8})
    assert len(found.curve.at) == 3 and found.notes[-1].startswith("converged")


def test_its_decoder_starts_as_the_trunks_language_model(trunk):
    """With the observation of no worth, the first logits are the trunk's own."""
    here = worlds(trunk, lambda random: random.integers(0, 300, LENGTH), pure_noise(), rows=2, corpus=60)
    effort = sequence.Effort(1, 1, 1, 32, 4, 1e-3, True, 2)
    own = OwnText(here.corpus, here.mechanism, here.table_VD, 0)
    reader, name = sequence._begin(own, here.corpus, Trunk(trunk), effort, LENGTH)
    assert name.endswith("and the trunk")
    ids = torch.from_numpy(here.rows[0].ids)[None]
    hidden = torch.ones_like(ids, dtype=torch.bool)
    x = here.observation.x_tilde[0][None]
    with torch.no_grad():
        h = reader.encode(x, ids, hidden, hidden)
        got = reader.following(reader.decode(h, sequence.before(ids))[0], x[0])
        alone = reader.logits(torch.zeros(()), reader.alone(x[0])) - reader.log_frequency_V
        want = trunk(input_ids=ids).logits[0, :-1]
    assert torch.allclose(got[1:] - alone[1:], want, atol=1e-4)
    assert all(not p.requires_grad for p in trunk.parameters())


def test_the_encoder_looks_both_ways_and_not_at_padding(trunk):
    here = worlds(trunk, markov, constant_noise(0.1), rows=2, corpus=60)
    own = OwnText(here.corpus, here.mechanism, here.table_VD, 0)
    torch.manual_seed(0)
    frequency = sequence.log_frequencies(here.corpus, 300)
    start = linear_start(own.pairs(here.corpus), here.table_VD, frequency)
    reader = Reader(here.table_VD, frequency, start, new_body(32, 1), longest=LENGTH)
    batch, x = own.obfuscated([here.corpus[0], here.corpus[1]], 1)
    args = (batch.tokens_BT, batch.obfuscate_BT)
    with torch.no_grad():
        whole = reader.encode(x, *args, batch.valid_BT)
        moved = x.clone()
        moved[0, -1] += 1.0
        assert (reader.encode(moved, *args, batch.valid_BT)[0, 1] - whole[0, 1]).abs().max() > 1e-6
        assert torch.equal(reader.encode(moved, *args, batch.valid_BT)[1], whole[1])
        short = batch.valid_BT.clone()
        short[0, -1] = False
        assert torch.allclose(
            reader.encode(moved, *args, short)[0, :-1], reader.encode(x, *args, short)[0, :-1], atol=1e-6
        )


def test_decoding_step_by_step_is_the_whole_forward(trunk):
    here = worlds(trunk, markov, constant_noise(0.5), rows=1, corpus=60)
    own = OwnText(here.corpus, here.mechanism, here.table_VD, 0)
    torch.manual_seed(0)
    effort = sequence.Effort(1, 1, 1, 32, 4, 1e-3, True, 2)
    reader, _ = sequence._begin(own, here.corpus, Trunk(trunk), effort, LENGTH)
    torch.nn.init.normal_(reader.leave_decoder.weight, std=0.3)
    torch.nn.init.normal_(reader.bridge.weight, std=0.3)
    ids, x = torch.from_numpy(here.rows[0].ids), here.observation.x_tilde[0]
    hidden = torch.from_numpy(here.rows[0].obfuscate)
    with torch.no_grad():
        h = reader.encode(x[None], ids[None], hidden[None], torch.ones_like(hidden)[None])
        row = torch.zeros(1, dtype=torch.int64)
        emission = sequence._Decoding(reader, h, x[None], candidates=300)
        whole = torch.log_softmax(reader.following(reader.decode(h, sequence.before(ids[None]))[0], x), -1)
        for t, token in enumerate(ids):
            if hidden[t]:
                emission.shortlist(t, row, None)
                assert torch.allclose(emission.log_LV[0], whole[t], atol=1e-4)
            emission.advance(t, row, row, token[None])
    (path,) = beam.search(None, here.observation.tokens, sequence._Decoding(reader, h, x[None]), beams=3)
    assert path.tokens_T[0] == ids[0]


@pytest.mark.parametrize("beams", [0, 3])
def test_prompts_read_side_by_side_are_read_as_alone(trunk, monkeypatch, beams):
    here = worlds(trunk, markov, constant_noise(0.5), rows=5, corpus=60)
    lengths = (8, 5, 3, 7, 8)
    rows = [row.cut(length) for row, length in zip(here.rows, lengths, strict=True)]
    rows[3].obfuscate[[2, 6]] = False  # clean in the middle and at the end
    here = World(rows, here.corpus, here.mechanism, trunk, 0)
    own = OwnText(here.corpus, here.mechanism, here.table_VD, 0)
    torch.manual_seed(0)
    reader, _ = sequence._begin(own, here.corpus, Trunk(trunk), sequence.Effort(1, 1, 1, 32, 4, 1e-3, True, beams), 8)
    for layer in (reader.leave, *((reader.leave_decoder, reader.bridge) if beams else ())):
        torch.nn.init.normal_(layer.weight, std=0.3)
    read = []
    for side_by_side in (16, 1):
        monkeypatch.setattr(beam, "PROMPTS", side_by_side)
        read.append(sequence._guesses(reader, here.observation, beams))
    assert torch.equal(read[0], read[1]) and len(read[0]) == len(here.truth_N)


def test_the_trunk_is_copied_without_its_table(trunk):
    body = trunk_body(trunk)
    assert body.embed_tokens is None and trunk.get_input_embeddings() is not None
    assert next(body.parameters()).requires_grad and not next(trunk.parameters()).requires_grad


def test_a_start_on_few_pairs_prefers_what_predicts(trunk):
    """The nearest row where it is sent as it is; a regression where it is turned."""
    torch.manual_seed(0)
    table = Table(trunk.get_input_embeddings().weight.detach())
    rows = [sample(np.random.default_rng(i).integers(0, 300, LENGTH)) for i in range(60)]
    frequency = sequence.log_frequencies(rows, 300)
    turned = linear(torch.linalg.qr(torch.randn(32, 32))[0], torch.zeros(32), 0.01)
    own = OwnText(rows, Transform(turned).mechanism, table.rows_VD, 0)
    assert "regression" in linear_start(own.pairs(rows), table.rows_VD, frequency).name


# -- what the answer tells ---------------------------------------------------------------------------------------------


def test_the_answer_gives_away_what_it_names(trunk):
    """One of four prompts, each of its own tokens, and an answer that says which: without it a quarter is guessed, with
    it everything is known, though nothing was sent but noise. An answer that is always the same tells nothing."""
    random = np.random.default_rng(3)

    def draw(says) -> Sample:
        which = random.integers(4)
        ids = 20 + LENGTH * which + np.arange(LENGTH)
        return sample(np.concatenate([[1], ids]))._replace(answer=np.array([2, 10 + says(which), 3]))

    for says, low, high in ((lambda which: which, 1.0, 1.0), (lambda which: 0, 0.0, 0.5)):
        rows = [draw(says) for _ in range(264)]
        here = World(rows[:64], rows[64:], pure_noise(), trunk, seed=0)
        granted = here.granted(sequence.answer)
        assert all(
            (t[h] == -1).all() for t, h in zip(granted["answered"].tokens, granted["answered"].hidden, strict=True)
        )
        found = sequence.answer(**granted, first=30, most=60, **SMALL)
        assert found.top_NK.shape[0] == len(here.truth_N) and low <= top1(found, here) <= high


def test_what_the_answer_repeats_is_copied_from_it(trunk):
    """Of two tokens drawn anew for each prompt, far more than can be learnt by heart, the answer repeats the first."""
    random = np.random.default_rng(4)
    pairs = random.integers(20, 300, (864, 2))
    rows = [sample([1, *pair])._replace(answer=np.array([5, pair[0]])) for pair in pairs]
    here = World(rows[:64], rows[64:], pure_noise(), trunk, seed=0)
    found = sequence.answer(**here.granted(sequence.answer), first=50, most=100, **SMALL)
    right_BH = (found.top_NK[:, 0] == here.truth_N).view(-1, 2)
    assert right_BH[:, 0].float().mean() >= 0.95 and right_BH[:, 1].float().mean() <= 0.1


@pytest.mark.parametrize("points", [False, True])
def test_the_loss_is_cross_entropy_by_the_posterior(trunk, points):
    table_VD = trunk.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    reader = Reader(table_VD, torch.zeros(len(table_VD)), None, new_body(32, 1), longest=8, points=points)
    tokens_BT = torch.tensor([[7, 7, 9, 200], [11, 12, 13, 0]])
    hidden_BT = torch.tensor([[False, True, False, True], [True, True, True, False]])
    valid_BT = torch.tensor([[True] * 4, [True] * 3 + [False]])
    h_BTH = torch.randn(2, 4, 32)
    logits_NV = reader.posterior(h_BTH, None, tokens_BT, hidden_BT, valid_BT)
    want_N = torch.nn.functional.cross_entropy(logits_NV, tokens_BT[hidden_BT], reduction="none")
    torch.testing.assert_close(reader.nats(h_BTH, None, tokens_BT, hidden_BT, valid_BT), want_N)


def test_products_are_rounded_while_it_trains_and_never_when_it_reads(monkeypatch):
    torch.manual_seed(0)
    body, x_BTH = new_body(32, 1), torch.randn(2, 4, 32)
    sequence_reader.round_products(body)
    exact = body.eval()(inputs_embeds=x_BTH).last_hidden_state
    monkeypatch.setattr(sequence_reader, "quick_in_bfloat16", lambda device: False)
    assert torch.equal(body.train()(inputs_embeds=x_BTH).last_hidden_state, exact)
    monkeypatch.setattr(sequence_reader, "quick_in_bfloat16", lambda device: True)
    near = body(inputs_embeds=x_BTH).last_hidden_state
    assert near.dtype == torch.float32 and not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0.0, atol=0.05)
    near.square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in body.parameters() if p.grad is not None)
    assert torch.equal(body.eval()(inputs_embeds=x_BTH).last_hidden_state, exact)


def test_rows_of_a_length_come_together_and_all_come(trunk):
    rows = [sample(range(length)) for length in range(2, 66)]
    batches = of_a_length(rows, 4, np.random.default_rng(0))
    drawn = [[len(row.ids) for row in next(batches)] for _ in range(8 * 20)]
    assert all(len(lengths) == 4 for lengths in drawn)
    assert {length for lengths in drawn for length in lengths} == set(range(2, 66))
    spread = np.mean([max(lengths) - min(lengths) for lengths in drawn])
    assert spread < 12  # of four at random it is 38
    for k in range(0, len(drawn), 8):
        assert len({length for lengths in drawn[k : k + 8] for length in lengths}) == 32, "none twice in eight batches"
    firsts = [sum(lengths) for lengths in drawn[::8]]
    assert np.std(firsts) > 40  # nor do they come in order of their lengths


def test_pointing_gives_probabilities_and_leaves_a_row_without_clean_tokens_alone(trunk):
    table_VD = trunk.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    reader = Reader(table_VD, torch.zeros(len(table_VD)), None, new_body(32, 1), longest=8, points=True)
    tokens_BT = torch.tensor([[7, -1, 9, -1], [-1, -1, -1, 0]])
    hidden_BT, valid_BT = tokens_BT < 0, torch.tensor([[True] * 4, [True] * 3 + [False]])
    h_BTH = torch.randn(2, 4, 32)
    logits_NV = reader.marginal(h_BTH[hidden_BT], None)
    mixed_NV = reader.posterior(h_BTH, None, tokens_BT, hidden_BT, valid_BT)
    odd_BT = hidden_BT & (torch.arange(hidden_BT.shape[1]) % 2 == 1)
    odd_CV = reader.posterior(h_BTH, None, tokens_BT, hidden_BT, valid_BT, odd_BT)
    torch.testing.assert_close(odd_CV, mixed_NV[odd_BT[hidden_BT]])
    assert mixed_NV.exp().sum(-1).tolist() == pytest.approx([1.0] * 5)
    assert torch.allclose(mixed_NV[2:], torch.log_softmax(logits_NV[2:], -1), atol=1e-5)
    gained_V = mixed_NV[0].exp() - torch.softmax(logits_NV[0], -1)
    assert (gained_V > 0).nonzero()[:, 0].tolist() == [7, 9]
