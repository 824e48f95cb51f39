"""Every way of the benchmark makes a step, and the work it is said to do is that of the model it builds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import arms, drift, page
from benchmarks.tables import Tables
from sgt_titan.titan.flops import hardware_flops_per_token

SIZE = replace(arms.CPU, width=128, layers=2, hidden=256, vocab=500, length=16)


@pytest.mark.parametrize("path", sorted(Path(arms.__file__).parent.glob("*.py")), ids=lambda path: path.name)
def test_what_is_run_as_a_file_finds_its_neighbours(path):
    """`python benchmarks/NAME.py` has its own folder on the path, not the checkout."""
    lines = path.read_text(encoding="utf-8").split("\n")
    needs = [number for number, line in enumerate(lines) if line.startswith(("from benchmarks", "from tests"))]
    if 'if __name__ == "__main__":' in lines and needs:
        assert any(line.startswith("sys.path.insert(0, ") for line in lines[: needs[0]])


@pytest.mark.parametrize("name", [name for name in arms.ARMS if "compile" not in name])
def test_an_arm_makes_a_step(name, gloo):
    arm = arms.ARMS[name](SIZE)
    arm.step()
    assert arm.flops > 0


@pytest.mark.parametrize("float8", ["weights", "products"])
def test_float8_is_a_way_of_its_own(float8, gloo):
    model, *_ = arms.model_of(SIZE, chunk=8, recompute="none", compiled=False, float8=float8)
    types = {p.dtype for p in model.trunk.layers.parameters()}
    assert torch.float8_e4m3fn in types
    arms.ours(SIZE, chunk=8, float8=float8).step()


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_work_is_counted_as_the_model_counts_it(recompute, gloo):
    """Norms and biases, which the benchmark leaves out, are 1% here."""
    model, *_ = arms.model_of(SIZE, chunk=0, recompute=recompute, compiled=False, float8="none")
    full = recompute == "full"
    expected = hardware_flops_per_token(model, full_recompute=full) * SIZE.tokens
    assert arms.work(SIZE, recompute=full) == pytest.approx(expected, rel=0.02)


def test_the_frontier_of_drift_counts_the_better_attacker():
    """Whoever drifted a model of his own has the public one, too."""

    def read(value: float) -> dict:
        keys = (*drift.MATCHING, *drift.CIPHERS)
        return {key: {"top1": {"value": value}, "top10": {"value": 2 * value}} for key in keys}

    points = [
        {"share": None, "perplexity": 2.0, "public": read(0.4)},
        {"share": 0.5, "perplexity": 3.0, "public": read(0.1), "own": read(0.2)},
    ]
    tables = Tables("here")
    drift.reported(points, 2.0, tables)
    exact, drifted = tables.tables[0]["cells"]
    assert exact[:4] == ["none: the original", 2.0, 0.0, 0.4] and drifted[:4] == ["0.5", 3.0, 0.5, 0.2]
    assert drifted[-1] == 0.1  # a cipher asks nothing of his model
    assert tables.tables[1]["cells"][1][3] == 0.4
    assert drift.figure(points, 2.0).startswith("<svg")


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("bench-process-start", page.start),
        ("bench-process-compile", page.compiled),
        ("bench-process-memory", page.memory),
        ("bench-tokenizing-speed", page.tokens),
    ],
)
def test_the_page_reads_what_its_benchmarks_write(name, ratios):
    """The tables of docs/results, which the same commands wrote."""
    file = Path(arms.__file__).parents[1] / "docs" / "results" / f"{name}.json"
    (table,) = json.loads(file.read_text(encoding="utf-8"))["tables"]
    found = list(ratios({row[0]: row[1:] for row in table["cells"]}))
    assert len(found) >= 2 and all(0 < ratio < 100 for _, ratio, _ in found)
