"""The paper's tables beside results of our own."""

from __future__ import annotations

import re

from benchmarks.tables import markdown
from sgt_titan.evaluation.studies import published
from tests.unit.evaluation.made_up import e, parsed, results


def test_published_tables_are_the_papers(tmp_path):
    rows = {"mi_abs_cos_norm": results(), "cos_sim": results(0.9)}
    text = published.markdown(rows, {"mi": results()}, {"command": "sgt-titan tables"})
    lines = [line for line in text.splitlines() if line.startswith("| mi_abs_cos_norm | paper")]
    assert "| -1.97 | 93.00 | 93.00 | 90.42 | 88.15 | 91.90 | 1.11 | 12.69 |" in lines[0]
    assert "| 86.77 | 86.66 | 46.98 | 47.04 |" in lines[1]
    assert text.count("| here |") == 3 and "80.0% [78.0, 82.0] | learned inverter" in text
    assert "unreadable" in text and "Figure 4" in text and "300" in text
    tables = published.tables(rows, {"mi": results()})
    assert [table["title"] for table in tables] == ["Table I", "Table III", "Figure 4, constant noise"]
    assert all(markdown(table) in re.sub(" +", " ", text) for table in tables), "what a page of docs/ shows of it"
    parsed(published.page(rows, {"mi": results()}, {"command": "x"}))
    assert "Table III" in published.terminal(rows, {"mi": results()})
    assert "Table III" not in published.terminal(rows, {})


def test_a_benchmark_at_chance_shows_no_loss():
    scores = [1.0, 0.0, 0.0, 0.0] * 10
    guessing = {"piqa": {"accuracy": e(0.25, 0.15, 0.4, 40), "chance": 0.25, "scores": scores}}
    real = {"piqa": {"accuracy": e(0.75, 0.6, 0.9, 40), "chance": 0.25, "scores": [1.0 - s for s in scores]}}
    assert published._utility(guessing, guessing) == "chance"
    assert published._utility(real, guessing).startswith("-50.00")
    assert published._utility(None, guessing) == published._utility(real, None) == "-"
