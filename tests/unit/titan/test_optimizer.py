"""A step that is not finite does not happen; heads, norms and biases do not decay."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sgt_titan.config.schema import Optimizer
from sgt_titan.titan.config import model_config
from sgt_titan.titan.optimizer import NonFiniteError, optimizer_config


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(2, 2).requires_grad_(False)
        self.estimator = nn.ModuleDict({"w": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "mean_head": nn.Linear(3, 3)})


def make(max_skipped=3, **options):
    torch.manual_seed(0)
    model = Tiny()
    config = optimizer_config(Optimizer(**options), max_skipped, fused=False)
    return model, config.build(model_parts=[model])


def step(model, optimizers, value=1.0, loss=0.0):
    optimizers.zero_grad()
    for parameter in model.estimator.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.estimator["w"].weight.grad[1, 2] = value
    optimizers.observe(torch.tensor(loss))
    optimizers.step()


def state(model, optimizers):
    return copy.deepcopy({**model.state_dict(), **optimizers.state_dict()})


def equal(a, b) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


@pytest.mark.parametrize(
    "bad",
    [{"value": float("nan")}, {"value": float("inf")}, {"value": -float("inf")}, {"loss": float("nan")},
     {"loss": float("inf")}],
)  # fmt: skip
def test_a_bad_step_changes_nothing_and_is_counted(gloo, bad):
    model, optimizers = make()
    step(model, optimizers)
    before = state(model, optimizers)
    step(model, optimizers, **bad)
    assert equal(state(model, optimizers), before)
    assert (optimizers.skipped, optimizers.skipped_in_a_row) == (1, 1)
    step(model, optimizers)
    assert not equal(state(model, optimizers), before)
    assert (optimizers.skipped, optimizers.skipped_in_a_row) == (1, 0)


def test_one_bad_microbatch_of_several_is_enough_and_is_forgotten_afterwards(gloo):
    model, optimizers = make()
    optimizers.observe(torch.tensor(float("nan")))
    step(model, optimizers)
    assert optimizers.skipped == 1
    step(model, optimizers)
    assert optimizers.skipped == 1


def test_raises_after_n_in_a_row_only(gloo):
    model, optimizers = make(max_skipped=3)
    for _ in range(3):
        step(model, optimizers, value=float("nan"))
        step(model, optimizers, value=float("nan"))
        step(model, optimizers)
    assert optimizers.skipped == 6
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        step(model, optimizers, value=float("nan"))
    with pytest.raises(NonFiniteError, match=r"^3 steps in a row .*training\.max_nonfinite_steps"):
        step(model, optimizers, value=float("nan"))
    assert equal(model.state_dict(), before)


def test_a_checkpoint_after_a_skipped_first_step_is_complete(gloo):
    """torchtitan leaves out the moments where gradients are left over; such a checkpoint could not be resumed."""
    model, optimizers = make()
    step(model, optimizers, value=float("nan"))
    saved = optimizers.state_dict()
    assert all(tensor.isfinite().all() for tensor in saved.values() if isinstance(tensor, torch.Tensor))
    _, fresh = make()
    assert saved.keys() == fresh.state_dict().keys()


def test_matches_adamw(gloo):
    model, optimizers = make(lr=0.01, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    reference = copy.deepcopy(model)
    inner = dict(reference.estimator.named_parameters())
    decayed = [inner.pop("w.weight")]
    kwargs = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6}
    plain = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.5}, {"params": list(inner.values()), "weight_decay": 0.0}], **kwargs
    )
    for _ in range(3):
        step(model, optimizers)
        for parameter in reference.estimator.parameters():
            parameter.grad = torch.ones_like(parameter)
        plain.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], rtol=0, atol=1e-7)
    assert torch.equal(model.trunk.weight, reference.trunk.weight)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "deepseek"])
def test_decay_groups_of_every_family(gloo, make_run, name):
    """Decayed: the bodies' matrices. Not decayed: heads, norms, biases. Together: the estimator."""
    from transformers import AutoConfig

    config = make_run("--estimator.body=separate", trunk=name)
    composite = model_config(config, AutoConfig.from_pretrained(config.trunk.path), 1.0)
    with torch.device("meta"):
        model = composite.build()
    optimizers = optimizer_config(Optimizer(weight_decay=0.1), 1, fused=False).build(model_parts=[model])
    groups = {group["weight_decay"]: group["param_names"] for o in optimizers for group in o.param_groups}
    assert set(groups) == {0.0, 0.1}
    shapes = {name: parameter.dim() for name, parameter in model.named_parameters()}
    for name in groups[0.1]:
        assert name.startswith("estimator.bodies.") and shapes[name] == 2
    for name in groups[0.0]:
        assert "_head." in name or shapes[name] == 1
    every = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sorted(groups[0.0] + groups[0.1]) == sorted(every)
    assert all(name.startswith("estimator.") for name in every)
