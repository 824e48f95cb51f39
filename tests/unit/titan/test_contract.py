"""What we rely on in torchtitan 0.3.0 and in torch's private parts. A failure here names what moved.

torchtitan promises nothing between versions, so every name that the plugin subclasses, overrides, replaces or calls by
its private name is here with the part of its signature that is used.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torchtitan
from torch import nn

from sgt_titan.titan import cpu_support

FOLDER = Path(cpu_support.__file__).parent

# "module:qualified name" -> parameters that we pass by position or by name, or that our override is given
SIGNATURES = {
    # overridden or replaced: the whole list, in order
    "torchtitan.trainer:Trainer._forward_backward_body": "self inputs labels global_valid_tokens extra_kwargs",
    "torchtitan.trainer:Trainer.train_step": "self data_iterator",
    "torchtitan.trainer:Trainer.train": "self",
    "torchtitan.trainer:Trainer.close": "self",
    "torchtitan.trainer:Trainer.Config.to_dict": "self",
    "torchtitan.components.metrics:MetricsProcessor.log": (
        "self step global_avg_loss global_max_loss grad_norm extra_metrics"
    ),
    "torchtitan.components.optimizer:OptimizersContainer.step": "self closure",
    "torchtitan.components.optimizer:OptimizersContainer.__init__": "self config model_parts",
    "torchtitan.components.checkpointer.base:BaseCheckpointManager._save": "self curr_step last_step",
    "torchtitan.components.checkpointer.base:BaseCheckpointManager._load": "self step",
    "torchtitan.components.checkpointer.base:BaseCheckpointManager._close": "self",
    "torchtitan.components.checkpointer.base:BaseCheckpointManager._wait_for_saving": "self",
    "torchtitan.components.checkpointer.base:BaseCheckpointManager._maybe_wait_for_staging": "self",
    "torchtitan.protocols.module:Module.init_states": "self buffer_device",
    "torchtitan.protocols.module:Module.parallelize": "self parallel_dims",
    "torchtitan.models.common.rope:CosSinRoPE._precompute_cache": "self",
    "torchtitan.models.common.rope:ComplexRoPE._precompute_cache": "self",
    "torchtitan.distributed.utils:set_pg_timeouts": "timeout parallel_dims",
    "torchtitan.tools.utils:get_peak_flops": "device_name",
    # called
    "torchtitan.components.checkpointer.utils:canonical_fqn": "name prefixes",
    "torchtitan.distributed:ParallelDims.get_mesh": "self dims",
    "torchtitan.distributed:ParallelDims.get_all_one_dimensional_meshes": "self",
    "torchtitan.distributed.fsdp:disable_fsdp_gradient_division": "model",
    "torchtitan.distributed.fsdp:get_fsdp_reshard_after_forward_policy": "reshard_after_forward_policy pp_enabled",
    "torchtitan.models.common.decoder_sharding:norm_config": "enable_sp",
    "torchtitan.models.common.decoder_sharding:dense_param_placement": "tp",
    "torchtitan.models.common.decoder_sharding:dense_sequence_parallel_placement": "",
    "torchtitan.models.common.decoder:Decoder.get_attention_masks": "self positions",
    "torch._dynamo:maybe_mark_dynamic": "t index",
    "torch.distributed.distributed_c10d:_set_pg_timeout": "timeout group",
    "transformers.utils.import_utils:create_import_structure_from_path": "module_path",
    "torch.distributed.fsdp._fully_shard._fsdp_init:_get_mesh_info": "mesh dp_mesh_dims",
    "torch.distributed.fsdp:FSDPModule.set_modules_to_backward_prefetch": "self modules",
    "torch.distributed.fsdp:FSDPModule.set_force_sum_reduction_for_comms": "self enable",
}
# a part of the list is enough
ACCEPTS = {
    "torchtitan.components.metrics:MetricsProcessor.__init__": "config parallel_dims dump_folder config_dict",
    "torchtitan.components.metrics:MetricsProcessor._build_metric_logger": "config dump_folder config_dict",
    "torchtitan.components.metrics:WandBLogger.__init__": "log_dir config_dict",
    "torchtitan.distributed:ParallelDims.get_optional_mesh": "dims",
    "torchtitan.distributed.activation_checkpoint:FullAC._wrap_block": "module base_fqn",
    "torchtitan.distributed.activation_checkpoint:SelectiveAC._wrap_block": "module base_fqn",
    "torchtitan.distributed.activation_checkpoint:FullAC.apply": "model",
    "torchtitan.models.common.config_utils:make_gqa_config": (
        "dim n_heads n_kv_heads head_dim wqkv_param_init wo_param_init inner_attention rope qk_norm"
    ),
    "torchtitan.models.common.config_utils:make_ffn_config": "dim hidden_dim w1_param_init w2w3_param_init",
    "torchtitan.models.common.decoder_sharding:dense_activation_placement": "tp",
    "torch.distributed.fsdp:fully_shard": "mesh reshard_after_forward shard_placement_fn mp_policy ignored_params",
    "torch.distributed.fsdp._fully_shard._fsdp_common:ShardPlacementResult": "placement mesh_info",
    "torch.distributed.tensor._utils:compute_local_shape_and_global_offset": "global_shape mesh placements",
    "torchtitan.models.common.linear:Linear.Config.traverse": "config_cls",
    "torch.nn.functional:scaled_mm": (
        "mat_a mat_b scale_a scale_recipe_a scale_b scale_recipe_b output_dtype use_fast_accum"
    ),
    "torch.distributed.checkpoint:HuggingFaceStorageWriter": "path save_distributed",
    "torch.distributed.checkpoint:HuggingFaceStorageReader": "path",
    "torchtitan.models.deepseek_v3:build_mla_moe_layers": (
        "n_layers n_dense_layers q_lora_rank mscale router_score_func router_num_expert_groups "
        "router_num_limited_groups router_route_scale router_route_norm attn_backend moe_comm_backend rope"
    ),
}
# what is counted, by group and name
COUNTERS = ("torch._dynamo.utils:counters",)
FIELDS = {
    "torchtitan.trainer:Trainer.Config": (
        "model_spec hf_assets_path dump_folder metrics dataloader optimizer lr_scheduler training parallelism "
        "checkpoint activation_checkpoint compile validator comm debug loss"
    ),
    "torchtitan.protocols.model_spec:ModelSpec": (
        "name flavor model parallelize_fn pipelining_fn post_optimizer_build_fn state_dict_adapter"
    ),
    "torchtitan.config.configs:TrainingConfig": (
        "steps seq_len local_batch_size global_batch_size max_norm mixed_precision_param disable_cuda_graphs"
    ),
    "torchtitan.config.configs:ParallelismConfig": (
        "data_parallel_replicate_degree data_parallel_shard_degree tensor_parallel_degree enable_sequence_parallel "
        "expert_parallel_degree fsdp_reshard_after_forward spmd_backend"
    ),
    "torchtitan.config.configs:CommConfig": "init_timeout_seconds train_timeout_seconds mode",
    "torchtitan.config.configs:DebugConfig": "seed deterministic print_config",
    "torchtitan.config.configs:CompileConfig": "enable components backend",
    "torchtitan.components.checkpointer.base:BaseCheckpointManager.Config": (
        "enable interval keep_latest_k load_only load_step"
    ),
    "torchtitan.components.metrics:MetricsProcessor.Config": "log_freq enable_tensorboard enable_wandb",
    "torchtitan.components.optimizer:OptimizersContainer.Config": "param_groups implementation",
    "torchtitan.components.optimizer:ParamGroupConfig": "pattern optimizer_name optimizer_kwargs",
    "torchtitan.components.optimizer:LRSchedulersContainer.Config": (
        "warmup_steps decay_ratio decay_type min_lr_factor"
    ),
    "torchtitan.models.common.decoder:Decoder.Config": (
        "dim vocab_size enable_weight_tying tok_embeddings norm lm_head layers"
    ),
    "torchtitan.models.common.linear:Linear.Config": "in_features out_features bias param_init sharding_config",
    "torchtitan.protocols.sharding:ShardingConfig": "state_shardings in_src_shardings out_src_shardings",
}


def resolve(name: str):
    module, _, path = name.partition(":")
    found = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def parameters(name: str) -> list[str]:
    return list(inspect.signature(resolve(name)).parameters)


def test_versions():
    assert torchtitan.__version__ == "0.3.0"
    assert tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 13)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    assert parameters(name) == SIGNATURES[name].split()


@pytest.mark.parametrize("name", ACCEPTS)
def test_parameters(name):
    missing = set(ACCEPTS[name].split()) - set(parameters(name))
    # fully_shard is wrapped in a decorator that hides nothing but types
    assert not missing, f"{name} no longer takes {sorted(missing)}"


@pytest.mark.parametrize("name", COUNTERS)
def test_counters(name):
    assert resolve(name)["nobody's group"]["nobody's name"] == 0


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    missing = set(FIELDS[name].split()) - {field.name for field in dataclasses.fields(resolve(name))}
    assert not missing, f"{name} no longer has {sorted(missing)}"


def test_options_that_are_written_through_exist():
    """Every torchtitan option in the table of shared options is a field of its config."""
    from torchtitan.trainer import Trainer

    from sgt_titan.config.keys import keys
    from sgt_titan.titan.options import SHARED

    flat = {field.name for field in dataclasses.fields(Trainer.Config)}
    for ours, theirs in SHARED.items():
        assert ours in keys(), ours
        section, _, leaf = theirs.rpartition(".")
        if not section:
            assert leaf in flat
            continue
        default = next(f for f in dataclasses.fields(Trainer.Config) if f.name == section).default_factory()
        assert hasattr(default, leaf), theirs


def imported_names() -> set[tuple[str, str]]:
    """(module, name) of every import from torchtitan, or from private modules of torch, in the plugin."""
    found = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                private = any(part.startswith("_") for part in node.module.split("."))
                for alias in node.names:
                    if node.module.startswith("torchtitan") or (
                        node.module.startswith("torch") and (private or alias.name.startswith("_"))
                    ):
                        found.add((node.module, alias.name))
    return found


def test_every_imported_name_exists():
    names = imported_names()
    assert len(names) > 40
    for module, name in names:
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_private_names_of_torch_are_on_this_page():
    listed = {(name.partition(":")[0], name.partition(":")[2]) for name in (*SIGNATURES, *ACCEPTS, *COUNTERS)}
    private = {(module, name) for module, name in imported_names() if not module.startswith("torchtitan")}
    assert private - listed <= {("torch.distributed.checkpoint._hf_utils", name) for _, name in private}
    assert {name for _, name in private} >= {"_set_pg_timeout", "_get_mesh_info", "ShardPlacementResult"}


def test_attributes_of_a_metrics_processor():
    """Set by torchtitan's trainer or constructor, read by our ``log``."""
    from torchtitan.components.metrics import MetricsProcessor

    constructor = inspect.getsource(MetricsProcessor.__init__)
    for name in ("ntokens_since_last_log", "data_loading_times", "time_last_log", "num_flops_per_token",
                 "gpu_peak_flops", "device_memory_monitor", "parallel_dims", "logger", "optimizers"):  # fmt: skip
        assert f"self.{name} = " in constructor, name
    from torchtitan.trainer import Trainer

    step, init = inspect.getsource(Trainer.train_step), inspect.getsource(Trainer.__init__)
    assert "self.metrics_processor.log(" in step and "self.metrics_processor.optimizers = self.optimizers" in init
    assert "self.fwd_bwd_fn = self._forward_backward_body" in init


def test_order_of_a_training_step():
    """Clip, step, schedule; the loss is checked only where it is logged, which is why the optimizer guards."""
    from torchtitan.trainer import Trainer

    source = inspect.getsource(Trainer.train_step)
    marks = ["zero_grad", "forward_backward_step", "clip_grad_norm_", "self.optimizers.step()",
             "self.lr_schedulers.step()", "if not should_log:", "math.isfinite(global_avg_loss)",
             "self.metrics_processor.log("]  # fmt: skip
    places = [source.index(mark) for mark in marks]
    assert places == sorted(places)


def test_checkpoint_manager_has_no_other_abstract_methods():
    from torchtitan.components.checkpointer.base import BaseCheckpointManager

    abstract = {"_save", "_load", "_close", "_wait_for_saving", "_maybe_wait_for_staging"}
    assert BaseCheckpointManager.__abstractmethods__ == abstract


def test_recomputation_wraps_under_the_name_that_canonical_fqn_strips():
    from torchtitan.components.checkpointer.utils import canonical_fqn
    from torchtitan.distributed.activation_checkpoint import FullAC

    wrapped = FullAC.Config().build(dump_folder="")._wrap_block(nn.Linear(2, 2), base_fqn="layers.0")
    names = [name for name, _ in nn.ModuleDict({"block": wrapped}).named_parameters()]
    assert names == ["block._checkpoint_wrapped_module.weight", "block._checkpoint_wrapped_module.bias"]
    assert [canonical_fqn(name) for name in names] == ["block.weight", "block.bias"]


def test_initialiser_table_is_looked_up_by_parameter_name():
    """``SGTModel.init_states`` replaces it, to leave frozen weights alone."""
    from torchtitan.models.common import Linear

    seen = []
    linear = Linear.Config(in_features=2, out_features=3, bias=True).build()
    linear._param_init = {
        "weight": lambda p: seen.append(tuple(p.shape)),
        "bias": lambda p: seen.append(tuple(p.shape)),
    }
    linear.init_states()
    assert seen == [(3, 2), (3,)]


def test_router_and_experts_have_the_names_that_are_read():
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter

    sources = [inspect.getsource(c) for c in (GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter)]
    for source, names in zip(
        sources,
        (("num_experts", "w1_EFD", "w2_EDF", "w3_EFD"), ("router", "routed_experts", "expert_bias_E"),
         ("inner_experts",), ("top_k", "gate")),
        strict=True,
    ):  # fmt: skip
        assert all(f"self.{name} = " in source or f'"{name}"' in source for name in names)


def test_cpu_support_is_in_place():
    import torchtitan.distributed.utils as dist_utils
    import torchtitan.tools.utils as tools

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: nothing is replaced")
    cpu_support.install()
    assert tools.device_type == "cpu"
    for name in ("get_device_name", "get_device_properties", "memory_stats", "reset_peak_memory_stats", "empty_cache",
                 "device_count", "current_device", "set_device", "synchronize"):  # fmt: skip
        assert callable(getattr(tools.device_module, name)), name
    assert dist_utils.set_pg_timeouts is cpu_support.set_pg_timeouts
    for name in ("device_type", "device_module"):  # bound again by the modules that use them
        for module in ("torchtitan.trainer", "torchtitan.components.metrics", "torchtitan.distributed.utils"):
            found = vars(importlib.import_module(module)).get(name, getattr(tools, name))
            assert found is getattr(tools, name) or found == getattr(tools, name), (module, name)
    before = tools.device_module
    cpu_support.install()
    assert tools.device_module is before


def test_timeouts_can_be_set_on_gloo(gloo):
    from datetime import timedelta

    from torchtitan.config.configs import ParallelismConfig
    from torchtitan.distributed import ParallelDims

    cpu_support.install()
    dims = ParallelDims.from_config(ParallelismConfig(), 1)
    dims.build_mesh()
    cpu_support.set_pg_timeouts(timedelta(seconds=7), dims)


def test_plugin_seam():
    """``--module sgt_titan --config NAME`` looks NAME up in ``sgt_titan.config_registry``."""
    from torchtitan.config.manager import ConfigManager

    source = inspect.getsource(ConfigManager)
    assert "config_registry" in source
    registry = importlib.import_module("sgt_titan.config_registry")
    assert callable(registry.demo) and "demo" in dir(registry)
