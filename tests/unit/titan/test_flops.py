"""Work per token against arithmetic done by hand from the config."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from sgt_titan.titan.config import model_config
from sgt_titan.titan.flops import hardware_flops_per_token, matmul_parameters, model_flops_per_token

V, D, F = 300, 32, 48  # vocabulary, width, hidden of the dense MLP


def composite(config):
    description = model_config(config, AutoConfig.from_pretrained(config.trunk.path), 1.0)
    with torch.device("meta"):
        return description.build()


# Vectors (norms, biases) are counted with the matrices, 1% here and nothing in a real model.
LLAMA_LAYER = D * 32 + 2 * D * 16 + 32 * D + 3 * D * F + 2 * D
QWEN2_LAYER = LLAMA_LAYER + 32 + 2 * 16
MLA = D * 16 + 16 + 16 * 4 * 16 + D * (16 + 8) + 16 + 16 * 4 * (8 + 12) + 4 * 12 * D + 2 * D
DENSE_LAYER = MLA + 3 * D * F
# 8 experts of which a token visits 2, one shared expert of the same width, the router
MOE_LAYER = MLA + 2 * 3 * D * 24 + 3 * D * 24 + D * 8
HEADS = 2 * (D * D + D)


@pytest.mark.parametrize(
    ("name", "trunk", "body_layer"),
    [
        ("llama", 3 * LLAMA_LAYER + D + V * D, LLAMA_LAYER),
        ("llama-tied", 3 * LLAMA_LAYER + D + V * D, LLAMA_LAYER),  # the table multiplies as lm_head
        ("qwen2", 3 * QWEN2_LAYER + D + V * D, QWEN2_LAYER),
        ("deepseek", DENSE_LAYER + 2 * MOE_LAYER + D + V * D, DENSE_LAYER),
    ],
)
@pytest.mark.parametrize("body", ["shared", "separate"])
def test_by_hand(make_run, name, trunk, body_layer, body):
    model = composite(make_run(f"--estimator.body={body}", "--estimator.layers=2", trunk=name))
    bodies = 2 if body == "separate" else 1
    estimator = bodies * (2 * body_layer + D) + HEADS
    assert matmul_parameters(model.trunk) == trunk
    assert matmul_parameters(model.estimator) == estimator
    ends = (D + V * D) + (bodies * D + HEADS)  # final norms, lm_head, the two heads
    # teacher forward 2N, student forward 2N, activations backward 2N; estimator 6N; 2N of all layers to recompute
    assert model_flops_per_token(model) == 6 * trunk + 6 * estimator
    assert hardware_flops_per_token(model, full_recompute=False) == 6 * trunk + 6 * estimator
    assert hardware_flops_per_token(model, full_recompute=True) == 8 * trunk + 8 * estimator - 2 * ends


def test_model_reports_it_to_torchtitan(make_run):
    model = composite(make_run("--estimator.layers=1"))
    parameters, flops = model.config.get_nparams_and_flops(model, 64)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert flops == model_flops_per_token(model)


def test_recomputation_wrappers_change_nothing(make_run, one_process):
    from sgt_titan.titan.tasks import to_trainer_config

    def count(*overrides):
        trainer = to_trainer_config(make_run(*overrides, trunk="deepseek")).build()
        model = trainer.model_parts[0]
        counted = (
            trainer.metrics_processor.num_flops_per_token,
            trainer.metrics_processor.num_hardware_flops_per_token,
            matmul_parameters(model.trunk),
            matmul_parameters(model.estimator),
            sum(map(matmul_parameters, (model.trunk.layers, *(body.layers for body in model.estimator.bodies)))),
        )
        trainer.close()
        return counted

    flops, hardware, trunk, estimator, layers = count()
    assert (flops, hardware) == (6 * (trunk + estimator),) * 2
    assert count("--activation_checkpoint.mode=full") == (flops, flops + 2 * layers, trunk, estimator, layers)
