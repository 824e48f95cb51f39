"""Attacks on a rotated basis where their success is known: an exact rotation, one with other weights, pure noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sgt_titan.conjformer.client import Client
from sgt_titan.conjformer.command import convert
from sgt_titan.conjformer.convert import Conversion
from sgt_titan.conjformer.families import symmetries_of
from sgt_titan.conjformer.secret import Secret, load
from sgt_titan.errors import UserError
from sgt_titan.evaluation.attacks import ATTACKS, ROTATION
from sgt_titan.evaluation.attacks.rotation_invariants import self_scores
from sgt_titan.evaluation.attacks.rotation_inverter import InvariantReader
from sgt_titan.evaluation.attacks.rotation_procrustes import orthogonal
from sgt_titan.evaluation.attacks.rotation_products import grams, products
from sgt_titan.evaluation.attacks.rotation_spectral import recover
from sgt_titan.evaluation.attacks.rotation_substitution import substitution_table, symbols
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import constant_noise, nothing
from sgt_titan.evaluation.world.rotated import Answering, load_rotation, rotate
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.evaluation.world.threat import Corpus, Served, Table
from sgt_titan.transform.trunk_files import TrunkFiles
from tests.unit.evaluation.worlds import pure_noise, random_rows, top1

SMALL = {
    "invariant_inverter": {"steps": 4, "layers": 1, "width": 32},
    "spectral_sequence": {"first": 4, "most": 8, "layers": 1, "width": 32},
}
BROKEN_BY_ROTATION = ("nearest_l2", "nearest_cosine")
EXACT = tuple(name for name in ROTATION if "substitution" not in name)  # which need text with a language in it


@pytest.fixture(scope="module")
def converted(trunk_dir, tmp_path_factory):
    """``converted(name, *options)``: server, client and secret of a trunk."""
    made = {}

    def make(name: str, *options: str):
        if (name, *options) not in made:
            folder = tmp_path_factory.mktemp("rotated")
            words = [str(trunk_dir(name)), str(folder / "s"), "--secret", str(folder / "k"), *options]
            assert convert(words) == 0
            made[name, *options] = folder / "s", folder / "s-client", folder / "k"
        return made[name, *options]

    return make


def world(mechanism, trunk):
    V = trunk.get_input_embeddings().weight.shape[0]
    # Long rows of few tokens: more distinct ones than dimensions are seen, as in any prompt of a page.
    return World(random_rows(12, 16, V, 1), random_rows(64, 16, V, 1000), mechanism, trunk, 0)


def run(name, here):
    attack = (ATTACKS | ROTATION)[name]
    return attack.run(**here.granted(attack.run), **{**attack.arguments("quick"), **SMALL.get(name, {})})


@pytest.fixture(scope="module", params=("fold", "mean"))
def exact(request, converted, trunk, trunk_dir):
    """A rotation of what the world knows, with nothing else done."""
    return world(load_rotation(nothing(), *converted("llama", "--norms", request.param), trunk_dir("llama")), trunk)


@pytest.mark.parametrize("name", EXACT)
def test_an_exact_rotation_is_read(name, exact):
    guess = run(name, exact)
    assert guess.top_NK.shape[0] == len(exact.truth_N) and guess.top_NK.shape[1] <= 10
    assert top1(guess, exact) >= 0.99


@pytest.mark.parametrize("name", BROKEN_BY_ROTATION)
def test_neighbours_in_the_public_table_are_not(name, exact):
    assert top1(run(name, exact), exact) < 0.08


@pytest.mark.parametrize("name", ROTATION)
def test_pure_noise_is_not_read(name, converted, trunk, trunk_dir):
    here = world(load_rotation(pure_noise(), *converted("llama"), trunk_dir("llama")), trunk)
    N, p = len(here.truth_N), 1 / here.size.vocab
    assert top1(run(name, here), here) <= p + 3.3 * math.sqrt(p * (1 - p) / N) + 1 / N


def test_another_trunk_s_weights_tell_nothing(converted, trunk, trunk_dir, tmp_path):
    """Matched with weights that have nothing to do with the served ones, spectral matching is as good as guessing."""
    (tmp_path / "config.json").write_text((trunk_dir("llama") / "config.json").read_text())
    random = torch.Generator().manual_seed(99)
    weights = load_file(trunk_dir("llama") / "model.safetensors")
    unlike = {name: torch.randn(tensor.shape, generator=random) for name, tensor in weights.items()}
    save_file(unlike | {name: t for name, t in weights.items() if "norm" in name or "embed" in name},
              tmp_path / "model.safetensors")  # fmt: skip
    here = world(load_rotation(nothing(), *converted("llama"), tmp_path), trunk)
    assert top1(run("spectral", here), here) < 0.08


@pytest.mark.parametrize("name", ("llama-tied", "qwen2", "qwen3"))
@pytest.mark.parametrize("symmetries", ("all", "none"))
def test_spectral_matching_finds_the_secret_itself(name, symmetries, converted, trunk_dir):
    """Up to rounding, from the two checkpoints alone, whatever is free beside the rotation."""
    server, client, secret = converted(name, "--symmetries", symmetries)
    found = recover(TrunkFiles(server), TrunkFiles(trunk_dir(name)))
    U_DD = Client.load(client, load(secret), dtype=torch.float64).U_DD
    torch.testing.assert_close(found.U_DD, U_DD, atol=1e-5, rtol=0)
    assert found.agreement > 0.9999


def test_products_are_what_every_secret_leaves(converted, trunk_dir):
    """M' = U M U^T for all of them; of the Gram matrices only the gate's."""
    for name in ("llama-tied", "qwen2", "qwen3"):
        server, client, secret = converted(name)
        U_DD = Client.load(client, load(secret), dtype=torch.float64).U_DD
        theirs, ours = Conversion(server, None), Conversion(trunk_dir(name), None)

        def misfit(invariants, U_DD=U_DD, theirs=theirs, ours=ours):
            served, plain = invariants(theirs), invariants(ours)
            return {
                kind: max((a - U_DD @ b @ U_DD.T).norm().item() for a, b in zip(served[kind], plain[kind], strict=True))
                for kind in plain
            }

        assert max(misfit(products).values()) < 1e-5
        left = misfit(grams)
        assert left.pop("unit") < 1e-5 and min(left["value"], left["scaled"], left["heads>"], left["scaled>"]) > 0.05
        assert (left["query"] > 0.05) is ("queries" in symmetries_of(ours.family))


def language(count: int, length: int, seed: int):
    """Rows of a random Markov chain over 40 words, of which each has a few successors."""
    random = np.random.default_rng(7)
    next_WW = random.dirichlet(np.full(40, 0.15), 40)
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = [int(random.integers(40))]
        while len(ids) < length:
            ids.append(int(random.choice(40, p=next_WW[ids[-1]])))
        rows.append(Sample(np.array(ids), np.arange(length) >= 1, np.zeros(length, dtype=bool)))
    return rows


def test_a_language_is_deciphered_without_weights_or_table(converted, trunk, trunk_dir):
    """And noise, which makes every vector another, ends it."""
    rows, corpus = language(40, 24, 1), language(200, 24, 1000)
    common = max(np.bincount(np.concatenate([row.ids[1:] for row in rows]))) / (40 * 23)
    for before, reads in ((nothing(), True), (constant_noise(0.1), False)):
        mechanism = load_rotation(before, *converted("llama"), trunk_dir("llama"))
        here = World(rows, corpus, mechanism, trunk, 0)
        share = top1(run("substitution", here), here)
        assert share > 0.9 if reads else share < 2.5 * common, share
        if reads:
            assert top1(run("substitution_table", here), here) > 0.95
            other = Table(torch.randn_like(here.table_VD))
            found = substitution_table(here.observation, Corpus(corpus), other, rounds=15)
            assert top1(found, here) < 0.5  # what it knows of the text leads to no table of other vectors


def test_equal_vectors_are_one_symbol():
    x_ND = torch.randn(5, 8)[torch.tensor([0, 3, 0, 1, 3, 2])]
    symbol_N = symbols(x_ND * (1 + 1e-5 * torch.randn(6, 8)))
    assert [symbol_N.tolist().index(s) for s in symbol_N.tolist()] == [0, 1, 0, 3, 1, 5]


def test_another_secret_or_a_drifted_original_is_refused(converted, trunk_dir, tmp_path):
    server, client, secret = converted("llama")
    other = converted("llama", "--symmetries", "none")
    with pytest.raises(UserError, match="another secret"):
        load_rotation(nothing(), other[0], client, secret, trunk_dir("llama"))
    with pytest.raises(UserError, match="another secret"):
        load_rotation(nothing(), server, client, other[2], trunk_dir("llama"))
    assert convert([str(trunk_dir("llama")), str(tmp_path / "moved"), "--plain", "--shake", "0.5"]) == 0
    for path, why in ((tmp_path / "moved", "moved away"), (server, "a server's rotated checkpoint")):
        with pytest.raises(UserError, match=why):
            load_rotation(nothing(), server, client, secret, path)


def test_spectral_matching_survives_a_small_change_of_the_weights(converted, trunk_dir, tmp_path):
    """A private fine-tuning that moves every weight by a tenth of its size hides the basis from no one."""
    changed = tmp_path / "changed"
    changed.mkdir()
    (changed / "config.json").write_text((trunk_dir("llama") / "config.json").read_text())
    random = torch.Generator().manual_seed(0)
    weights = load_file(trunk_dir("llama") / "model.safetensors")
    for tensor in weights.values():
        tensor += 0.1 * tensor.std() * torch.randn(tensor.shape, generator=random) if tensor.dim() == 2 else 0
    save_file(weights, changed / "model.safetensors")
    for file in trunk_dir("llama").glob("tokenizer*"):
        (changed / file.name).write_bytes(file.read_bytes())
    assert convert([str(changed), str(tmp_path / "s"), "--secret", str(tmp_path / "k")]) == 0
    found = recover(TrunkFiles(tmp_path / "s"), TrunkFiles(trunk_dir("llama")))
    U_DD = Client.load(tmp_path / "s-client", load(tmp_path / "k"), dtype=torch.float64).U_DD
    assert (found.U_DD * U_DD).sum() / len(U_DD) > 0.98  # 1: the same matrix


def test_fingerprints_are_invariant_and_rows_differ(converted, trunk_dir):
    for name in ("llama-tied", "qwen2", "qwen3"):
        server, client, secret = converted(name)
        found = Client.load(client, load(secret), dtype=torch.float64)
        plain = self_scores(TrunkFiles(trunk_dir(name)), found.embed_VD)
        served = self_scores(TrunkFiles(server), found.rotate(found.embed_VD))
        served, plain = served.sort(-1).values, plain.sort(-1).values  # heads have changed places
        torch.testing.assert_close(served, plain, atol=1e-3, rtol=1e-4)
        assert plain.std(0).min() > 1e-3


def test_noise_defeats_the_invariants_and_not_the_weights(converted, trunk, trunk_dir):
    """Noise of half the table's std: norms are lost, and the basis is found all the same, so rotation adds nothing."""
    std = 0.5 * trunk.get_input_embeddings().weight.std().item()
    bare, files = constant_noise(std), converted("llama")
    here = world(load_rotation(bare, *files, trunk_dir("llama")), trunk)
    without = world(bare, trunk)
    assert top1(run("norm_matching", here), here) < 0.1
    assert top1(run("spectral", here), here) > 0.9 * top1(run("nearest_l2", without), without) > 0.8


def test_procrustes_needs_about_as_many_distinct_tokens_as_dimensions(exact):
    guess = run("procrustes", exact)
    shares = [(top_N == exact.truth_N).double().mean().item() for top_N in guess.curve.top_N]
    assert shares[0] < 0.5 and shares[-1] == 1.0
    U_DD = Secret.fresh().orthogonal("u", 12)
    x_MD = torch.randn(40, 12, dtype=torch.float64)
    torch.testing.assert_close(orthogonal((x_MD @ U_DD.T).T @ x_MD), U_DD)


def test_the_learned_reader_is_invariant():
    torch.manual_seed(0)
    reader = InvariantReader(torch.randn(50, 16, dtype=torch.float64).float(), layers=2, width=32)
    torch.nn.init.normal_(reader.leave.weight)
    reader.rate_F.clamp_(max=1e2)  # the finest scales see rounding
    x_BTD, valid_BT = torch.randn(2, 7, 16), torch.ones(2, 7, dtype=torch.bool)
    U_DD = Secret.fresh().orthogonal("u", 16).float()
    torch.testing.assert_close(reader(x_BTD, valid_BT), reader(x_BTD @ U_DD.T, valid_BT), atol=1e-2, rtol=1e-3)


def test_an_answer_is_the_plain_model_s(exact, trunk):
    rotation = exact.mechanism.rotation
    assert isinstance(rotation.answer, Answering)
    client = rotation.answer.client
    tokens_BT = torch.arange(10)[None]
    logits = rotation.answer(client.encode(tokens_BT), torch.ones_like(tokens_BT)).logits
    if exact.mechanism.rotation.served.read("model.layers.0.input_layernorm.weight").eq(1).all():
        torch.testing.assert_close(logits, trunk(input_ids=tokens_BT).logits, atol=1e-4, rtol=0)


def test_what_is_granted_holds_no_secret(exact):
    for attack in ROTATION.values():
        for grant in exact.granted(attack.run).values():
            assert not hasattr(grant, "U_DD") and "Client" not in repr(grant)
    assert isinstance(exact.granted(ROTATION["spectral"].run)["served"], Served)
    with pytest.raises(ValueError, match="no rotation"):
        world(nothing(), exact.trunk).granted(ROTATION["spectral"].run)


def test_the_wire_s_type_rounds_what_is_sent(converted, trunk, trunk_dir):
    files = converted("llama")
    whole = load_rotation(nothing(), *files, trunk_dir("llama"))
    half = rotate(nothing(), whole.rotation.answer, whole.rotation.served, whole.rotation.public, wire=torch.bfloat16)
    a, b = (world(m, trunk).observation.x_tilde_ND for m in (whole, half))
    assert 1e-4 < ((a - b).norm() / a.norm()).item() < 1e-2


def test_the_suites_run_them_where_there_is_a_rotation():
    from sgt_titan.evaluation.measure.suite import battery

    assert set(ROTATION) <= set(battery("quick", "rotated", rotated=True))
    assert not set(ROTATION) & set(battery("quick", "sgt"))
    assert list(battery("quick", "rotated", ("spectral",), rotated=True)) == ["spectral"]
    for suite in ("quick", "standard", "full"):
        for attack in ROTATION.values():
            assert attack.arguments(suite) is not None


def test_utility_is_that_of_the_plain_model(exact, trunk):
    """The report's numbers of a folded rotation are those of sending the prompt in clear."""
    from sgt_titan.evaluation.scores.utility import measured, perplexity
    from sgt_titan.evaluation.world.samples import padded

    if not exact.mechanism.rotation.served.read("model.layers.0.input_layernorm.weight").eq(1).all():
        pytest.skip("means of gains are another model")
    rows = [row._replace(target=(torch.arange(16) > 8).numpy()) for row in exact.rows]
    batch = padded(rows, 0, torch.device("cpu"))
    clean, ours = (measured(trunk, [batch], m, torch.Generator()) for m in (nothing(), exact.mechanism))
    assert abs(perplexity(ours) / perplexity(clean) - 1) < 1e-4 and (ours.agree_N == 1).double().mean() > 0.99


def test_spectral_matching_finds_gpt2_s_secret(tmp_path):
    """LayerNorm, fused and transposed projections, positions at the client: the weights tell the basis all the same."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=24, n_layer=3, n_head=2))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape) * (0.3 if tensor.dim() == 1 else 1) + (".ln_" in name))
    model.save_pretrained(tmp_path / "trunk")
    (tmp_path / "trunk" / "tokenizer.json").write_text("{}")
    server, key = tmp_path / "server", tmp_path / "key"
    assert convert([str(tmp_path / "trunk"), str(server), "--secret", str(key)]) == 0
    found = recover(TrunkFiles(server), TrunkFiles(tmp_path / "trunk"))
    client = Client.load(tmp_path / "server-client", load(key), dtype=torch.float64)
    x_ND = client.embed(torch.arange(30)[None])[0]
    undone = client.rotate(x_ND) @ found.U_DD
    torch.testing.assert_close(undone, x_ND, atol=1e-3, rtol=1e-3)  # the direction of all ones is never used
    with pytest.raises(UserError, match="positions are added"):
        load_rotation(nothing(), server, tmp_path / "server-client", key, tmp_path / "trunk")
