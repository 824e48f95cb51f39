"""Going on: bit for bit on the same ranks, after damage, after being killed, on a full disk, in a wrong directory."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import launch
from sgt_titan import checkpoint
from sgt_titan.cluster import status

pytestmark = pytest.mark.distributed

# 6 steps with a checkpoint at every other one.
SHORT = (
    *("--training.steps", "6", "--checkpoint.interval", "2", "--metrics.probe_every", "0"),
    *("--run.deterministic", "true"),
)


def committed(output_dir: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_steps(output_dir) if checkpoint.is_committed(path)]


def assert_same_tensors(a: Path, b: Path) -> None:
    """Bit for bit: weights, moments and the random state."""
    first, second = checkpoint.read_tensors(a), checkpoint.read_tensors(b)
    assert first.keys() == second.keys()
    assert any(name.startswith("optimizer.") for name in first) and any(name.startswith("sgt.") for name in first)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def one_line(outcome: launch.Outcome) -> str:
    """What rank 0 told the user: exactly one line of the program's own, and no traceback."""
    lines = [line for line in outcome.errors[0].splitlines() if line.startswith("sgt-titan: ")]
    assert len(lines) == 1, outcome.errors[0]
    assert "Traceback" not in outcome.errors[0], outcome.errors[0]
    return lines[0]


@pytest.fixture(scope="module")
def finished(small):
    """A run of one process with checkpoints of steps 2, 4 and 6."""
    run = small.finish(1, *SHORT)
    assert committed(run.output_dir) == [6, 4, 2]
    return run


@pytest.fixture
def copy(finished, tmp_path):
    """A folder with a copy of that run to be harmed."""
    shutil.copytree(finished.output_dir, tmp_path / "out", ignore=shutil.ignore_patterns("tb"))
    return tmp_path


# -- the same ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_is_bit_exact(ranks, small):
    """10 steps, and the same run from its checkpoint of step 5: every number of steps 6 to 10 and every tensor."""
    options = ("--training.local_batch_size", "2", "--checkpoint.interval", "5", "--run.deterministic", "true")
    whole = small.finish(ranks, *options)
    folder = small.new_folder()
    launch.copy_until(whole.output_dir, 5, folder / "out")
    resumed = small.finish(ranks, *options, folder=folder)
    expected, found = whole.scalars, resumed.scalars
    assert sorted(found) == [6, 7, 8, 9, 10]
    for step, values in found.items():
        compared = {tag for tag in expected[step] if not tag.startswith(("throughput/", "memory/"))}
        assert len(compared) >= 14
        assert {tag: values[tag] for tag in compared} == {tag: expected[step][tag] for tag in compared}, step
    final = [checkpoint.step_dir(run.output_dir, 10) for run in (whole, resumed)]
    assert_same_tensors(*final)
    states = [checkpoint.read_state(path) for path in final]
    for key in ("step", "train_state", "data", "lr_scheduler", "metrics", "probe", "fingerprints"):
        assert states[0][key] == states[1][key], key


def test_a_mixture_goes_on_as_it_would_have(small, tmp_path):
    """Into its second epoch; with another weight it is another run, and the key says so."""
    config = json.loads(small.config.read_text())
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"the dog {i} sat on the mat"}) + "\n" for i in range(8)))
    config["data"]["sources"] = {
        "chats": {"source": config["data"].pop("source"), "max_samples": 12, "weight": 1},
        "text": {"source": str(text), "prompt_tokens": 4, "weight": 2},
    }
    (tmp_path / "mixed.yaml").write_text(json.dumps(config))
    mixed = dataclasses.replace(small, config=tmp_path / "mixed.yaml")
    options = (*SHORT, "--checkpoint.interval", "3")
    whole = mixed.finish(1, *options)
    mixture = json.loads((whole.output_dir / "run.json").read_text())["mixture"]
    assert {name: about["weight"] for name, about in mixture.items()} == {"chats": 1.0, "text": 2.0}
    assert sum(about["samples"] for about in mixture.values()) < 6 * 4, "or no second epoch is begun"
    folder = small.new_folder()
    launch.copy_until(whole.output_dir, 3, folder / "out")
    _, outcome = mixed.run(1, *options, "--data.sources.text.weight", "1", folder=folder)
    assert outcome.codes == [2] and "data.sources.text.weight: 2.0 -> 1.0" in one_line(outcome)
    resumed = mixed.finish(1, *options, folder=folder)
    assert sorted(resumed.scalars) == [4, 5, 6]
    assert_same_tensors(*(checkpoint.step_dir(run.output_dir, 6) for run in (whole, resumed)))


# -- damage -----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def change_state(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"step": 7}))


def lose_a_file(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def truncate_marker(path: Path) -> None:
    os.truncate(path / "COMMITTED", 20)


def lose_the_marker(path: Path) -> None:
    (path / "COMMITTED").unlink()


DAMAGE = {
    truncate: "committed with",
    lose_a_file: "missing",
    change_state: "state.json",
    truncate_marker: "COMMITTED: unreadable",
    lose_the_marker: "no commit marker",
}


@pytest.mark.parametrize("harm", DAMAGE)
def test_a_damaged_newest_checkpoint_is_reported_and_made_anew(harm, copy, finished, small):
    """The one before it is used, and the step that was damaged is saved again: the same bits as before."""
    newest = checkpoint.step_dir(copy / "out", 6)
    harm(newest)
    run = small.finish(1, *SHORT, folder=copy)
    output = run.outcome.output[0]
    assert DAMAGE[harm] in output and str(newest) in output
    assert "Resumed from" in output and "step-00000004" in output
    assert checkpoint.problems(newest) == []
    assert_same_tensors(newest, checkpoint.step_dir(finished.output_dir, 6))


def test_a_flipped_bit_found_by_one_rank_alone(copy, small):
    """Each rank sums up some of the files; all of them must turn away from the directory."""
    flip_a_bit(checkpoint.step_dir(copy / "out", 6))
    run = small.finish(
        2,
        *SHORT,
        "--training.steps",
        "7",
        "--training.local_batch_size",
        "2",
        folder=copy,
        hooks=(launch.record_samples,),
    )
    assert "checksum differs" in run.outcome.output[0]
    assert sorted(launch.samples(copy)) == [5, 6, 7]
    assert checkpoint.problems(checkpoint.step_dir(copy / "out", 6)) == []


def test_a_directory_without_marker_is_ignored(copy, small):
    shutil.copytree(checkpoint.step_dir(copy / "out", 6), checkpoint.step_dir(copy / "out", 9))
    lose_the_marker(checkpoint.step_dir(copy / "out", 9))
    run = small.finish(1, *SHORT, "--training.steps", "7", folder=copy)
    output = run.outcome.output[0]
    assert "step-00000009: no commit marker" in output
    assert "Resumed from" in output and "step-00000006" in output
    assert committed(copy / "out")[0] == 7


def test_no_fresh_start_over_damaged_checkpoints(copy, small):
    """Hours of training may be recoverable from a backup; starting over is for the user to decide."""
    for step in (2, 4, 6):
        truncate(checkpoint.step_dir(copy / "out", step))
    before = launch.snapshot(copy / "out" / "checkpoints")
    _, outcome = small.run(1, *SHORT, folder=copy)
    assert outcome.codes == [2]
    line = one_line(outcome)
    assert (
        "step-00000006" in line and "every committed checkpoint is damaged" in line and "to start from step 0" in line
    )
    assert launch.snapshot(copy / "out" / "checkpoints") == before


# -- whose directory, and how far -------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_writes_nothing(finished, small):
    before = launch.snapshot(finished.output_dir)
    _, outcome = small.run(2, *SHORT, "--training.local_batch_size", "2", folder=finished.folder)
    assert outcome.codes == [0, 0]
    assert "already trained to step 6 of 6; nothing to do" in outcome.output[0]
    assert launch.snapshot(finished.output_dir) == before


def test_a_run_that_ended_before_its_export_is_finished_by_the_next_start(copy, small):
    """Killed after the last save; without this a batch script would start it again until it may not any more."""
    status.write(copy / "out", "running", attempt="slurm-7.0", step=0)
    words = ("--training.local_batch_size", "2", "--export.at_end", "true")
    _, outcome = small.run(2, *SHORT, *words, folder=copy)
    assert outcome.codes == [0, 0]
    assert status.read(copy / "out")["state"] == "finished" and (copy / "out" / "export" / "config.json").is_file()


def other_trunk(small_config: Path, folder: Path) -> tuple[str, ...]:
    source = Path(json.loads(small_config.read_text())["trunk"]["path"])
    target = shutil.copytree(source, folder / "other-trunk")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return "--trunk.path", str(target)


def other_data(small_config: Path, folder: Path) -> tuple[str, ...]:
    rows = Path(json.loads(small_config.read_text())["data"]["source"]).read_text().splitlines(keepends=True)
    (folder / "other.jsonl").write_text("".join(rows[1:]))
    return "--data.source", str(folder / "other.jsonl")


def other_objective(small_config: Path, folder: Path) -> tuple[str, ...]:
    return "--objective.abs_cos.weight", "2"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_trunk, "trunk fingerprint"),
        (other_data, "data fingerprint"),
        (other_objective, "objective.abs_cos.weight: 1.0 -> 2.0"),
    ],
)
def test_another_run_in_the_directory(change, named, copy, small):
    """An error that names the difference and the flag; with the flag the run goes on."""
    words = (*SHORT, "--training.steps", "7", *change(small.config, copy))
    before = launch.snapshot(copy / "out")
    _, outcome = small.run(1, *words, folder=copy)
    assert outcome.codes == [2]
    line = one_line(outcome)
    assert named in line and "--checkpoint.accept_changes true" in line and str(copy / "out") in line
    assert launch.snapshot(copy / "out") == before
    run = small.finish(1, *words, "--checkpoint.accept_changes", "true", folder=copy)
    assert "step-00000006" in run.outcome.output[0] and committed(copy / "out")[0] == 7


@pytest.mark.parametrize("change", ["--estimator.layers=2", "--estimator.body=separate"])
def test_weights_of_other_shapes_cannot_be_accepted(change, copy, small):
    before = (copy / "out" / "config.yaml").read_text()
    _, outcome = small.run(1, *SHORT, "--training.steps", "7", change, "--checkpoint.accept_changes", folder=copy)
    assert outcome.codes == [2]
    assert re.search(r"step-00000006: holds sgt\.bodies\S+ as not at all, this run as \(", one_line(outcome))
    assert (copy / "out" / "config.yaml").read_text() == before
    small.finish(1, *SHORT, "--training.steps", "7", folder=copy)


def test_changes_may_be_accepted_though_the_newest_checkpoint_is_damaged(copy, small):
    file = next(checkpoint.step_dir(copy / "out", 6).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])  # the end of its header is missing
    words = (*SHORT, "--training.steps", "5", "--optimizer.lr", "2e-3", "--checkpoint.accept_changes", "true")
    run = small.finish(1, *words, "--export.at_end", "true", folder=copy)
    assert "step-00000004" in run.outcome.output[0] and committed(copy / "out")[:2] == [6, 5]
    assert (copy / "out" / "export" / "config.json").is_file()  # of step 5, though 6 is newer


def test_a_directory_of_somebody_else(tmp_path, small):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    _, outcome = small.run(1, *SHORT, folder=tmp_path)
    assert outcome.codes == [2] and "thesis.tex" in one_line(outcome)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


# -- interrupted saves ------------------------------------------------------------------------------------------------


def test_killed_in_the_middle_of_a_save(small, tmp_path):
    """All ranks die between the tensors and the marker; the next start uses the checkpoint before."""
    options = (*SHORT, "--training.local_batch_size", "2")
    words = small.words(tmp_path, *options)
    job = launch.start(2, words, tmp_path, hooks=(launch.no_nap, launch.slow_commit))
    partial, before = (checkpoint.step_dir(tmp_path / "out", step) for step in (4, 2))
    deadline = time.monotonic() + 90
    while not list(partial.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.kill()
    assert set(job.wait().codes) == {-9}
    assert list(partial.glob("*.safetensors")) and not checkpoint.is_committed(partial)
    assert checkpoint.problems(before) == []

    run = small.finish(2, *options, folder=tmp_path, hooks=(launch.record_samples,))
    output = run.outcome.output[0]
    assert f"{partial}: no commit marker" in output and f"Resumed from {before}" in output
    assert sorted(launch.samples(tmp_path)) == [3, 4, 5, 6]
    assert committed(tmp_path / "out") == [6, 4, 2]


def no_space(rank: int, folder: Path) -> None:
    """Rank 1 finds the disk full while it writes the shard of step 4."""
    from sgt_titan.titan.checkpoint import HuggingFaceStorageWriter

    original = HuggingFaceStorageWriter.write_data

    def write_data(self, plan, planner):
        if rank == 1 and "step-00000004" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device", str(self.path))
        return original(self, plan, planner)

    HuggingFaceStorageWriter.write_data = write_data


def assert_kept_step_2_and_goes_on(outcome: launch.Outcome, folder: Path, small, options) -> None:
    assert outcome.codes == [2, 2], "\n".join(outcome.output)[-4000:]
    line = one_line(outcome)
    assert "no space left to save step 4" in line and "kept step-00000002" in line
    assert not checkpoint.step_dir(folder / "out", 4).exists()
    assert checkpoint.problems(checkpoint.step_dir(folder / "out", 2)) == []
    run = small.finish(2, *options, folder=folder)
    assert "Resumed from" in run.outcome.output[0] and "step-00000002" in run.outcome.output[0]
    assert committed(folder / "out") == [6, 4, 2]


def test_disk_full_on_one_rank(small, tmp_path):
    options = (*SHORT, "--training.local_batch_size", "2")
    _, outcome = small.run(2, *options, folder=tmp_path, hooks=(no_space,))
    assert_kept_step_2_and_goes_on(outcome, tmp_path, small, options)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("left", [0, 600_000])
def test_disk_full_for_real(left, small, small_disk):
    """Somebody else fills the disk after the check of the free space: before the first file, and amid the shards."""
    # Waiting for the save, since what training goes on to log would go to the same full disk.
    options = (*SHORT, "--training.local_batch_size", "2", "--checkpoint.asynchronous", "false")
    _, outcome = small.run(2, *options, folder=small_disk, hooks=(launch.FillDisk(step=4, left=left),))
    (small_disk / "filler").unlink()
    assert_kept_step_2_and_goes_on(outcome, small_disk, small, options)


def test_disk_full_before_the_save(small, small_disk):
    """Found by the check of the free space, before anything is written."""
    # Waiting for the save, since what training goes on to log would go to the same full disk.
    options = (*SHORT, "--training.local_batch_size", "2", "--checkpoint.asynchronous", "false")
    filler = launch.FillDisk(step=4, left=300_000, before_check=True)
    _, outcome = small.run(2, *options, folder=small_disk, hooks=(filler,))
    (small_disk / "filler").unlink()
    assert_kept_step_2_and_goes_on(outcome, small_disk, small, options)
