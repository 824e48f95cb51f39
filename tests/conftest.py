"""What tests of several areas share: small random checkpoints of every trunk family, rows to train on, one process."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import bare_trunks

VOCABULARY, WIDTH = 300, 32


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    """An fsync takes 20 ms and more, and the suite has thousands; tests/unit/test_disk.py causes those that fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
_MLA = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
_MOE = _MLA | {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}

# Name -> (model_type, what differs from the common configuration). Norm eps is never a default.
TRUNKS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _ATTENTION),
    "llama-tied": ("llama", _ATTENTION | {"tie_word_embeddings": True}),
    "llama-llama3-rope": ("llama", _ATTENTION | {"rope_parameters": _LLAMA3_ROPE, "head_dim": 16}),
    "llama-yarn": ("llama", _ATTENTION | {"rope_parameters": {k: v for k, v in _YARN.items() if "mscale" not in k}}),
    "llama-linear": (
        "llama",
        _ATTENTION | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen2": ("qwen2", _ATTENTION),
    "mistral": ("mistral", _ATTENTION | {"sliding_window": None, "head_dim": 16}),
    "smollm3": ("smollm3", _ATTENTION | {"no_rope_layers": [1, 0, 1], "pad_token_id": 1, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", _ATTENTION | {"head_dim": 16}),
    "qwen3-tied": ("qwen3", _ATTENTION | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-moe": (
        "qwen3_moe",
        _ATTENTION
        | {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "deepseek-dense": ("deepseek_v3", _MOE | {"q_lora_rank": 16, "first_k_dense_replace": 3}),
    "deepseek-dense-yarn": (
        "deepseek_v3",
        # Other than DeepSeek's own: with equal mscales the factor on cos and sin is 1 and cannot be wrong.
        _MOE | {"q_lora_rank": 16, "first_k_dense_replace": 3, "rope_parameters": _YARN | {"mscale_all_dim": 0.7}},
    ),
    "deepseek": ("deepseek_v3", _MOE | {"q_lora_rank": 16, "n_group": 1, "topk_group": 1}),
    "deepseek-groups": ("deepseek_v3", _MOE | {"q_lora_rank": 16, "n_group": 4, "topk_group": 2}),
    "deepseek-no-q-lora": ("deepseek_v3", _MOE | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek-yarn": (
        "deepseek_v3",
        _MOE | {"q_lora_rank": 16, "n_group": 1, "topk_group": 1, "rope_parameters": _YARN},
    ),
}


def trunk_config(name: str):
    """Hugging Face config of a trunk of the table."""
    from transformers import AutoConfig

    model_type, options = TRUNKS[name]
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    return AutoConfig.for_model(model_type, **(common | options))


def write_trunk(path: Path, name: str, *, max_shard_size: str = "5GB") -> Path:
    """A random checkpoint with a tokenizer; no norm, bias or router bias is what it is initialised to."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(trunk_config(name), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, tensor in {**dict(model.named_parameters()), **dict(model.named_buffers())}.items():
            if not tensor.is_floating_point() or "inv_freq" in key:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if key.endswith("norm.weight"):
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.dim() == 1:
                tensor.copy_(0.3 * noise)
            else:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def bare_trunk() -> Callable[..., dict]:
    """``bare_trunk(path, **changes)``: a config.json and weights that are all zero, for what reads headers alone."""
    return bare_trunks.write_bare_trunk


def write_tokenizer(path: Path) -> None:
    """Bytes and two special tokens: 258 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>"])
    path.mkdir(parents=True, exist_ok=True)
    core.save(str(path / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(about))


@pytest.fixture(scope="session")
def trunk_dir(tmp_path_factory) -> Callable[..., Path]:
    """``trunk_dir(name)``: directory of a checkpoint of ``TRUNKS``, written once a session. Do not change its files."""
    made: dict[tuple[str, str], Path] = {}

    def make(name: str, max_shard_size: str = "5GB") -> Path:
        key = (name, max_shard_size)
        if key not in made:
            made[key] = write_trunk(tmp_path_factory.mktemp(name), name, max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture(scope="session")
def trunk_kinds() -> dict[str, str]:
    """Name -> model_type of ``TRUNKS``."""
    return {name: kind for name, (kind, _) in TRUNKS.items()}


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> Path:
    """60 rows of instruction, input and output, of different lengths."""
    rows = [
        {"instruction": f"say {i}", "input": "abc " * (i % 4 + 1), "output": f"it is {i * i} " * (i % 3 + 1)}
        for i in range(60)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def make_run(trunk_dir, rows_file, tmp_path_factory):
    """``make_run(overrides..., trunk=name)``: the resolved config of a small run in a directory of its own."""

    cache = tmp_path_factory.mktemp("cache")

    def make(*overrides: str, trunk: str = "llama", world_size: int = 1):
        from sgt_titan.train import prepared

        folder = tmp_path_factory.mktemp("run")
        options = {
            "trunk": {"path": str(trunk_dir(trunk))},
            "run": {"name": "small", "output_dir": str(folder / "out")},
            "data": {"source": str(rows_file), "cache_dir": str(cache), "template": "plain"},
            "training": {"steps": 3, "seq_len": 64, "local_batch_size": 2, "global_batch_size": 4},
            "estimator": {"layers": 1},
            "lr_scheduler": {"warmup_steps": 1},
            "metrics": {"tensorboard": False, "log_every": 1, "probe_every": 0, "probe_samples": 4},
        }
        file = folder / "small.yaml"
        file.write_text(json.dumps(options))  # JSON is YAML
        return prepared(str(file), list(overrides), world_size)

    return make


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """torchrun's environment of one process, and no process group left behind."""
    import torch.distributed as dist

    ours = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    before = {key: os.environ.get(key) for key in ours}
    os.environ.update(ours)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    for key, value in before.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value


@pytest.fixture(scope="module")
def gloo(one_process) -> Iterator[None]:
    """A process group of one."""
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=0, world_size=1)
    yield


@pytest.fixture
def assets() -> Path:
    """The folder of real data and models; the test is skipped where there is none."""
    if "SGT_TITAN_ASSETS" not in os.environ:
        pytest.skip("SGT_TITAN_ASSETS is not set")
    return Path(os.environ["SGT_TITAN_ASSETS"])
