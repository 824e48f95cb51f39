import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sgt_titan.config.load import dump
from sgt_titan.config.schema import Config
from sgt_titan.data.cache import prepare
from sgt_titan.demo import TRUNK
from sgt_titan.errors import UserError
from sgt_titan.evaluation.measure import before_after
from sgt_titan.evaluation.measure import summary as report
from sgt_titan.evaluation.scores import privacy
from sgt_titan.evaluation.scores.utility import Utility
from sgt_titan.evaluation.world import samples
from sgt_titan.evaluation.world.mechanisms import Obfuscated
from sgt_titan.evaluation.world.samples import Sample
from sgt_titan.transform.prompts import PROMPT, RESPONSE

ROWS = 12


@pytest.fixture(scope="module")
def trunk():
    return AutoModelForCausalLM.from_pretrained(TRUNK, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def identity(make_export, demo_config):
    return summarise(make_export(1e-6), demo_config, samples=ROWS)


@pytest.fixture(scope="module")
def drowned(make_export, demo_config):
    return summarise(make_export(1e4), demo_config, samples=ROWS)


def summarise(export, config, **options):
    return report.summarise(export, config, **{"zero_steps": 10, **options})


def nats(trunk, ids, targets, zero=()) -> list[float]:
    """Negative log-likelihood of ``ids[t]`` for t in targets, one forward pass of one unpadded row."""
    with torch.no_grad():
        x_BTD = trunk.get_input_embeddings()(torch.tensor([ids])).clone()
        x_BTD[0, list(zero)] = 0
        logits_TV = trunk(inputs_embeds=x_BTD).logits[0]
    return [-torch.log_softmax(logits_TV[t - 1], -1)[ids[t]].item() for t in targets]


# -- known exports -----------------------------------------------------------------------------------------------------


def test_identity_costs_nothing_and_hides_nothing(identity):
    sgt = identity.conditions["sgt"]
    assert (sgt.nn_fr, sgt.ttr_10, sgt.sym_ttr_100, sgt.rank_entropy) == (0, 0, 0, 0)
    assert sgt.kl == pytest.approx(0, abs=1e-6)
    assert sgt.kept == pytest.approx(1, abs=1e-4)
    assert sgt.agreement == 1
    assert sgt.mi > 1e6
    assert identity.conditions["clean"].mi == math.inf
    shown = identity.examples[0]
    assert shown.nearest_neighbour == shown.prompt
    assert shown.answer_obfuscated == shown.answer_clean


def test_noise_hides_everything_and_keeps_nothing(drowned):
    sgt = drowned.conditions["sgt"]
    # A token is the nearest of V rows by chance; the rows' lengths make some likelier than 1 / V.
    assert sgt.nn_fr > 0.95
    # The estimate is half the mean of eps^2 - 1 over tokens and features: 4 of its standard deviations.
    assert sgt.mi == pytest.approx(0, abs=4 * (2 * drowned.obfuscated_tokens * drowned.width) ** -0.5)
    assert sgt.kl > 0.5
    assert sgt.kept < 0.05
    assert sgt.rank_entropy <= drowned.rank_entropy_ceiling
    assert drowned.mean_std == pytest.approx(1e4, rel=1e-3)
    assert drowned.mean_norm == 0


def test_an_untrained_transform_is_the_noise_baseline(drowned):
    # Zero heads: no mean and one std, so both draw the same noise and must measure the same.
    noise, sgt = drowned.conditions["noise"], drowned.conditions["sgt"]
    assert sgt.nn_fr == noise.nn_fr
    assert sgt.perplexity == pytest.approx(noise.perplexity, rel=1e-4)
    assert sgt.mi == pytest.approx(noise.mi, abs=1e-6)


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
    assert identity.response_tokens == len(clean)
    assert identity.conditions["clean"].perplexity == pytest.approx(math.exp(np.mean(clean)), rel=1e-4)
    assert identity.without_prompt["taken out"] == pytest.approx(math.exp(np.mean(dropped)), rel=1e-4)
    assert identity.without_prompt["zeroed"] == pytest.approx(math.exp(np.mean(zeroed)), rel=1e-4)
    best = identity.conditions["no_prompt"]
    assert len(identity.without_prompt) == 4
    assert best.perplexity == pytest.approx(min(identity.without_prompt.values()))
    assert best.kept == pytest.approx(0, abs=1e-9)


def test_repeats_exactly_with_one_seed(make_export, demo_config):
    export = make_export(1.0)
    first, second, other = (summarise(export, demo_config, samples=2, seed=s) for s in (0, 0, 1))
    assert first.conditions == second.conditions
    assert first.conditions["sgt"].perplexity != other.conditions["sgt"].perplexity


# -- the parts ---------------------------------------------------------------------------------------------------------


def test_condition_in_closed_form():
    utility = Utility(
        nll_N=torch.tensor([1.0, 2.0], dtype=torch.float64),
        cross_entropy_N=torch.tensor([2.0, 3.0], dtype=torch.float64),
        teacher_entropy_N=torch.tensor([0.5, 0.5], dtype=torch.float64),
        agree_N=torch.tensor([1.0, 0.0], dtype=torch.float64),
    )
    found = report.condition(utility, 0.75)
    assert found.perplexity == pytest.approx(math.exp(1.5))
    assert found.kept == pytest.approx(0.75)
    assert (found.cross_entropy, found.kl, found.agreement, found.nn_fr) == (2.5, 2.0, 0.5, None)


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


def test_shortened_rows_keep_template_and_response():
    row = Sample(
        np.array([1, 5, 6, 2, 7, 8]),
        np.array([0, 1, 1, 0, 0, 0], dtype=bool),
        np.array([0, 0, 0, 0, 1, 1], dtype=bool),
    )
    short = samples.shorten(row)
    assert short.ids.tolist() == [1, 2, 7, 8]
    assert short.target.tolist() == [False, False, True, True]
    assert not short.obfuscate.any()


def test_a_first_response_token_without_context_is_not_scored():
    class View:
        """One row of a text without BOS: the prompt is all that stands before the response."""

        def __len__(self):
            return 2

        def spread(self, count):
            return range(count)

        def tokens(self, i):
            return np.array([5, 6, 7, 8], dtype=np.uint16)

        def roles(self, i):
            return np.array([1, 1, RESPONSE, RESPONSE], dtype=np.uint8)

    row = samples.read_samples(View(), Config(), 1)[0]
    assert row.target.tolist() == [False, False, False, True]
    assert samples.shorten(row).ids.tolist() == [7, 8]


@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_batches_hold_every_row_once(count):
    rows = [Sample(np.full(3, i), np.zeros(3, bool), np.zeros(3, bool)) for i in range(count)]
    parts = list(samples.batched(rows, 10))
    assert [int(row.ids[0]) for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) <= samples.MAX_ROWS
    assert {len(part) for part in samples.batched(rows, 10**9)} <= {1, 2}


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_another_table_is_refused(make_export, demo_config):
    with pytest.raises(UserError, match="embedding table is not that of"):
        summarise(make_export(0.1, table_change=0.5), demo_config, samples=2)


def test_an_export_without_table_needs_its_own_trunk(make_export, demo_config, tmp_path):
    export = make_export(0.1, embeddings=False)
    assert summarise(export, demo_config, samples=2, examples=0).conditions["sgt"].kept > 0.5
    settings = json.loads((export / "config.json").read_text())
    settings["fingerprints"]["trunk"] = "0" * 64
    (export / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="was not trained for"):
        summarise(export, demo_config, samples=2)


def test_rows_of_another_split_are_said_to_be_so(identity, demo_config, make_export):
    assert not identity.held_out and any("held out" in note for note in identity.notes)
    export = make_export(0.1)
    settings = json.loads((export / "config.json").read_text())
    settings["fingerprints"]["data"] = prepare(demo_config, str(TRUNK), progress=False).fingerprint
    (export / "config.json").write_text(json.dumps(settings))
    assert summarise(export, demo_config, samples=2, examples=0).held_out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.lr", "1"], "--optimizer.lr: does not belong"),
        (["--data.prompt_token", "1"], "data.prompt_token"),
        (["--training.seq_len", "100000"], "beyond the trunk's"),
        (["--training.seq_len", "0"], "training.seq_len must be at least 2, got 0"),
        (["--data.max_samples", "-5"], "data.max_samples must be 0 or more, got -5"),
        (["--data.columns.txt", "story"], "data.columns.txt is no field"),
    ],
)
def test_options_that_do_not_belong(make_export, words, message):
    with pytest.raises(UserError, match=message):
        samples.data_config(make_export(0.1), str(TRUNK), "demo", words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "--samples must be at least 2"),
        ({"examples": -1}, "--examples at least 0, got 128 and -1"),
        ({"zero_steps": 0}, "--zero-steps must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"seed": 1 << 64}, "--seed must be from 0"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        summarise("nowhere", None, **options)


def test_options_of_the_run_beside_the_export(make_export):
    export = make_export(0.1)
    run = Config()
    run.data.source, run.data.max_samples, run.training.seq_len = "demo", 77, 99
    (export.parent / "config.yaml").write_text(dump(run))
    config = samples.data_config(export, "demo", "demo")
    assert (config.data.max_samples, config.training.seq_len, config.trunk.path) == (77, 99, str(TRUNK))
    assert samples.data_config(export, "demo", "demo", ["--data.max_samples", "5"]).data.max_samples == 5
    run.data.columns = {"text": "story"}
    (export.parent / "config.yaml").write_text(dump(run))
    both = samples.data_config(export, "demo", "demo", ["--data.columns.output", "end"]).data.columns
    assert both == {"text": "story", "output": "end"}
    # Another source: nothing of the run's data options applies.
    assert samples.data_config(export, "demo", "rows.jsonl").data.max_samples == 0


# -- what is printed ---------------------------------------------------------------------------------------------------


def test_table_states_every_n_and_the_caution(drowned):
    text = report.table(drowned)
    for wanted in (
        f"N = {drowned.response_tokens:,} tokens",
        f"N = {drowned.obfuscated_tokens:,} obfuscated",
        f"N = {drowned.mi_pairs:,} pairs",
        "Caution: Nearest neighbour is the weakest attacker",
        "unbounded",
    ):
        assert wanted in text
    assert max(map(len, text.splitlines())) <= report.LINE


def test_control_characters_do_not_reach_the_terminal():
    assert "\x1b" not in report._printable("a\x1b[31mb\nc")


def test_main_writes_json_without_nan(make_export, demo_config, tmp_path, capsys):
    words = [
        str(make_export(1e-6)),
        "--trunk",
        "demo",
        "--data",
        "demo",
        "--samples",
        "2",
        "--examples",
        "0",
        "--zero-steps",
        "20",
    ]
    options = [f"--data.cache_dir={demo_config.data.cache_dir}", "--data.max_samples=240"]
    out = tmp_path / "report.json"
    assert before_after.main([*words, *options, "--data.validation_samples=24", "--json", str(out)]) == 0
    found = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["conditions"]["clean"]["mi"] is None
    assert found["conditions"]["sgt"]["nn_fr"] == 0
    assert found["caution"].startswith("Nearest neighbour")
    assert "this SGT" in capsys.readouterr().out
