"""The real launchers in processes of their own: the command, torchrun, torchtitan's; what they exit with and print."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import launch
from sgt_titan import checkpoint

pytestmark = pytest.mark.distributed


def python(*words: str, cwd: Path, timeout: float = 150) -> subprocess.CompletedProcess:
    removed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in removed}
    env |= {"PYTHONPATH": str(launch.ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, cwd=cwd, timeout=timeout)


def test_the_command_trains_the_shipped_trunk(small, tmp_path):
    """`sgt-titan train NAME --nproc 2` from a folder of its own, to an export."""
    options = ("--trunk.path", "demo", "--training.steps", "2", "--training.local_batch_size", "2")
    words = (*small.words(tmp_path, *options), "--export.at_end", "true", "--nproc", "2")
    done = python("-m", "sgt_titan.cli", "train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert checkpoint.read_state(checkpoint.latest_committed(tmp_path / "out"))["world_size"] == 2
    assert sorted(launch.scalars(tmp_path / "out")) == [1, 2]
    assert (tmp_path / "out" / "export" / "model.safetensors").is_file()


def test_torchtitans_own_launcher_and_flags(small, tmp_path):
    """Its flags win over the file's; the run is the one that our own command with these options makes."""
    (tmp_path / "train_configs").mkdir()
    config = yaml.safe_load(small.config.read_text())
    config["training"]["local_batch_size"] = 2
    (tmp_path / "train_configs" / "here.yaml").write_text(yaml.safe_dump(config))
    flags = (
        *("--training.steps", "4", "--training.local_batch_size", "1", "--lr_scheduler.warmup_steps", "1"),
        *("--debug.seed", "3", "--checkpoint.interval", "2", "--dump_folder", str(tmp_path / "theirs" / "out")),
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    launcher = ("-m", "torchtitan.train", "--module", "sgt_titan", "--config", "here")
    done = python(*torchrun, *launcher, *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    theirs = tmp_path / "theirs" / "out"
    assert [checkpoint.step_of(path) for path in checkpoint.list_steps(theirs)] == [4, 2]
    config = yaml.safe_load((theirs / "config.yaml").read_text())
    assert (config["training"]["steps"], config["training"]["local_batch_size"]) == (4, 1)
    assert (config["run"]["seed"], config["lr_scheduler"]["warmup_steps"]) == (3, 1)

    before = launch.snapshot(theirs / "checkpoints"), (theirs / "config.yaml").read_text()
    done = python(*torchrun, *launcher, *flags, "--training.seq_len", "1024", cwd=tmp_path)
    assert done.returncode != 0
    assert "training.seq_len 1024 exceeds the trunk's max_position_embeddings 512" in done.stderr
    assert (launch.snapshot(theirs / "checkpoints"), (theirs / "config.yaml").read_text()) == before

    ours = small.finish(
        2,
        *("--training.steps", "4", "--training.local_batch_size", "1"),
        *("--lr_scheduler.warmup_steps", "1", "--run.seed", "3"),
    )
    expected, found = ours.scalars, launch.scalars(theirs)
    for step in (1, 2, 3, 4):
        for tag in ("loss/total", "utility/kl_nats", "optimizer/grad_norm"):
            assert found[step][tag] == pytest.approx(expected[step][tag], rel=1e-4), (step, tag)


def test_torchrun_tells_bad_input_once(small, tmp_path):
    """What only a rank can find: every rank fails, one of them says why, and none of them waits for another."""
    words = small.words(tmp_path, "--parallelism.tensor_parallel_degree", "3")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "sgt_titan.train")
    done = python(*torchrun, *words, cwd=tmp_path)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("sgt-titan: error: ")]
    assert lines == ["sgt-titan: error: parallelism: replicate 1 x tensor 3 = 3 does not divide the world size 2"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--nproc", "2", "--parallelism.data_parallel_shard_degree", "3"), "but the world size is 2"),
        (
            ("--nproc", "3", "--parallelism.tensor_parallel_degree", "3"),
            "tensor_parallel_degree 3 does not divide the trunk's num_attention_heads 4",
        ),
        (("--training.seq_len", "1024"), "training.seq_len 1024 exceeds the trunk's max_position_embeddings 512"),
        (("--training.global_batch_size", "6"), "training.global_batch_size 6 is not a multiple of"),
    ],
)
def test_bad_input_ends_with_one_line_and_no_directory(options, message, small, tmp_path):
    done = python("-m", "sgt_titan.cli", "train", *small.words(tmp_path, *options), cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("sgt-titan: error: ")
    assert message in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []
