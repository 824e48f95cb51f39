"""Every family: torchtitan's decoder with our weights gives transformers' logits.

Shape suffixes: B rows, T tokens, V vocabulary, E experts, K experts of a token, N tokens flat, D width.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import sgt_titan.demo
from sgt_titan.titan.load_trunk import hf_shapes, load_trunk, named_weights
from sgt_titan.titan.trunks import build, family_of, hf_name
from sgt_titan.transform.trunk_files import TrunkFiles

# Largest difference of logits whose own standard deviation is about 1 (asserted), float32 on both sides.
TOLERANCE = 2e-5
DENSE = (
    "llama",
    "llama-tied",
    "llama-llama3-rope",
    "llama-yarn",
    "llama-linear",
    "qwen2",
    "mistral",
    "smollm3",
    "qwen3",
    "qwen3-tied",
    "deepseek-dense",
    "deepseek-dense-yarn",
)
MOE = ("qwen3-moe", "deepseek", "deepseek-groups", "deepseek-no-q-lora", "deepseek-yarn")


def load_titan(path) -> nn.Module:
    hf = AutoConfig.from_pretrained(path)
    trunk = build(hf, "sdpa").build()
    # Whatever is not loaded from the files must show: NaN, but for what is computed (rotary caches).
    for tensor in named_weights(trunk).values():
        tensor.data.fill_(float("nan")) if tensor.is_floating_point() else None
    if hf.tie_word_embeddings:
        trunk.tok_embeddings.weight = trunk.lm_head.weight
    trunk.init_states()
    for tensor in named_weights(trunk).values():
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
    load_trunk(trunk, family_of(hf), TrunkFiles(path))
    return trunk.eval()


def load_hf(path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def tokens(vocabulary: int, rows: int = 2, length: int = 96) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def titan_logits(trunk, tokens_BT: torch.Tensor) -> torch.Tensor:
    positions_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
    h_BTD = trunk.tok_embeddings(tokens_BT)
    for layer in trunk.layers.values():
        h_BTD = layer(h_BTD, None, positions_BT)
    return trunk.lm_head(trunk.norm(h_BTD))


@torch.no_grad()
def largest_difference(trunk, model, tokens_BT: torch.Tensor) -> float:
    ours_BTV, theirs_BTV = titan_logits(trunk, tokens_BT), model(tokens_BT).logits
    assert 0.5 < theirs_BTV.std() < 20, "logits too uniform, or too large, to compare"
    return (ours_BTV - theirs_BTV).abs().max().item()


@pytest.mark.parametrize("name", DENSE)
def test_dense_logits(name, trunk_dir, record_property):
    path = trunk_dir(name)
    difference = largest_difference(load_titan(path), load_hf(path), tokens(300))
    record_property("max_difference", difference)
    print(f"{name}: max |difference| of logits {difference:.2e}")
    assert difference < TOLERANCE


def test_a_key_of_another_family_changes_nothing(trunk_dir, tmp_path):
    """transformers' Llama does not read SmolLM3's list of layers without RoPE."""
    path = shutil.copytree(trunk_dir("llama"), tmp_path / "trunk")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"no_rope_layers": [1, 1, 0]}))
    assert largest_difference(load_titan(path), load_hf(path), tokens(300)) < TOLERANCE


# -- mixtures of experts -----------------------------------------------------------------------------------------------


def experts_in_float32(self, x_RD: torch.Tensor, num_tokens_per_expert_E: torch.Tensor) -> torch.Tensor:
    """What torchtitan's ``GroupedExperts`` computes, without its cast to bfloat16."""
    pieces = x_RD.split(num_tokens_per_expert_E.tolist())
    results = [
        (nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        for x, w1, w2, w3 in zip(pieces, self.w1_EFD, self.w2_EDF, self.w3_EFD, strict=True)
    ]
    return torch.cat(results)


def experts_in_bfloat16(self, x_ND, chosen_NK, weights_NK):
    """transformers' experts with torchtitan's rounding: products in bfloat16, sums in float32."""
    result_ND = torch.zeros_like(x_ND)
    x_ND = x_ND.bfloat16()
    for expert in range(self.num_experts):
        token_N, place_N = torch.where(chosen_NK == expert)
        gate, up = (x_ND[token_N] @ self.gate_up_proj[expert].bfloat16().T).chunk(2, dim=-1)
        out = ((nn.functional.silu(gate) * up) @ self.down_proj[expert].bfloat16().T).float()
        result_ND.index_add_(0, token_N, out * weights_NK[token_N, place_N, None])
    return result_ND


@pytest.mark.parametrize("name", MOE)
def test_moe_logits(name, trunk_dir, monkeypatch):
    """Everything but the experts' precision is equal in float32; that precision is then bounded by itself."""
    from torchtitan.models.common.moe import GroupedExperts

    path = trunk_dir(name)
    trunk, model, tokens_BT = load_titan(path), load_hf(path), tokens(300)
    as_it_is = (titan_logits(trunk, tokens_BT) - model(tokens_BT).logits).detach().abs().amax(-1).flatten()
    with monkeypatch.context() as patch:
        patch.setattr(GroupedExperts, "forward", experts_in_float32)
        float32 = largest_difference(trunk, model, tokens_BT)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model.layers[-1].mlp.experts), "forward", experts_in_bfloat16)
        both = (titan_logits(trunk, tokens_BT) - model(tokens_BT).logits).detach().abs().amax(-1).flatten()
    print(
        f"{name}: max |difference| of logits {float32:.2e} with experts in float32, {both.max():.2e} with both in "
        f"bfloat16; as it is {as_it_is.max():.2e} (median token {as_it_is.median():.2e})"
    )
    assert float32 < TOLERANCE
    # Rounding to bfloat16 (2^-9) turns a last-bit difference of its argument into 0.4% now and then, so the largest
    # difference is that of one such element, and the median token shows none.
    assert both.median() < TOLERANCE and both.max() < 0.02
    # bfloat16 experts against float32 experts: about 1% of a logit's spread; where two experts nearly tie, a token of a
    # later layer may go to the other one and be off by any amount.
    assert as_it_is.median() < 0.04 and (as_it_is > 0.2).float().mean() < 0.02


@pytest.mark.parametrize("name", ["deepseek", "deepseek-groups"])
def test_router_uses_its_bias_to_choose_and_not_to_weigh(name, trunk_dir):
    """The bias must matter for this to be a test of it: without it, other experts are chosen."""
    path = trunk_dir(name)
    trunk, tokens_BT = load_titan(path), tokens(300)
    before = titan_logits(trunk, tokens_BT)
    for layer in trunk.layers.values():
        if layer.moe_enabled:
            assert layer.moe.expert_bias_E.abs().max() > 0.1
            layer.moe.expert_bias_E.zero_()
    assert (titan_logits(trunk, tokens_BT) - before).abs().max() > 0.1


# -- bytes -------------------------------------------------------------------------------------------------------------


def file_tensors(path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as reader:
            found |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    return found


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "qwen2", "qwen3", "qwen3-moe", "deepseek", "deepseek-no-q-lora"]
)
def test_loaded_tensors_are_the_files_bytes(name, trunk_dir):
    path = trunk_dir(name, "20KB")
    assert len(list(path.glob("*.safetensors"))) > 3 and (path / "model.safetensors.index.json").is_file()
    trunk, stored = load_titan(path), file_tensors(path)
    family = family_of(AutoConfig.from_pretrained(path))
    loaded = {}
    for key, tensor in named_weights(trunk).items():
        target = hf_name(family, key)
        if "{}" in target:
            loaded |= {target.format(expert): row for expert, row in enumerate(tensor)}
        else:
            loaded[target] = tensor
    if name.endswith("tied"):
        assert loaded.pop("lm_head.weight").data_ptr() == loaded["model.embed_tokens.weight"].data_ptr()
    # Every tensor of the checkpoint is used, once, and nothing else is promised.
    assert sorted(loaded) == sorted(stored) and len(stored) > 20
    assert all(same_bytes(loaded[key].detach(), stored[key]) for key in stored)


def test_sharded_checkpoint_gives_the_same_logits(trunk_dir):
    tokens_BT = tokens(300)
    for name in ("llama-tied", "deepseek"):
        whole = titan_logits(load_titan(trunk_dir(name)), tokens_BT)
        assert torch.equal(titan_logits(load_titan(trunk_dir(name, "20KB")), tokens_BT), whole)


def test_bfloat16_checkpoint_in_a_bfloat16_trunk(trunk_dir, tmp_path):
    model = load_hf(trunk_dir("qwen2")).bfloat16()
    model.save_pretrained(tmp_path)
    hf = AutoConfig.from_pretrained(tmp_path)
    torch.set_default_dtype(torch.bfloat16)
    try:
        trunk = build(hf, "sdpa").build()
    finally:
        torch.set_default_dtype(torch.float32)
    trunk.init_states()
    load_trunk(trunk, family_of(hf), TrunkFiles(tmp_path))
    stored, family = file_tensors(tmp_path), family_of(hf)
    assert all(same_bytes(t.detach(), stored[hf_name(family, key)]) for key, t in named_weights(trunk).items())
    assert set(hf_shapes(trunk, family)) == set(stored)
    tokens_BT = tokens(300)
    with torch.no_grad():
        model = model.float()
        exact_BTV = model(tokens_BT).logits
    difference = (titan_logits(trunk, tokens_BT).float() - exact_BTV).abs()
    print(f"bfloat16: max |difference| of logits from the float32 arithmetic {difference.max():.2e}")
    assert difference.mean() < 0.02 and difference.max() < 0.2


# -- a real model ------------------------------------------------------------------------------------------------------


@pytest.mark.assets
def test_asset_model(assets):
    path = assets / "models" / "stories3M-hf"
    trunk, model = load_titan(path), load_hf(path)
    difference = largest_difference(trunk, model, tokens(trunk.tok_embeddings.weight.shape[0], length=256))
    print(f"{path.name}: max |difference| of logits {difference:.2e}")
    assert difference < 1e-4


def test_demo_trunk():
    path = Path(sgt_titan.demo.__file__).parent / "trunk"
    trunk, model = load_titan(path), load_hf(path)
    difference = largest_difference(trunk, model, tokens(trunk.tok_embeddings.weight.shape[0]))
    print(f"demo: max |difference| of logits {difference:.2e}")
    assert difference < 1e-4
