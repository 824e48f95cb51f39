"""One way in for every command: overrides anywhere among its words, and a config checked, cheap things first."""

from __future__ import annotations

import pytest

from sgt_titan import cli
from sgt_titan.arguments import Parser
from sgt_titan.config.door import read_config, split_words
from sgt_titan.errors import UserError


@pytest.fixture
def parser():
    found = Parser(prog="x", allow_abbrev=False)
    found.add_argument("name")
    found.add_argument("--gpu")
    found.add_argument("--json", action="store_true")
    found.add_argument("--nodes", nargs="+")
    return found


@pytest.mark.parametrize(
    ("words", "own", "overrides"),
    [
        ("demo --training.seq_len 64", {}, ["--training.seq_len", "64"]),
        ("--training.seq_len 64 demo", {}, ["--training.seq_len", "64"]),
        ("--training.seq_len=64 demo", {}, ["--training.seq_len=64"]),
        ("--gpu a100 --metrics.wandb demo", {"gpu": "a100"}, ["--metrics.wandb"]),
        ("--metrics.wandb true --json demo", {"json": True}, ["--metrics.wandb", "true"]),
        ("--gpu=a100 demo --nodes a b --run.seed 1", {"gpu": "a100", "nodes": ["a", "b"]}, ["--run.seed", "1"]),
    ],
)
def test_overrides_stand_anywhere(words, own, overrides, parser):
    arguments, found = split_words(parser, words.split())
    assert arguments.name == "demo" and found == overrides
    assert {key: value for key, value in vars(arguments).items() if value and key != "name"} == own


def test_an_override_that_is_wrong_is_told_before_anything(parser):
    with pytest.raises(UserError, match=r"unknown option --training\.sequence; did you mean"):
        split_words(parser, ["--training.sequence", "64", "demo"])


@pytest.mark.parametrize("command", ["plan", "doctor", "tables", "train", "prepare"])
def test_every_command_reads_an_override_before_the_name(command, capsys):
    """It once planned a config named 64."""
    assert cli.main([command, "--training.seq_len", "64", "no-such-config"]) == 2
    assert "no config or file named no-such-config" in capsys.readouterr().err
    assert cli.main([command, "--training.seq_len", "1", "demo"]) == 2
    assert "training.seq_len must be at least 2, got 1" in capsys.readouterr().err


def test_environment_variables_in_a_run_s_name(monkeypatch):
    """An array's tasks differ in nothing else."""
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    config, _ = read_config("demo", ["--run.name", "sweep-${SLURM_ARRAY_TASK_ID}"], shared="/runs")
    assert (config.run.name, config.run.output_dir) == ("sweep-3", "/runs/sweep-3")
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    with pytest.raises(UserError, match=r"run\.name: environment variable SLURM_ARRAY_TASK_ID is not set"):
        read_config("demo", ["--run.name", "sweep-${SLURM_ARRAY_TASK_ID}"])
    for name in ("../x", "a/b", "..", "", "~x"):
        with pytest.raises(UserError, match=r"run\.name must be a name"):
            read_config("demo", [f"--run.name={name}"])
