"""``sgt-titan report``: the suite of a glance, on exports whose numbers are known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from sgt_titan import cli
from sgt_titan.client.inspect import best_attacker
from sgt_titan.config.load import dump
from sgt_titan.data.cache import prepare
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure import runner
from sgt_titan.evaluation.measure.parts import Parts
from sgt_titan.evaluation.measure.setting import load_setting
from sgt_titan.evaluation.report.html import page
from sgt_titan.evaluation.report.terminal import WIDTH, render
from sgt_titan.evaluation.studies.frontier import measured_before
from sgt_titan.transform.prompts import PROMPT, RESPONSE

ROWS = 12


@pytest.fixture(scope="module")
def identity(make_export, demo_config):
    return glance(make_export(1e-6), demo_config)


@pytest.fixture(scope="module")
def drowned(make_export, demo_config):
    return glance(make_export(1e4), demo_config)


def glance(export, config, *, rows=ROWS, seed=0, examples=1):
    """What ``results.json`` has of the mechanisms and of no prompt."""
    setting = load_setting(str(export), config, rows=rows, corpus=ROWS, zero_steps=10)
    evaluation = runner.Evaluation(setting=setting, suite="glance", seed=seed, examples=examples)
    jobs, parts = list(evaluation.jobs()), Parts(None)
    runner.run_jobs(jobs, parts, lambda text: None)
    return runner.merged(evaluation, jobs, parts)


def value(results, mechanism, part, key):
    return results["mechanisms"][mechanism][part][key]["value"]


def nats(trunk, ids, targets, zero=()) -> list[float]:
    """Negative log-likelihood of ``ids[t]`` for t in targets, one forward pass of one unpadded row."""
    with torch.no_grad():
        x_BTD = trunk.get_input_embeddings()(torch.tensor([ids])).clone()
        x_BTD[0, list(zero)] = 0
        logits_TV = trunk(inputs_embeds=x_BTD).logits[0]
    return [-torch.log_softmax(logits_TV[t - 1], -1)[ids[t]].item() for t in targets]


# -- known exports -----------------------------------------------------------------------------------------------------


def test_identity_costs_nothing_and_hides_nothing(identity):
    for key in ("nn_fr", "ttr_10", "sym_ttr_100", "rank_entropy"):
        assert value(identity, "sgt", "privacy", key) == 0
    assert value(identity, "sgt", "utility", "kl") == pytest.approx(0, abs=1e-6)
    assert value(identity, "sgt", "utility", "kept") == pytest.approx(1, abs=1e-4)
    assert value(identity, "sgt", "utility", "agreement") == 1
    assert value(identity, "sgt", "privacy", "mi") > 1e6
    assert value(identity, "none", "privacy", "mi") == "inf"
    (shown,) = identity["mechanisms"]["sgt"]["examples"]
    assert shown["guesses"] == {"nearest_l2": shown["prompt"]}
    assert shown["answer_obfuscated"] == shown["answer_clean"]


def test_noise_hides_everything_and_keeps_nothing(drowned, trunk):
    privacy, facts = drowned["mechanisms"]["sgt"]["privacy"], drowned["mechanisms"]["sgt"]["facts"]
    # A token is the nearest of V rows by chance; the rows' lengths make some likelier than 1 / V.
    assert privacy["nn_fr"]["value"] > 0.95
    # The estimate is half the mean of eps^2 - 1 over tokens and features: 4 of its standard deviations.
    width = trunk.config.hidden_size
    assert privacy["mi"]["value"] == pytest.approx(0, abs=4 * (2 * privacy["nn_fr"]["n"] * width) ** -0.5)
    assert value(drowned, "sgt", "utility", "kl") > 0.5
    assert value(drowned, "sgt", "utility", "kept") < 0.05
    assert privacy["rank_entropy"]["value"] <= privacy["rank_entropy_ceiling"]
    assert facts["std"] == pytest.approx(1e4, rel=1e-3) and facts["mean_norm"] == 0


def test_an_untrained_transform_is_the_noise_baseline(drowned):
    # Zero heads: no mean and one std, so both draw the same noise and must measure the same.
    for part, key, close in (("privacy", "nn_fr", 0), ("utility", "perplexity", 1e-4), ("privacy", "mi", 0)):
        noise, sgt = (value(drowned, name, part, key) for name in ("noise", "sgt"))
        assert sgt == pytest.approx(noise, rel=close, abs=1e-6)


def test_perplexities_are_those_of_unpadded_rows(identity, demo_config, trunk):
    view = prepare(demo_config, str(TRUNK), progress=False).validation
    clean, dropped, zeroed = [], [], []
    for i in range(ROWS):
        ids, roles = view.tokens(i).astype(int).tolist(), view.roles(i)
        targets = np.flatnonzero(roles == RESPONSE)
        clean += nats(trunk, ids, targets)
        zeroed += nats(trunk, ids, targets, zero=np.flatnonzero(roles == PROMPT))
        keep = [t for t in range(len(ids)) if roles[t] != PROMPT]
        dropped += nats(trunk, [ids[t] for t in keep], [k for k, t in enumerate(keep) if roles[t] == RESPONSE])
    assert identity["mechanisms"]["none"]["utility"]["perplexity"]["n"] == len(clean)
    assert value(identity, "none", "utility", "perplexity") == pytest.approx(math.exp(np.mean(clean)), rel=1e-4)
    no_prompt = identity["no_prompt"]
    assert no_prompt["ways"]["taken out"] == pytest.approx(math.exp(np.mean(dropped)), rel=1e-4)
    assert no_prompt["ways"]["zeroed"] == pytest.approx(math.exp(np.mean(zeroed)), rel=1e-4)
    assert len(no_prompt["ways"]) == 4
    lowest = min(no_prompt["ways"].values())
    assert no_prompt["perplexity"]["value"] == pytest.approx(lowest)
    assert no_prompt["utility"]["perplexity"]["value"] == pytest.approx(lowest)
    assert no_prompt["utility"]["kept"]["value"] == pytest.approx(0, abs=1e-9)


def test_repeats_exactly_with_one_seed(make_export, demo_config):
    export = make_export(1.0)
    first, second, other = (glance(export, demo_config, rows=2, examples=0, seed=s) for s in (0, 0, 1))
    for found in (first, second, other):
        for mechanism in found["mechanisms"].values():
            for attack in mechanism["attacks"].values():
                attack.pop("seconds")
    assert first == second
    assert value(first, "sgt", "utility", "perplexity") != value(other, "sgt", "utility", "perplexity")


def test_an_export_without_a_table_is_measured_on_its_trunk(make_export, demo_config):
    found = glance(make_export(0.1, embeddings=False), demo_config, rows=2, examples=0)
    assert value(found, "sgt", "utility", "kept") > 0.5


# -- what is said ------------------------------------------------------------------------------------------------------


def test_the_weakest_attacker_is_nowhere_called_the_best(drowned):
    assert drowned["mechanisms"]["sgt"]["best"] is None
    text, whole = render(drowned), page(drowned)
    assert "weakest attacker" in text and "BEST ATTACKER" not in text and max(map(len, text.splitlines())) <= WIDTH
    assert "weakest attacker" in whole and "by the best attacker" not in whole
    sgt = drowned["mechanisms"]["sgt"]
    for of, what in (("utility", "perplexity"), ("privacy", "nn_fr"), ("privacy", "mi")):
        unit = {"perplexity": "response tokens", "nn_fr": "hidden tokens", "mi": "pairs of rows"}[what]
        assert sgt[of][what]["n"] > 0 and f"(N = {sgt[of][what]['n']:,} {unit}" in text
    assert "unbounded" in text and "no prompt" in text and "NOT settled" in " ".join(text.split())


def test_report_is_a_glance(make_export, demo_config, tmp_path, capsys):
    export = make_export(1e-6)
    (export.parent / "config.yaml").write_text(dump(demo_config))
    words = ["report", str(export), "--trunk", "demo", "--data", "demo", "--samples", "2", "--examples", "0"]
    words += ["--zero-steps", "10"]
    before = sorted(export.parent.rglob("*"))
    assert cli.main(words) == 0
    assert sorted(export.parent.rglob("*")) == before, "kept without --out"
    printed = capsys.readouterr().out
    assert "this SGT" in printed and "may have been trained on some of them" in printed
    out = tmp_path / "report"
    assert cli.main([*words, "--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(printed.rstrip())
    found = json.loads((out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["about"]["suite"] == "glance" and found["about"]["rows"] == 2
    assert value(found, "none", "privacy", "mi") == "inf"
    assert value(found, "sgt", "privacy", "nn_fr") == 0
    assert set(found["mechanisms"]["sgt"]["attacks"]) == {"nearest_l2"}
    assert "not measured" in best_attacker(out / "results.json")
    with pytest.raises(UserError, match="a glance"):
        measured_before([str(out)])
