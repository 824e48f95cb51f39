"""Training touches the estimator and nothing else."""

from __future__ import annotations

import hashlib
import time

import pytest
import torch
from safetensors import safe_open

from sgt_titan import checkpoint
from sgt_titan.titan.load_trunk import named_weights
from sgt_titan.titan.tasks import to_trainer_config
from sgt_titan.transform.trunk_files import TrunkFiles


def digests(module) -> dict[str, str]:
    def one(tensor: torch.Tensor) -> str:
        local = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
        return hashlib.sha256(local.detach().contiguous().view(torch.uint8).numpy()).hexdigest()

    return {name: one(tensor) for name, tensor in [*named_weights(module).items(), *module.named_buffers()]}


@pytest.fixture(scope="module", params=["llama-tied", "deepseek"])
def trained(request, make_run, one_process):
    """A trainer after three steps, with digests of its trunk and its estimator from before."""
    config = make_run("--activation_checkpoint.mode=full", "--export.at_end=false", trunk=request.param)
    trainer = to_trainer_config(config).build()
    model = trainer.model_parts[0]
    before = digests(model.trunk), digests(model.estimator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", lambda seconds: None)
        trainer.train()
    yield trainer, *before
    trainer.close()


def test_trunk_bytes_are_unchanged_and_the_estimator_s_are_not(trained):
    trainer, trunk, estimator = trained
    model = trainer.model_parts[0]
    assert trainer.step == 3
    assert digests(model.trunk) == trunk and len(trunk) > 20
    after = digests(model.estimator)
    unchanged = [name for name, digest in estimator.items() if after[name] == digest]
    assert all("rope" in name or "cache" in name for name in unchanged), unchanged


def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(trained):
    trainer, *_ = trained
    model = trainer.model_parts[0]
    frozen = list(model.trunk.parameters())
    assert frozen and not any(p.requires_grad or p.grad is not None for p in frozen)
    assert all(p.requires_grad for p in model.estimator.parameters())
    held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.estimator.parameters()}
    moments = {id(p) for o in trainer.optimizers for p in o.state}
    assert moments == held


def test_trunk_stays_in_evaluation_mode(trained):
    trainer, *_ = trained
    model = trainer.model_parts[0]
    assert model.training and model.estimator.training
    assert not any(module.training for module in model.trunk.modules())
    for layer in model.trunk.layers.values():
        block = getattr(layer.block, "_checkpoint_wrapped_module", layer.block)
        if getattr(block, "moe_enabled", False):
            assert block.moe.tokens_per_expert_E.sum() == 0


def test_checkpoint_holds_no_trunk_tensor(trained):
    trainer, *_ = trained
    path = checkpoint.latest_committed(trainer.prepared.config.run.output_dir)
    assert checkpoint.step_of(path) == 3 and checkpoint.problems(path) == []
    stored = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            stored |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    weights = {name: tensor for name, tensor in stored.items() if name.startswith("sgt.")}
    estimator = trainer.model_parts[0].estimator
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in estimator.parameters())
    assert {name.split(".")[0] for name in stored} == {"sgt", "optimizer", "rng"}
    # By content too, whatever it may be called: no tensor of the trunk's files is in there.
    files = TrunkFiles(trainer.prepared.files.path)
    trunk = [files.read(name) for name in files.entries]
    assert not any(torch.equal(a, b) for a in stored.values() for b in trunk if a.shape == b.shape)
