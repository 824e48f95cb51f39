"""``run.task finetune``: data-parallel ranks train what one trains, a resumed run is the uninterrupted one."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

import launch
from sgt_titan import checkpoint, train
from sgt_titan.conjformer.command import convert

pytestmark = pytest.mark.distributed

TERMS = ("loss/total", "utility/kl_nats", "loss/drift", "optimizer/grad_norm")


@pytest.fixture(scope="module")
def options(demo_trunk, tmp_path_factory):
    """Overrides of a fine-tuning of the demo's first layers with scalar norms: 6 steps, saved at step 3."""
    plain = tmp_path_factory.mktemp("plain") / "mean"
    for file in demo_trunk.glob("tokenizer*"):
        assert file.is_file()
    assert convert([str(demo_trunk), str(plain), "--plain", "--norms", "mean"]) == 0
    return (
        *("--run.task", "finetune", "--trunk.path", str(plain), "--export.at_end", "true"),
        *("--finetune.teacher", str(demo_trunk), "--finetune.distil", "0.5", "--finetune.drift", "0.1"),
        *("--training.steps", "6", "--checkpoint.interval", "3", "--metrics.probe_every", "6"),
        *("--run.deterministic", "true"),
    )


@pytest.fixture(scope="module")
def two_ranks(small, options):
    return small.finish(2, *options, "--training.local_batch_size", "2")


def test_data_parallel_ranks_train_what_one_trains(small, options, two_ranks):
    one = small.finish(1, *options)
    assert sorted(one.scalars) == [1, 2, 3, 4, 5, 6]
    for step, values in one.scalars.items():
        for name in TERMS:
            assert math.isclose(values[name], two_ranks.scalars[step][name], rel_tol=1e-4), (step, name)
    losses = [one.scalars[step]["loss/total"] for step in range(1, 7)]
    assert losses[-1] < losses[0]
    a, b = (load_file(run.output_dir / "export" / "model.safetensors") for run in (one, two_ranks))
    assert a.keys() == b.keys() and "lm_head.weight" not in a
    for name, tensor in a.items():
        # AdamW moves a weight by its gradient's sign, and of the smallest gradients rounding decides that.
        far = (tensor - b[name]).abs()
        assert far.max() < 1e-3 and (far > 1e-4).double().mean() < 1e-4, name


def test_torchtitans_own_launcher_gets_all_that_a_run_needs(small, options):
    from sgt_titan.titan.tasks import to_trainer_config

    name, *words = small.words(small.new_folder(), *options, "--checkpoint.asynchronous", "false")
    config = to_trainer_config(train.prepared(name, words, 1))
    assert config.checkpoint.asynchronous is False
    config.prepared.timeline.mark("build")  # the trainer's first act


def test_a_resumed_run_is_the_uninterrupted_one(small, options, two_ranks):
    folder = small.new_folder()
    launch.copy_until(two_ranks.output_dir, 3, folder / "out")
    resumed = small.finish(2, *options, "--training.local_batch_size", "2", folder=folder)
    assert sorted(resumed.scalars) == [4, 5, 6]
    first, second = (checkpoint.read_tensors(checkpoint.step_dir(run.output_dir, 6)) for run in (two_ranks, resumed))
    assert first.keys() == second.keys() and any(name.startswith("optimizer.") for name in first)
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_norms_stay_scalar_and_the_result_is_rotated(small, options, two_ranks, tmp_path):
    weights = load_file(two_ranks.output_dir / "export" / "model.safetensors")
    for name, tensor in weights.items():
        if "norm" in name:
            assert tensor.max() == tensor.min(), name
    # The export is a trunk like any other: it converts, and answers as itself.
    from transformers import AutoModelForCausalLM

    from sgt_titan.conjformer.client import Client
    from sgt_titan.conjformer.secret import load

    plain = two_ranks.output_dir / "export"
    assert convert([str(plain), str(tmp_path / "s"), "--secret", str(tmp_path / "k")]) == 0
    client = Client.load(tmp_path / "s-client", load(tmp_path / "k"))
    tokens_BT = torch.arange(3, 40)[None]
    model, server = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (plain, tmp_path / "s"))
    with torch.no_grad():
        ours = client.decode(server(inputs_embeds=client.encode(tokens_BT)).logits)
        torch.testing.assert_close(ours, model(input_ids=tokens_BT).logits, atol=1e-4, rtol=0)


def test_what_drifted_does_not_pass_for_the_original(small, options, two_ranks):
    """Its export says so, and a further run refuses it as its teacher."""
    moved = two_ranks.output_dir / "export"
    folder, outcome = small.run(1, *options, "--finetune.teacher", str(moved))
    assert outcome.codes == [2] and "finetune.teacher" in outcome.errors[0] and "moved away" in outcome.errors[0]
    assert not (folder / "out" / "checkpoints").exists()


def test_gains_per_feature_are_refused(small, demo_trunk, options):
    folder, outcome = small.run(1, *options, "--trunk.path", str(demo_trunk))
    assert outcome.codes == [2] and "conjformer convert --plain" in outcome.errors[0]
    assert not (folder / "out" / "checkpoints").exists()
