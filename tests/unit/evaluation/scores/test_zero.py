"""The constant prompt that ``kept`` counts from: it sees no prompt, beats other constants, and is fitted once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError
from sgt_titan.evaluation.scores import zero
from sgt_titan.evaluation.scores.zero import Zero
from sgt_titan.evaluation.world.samples import Sample, padded
from tests.unit.evaluation.worlds import tiny_trunk

CPU = torch.device("cpu")


def rows(count: int, seed: int = 0, length: int = 14, start: int = 9) -> list[Sample]:
    """One clean token, a hidden prompt, a response of which the last tokens are scored."""
    random, at = np.random.default_rng(seed), np.arange(length)
    return [Sample(random.integers(0, 300, length), (at > 0) & (at < start), at >= start) for _ in range(count)]


@pytest.fixture(scope="module")
def trunk(trunk_dir):
    return tiny_trunk(trunk_dir)


@pytest.fixture(scope="module")
def fitted(trunk):
    return zero.fit(trunk, rows(32), 50)


def loss(trunk, found: Zero) -> float:
    batch = padded(rows(16, seed=7), 0, CPU)
    parts = found.shared_D, found.front_PD, found.back_PD
    with torch.no_grad():
        return zero._cross_entropy(trunk, batch, parts).mean().item()


def test_it_stands_where_the_prompt_is_hidden_and_knows_positions_alone():
    front_PD, back_PD = torch.arange(12.0)[:, None] * 10, torch.arange(12.0)[:, None] * 1000
    found = Zero(torch.tensor([0.5]), front_PD, back_PD, 1, False)
    flags = np.zeros(6, dtype=bool)
    short = Sample(np.arange(5), np.array([0, 1, 1, 0, 1], dtype=bool), np.array([0, 0, 0, 1, 1], dtype=bool))
    plain = Sample(np.arange(6), flags | [False, True, False, False, False, False], flags)
    batch = padded([short, plain], 0, CPU)
    x_BTD = torch.full((2, 6, 1), -1.0)
    # The response starts at 3 and stays clean, also where it is obfuscated; without one the row's end counts.
    assert found.place(batch, x_BTD)[..., 0].tolist() == [
        [-1, 0.5 + 10 + 2000, 0.5 + 20 + 1000, -1, -1, -1],
        [-1, 0.5 + 10 + 5000, -1, -1, -1, -1],
    ]
    other = batch._replace(tokens_BT=batch.tokens_BT + 100)
    assert torch.equal(found.place(other, x_BTD), found.place(batch, x_BTD))
    longer = padded([Sample(np.arange(40), np.arange(40) < 30, np.arange(40) >= 30)], 0, CPU)
    assert found.place(longer, torch.zeros(1, 40, 1)).isfinite().all()


def test_it_beats_the_constants_that_nobody_fitted(trunk, fitted):
    table_VD, (P, D) = trunk.get_input_embeddings().weight, fitted.front_PD.shape
    nothing_PD = torch.zeros(P, D)
    for start_D in (table_VD.mean(0), torch.zeros(D), table_VD[5]):
        assert loss(trunk, fitted) < loss(trunk, Zero(start_D, nothing_PD, nothing_PD, 0, False))
    assert len(fitted.aside) == 50 // zero.EVERY and fitted.steps == 50


def test_it_is_a_function_of_its_input_and_goes_on(trunk, fitted):
    again = zero.fit(trunk, rows(32), 50)
    assert torch.equal(again.shared_D, fitted.shared_D) and again.aside == fitted.aside
    further = zero.fit(trunk, rows(32), 75, begin=fitted)
    assert further.steps == 75 and further.aside[:2] == fitted.aside and len(further.aside) == 3
    assert zero.fit(trunk, rows(32), 10, begin=fitted) is fitted


def test_it_stops_when_it_stands_still(trunk, monkeypatch):
    monkeypatch.setattr(zero, "TOLERANCE", 10.0)
    monkeypatch.setattr(zero, "EVERY", 1)
    found = zero.fit(trunk, rows(32), 1000)
    # The first look sets the mark; then two a cut, and two more to be sure.
    assert found.settled and found.steps == 1 + 2 * (zero.CUTS + 1) and found.done(10**6)
    assert "settled" in found.note() and "NOT" not in found.note()


def test_what_has_not_settled_says_so(fitted):
    assert not fitted.settled and "50 steps, NOT settled" in fitted.note()
    assert fitted.done(50) and not fitted.done(51)


def test_it_is_fitted_once_for_a_trunk_and_data(trunk, tmp_path, monkeypatch):
    config = Config()
    config.data.cache_dir = str(tmp_path)
    calls = []
    real = zero.fit

    def fit(trunk, rows, steps, **options):
        calls.append((steps, options["begin"].steps if options["begin"] else 0))
        return real(trunk, rows, steps, **options)

    monkeypatch.setattr(zero, "fit", fit)

    def ask(steps: int, data: str = "d") -> Zero:
        return zero.fitted(config, trunk, rows(8), trunk_fingerprint="t", data_fingerprint=data, steps=steps)

    first, second = ask(3), ask(2)
    assert calls == [(3, 0)] and torch.equal(first.back_PD, second.back_PD) and second.aside == first.aside
    assert ask(5).steps == 5 and calls[1:] == [(5, 3)]
    ask(2, data="other")
    config.data.obfuscate = "all" if config.data.obfuscate != "all" else "prompt"
    ask(2)
    assert len(calls) == 4 and len(list(tmp_path.glob("zeros/*.safetensors"))) == 3
    for file in tmp_path.glob("zeros/*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    ask(2)
    assert calls[4:] == [(2, 0)] and not list(tmp_path.glob("zeros/.*"))


def test_a_cache_that_cannot_be_written_is_said(trunk, tmp_path):
    config = Config()
    (tmp_path / "zeros").write_text("in the way")
    config.data.cache_dir = str(tmp_path)
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write .*zeros"):
        zero.fitted(config, trunk, rows(8), trunk_fingerprint="t", data_fingerprint="d", steps=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--zero-steps", "0"], "--zero-steps must be at least 1, got 0"),
        (["--rows", "1"], "--rows must be at least 2, got 1"),
        (["--kept", "95,much"], "--kept: give percents"),
        (["--data.sourc", "x"], "data.sourc"),
    ],
)
def test_bad_input(words, message):
    with pytest.raises(UserError, match=message):
        zero.main(["demo", *words])


def test_the_command_counts_old_figures_anew(demo_config, capsys):
    options = ["--data.max_samples", "240", "--data.validation_samples", "24", "--training.seq_len", "192"]
    words = ["demo", "--rows", "8", "--zero-steps", "10", "--kept", "100,50", *options]
    assert zero.main([*words, "--data.cache_dir", demo_config.data.cache_dir]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].strip() == "100.0% is 100.0%"
    assert float(lines[-1].split()[-1].rstrip("%")) <= 50  # so short a fit may not beat zeroing
    assert "constant prompt fitted for" in lines[-3]
