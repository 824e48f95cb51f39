"""Quantised checkpoints: read with the scales that config.json states, or refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sgt_titan.errors import UserError
from sgt_titan.transform.trunk_files import TrunkFiles
from sgt_titan.trunk.quantisation import scheme_of

E4M3 = torch.float8_e4m3fn


def compressed(strategy: str = "channel", stored: str = "float-quantized", **weights) -> dict:
    number = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True} | weights
    return {"quant_method": "compressed-tensors", "format": stored, "config_groups": {"group_0": {"weights": number}}}


def fp8(block: list[int] | None = None) -> dict:
    return {"quant_method": "fp8", "weight_block_size": block}


def scaled(weight: torch.Tensor, peak: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(stored, scale) for a weight and the largest |w| of what shares a scale, broadcastable to it."""
    top = 127.0 if dtype == torch.int8 else 448.0
    scale = peak / top
    stored = (weight / scale).round() if dtype == torch.int8 else weight / scale
    return stored.to(dtype), scale


def by_tensor(weight, dtype=E4M3):
    return scaled(weight, weight.abs().max(), dtype)


def by_row(weight, dtype=E4M3):
    return scaled(weight, weight.abs().amax(1, keepdim=True), dtype)


def by_block(weight, rows=8, columns=16):
    """Blocks of 8 x 16, the last ones cut."""
    r, c = weight.shape
    peak = torch.zeros(-(-r // rows), -(-c // columns))
    for i in range(peak.shape[0]):
        for j in range(peak.shape[1]):
            peak[i, j] = weight[rows * i : rows * (i + 1), columns * j : columns * (j + 1)].abs().max()
    spread = peak.repeat_interleave(rows, 0)[:r].repeat_interleave(columns, 1)[:, :c]
    return scaled(weight, spread, E4M3)[0], peak / 448


# name -> (quantization_config, stored and scale of a weight, what the scale is called)
READ = {
    "fp8 blocks": (fp8([8, 16]), by_block, "_scale_inv"),
    "fp8 tensor": (fp8(), by_tensor, "_scale_inv"),
    "fp8 tensor, vLLM's name": (fp8() | {"activation_scheme": "static"}, by_tensor, "_scale"),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, by_row, "_scale"),
    "compressed rows": (compressed(), by_row, "_scale"),
    "compressed tensor": (compressed("tensor"), by_tensor, "_scale"),
    "compressed blocks": (compressed("block", block_structure=[8, 16]), by_block, "_scale"),
    "compressed int8": (
        compressed(stored="int-quantized", type="int"),
        lambda weight: by_row(weight, torch.int8),
        "_scale",
    ),
}


@pytest.fixture
def quantised(trunk_dir, tmp_path):
    """``quantised(case)``: a copy of a trunk whose projections are stored so, and the values that they stand for."""

    def make(case: str, trunk: str = "llama"):
        config, quantise, suffix = READ[case]
        source, stored, values = trunk_dir(trunk), {}, {}
        for name, tensor in load_file(source / "model.safetensors").items():
            stored[name] = values[name] = tensor
            if name.endswith("_proj.weight"):
                low, scale = quantise(tensor)
                stored |= {name: low, name + suffix: scale.contiguous()}
                stored[name.replace(".weight", ".input_scale")] = torch.ones(())
                blocks = scale.dim() == 2 and scale.shape[1] > 1
                spread = scale.repeat_interleave(8, 0).repeat_interleave(16, 1) if blocks else scale
                values[name] = low.float() * (spread[: low.shape[0], : low.shape[1]] if blocks else spread)
                assert (values[name] - tensor).abs().max() < 0.1 * tensor.abs().max()
        path = tmp_path / "quantised"
        path.mkdir()
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
        about = json.loads((source / "config.json").read_text()) | {"quantization_config": config}
        (path / "config.json").write_text(json.dumps(about))
        for file in source.glob("tokenizer*"):
            (path / file.name).write_bytes(file.read_bytes())
        return path, values

    return make


@pytest.mark.parametrize("case", READ)
def test_values_are_stored_times_scale(quantised, case):
    path, values = quantised(case)
    files = TrunkFiles(path)
    assert set(files.entries) == set(values)
    for name, value in values.items():
        assert torch.equal(files.read(name), value), name
        files.check_values(name, value)
        if value.dim() == 2:
            region = slice(3, value.shape[0] - 1), slice(5, value.shape[1] - 2)
            assert torch.equal(files.read(name, region), value[region]), name


def test_both_worlds_compute_with_the_same_values(quantised):
    """torchtitan's trunk and transformers', from the same quantised files."""
    from transformers import AutoConfig

    from sgt_titan.evaluation.world.samples import load_trunk as load_for_evaluation
    from sgt_titan.titan.load_trunk import load_trunk, named_weights
    from sgt_titan.titan.trunks import build, family_of, hf_name

    path, values = quantised("compressed rows")
    hf = AutoConfig.from_pretrained(path)
    trunk = build(hf, "sdpa").build()
    load_trunk(trunk, family_of(hf), TrunkFiles(path))
    for name, tensor in named_weights(trunk).items():
        assert torch.equal(tensor.detach(), values[hf_name(family_of(hf), name)])
    model = load_for_evaluation(path, torch.device("cpu"))
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.named_parameters())


def test_the_scheme_is_part_of_the_fingerprint(quantised):
    path, _ = quantised("fp8 blocks")
    before, config = TrunkFiles(path).fingerprint(), json.loads((path / "config.json").read_text())
    config["quantization_config"] = compressed("block", block_structure=[8, 16])
    (path / "config.json").write_text(json.dumps(config))
    assert TrunkFiles(path).fingerprint() != before


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"quant_method": "awq", "bits": 4}, "weights quantised by 'awq' are not read here"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "'bitsandbytes'"),
        ({"load_in_4bit": True}, "'bitsandbytes'"),
        ({"quant_method": "hqq"}, "'hqq'"),
        ({"quant_method": "mxfp4"}, "'mxfp4'"),
        ({"bits": 4}, "'a method without a name'"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "'fp8'"),
        (fp8([128]), "weight_block_size is \\[128\\]"),
        (compressed(stored="pack-quantized"), "in the format 'pack-quantized'"),
        (compressed(num_bits=4), "'num_bits': 4"),
        (compressed("group"), "'strategy': 'group'"),
        (compressed(symmetric=False), "zero points"),
        (compressed() | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config"),
        ("yes", "must be a JSON object"),
    ],
)
def test_methods_that_are_not_read_are_refused_by_name(found, message):
    with pytest.raises(UserError, match=message):
        scheme_of({"quantization_config": found})
    assert scheme_of({"quantization_config": None}) is None


@pytest.mark.parametrize(
    ("edit", "config", "message"),
    [
        (lambda t: None, {}, "stored as float8, and config.json has no quantization_config"),
        (lambda t: t.pop("w.weight_scale"), compressed(), "is stored as float8 and has no scale"),
        (lambda t: t.update({"w.weight_scale": torch.ones(3, 1)}), compressed(), r"is \(3, 1\), which is not a scale"),
        (lambda t: t.update({"w.weight": torch.ones(4, 4)}), compressed(), "has a scale, w.weight_scale, but"),
        (
            lambda t: t.update({"w.weight": torch.ones(4, 4, dtype=torch.int8)}),
            compressed(),
            "stored as I8; compressed",
        ),
        (lambda t: t.update({"w.weight": torch.ones(4, 4, dtype=torch.uint8)}), compressed(), "stored as U8"),
        (lambda t: t.update({"w.weight_zero_point": torch.ones(4, dtype=torch.int8)}), compressed(), "zero points"),
    ],
)
def test_files_that_are_not_what_the_config_says(tmp_path, edit, config, message):
    tensors = {"w.weight": torch.ones(4, 4).to(E4M3), "w.weight_scale": torch.ones(4, 1)}
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    with pytest.raises(UserError, match=message) as error:
        TrunkFiles(tmp_path)
    assert "\n" not in str(error.value)


def test_values_no_weight_can_have(trunk_dir):
    """What loads as garbage is refused whatever config.json says: float8 and int8 without their scales, NaN, zeros."""
    files = TrunkFiles(trunk_dir("llama"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = files.read(name)
    files.check_values(name, weight)
    files.check_values(name, weight[:3] * 0)  # a shard may be padding
    files.check_values("model.norm.weight", torch.full((8,), 400.0))  # a gain may be large
    for wrong, message in (
        (by_row(weight)[0].float(), "is it quantised"),
        (by_row(weight, torch.int8)[0].float(), "is it quantised"),
        (weight * 0, "is zero everywhere"),
        (weight * float("nan"), "NaN or infinite"),
        (weight / 0, "NaN or infinite"),
    ):
        with pytest.raises(UserError, match=message):
            files.check_values(name, wrong)
