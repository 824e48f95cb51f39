"""Both streams in one pass: what is kept of them, and that they are two forwards of the same layers."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from sgt_titan.titan.dataloader import microbatch_inputs
from sgt_titan.titan.model import DualStream
from sgt_titan.titan.tasks import to_trainer_config


@pytest.fixture(scope="module", params=["none", "full"])
def trainer(request, make_run, one_process):
    options = (f"--activation_checkpoint.mode={request.param}", "--estimator.std_init=0.5")
    trainer = to_trainer_config(make_run(*options, trunk="llama")).build()
    trainer.step = 1
    yield trainer
    trainer.close()


def forward(trainer):
    batch = microbatch_inputs(trainer.prepared.train_source, 0, [0, 1])
    return trainer.evaluate_streams(batch["input"], batch)


def duals(trainer):
    return [module for module in trainer.model_parts[0].modules() if isinstance(module, DualStream)]


def watch(modules, hook):
    handles = [module.register_forward_hook(hook) for module in modules]
    return lambda: [handle.remove() for handle in handles]


def test_the_teacher_leaves_nothing_behind(trainer):
    """No graph, and no more than two layers' outputs alive at a time: the one that is read and the one written."""
    alive: list[weakref.ref] = []
    most = 0

    def hook(module, inputs, outputs):
        nonlocal most
        assert not outputs[0].requires_grad and outputs[1].requires_grad
        alive.append(weakref.ref(outputs[0].untyped_storage()))
        most = max(most, sum(reference() is not None for reference in alive))

    stop = watch(duals(trainer), hook)
    result = forward(trainer)
    stop()
    assert len(alive) == 4  # three layers and the norm
    assert most == 2
    assert not any(reference() is not None for reference in alive)
    del result


def test_the_student_alone_is_recomputed(trainer):
    """A layer's block runs for the teacher, for the student, and again in the backward pass under recomputation."""
    calls = []
    blocks = [getattr(d.block, "_checkpoint_wrapped_module", d.block) for d in duals(trainer)]
    recomputed = blocks[0] is not duals(trainer)[0].block
    handles = [
        block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled())) for block in blocks[:3]
    ]
    _, loss, _ = forward(trainer)
    assert calls == [False, True] * 3
    loss.backward()
    assert calls[6:] == ([True] * 3 if recomputed else [])
    for handle in handles:
        handle.remove()


def test_one_call_is_two_forwards(trainer):
    """Layer by layer, bit by bit."""
    seen = []
    stop = watch(duals(trainer), lambda module, inputs, outputs: seen.append((module, inputs, outputs)))
    with torch.no_grad():
        forward(trainer)
        stop()
        for module, (teacher, student, *rest), (teacher_out, student_out) in seen:
            assert not torch.equal(teacher, student)
            assert torch.equal(module.block(teacher, *rest), teacher_out)
            assert torch.equal(module.block(student, *rest), student_out)


def test_one_process_has_no_fsdp(trainer):
    """It has nobody to gather from, and in float32 nothing to cast: weights are used where they lie."""
    model = trainer.model_parts[0]
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert not any(isinstance(weight, DTensor) for weight in model.parameters())


def test_one_process_that_casts_has_fsdp_for_what_is_trained(make_run):
    """A trunk that is not split is not copied."""
    trainer = to_trainer_config(make_run("--trunk.dtype=bfloat16")).build()
    trunk, estimator = trainer.model_parts[0].trunk, trainer.model_parts[0].estimator
    trainer.close()
    assert not any(isinstance(module, FSDPModule) for module in trunk.modules())
    assert not any(isinstance(weight, DTensor) for weight in trunk.parameters())
    assert all(isinstance(weight, DTensor) for weight in estimator.parameters())
