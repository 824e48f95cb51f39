"""What is guessed without looking: once for all evaluations of the same prompts, and for no others."""

from __future__ import annotations

import pytest
import torch

from sgt_titan.errors import UserError
from sgt_titan.evaluation.scores import guessing
from sgt_titan.evaluation.world.threat import Curve, Guess
from tests.unit.evaluation.worlds import random_rows

ROWS, CORPUS, TABLE = random_rows(2, 6, 30, 0), random_rows(5, 6, 30, 1), torch.randn(30, 4)
EFFORT = {"first": 2, "most": 4}


def found(token: int) -> Guess:
    top_NK = torch.full((10, 3), token)
    curve = Curve("training steps", (0.0, 4.0), (top_NK[:, 0], top_NK[:, 0] + 1), (5.0, 4.0), "nats")
    return Guess(top_NK, curve, 1e9, ("converged",))


def test_the_second_evaluation_takes_what_the_first_found(tmp_path):
    file = guessing.location(tmp_path, ROWS, CORPUS, TABLE, EFFORT)
    first = guessing.once(file, lambda: found(3))
    second = guessing.once(file, lambda: pytest.fail("found twice"))
    assert torch.equal(first.top_NK, second.top_NK) and second.notes == ("converged",) and second.flops == 1e9
    assert second.curve.at == (0.0, 4.0) and second.curve.extra == (5.0, 4.0) and second.curve.extra_label == "nats"
    assert all(torch.equal(a, b) for a, b in zip(first.curve.top_N, second.curve.top_N, strict=True))


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


def test_a_damaged_file_is_found_again_and_a_cache_that_cannot_be_written_is_said(tmp_path):
    file = guessing.location(tmp_path, ROWS, CORPUS, TABLE, EFFORT)
    guessing.once(file, lambda: found(3))
    file.write_bytes(file.read_bytes()[:40])
    assert guessing.once(file, lambda: found(4)).top_NK[0, 0] == 4
    (tmp_path / "full").write_text("a file")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write"):
        guessing.once(tmp_path / "full" / "guesses" / "x.safetensors", lambda: found(3))
