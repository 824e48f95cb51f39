"""Recomputation and compilation trade memory for time and change no number."""

from __future__ import annotations

import pytest
import torch

from sgt_titan.titan.dataloader import microbatch_inputs
from sgt_titan.titan.layout import local
from sgt_titan.titan.tasks import to_trainer_config


def loss_and_gradients(make_run, *options):
    """Of the first microbatch of a run, and how many tensors the layers kept for the backward pass."""
    config = to_trainer_config(make_run("--estimator.std_init=0.5", "--training.loss_chunk_tokens=7", *options))
    config.compile.backend = "aot_eager"  # traces as inductor does and generates no code
    trainer = config.build()
    trainer.step = 1
    model = trainer.model_parts[0]
    batch = microbatch_inputs(trainer.prepared.train_source, 0, [0, 1])
    kept = 0

    def pack(tensor):
        nonlocal kept
        kept += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _, loss, _ = trainer.evaluate_streams(batch["input"], batch)
    loss.backward()
    gradients = torch.cat([local(p.grad).flatten() for p in model.estimator.parameters()])
    trainer.close()
    torch._dynamo.reset()
    return loss.item(), gradients, kept


@pytest.fixture(scope="module")
def plain(make_run, one_process):
    return loss_and_gradients(make_run)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputation(mode, plain, make_run):
    loss, gradients, kept = loss_and_gradients(make_run, f"--activation_checkpoint.mode={mode}")
    assert loss == plain[0]
    torch.testing.assert_close(gradients, plain[1], rtol=1e-6, atol=1e-9)
    assert kept < plain[2]


def test_every_block_compiles_whole_and_stays_the_same(plain, make_run):
    loss, gradients, _ = loss_and_gradients(make_run, "--compile.enable=true", "--activation_checkpoint.mode=full")
    assert loss == pytest.approx(plain[0], rel=1e-6)
    torch.testing.assert_close(gradients, plain[1], rtol=1e-4, atol=1e-7)
