"""Every shipped config: it loads, fits its cluster, and is built at its real world size on torchtitan's fake backend.

The models are built once, on the meta device, in a process of their own (this file run as a script): a fake process
group and torchtitan's idea of the device are global.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgt_titan.config.check import validate
from sgt_titan.config.load import difference, load
from sgt_titan.config.resolve import resolve
from sgt_titan.config.schema import Config
from sgt_titan.config.trunk import read_trunk
from sgt_titan.errors import UserError
from sgt_titan.plan import SHIPPED, from_name, plan, summary

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / "train_configs"
CPU_CONFIGS = ("demo", "demo_settled", "stories3m")
needs_assets = pytest.mark.skipif(not os.environ.get("SGT_TITAN_ASSETS"), reason="SGT_TITAN_ASSETS is not set")
NAMES = [
    pytest.param(name, marks=[pytest.mark.assets, needs_assets] if name == "stories3m" else [])
    for name in (*CPU_CONFIGS, *SHIPPED)
]

# Parameters, of the models' cards and reports; exact where torchtitan's flavor of that size says so.
PUBLISHED = {
    "llama3_1b": 1.236e9,
    "qwen3_32b_64x8": 32.8e9,
    "deepseek_r1_qwen_32b_64x8": 32.8e9,
    "llama3_70b_1x8": 70.55e9,
    "llama3_70b_32x8": 70.55e9,
    "llama3_70b_64x8": 70.55e9,
    "deepseek_r1_70b_64x8": 70.55e9,
    "deepseek_v3_64x8": 671e9,
}
FLAVORS = {  # trunks/*.json -> torchtitan's flavor
    "llama-3.2-1b-instruct": ("llama3", "1B"),
    "llama-3.3-70b-instruct": ("llama3", "70B"),
    "qwen3-32b": ("qwen3", "32B"),
    "deepseek-v3": ("deepseek_v3", "671B"),
}


@pytest.fixture(autouse=True)
def trunks_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SGT_TRUNKS", str(tmp_path / "nothing"))


def resolved(name: str) -> tuple[Config, dict, int]:
    config = load(str(CONFIGS / f"{name}.yaml"))
    world_size = config.cluster.nodes * config.cluster.gpus_per_node
    config = resolve(config, world_size=world_size)
    trunk = read_trunk(config, weights=False)
    validate(config, world_size, trunk)
    return config, trunk, world_size


# -- the files ---------------------------------------------------------------------------------------------------------


def test_every_config_is_tested_here():
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml")) == sorted((*CPU_CONFIGS, *SHIPPED))
    assert set(PUBLISHED) == set(SHIPPED)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_valid_at_its_own_size(name):
    config, _, world_size = resolved(name)
    first_line = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first_line.startswith("# ") and len(first_line) < 110
    if name in SHIPPED:
        size = name.rsplit("_", 1)[-1]
        nodes, gpus = map(int, size.split("x")) if "x" in size else (1, 1)
        assert (config.cluster.nodes, config.cluster.gpus_per_node, world_size) == (nodes, gpus, nodes * gpus)
        assert config.parallelism.tensor_parallel_degree <= gpus  # inside a node
        assert config.data.packing
        assert plan(*resolved(name)[:2]).fits


@pytest.mark.parametrize("name", SHIPPED)
def test_a_wrong_world_size_is_refused(name):
    config = load(str(CONFIGS / f"{name}.yaml"), ["--parallelism.data_parallel_replicate_degree", "3"])
    with pytest.raises(UserError, match="world size"):
        validate(resolve(config, world_size=7), 7, None)


def test_half_the_nodes_go_on_with_the_same_run(built):
    whole, half = (resolved(f"llama3_70b_{size}")[0] for size in ("64x8", "32x8"))
    lines = difference(whole, half)
    assert sorted(line.split()[0].rstrip(":") for line in lines) == [
        "cluster.nodes",
        "parallelism.data_parallel_replicate_degree",
    ]
    assert all(line.startswith(tuple(built["may differ"])) for line in lines)
    assert whole.run.output_dir == half.run.output_dir
    assert whole.training.global_batch_size == half.training.global_batch_size


# -- the models torchtitan builds --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, dict]:
    """Facts of every config's model, and of torchtitan's own flavors, by name."""
    folder = tmp_path_factory.mktemp("built")
    names = [name for name in (*CPU_CONFIGS, *SHIPPED) if name != "stories3m" or os.environ.get("SGT_TITAN_ASSETS")]
    env = os.environ | {"SGT_TRUNKS": str(folder / "nothing"), "PYTHONPATH": str(REPO), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, __file__, str(folder / "facts.json"), *names],
        env=env,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "facts.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_model_is_built_at_its_world_size(name, built):
    facts, (config, _, world_size) = built[name], resolved(name)
    assert facts["world_size"] == world_size
    assert facts["trunk_is_frozen"] and facts["estimator_is_trained"]
    # A process alone shards nothing but an estimator that FSDP casts: a frozen trunk stays where it is.
    cast = "trunk." if name in SHIPPED else ""
    assert all(world_size == 1 and parameter.startswith(cast) for parameter in facts["unsharded_parameters"])
    recomputed = config.activation_checkpoint.mode == "full"
    assert facts["recomputed_blocks"] == (facts["blocks"] if recomputed else 0)
    assert facts["trunk_dtype"] == ("torch.bfloat16" if name in SHIPPED else "torch.float32")
    assert facts["estimator_dtype"] == "torch.float32"
    if name in PUBLISHED:
        assert facts["trunk_parameters"] == pytest.approx(PUBLISHED[name], rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_plan_counts_what_is_built(name, built):
    facts, result = built[name], plan(*resolved(name)[:2])
    assert result.trunk_parameters == facts["trunk_parameters"]
    assert result.estimator_parameters == facts["estimator_parameters"]
    assert result.memory.trunk == facts["trunk_bytes"]
    assert result.memory.estimator == facts["estimator_bytes"]
    assert result.memory.buffers == facts["rope_bytes"]
    assert result.layer_gathered == facts["layer_gathered"]
    assert result.model_flops_per_token == facts["model_flops"]
    assert result.hardware_flops_per_token == facts["hardware_flops"]


def test_experts_are_spread(built):
    """4 of 256 experts a rank, the hidden dimension over the 8 ranks that share them."""
    facts = built["deepseek_v3_64x8"]
    assert facts["experts"] == {"mesh": ["efsdp", "ep"], "local": [4, 256, 7168], "whole": [256, 2048, 7168]}
    assert facts["expert_layers"] == 58


@pytest.mark.parametrize("architecture", FLAVORS)
def test_architecture_is_torchtitans_flavor(architecture, built):
    ours, theirs = built["flavors"][architecture]
    assert ours.pop("rope") == pytest.approx(theirs.pop("rope"), abs=1e-3)  # float32 angles of thousands of radians
    assert ours == theirs


def test_r1_distill_qwen_is_qwen2_5_32b():
    """No flavor of torchtitan's; Qwen2.5 technical report, arXiv 2412.15115, table 1, and 31.0B without embeddings."""
    trunk = json.loads((CONFIGS / "trunks" / "deepseek-r1-distill-qwen-32b.json").read_text())
    assert (trunk["num_hidden_layers"], trunk["num_attention_heads"], trunk["num_key_value_heads"]) == (64, 40, 8)
    embeddings = 2 * trunk["vocab_size"] * trunk["hidden_size"]
    assert from_name("deepseek_r1_qwen_32b_64x8").trunk_parameters - embeddings == pytest.approx(31.0e9, rel=0.01)


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def test_memory_page_is_current():
    page = (REPO / "docs" / "MEMORY.md").read_text()
    assert summary(SHIPPED) in page, "docs/MEMORY.md: replace its tables by the output of `sgt-titan plan`"


def test_plan_of_one_config_by_hand():
    """Llama-3.3-70B on 64 x 8, from the numbers of its config.json."""
    result = from_name("llama3_70b_64x8")
    width, hidden, vocabulary = 8192, 28672, 128256
    layer = 2 * width * width + 2 * width * 1024 + 3 * width * hidden + 2 * width
    assert result.trunk_parameters == 80 * layer + 2 * vocabulary * width + width
    estimator = 2 * layer + width + 2 * (width * width + width)
    denoiser = 2 * layer + width + (width * width + width) + width
    assert result.estimator_parameters == estimator + denoiser
    assert result.checkpoint_bytes == 12 * result.estimator_parameters
    assert result.layer_gathered == 2 * ((layer - 2 * width) // 8 + 2 * width)
    assert result.memory.saved == 84 * 2 * (8 * 2048 * width) // 8
    assert (result.microbatches, result.tokens_per_step) == (1, 512 * 2048)
    matmul = 80 * layer + vocabulary * width + width + result.estimator_parameters
    work = 6 * matmul + 2 * (80 + 4) * layer  # all layers are recomputed, lm_head and the heads are not
    assert (result.model_flops_per_token, result.hardware_flops_per_token) == (6 * matmul, work)
    assert result.seconds_per_step == pytest.approx(work * 512 * 2048 / (512 * 312e12 * 0.4))


def test_70b_does_not_fit_one_node_without_sharing_it():
    one = ["--parallelism.tensor_parallel_degree", "1", "--cluster.gpus_per_node", "1"]
    assert from_name("llama3_70b_1x8").fits
    assert not from_name("llama3_70b_1x8", one).fits


def test_half_the_nodes_take_twice_as_long():
    whole, half = from_name("llama3_70b_64x8"), from_name("llama3_70b_32x8")
    assert half.seconds_per_step == pytest.approx(2 * whole.seconds_per_step)
    assert half.microbatches == 2 * whole.microbatches
    assert half.memory == whole.memory


# -- run as a script: build --------------------------------------------------------------------------------------------


def _facts(name: str) -> dict:
    import torch
    import torch.distributed as dist
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.placement_types import _StridedShard
    from torchtitan.distributed import utils as dist_utils
    from transformers import CONFIG_MAPPING

    from sgt_titan.titan import cpu_support
    from sgt_titan.titan.build import meta_model, parallelize
    from sgt_titan.titan.flops import hardware_flops_per_token, model_flops_per_token

    cpu_support.install()
    config, trunk, world_size = resolved(name)
    if name in SHIPPED:
        config.trunk.dtype = "bfloat16"  # what auto means on the GPUs it was sized for
    hf = CONFIG_MAPPING[trunk["model_type"]].from_dict(trunk)
    dist_utils.init_fake_mode(world_size)
    try:
        model, trainer, dims = meta_model(config, hf, scale=1.0, world_size=world_size)
        recomputed = config.activation_checkpoint.mode == "full"
        facts = {
            "world_size": dist.get_world_size(),
            "trunk_parameters": sum(p.numel() for p in model.trunk.parameters()),
            "estimator_parameters": sum(p.numel() for p in model.estimator.parameters()),
            "model_flops": model_flops_per_token(model),
            "hardware_flops": hardware_flops_per_token(model, full_recompute=recomputed),
            "blocks": len(model.trunk.layers) + sum(len(body.layers) for body in model.estimator.every_body()),
        }
        parallelize(model, trainer, dims)

        def local_bytes(module) -> int:
            return sum(getattr(p, "_local_tensor", p).numel() * p.element_size() for p in module.parameters())

        def gathered(p: torch.Tensor) -> int:
            """Bytes once FSDP has gathered it: what tensor and expert parallelism leave to a rank."""
            if not isinstance(p, DTensor):
                return p.numel() * p.element_size()
            split = [
                p.device_mesh.size(i)
                for i, (axis, placement) in enumerate(zip(p.device_mesh.mesh_dim_names, p.placements, strict=True))
                if axis in ("tp", "ep") and isinstance(placement, Shard | _StridedShard)
            ]
            return p.numel() * p.element_size() // (split[0] if split else 1)

        parameters = dict(model.named_parameters())
        experts = [p for n, p in parameters.items() if n.endswith("w1_EFD")]
        facts |= {
            "trunk_is_frozen": not any(p.requires_grad for p in model.trunk.parameters()),
            "estimator_is_trained": all(p.requires_grad for p in model.estimator.parameters()),
            "unsharded_parameters": [n for n, p in parameters.items() if not isinstance(p, DTensor)],
            "recomputed_blocks": sum(isinstance(m, CheckpointWrapper) for m in model.modules()),
            "trunk_dtype": str(model.trunk.norm.block.weight.dtype),
            "estimator_dtype": str(model.estimator.mean_head.weight.dtype),
            "trunk_bytes": local_bytes(model.trunk),
            "estimator_bytes": local_bytes(model.estimator),
            "rope_bytes": sum(
                b.numel() * b.element_size() for n, b in model.named_buffers() if n.endswith("rope.cache")
            ),
            "layer_gathered": max(sum(map(gathered, layer.parameters())) for layer in model.trunk.layers.values()),
            "expert_layers": len(experts),
        }
        if experts:
            mesh, local, whole = experts[0].device_mesh.mesh_dim_names, experts[0].to_local().shape, experts[0].shape
            facts["experts"] = {"mesh": list(mesh), "local": list(local), "whole": list(whole)}
        return facts
    finally:
        dist.destroy_process_group()


def _flavor(architecture: str) -> list[dict]:
    """What can be compared of our decoder and of torchtitan's flavor, each."""
    import importlib

    import torch
    from transformers import CONFIG_MAPPING

    from sgt_titan.titan.trunks import build

    trunk = json.loads((CONFIGS / "trunks" / f"{architecture}.json").read_text())
    family, flavor = FLAVORS[architecture]
    package = importlib.import_module(f"torchtitan.models.{family}")
    options = {"attn_backend": "flex"} | ({"moe_comm_backend": "standard"} if family == "deepseek_v3" else {})
    ours = build(CONFIG_MAPPING[trunk["model_type"]].from_dict(trunk), "flex")
    theirs = package.model_registry(flavor, **options).model

    def facts(decoder) -> dict:
        with torch.device("meta"):
            model = decoder.build()
        first, last = decoder.layers[0], decoder.layers[-1]
        attention, moe = first.attention, getattr(last, "moe", None)
        facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "vocabulary, width": tuple(model.lm_head.weight.shape),
            "tied": bool(decoder.enable_weight_tying),
            "layers": len(decoder.layers),
            "heads": (attention.n_heads, getattr(attention, "n_kv_heads", None)),
            "hidden": tuple(model.layers["0"].feed_forward.w1.weight.shape),
            "eps": first.attention_norm.eps if family == "qwen3" else None,
        }
        if family == "deepseek_v3":
            names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "mscale")
            facts |= {name: getattr(attention, name) for name in names}
            names = ("top_k", "num_expert_groups", "num_limited_groups", "route_scale", "route_norm", "score_func")
            facts |= {name: getattr(moe.router, name) for name in names} | {
                "experts": moe.num_experts,
                "dense": sum(layer.moe is None for layer in decoder.layers),
                "softmax scale": model.layers["0"].attention.softmax_scale,
            }
        # torchtitan's 1B flavor keeps Llama 3.1's rope factor 8, where Llama 3.2's is 32.
        facts["rope"] = [] if architecture == "llama-3.2-1b-instruct" else _angles(attention.rope)
        return facts

    return json.loads(json.dumps([facts(ours), facts(theirs)]))


def _angles(rope) -> list[float]:
    """cos of every frequency at positions 1, 100 and 10,000 in whatever layout the cache has."""
    import dataclasses

    import torch

    module = dataclasses.replace(rope, max_seq_len=10_001).build()
    cache = module.cache.real if torch.is_complex(module.cache) else module.cache[:, : rope.dim // 2]
    return cache[[1, 100, 10_000]].flatten().tolist()


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    os.environ.setdefault("SGT_TRUNKS", "nothing")
    everything = {name: _facts(name) for name in names}
    from sgt_titan.cluster.directory import MAY_DIFFER

    everything["may differ"] = MAY_DIFFER
    everything["flavors"] = {architecture: _flavor(architecture) for architecture in FLAVORS}
    Path(out).write_text(json.dumps(everything))
