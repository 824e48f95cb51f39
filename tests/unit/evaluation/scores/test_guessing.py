"""What is guessed without looking: once for all evaluations of the same prompts, and for no others."""

from __future__ import annotations

import pytest
import torch

from sgt_titan.evaluation.scores import guessing
from tests.unit.evaluation.worlds import random_rows

ROWS, CORPUS, TABLE = random_rows(2, 6, 30, 0), random_rows(5, 6, 30, 1), torch.randn(30, 4)
EFFORT = {"first": 2, "most": 4}


@pytest.mark.parametrize(
    "other",
    [
        {"prompts": random_rows(2, 6, 30, 9)},
        {"prompts": random_rows(2, 6, 30, 0, clean=2)},  # the same tokens, fewer of them hidden
        {"corpus": CORPUS[:-1]},
        {"table_VD": TABLE + 1e-3},
        {"effort": EFFORT | {"most": 8}},
        {"prompts": [row._replace(answer=row.ids[:1]) for row in ROWS], "answered": True},
    ],
)
def test_what_decides_it_names_the_file(tmp_path, other):
    mine = {"prompts": ROWS, "corpus": CORPUS, "table_VD": TABLE, "effort": EFFORT}
    assert guessing.location(tmp_path, **mine) != guessing.location(tmp_path, **mine | other)


def test_what_is_guessed_without_the_answers_does_not_depend_on_them(tmp_path):
    rows = [row._replace(answer=row.ids[:1]) for row in ROWS]
    known = guessing.location(tmp_path, ROWS, CORPUS, TABLE, EFFORT)
    assert guessing.location(tmp_path, rows, CORPUS, TABLE, EFFORT) == known
    assert guessing.location(tmp_path, rows, CORPUS, TABLE, EFFORT, answered=True) != known
