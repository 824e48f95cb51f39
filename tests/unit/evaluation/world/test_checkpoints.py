"""What an attacker has trained is trained once: by this object, or by whoever finds its file."""

from __future__ import annotations

import pytest
import torch

from sgt_titan.errors import UserError
from sgt_titan.evaluation.world.checkpoints import in_files, in_memory
from sgt_titan.evaluation.world.threat import Curve, Guess

EFFORT = {"first": 2, "most": 4}


def found(token: int) -> Guess:
    top_NK = torch.full((10, 3), token)
    curve = Curve("training steps", (0.0, 4.0), (top_NK[:, 0], top_NK[:, 0] + 1), (5.0, 4.0), "nats")
    return Guess(top_NK, curve, 1e9, ("converged",), {"leave.weight": torch.full((2, 2), float(token))})


def test_in_memory_it_is_trained_once_for_an_effort():
    kept = in_memory()
    assert kept.once("a", EFFORT, lambda: found(3)) is kept.once("a", dict(EFFORT), lambda: pytest.fail("twice"))
    assert kept.once("a", EFFORT | {"most": 8}, lambda: found(4)).top_NK[0, 0] == 4
    assert kept.once("b", EFFORT, lambda: found(5)).top_NK[0, 0] == 5
    assert in_memory().once("a", EFFORT, lambda: found(6)).top_NK[0, 0] == 6


def test_another_process_finds_the_file_with_everything_in_it(tmp_path):
    def path(name, effort):
        return tmp_path / "networks" / f"{name}-{effort['most']}.safetensors"

    first = in_files(path).once("a", EFFORT, lambda: found(3))
    second = in_files(path).once("a", EFFORT, lambda: pytest.fail("trained twice"))
    assert torch.equal(first.top_NK, second.top_NK) and second.notes == ("converged",) and second.flops == 1e9
    assert second.curve.at == (0.0, 4.0) and second.curve.extra == (5.0, 4.0) and second.curve.extra_label == "nats"
    assert all(torch.equal(a, b) for a, b in zip(first.curve.top_N, second.curve.top_N, strict=True))
    assert second.weights.keys() == {"leave.weight"} and second.weights["leave.weight"].tolist() == [[3.0, 3.0]] * 2
    assert in_files(path).once("a", EFFORT | {"most": 8}, lambda: found(4)).top_NK[0, 0] == 4


def test_a_damaged_file_is_trained_again_and_a_folder_that_cannot_be_written_is_said(tmp_path):
    file = tmp_path / "a.safetensors"
    in_files(lambda *_: file).once("a", EFFORT, lambda: found(3))
    file.write_bytes(file.read_bytes()[:40])
    assert in_files(lambda *_: file).once("a", EFFORT, lambda: found(4)).top_NK[0, 0] == 4
    (tmp_path / "full").write_text("a file")
    kept = in_files(lambda *_: tmp_path / "full" / "networks" / "x.safetensors", "--out")
    with pytest.raises(UserError, match="--out: cannot write"):
        kept.once("a", EFFORT, lambda: found(3))
