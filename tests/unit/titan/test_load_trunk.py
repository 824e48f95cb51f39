"""Filling a trunk: what is checked before, and that shards get their part."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import Replicate, Shard, init_device_mesh, zeros
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig

from sgt_titan.errors import UserError
from sgt_titan.titan import load_trunk as load_module
from sgt_titan.titan.initialize import initialize_estimator, initialize_from_trunk
from sgt_titan.titan.load_trunk import check_trunk, hf_shapes, load_trunk, local_region, named_weights, pieces
from sgt_titan.titan.model import Estimator
from sgt_titan.titan.replicas import checksum
from sgt_titan.titan.trunks import FAMILIES, build, export_name, family_of, hf_name
from sgt_titan.transform.trunk_files import TrunkFiles


def meta_trunk(path):
    hf = AutoConfig.from_pretrained(path)
    config = build(hf, "sdpa")
    with torch.device("meta"):
        return config.build(), family_of(hf)


@pytest.fixture
def changed(trunk_dir, tmp_path):
    """``changed(name, edit)``: a copy of a checkpoint whose tensors ``edit`` has been at."""

    def make(name, edit):
        path = shutil.copytree(trunk_dir(name), tmp_path / "changed")
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")
        return path

    return make


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight"),
        ("llama", "lm_head.weight"),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("deepseek", "model.layers.1.mlp.experts.5.down_proj.weight"),
        ("deepseek", "model.layers.2.mlp.gate.e_score_correction_bias"),
    ],
)
def test_missing_tensor_is_named_before_anything_is_read(changed, monkeypatch, name, tensor):
    path = changed(name, lambda tensors: tensors.pop(tensor))
    trunk, family = meta_trunk(path)
    files = TrunkFiles(path)
    monkeypatch.setattr(files, "read", lambda *a: pytest.fail("read before checking"))
    with pytest.raises(UserError, match=rf"has no tensor {tensor}; config\.json promises \("):
        load_trunk(trunk, family, files)


def test_wrong_shape_is_named(changed):
    def edit(tensors):
        tensors["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(8, 32)

    path = changed("llama", edit)
    trunk, family = meta_trunk(path)
    with pytest.raises(UserError, match=r"k_proj\.weight is \(8, 32\), config\.json promises \(16, 32\)$"):
        check_trunk(trunk, family, TrunkFiles(path))


def test_tied_trunk_needs_no_lm_head_and_takes_no_other(trunk_dir, changed, tmp_path):
    path = trunk_dir("llama-tied")
    assert "lm_head.weight" not in TrunkFiles(path)
    trunk, family = meta_trunk(path)
    check_trunk(trunk, family, TrunkFiles(path))
    table = TrunkFiles(path).embedding_table()
    same = changed("llama-tied", lambda tensors: tensors.update({"lm_head.weight": table.clone()}))
    check_trunk(trunk, family, TrunkFiles(same))
    own = {**load_file(same / "model.safetensors"), "lm_head.weight": table + 1e-3}
    save_file(own, same / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings true, and the files an lm_head"):
        check_trunk(trunk, family, TrunkFiles(same))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "deepseek", "deepseek-no-q-lora"])
def test_promised_names_and_shapes_are_transformers_own(trunk_dir, name):
    path = trunk_dir(name)
    trunk, family = meta_trunk(path)
    stored = {key: tuple(t.shape) for key, t in load_file(path / "model.safetensors").items()}
    assert hf_shapes(trunk, family) == stored


@pytest.mark.parametrize("family", list(FAMILIES.values()), ids=list(FAMILIES))
def test_names_are_one_to_one(family):
    assert len(set(family.names.values())) == len(family.names)
    for ours, theirs in family.names.items():
        layered = ours.replace("{}", "7", 1)
        assert hf_name(family, layered) == theirs.replace("{}", "7", 1)


def test_export_names():
    family = FAMILIES["llama"]
    name = "bodies.1.layers.0.attention.qkv_linear.wq.weight"
    assert export_name(family, name) == "bodies.1.layers.0.self_attn.q_proj.weight"
    assert export_name(family, "bodies.0.norm.weight") == "bodies.0.norm.weight"
    assert export_name(family, "mean_head.bias") == "mean_head.bias"


def test_unknown_family():
    with pytest.raises(UserError, match=rf"model_type 'gpt2'; supported are {', '.join(FAMILIES)}$"):
        family_of(AutoConfig.for_model("gpt2"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
    ],
)
def test_what_a_row_cannot_express_is_refused(options, message):
    hf = AutoConfig.for_model(
        "llama", hidden_size=32, num_attention_heads=4, vocab_size=10, num_hidden_layers=1, **options
    )
    with pytest.raises(UserError) as error:
        build(hf, "sdpa")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "deepseek"])
def test_small_pieces_make_the_same_trunk(trunk_dir, monkeypatch, name):
    files = TrunkFiles(trunk_dir(name))
    loaded = []
    for size in (load_module.PIECE_BYTES, 1000):
        monkeypatch.setattr(load_module, "PIECE_BYTES", size)
        trunk, family = meta_trunk(trunk_dir(name))
        trunk.to_empty(device="cpu")
        tally = load_trunk(trunk, family, files)
        loaded.append(named_weights(trunk))
        assert tally.received == 0 and tally.read == sum(entry.end - entry.begin for entry in files.entries.values())
    some = list(pieces(trunk, family, files))
    assert len(some) > 2 * len(loaded[0]) and all(part.nbytes <= 1000 for piece in some for part in piece.parts)
    for key, tensor in loaded[0].items():
        if key != "lm_head.weight" or not trunk.enable_weight_tying:  # to_empty has untied it
            assert torch.equal(tensor, loaded[1][key]), key


def test_a_large_matrix_of_zeros_is_seen_though_no_piece_shows_it(changed, monkeypatch):
    path = changed("llama", lambda tensors: tensors["model.embed_tokens.weight"].zero_())
    monkeypatch.setattr(load_module, "PIECE_BYTES", 1000)
    trunk, family = meta_trunk(path)
    trunk.to_empty(device="cpu")
    with pytest.raises(UserError, match=r"embed_tokens\.weight is zero everywhere"):
        load_trunk(trunk, family, TrunkFiles(path))


# -- checksums ---------------------------------------------------------------------------------------------------------


def test_a_checksum_sees_each_bit_and_each_exchange():
    parts = torch.randn(7, 5), torch.randn(3).bfloat16()
    whole = checksum(parts)
    assert checksum([part.clone() for part in parts]) == whole
    assert checksum([torch.cat([part.new_zeros(1), part.flatten()])[1:] for part in parts]) == whole  # wherever it lies
    for part in parts:
        bytes_ = part.view(-1).view(torch.uint8)
        for index in range(bytes_.numel()):
            for bit in (1, 128):
                bytes_[index] ^= bit
                assert checksum(parts) != whole
                bytes_[index] ^= bit
    swapped = parts[0].clone()
    swapped[[0, 2]] = swapped[[2, 0]]
    assert checksum([swapped, parts[1]]) != whole


# -- shards ------------------------------------------------------------------------------------------------------------


def test_local_region_of_a_plain_tensor_is_all_of_it():
    tensor = torch.arange(6).view(2, 3)
    local, region = local_region(tensor)
    assert local is tensor and region == (slice(0, 2), slice(0, 3))


@pytest.mark.parametrize("rank", range(4))
def test_local_region_on_a_2x2_mesh(rank):
    """Every rank of FSDP 2 x TP 2 in turn, on torch's fake backend: uneven, replicated and empty shards."""
    dist.init_process_group("fake", rank=rank, world_size=4, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        dp, tp = mesh.get_coordinate()
        assert (dp, tp) == divmod(rank, 2)
        for shape, placements, expected in [
            ((7, 6), [Shard(0), Shard(1)], (((0, 4), (4, 7))[dp], ((0, 3), (3, 6))[tp])),
            ((7, 6), [Replicate(), Shard(0)], (((0, 4), (4, 7))[tp], (0, 6))),
            ((1, 6), [Shard(0), Replicate()], (((0, 1), (1, 1))[dp], (0, 6))),
        ]:
            tensor = zeros(*shape, device_mesh=mesh, placements=placements)
            local, region = local_region(tensor)
            assert tuple((s.start, s.stop) for s in region) == expected
            assert tuple(local.shape) == tuple(s.stop - s.start for s in region)
    finally:
        dist.destroy_process_group()


# -- initial weights ---------------------------------------------------------------------------------------------------


def estimator_of(path, layers=2, bodies=1):
    from sgt_titan.config.schema import Config
    from sgt_titan.titan.config import model_config

    config = Config()
    config.trunk.path, config.estimator.layers = str(path), layers
    config.estimator.body = "separate" if bodies == 2 else "shared"
    model = model_config(config, AutoConfig.from_pretrained(path), 1.0).build()
    assert isinstance(model.estimator, Estimator)
    return model.estimator


def test_initial_weights(trunk_dir):
    estimator = estimator_of(trunk_dir("qwen2"), bodies=2)
    initialize_estimator(estimator, seed=4)
    weights = named_weights(estimator)
    for name, tensor in weights.items():
        if "_head." in name or name.endswith("bias"):
            assert not tensor.any(), name
        elif tensor.dim() == 1:
            assert (tensor == 1).all(), name
        else:
            assert abs(tensor.std() - 0.02) < 0.003 and abs(tensor.mean()) < 0.003, name
    again, other = estimator_of(trunk_dir("qwen2"), bodies=2), estimator_of(trunk_dir("qwen2"), bodies=2)
    initialize_estimator(again, seed=4)
    initialize_estimator(other, seed=5)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in named_weights(again).items())
    key = "bodies.0.layers.0.attention.wo.weight"
    assert not torch.equal(named_weights(other)[key], weights[key])
    assert not torch.equal(weights[key.replace("bodies.0", "bodies.1")], weights[key])


def test_bodies_from_the_trunk(trunk_dir):
    path = trunk_dir("qwen2")
    estimator, files = estimator_of(path, bodies=2), TrunkFiles(path)
    initialize_estimator(estimator, seed=0)
    initialize_from_trunk(estimator.bodies, "The estimator", FAMILIES["qwen2"], files)
    for body in estimator.bodies:
        for name, tensor in named_weights(body).items():
            assert torch.equal(tensor.detach(), files.read(hf_name(FAMILIES["qwen2"], name))), name
    assert not any(t.any() for name, t in named_weights(estimator).items() if "_head." in name)


def test_bodies_from_a_moe_trunk_are_refused_past_its_dense_layers(trunk_dir):
    path = trunk_dir("deepseek")  # one dense layer, two of experts
    initialize_from_trunk(estimator_of(path, layers=1).bodies, "", FAMILIES["deepseek_v3"], TrunkFiles(path))
    with pytest.raises(UserError, match=r"has no tensor model\.layers\.1\.mlp\.gate_proj\.weight"):
        initialize_from_trunk(estimator_of(path, layers=2).bodies, "", FAMILIES["deepseek_v3"], TrunkFiles(path))
