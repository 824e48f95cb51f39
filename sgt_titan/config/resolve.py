"""Defaults that depend on other options, and checks across options. No torch.

What needs the data (steps from epochs, ``format: auto``), the tokenizer (``template: auto``) or the device
(``dtype: auto``) stays as it is; everything else is explicit after ``resolve``.
"""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sgt_titan.config.keys import get
from sgt_titan.config.paths import expand, unset
from sgt_titan.config.schema import PRESETS, SOURCE_KEYS, TERMS, Config, Data, Term
from sgt_titan.errors import UserError
from sgt_titan.trunk.check import check_checkpoint
from sgt_titan.trunk.families import FAMILIES, check_config, expert_count
from sgt_titan.trunk.files import CONFIG, check_folder, holds_weights, read_json
from sgt_titan.trunk.quantisation import scheme_of

_PATHS = ("run.output_dir", "trunk.path", "trunk.architecture", "data.source", "data.cache_dir", "teacher_cache.dir")
_DATA_FIELDS = (
    "text",
    "system",
    "instruction",
    "input",
    "output",
    "history",
    "messages",
    "tools",
    "private",
    "role",
    "content",
)

# Entries of config.json that change a weight's shape; `path` and `architecture` must agree on them.
_SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)

# key: (what must hold, in words; test)
_RANGES = {
    "cluster.nodes": ("at least 1", lambda v: v >= 1),
    "cluster.gpus_per_node": ("at least 1", lambda v: v >= 1),
    "run.name": (
        "a name that is not empty, without / and not . or .. (run.output_dir says where else)",
        lambda v: bool(v.strip()) and "/" not in v and "\0" not in v and v not in (".", "..") and not v.startswith("~"),
    ),
    "run.seed": ("0 or more", lambda v: v >= 0),
    "estimator.layers": ("at least 1", lambda v: v >= 1),
    "estimator.mean_bound": ("0 (unbounded) or more", lambda v: v >= 0),
    "denoiser.layers": ("0 (none) or more", lambda v: v >= 0),
    "objective.rate.tau": ("above 0", lambda v: v > 0),
    "objective.rate.private": ("above 0", lambda v: v > 0),
    "objective.rate.context_layers": ("at least 1", lambda v: v >= 1),
    "objective.rate.context_rank": ("at least 1", lambda v: v >= 1),
    "objective.mi_group": ("0 (automatic) or at least 2", lambda v: v == 0 or v >= 2),
    "data.max_bad_share": ("between 0 and 1", lambda v: 0 <= v <= 1),
    "data.prompt_tokens": ("0 or more", lambda v: v >= 0),
    "data.min_prompt_tokens": ("0 or more", lambda v: v >= 0),
    "data.max_samples": ("0 (all) or more", lambda v: v >= 0),
    "data.validation_samples": ("0 or more", lambda v: v >= 0),
    "teacher_cache.top_k": ("0 (off) or at least 1", lambda v: v >= 0),
    "training.steps": ("0 (from epochs) or more", lambda v: v >= 0),
    "training.seq_len": ("at least 2", lambda v: v >= 2),
    "training.local_batch_size": ("at least 1", lambda v: v >= 1),
    "training.global_batch_size": ("-1 (no accumulation) or at least 1", lambda v: v == -1 or v >= 1),
    "training.loss_chunk_tokens": ("0 (automatic) or at least 1", lambda v: v >= 0),
    "training.max_norm": ("above 0", lambda v: v > 0),
    "training.max_nonfinite_steps": ("at least 1", lambda v: v >= 1),
    "optimizer.lr": ("above 0", lambda v: v > 0),
    "optimizer.beta1": ("in [0, 1)", lambda v: 0 <= v < 1),
    "optimizer.beta2": ("in [0, 1)", lambda v: 0 <= v < 1),
    "optimizer.eps": ("above 0", lambda v: v > 0),
    "optimizer.weight_decay": ("0 or more", lambda v: v >= 0),
    "lr_scheduler.warmup_steps": ("0 or more", lambda v: v >= 0),
    "lr_scheduler.decay_ratio": ("in [0, 1]", lambda v: v is None or 0 <= v <= 1),
    "lr_scheduler.min_lr_factor": ("in [0, 1]", lambda v: 0 <= v <= 1),
    "parallelism.data_parallel_replicate_degree": ("at least 1, or -1", lambda v: v >= 1 or v == -1),
    "parallelism.data_parallel_shard_degree": ("-1 (what is left) or at least 1", lambda v: v == -1 or v >= 1),
    "parallelism.tensor_parallel_degree": ("at least 1", lambda v: v >= 1),
    "parallelism.expert_parallel_degree": ("at least 1", lambda v: v >= 1),
    "checkpoint.interval": ("at least 1", lambda v: v >= 1),
    "checkpoint.keep_latest": (
        "0 (all) or at least 2, since with 1 the only checkpoint is lost when a save is interrupted",
        lambda v: v == 0 or v >= 2,
    ),
    "metrics.log_every": ("at least 1", lambda v: v >= 1),
    "metrics.probe_every": ("0 (never) or more", lambda v: v >= 0),
    "metrics.probe_samples": ("at least 1", lambda v: v >= 1),
    "comm.init_timeout_seconds": ("at least 1", lambda v: v >= 1),
    "comm.train_timeout_seconds": ("at least 1", lambda v: v >= 1),
    **{f"objective.{term}.weight": ("0 or more", lambda v: v is None or v >= 0) for term in TERMS},
    **{f"objective.{term}.start": ("0 or more", lambda v: v >= 0) for term in TERMS},
    **{f"objective.{term}.ramp_steps": ("0 or more", lambda v: v >= 0) for term in TERMS},
}


def resolve(config: Config, *, world_size: int | None, home: str = "outputs") -> Config:
    """A copy of the config in which defaults that depend on other options are explicit.

    Fills ``run.name`` (environment variables, such as an array's task), ``run.output_dir`` (below ``home``),
    ``data.cache_dir``, ``data.source`` and ``trunk`` paths (environment variables,
    ``~``, ``trunk.path: demo``), the weights of the terms (explicit ones win over the preset's, the rest are
    0), ``objective.mi_group``, and, when the world size is known and fits, the shard degree and
    the global batch size. Resolving a resolved config changes nothing.

    Raises:
        UserError: a path names an environment variable that is not set (``trunk.path`` may, with an ``architecture``).
    """
    config = copy.deepcopy(config)
    run, data, training = config.run, config.data, config.training
    if "$" in run.name:
        run.name = expand(run.name, "run.name")
    for key in _PATHS:
        if key == "trunk.path" and config.trunk.architecture and unset(config.trunk.path):
            continue  # dry runs and arithmetic do without the trunk; `read_trunk` says it to the others
        section, name = key.split(".")
        setattr(getattr(config, section), name, expand(get(config, key), key))
    for key, table in _source_tables(data):
        if "source" in table:
            table["source"] = expand(table["source"], f"{key}.source")
    if config.trunk.path == "demo":
        config.trunk.path = str(Path(__file__).resolve().parents[1] / "demo" / "trunk")
    if config.trunk.architecture:
        config.trunk.architecture = os.path.abspath(config.trunk.architecture)
    run.output_dir = run.output_dir or os.path.join(home, run.name)
    data.cache_dir = cache_dir(config, home)

    preset = PRESETS.get(config.objective.preset, {})
    for name in TERMS:
        term: Term = getattr(config.objective, name)
        term.weight = preset.get(name, 0.0) if term.weight is None else term.weight
    config.objective.mi_group = config.objective.mi_group or max(2, training.local_batch_size)

    if world_size is not None and not list(_degree_problems(config, world_size)):
        degree = dp_degree(config, world_size)
        p = config.parallelism
        if p.data_parallel_replicate_degree == -1:
            p.data_parallel_replicate_degree = degree // p.data_parallel_shard_degree
        p.data_parallel_shard_degree = degree // p.data_parallel_replicate_degree
        if training.global_batch_size == -1:
            training.global_batch_size = training.local_batch_size * degree
    return config


def cache_dir(config: Config, home: str = "outputs") -> str:
    """``data.cache_dir``, resolved or not: beside the run's directory unless it is set.

    Raises:
        UserError: a path names an environment variable that is not set.
    """
    if config.data.cache_dir:
        return expand(config.data.cache_dir, "data.cache_dir")
    output = config.run.output_dir or os.path.join(home, config.run.name)
    return os.path.normpath(os.path.join(expand(output, "run.output_dir"), "..", ".cache", "data"))


def validate(
    config: Config, world_size: int | None, trunk_config: dict[str, Any] | None, *, device: str | None = None
) -> None:
    """Check a resolved config across options.

    Args:
        world_size: number of processes; None skips what depends on it.
        trunk_config: the trunk's config.json; None skips what depends on it.
        device: "cpu" refuses what needs a GPU; None: not known yet.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    for message in _problems(config, world_size, trunk_config, device):
        raise UserError(message)


def dp_degree(config: Config, world_size: int) -> int:
    """Number of data-parallel ranks (replicas times shards), each with its own rows.

    Raises:
        UserError: the degrees do not multiply to the world size.
    """
    for message in _degree_problems(config, world_size):
        raise UserError(message)
    return world_size // config.parallelism.tensor_parallel_degree


def pair_groups_fit(config: Config, dp: int) -> bool:
    """Whether groups of ``objective.mi_group`` rows tile a microbatch of ``dp`` ranks, each in or of whole ranks."""
    return _tile(config.objective.mi_group, config.training.local_batch_size, dp)


def _tile(group: int, local: int, dp: int) -> bool:
    return local * dp % group == 0 and (group % local == 0 or local % group == 0)


def read_trunk(config: Config, *, weights: bool = True) -> dict[str, Any]:
    """The config.json of the trunk of a resolved config: that in ``trunk.path``, else ``trunk.architecture``.

    Args:
        weights: also require ``trunk.path`` with the files of the weights; False for dry runs and arithmetic, which
            check them where they are.

    Raises:
        UserError: neither exists, a file is missing or no JSON object, the two disagree on a shape, or the weights'
            headers are not those of a model that can be trained against.
    """
    path, architecture = config.trunk.path, config.trunk.architecture
    if weights:
        path = expand(path, "trunk.path")
    if not path and (weights or not architecture):
        raise UserError("trunk.path is not set: it must be the directory with the frozen model's checkpoint")
    if architecture and not Path(architecture).is_file():
        raise UserError(f"trunk.architecture: no file {architecture}")
    own = Path(path, CONFIG) if path else None
    if own and (weights or not architecture):
        check_folder(path)
    found = [read_json(Path(file)) for file in (own, architecture) if file and Path(file).is_file()]
    if len(found) == 2:
        for key in _SHAPE_KEYS:
            if key in found[0] and key in found[1] and found[0][key] != found[1][key]:
                raise UserError(
                    f"trunk.architecture: {key} is {found[1][key]} in {architecture} but {found[0][key]} in {own}"
                )
    if own and own.is_file() and (weights or holds_weights(own.parent)):
        check_checkpoint(own.parent, any_family=config.run.task != "sgt")
    elif config.run.task == "sgt":
        check_config(found[0])
        scheme_of(found[0])
    return found[0]


def _problems(
    config: Config, world_size: int | None, trunk_config: dict[str, Any] | None, device: str | None
) -> Iterator[str]:
    yield from _range_problems(config)
    yield from _task_problems(config)
    yield from _data_problems(config, device)
    if world_size is not None:
        yield from _degree_problems(config, world_size)
        yield from _batch_problems(config, dp_degree(config, world_size))
    tp = config.parallelism.tensor_parallel_degree
    if tp > 1 and config.parallelism.enable_sequence_parallel and config.training.seq_len % tp:
        yield (
            f"training.seq_len {config.training.seq_len} is not a multiple of tensor_parallel_degree {tp}, as "
            f"enable_sequence_parallel needs; {_multiples(config.training.seq_len, tp)} would be"
        )
    if trunk_config is not None:
        yield from _trunk_problems(config, trunk_config)


def _range_problems(config: Config) -> Iterator[str]:
    for key, (words, holds) in _RANGES.items():
        if not holds(get(config, key)):
            yield f"{key} must be {words}, got {get(config, key)}"
    if config.training.steps == 0 and config.training.epochs <= 0:
        yield f"training.epochs must be above 0 when training.steps is 0, got {config.training.epochs}"
    e = config.estimator
    if not 0 < e.std_min < e.std_init < e.std_max:
        yield (
            f"estimator: 0 < std_min < std_init < std_max must hold, got std_min {e.std_min}, std_init {e.std_init}, "
            f"std_max {e.std_max}"
        )


def _task_problems(config: Config) -> Iterator[str]:
    if config.run.task == "sgt":
        return
    for name in ("tensor_parallel_degree", "expert_parallel_degree"):
        if getattr(config.parallelism, name) > 1:
            yield f"parallelism.{name}: run.task finetune is data-parallel only; it must be 1"
    if config.data.packing:
        yield "data.packing: run.task finetune trains on unpacked rows; set it to false"
    if config.trunk.float8 != "none":
        yield "trunk.float8: run.task finetune trains the trunk, which needs its own type; set it to none"


def _data_problems(config: Config, device: str | None) -> Iterator[str]:
    data, seq_len = config.data, config.training.seq_len
    yield from _mixture_problems(data)
    if not data.source and not data.sources:
        yield "data.source is not set: a preset (such as demo), a hub dataset name or a local file"
    for key, table in [("data", vars(data)), *_source_tables(data)]:
        for name in table.get("columns", {}):
            if name not in _DATA_FIELDS:
                yield f"{key}.columns.{name} is no field; the fields are {', '.join(_DATA_FIELDS)}"
        if (prompt := table.get("prompt_tokens", 0)) >= seq_len:
            yield f"{key}.prompt_tokens {prompt} must be below training.seq_len {seq_len}"
    if data.min_prompt_tokens > seq_len:
        yield f"data.min_prompt_tokens {data.min_prompt_tokens} exceeds training.seq_len {seq_len}: no sample is left"
    if config.objective.utility_positions == "response" and data.format == "text" and data.prompt_tokens == 0:
        yield (
            "objective.utility_positions response needs response tokens, but with data.format text and "
            "data.prompt_tokens 0 the whole text is prompt; set data.prompt_tokens or utility_positions all"
        )
    if data.packing and device == "cpu":
        yield "data.packing needs a GPU (document masks have no CPU backward); set data.packing false"
    if data.validation_source and not data.validation_samples:
        yield "data.validation_source: data.validation_samples is 0; say how many of its rows are held out"
    if config.metrics.probe_every and not data.validation_samples:
        yield "metrics.probe_every needs held-out samples; set data.validation_samples or metrics.probe_every 0"


def _source_tables(data: Data) -> list[tuple[str, dict[str, Any]]]:
    """Key and table of every source that has one."""
    own = [("data.validation_source", data.validation_source)] if data.validation_source else []
    return [*((f"data.sources.{name}", table) for name, table in data.sources.items()), *own]


def _mixture_problems(data: Data) -> Iterator[str]:
    if data.source and data.sources:
        yield f"data.source: {data.source!r}, and data.sources names {', '.join(data.sources)}; give one or the other"
    for key in SOURCE_KEYS[1:]:
        if data.sources and getattr(data, key) != getattr(Data(), key):
            yield f"data.{key}: belongs to one source; set it in data.sources.NAME"
    for key, table in _source_tables(data):
        if not table.get("source"):
            yield f"{key}.source is not set: a preset, a hub dataset name or a local file"
        for name in ("prompt_tokens", "max_samples"):
            if table.get(name, 0) < 0:
                yield f"{key}.{name} must be 0 or more, got {table[name]}"
        if table.get("weight", 1) <= 0:
            yield f"{key}.weight must be above 0, got {table['weight']}; leave a source out that is not wanted"
    for name in data.sources:
        if not re.fullmatch(r"[\w-]+", name) or name == "validation":
            yield f"data.sources.{name}: a source's name is letters, digits, _ and -, and not validation"
    if "weight" in data.validation_source:
        yield "data.validation_source.weight: held-out rows have no weight; leave it out"
    without = [name for name, table in data.sources.items() if "weight" not in table]
    if without and len(without) < len(data.sources):
        yield f"data.sources.{without[0]}.weight is not set, and others are; give all of them a weight, or none"


def _degree_problems(config: Config, world_size: int) -> Iterator[str]:
    p = config.parallelism
    replicate, shard, tp = p.data_parallel_replicate_degree, p.data_parallel_shard_degree, p.tensor_parallel_degree
    if min(tp, p.expert_parallel_degree) < 1 or any(d < 1 and d != -1 for d in (replicate, shard)):
        yield f"parallelism: degrees must be positive, got replicate {replicate}, shard {shard}, tensor {tp}"
        return
    if replicate == shard == -1:
        yield "parallelism: data_parallel_replicate_degree and data_parallel_shard_degree are both -1; say one of them"
        return
    given = {"replicate": replicate, "shard": shard, "tensor": tp}
    said = " x ".join(f"{name} {degree}" for name, degree in given.items() if degree != -1)
    product = math.prod(degree for degree in given.values() if degree != -1)
    if world_size % product if -1 in given.values() else product != world_size:
        does = "does not divide the world size" if -1 in given.values() else "but the world size is"
        yield f"parallelism: {said} = {product}{',' if does.startswith('but') else ''} {does} {world_size}"
        return
    shard = world_size // product if shard == -1 else shard
    if (shard * tp) % p.expert_parallel_degree:
        yield (
            f"parallelism.expert_parallel_degree {p.expert_parallel_degree} does not divide shard {shard} x tensor "
            f"{tp} = {shard * tp}"
        )


def _batch_problems(config: Config, dp: int) -> Iterator[str]:
    local, total = config.training.local_batch_size, config.training.global_batch_size
    rows, group = local * dp, config.objective.mi_group
    ranks = f"local_batch_size {local} x {dp} data-parallel {'rank' if dp == 1 else 'ranks'} = {rows}"
    if total != -1 and total % rows:
        yield (f"training.global_batch_size {total} is not a multiple of {ranks}; {_multiples(total, rows)} would be")
    term = config.objective.mi
    trained = term.weight or (term.start and term.ramp_steps)
    if config.run.task != "sgt" or not trained or pair_groups_fit(config, dp):
        return
    if rows < 2:
        yield f"objective.mi pairs rows of one microbatch, which has 1 row ({ranks}); raise training.local_batch_size"
    else:
        fits = [g for g in range(2, rows + 1) if _tile(g, local, dp)]
        yield (f"objective.mi_group {group} does not divide a microbatch evenly ({ranks} rows); {_either(fits)} would")


def _trunk_problems(config: Config, trunk_config: dict[str, Any]) -> Iterator[str]:
    # Multimodal checkpoints keep the language model's numbers one level down.
    trunk = trunk_config.get("text_config") or trunk_config
    tp, ep = config.parallelism.tensor_parallel_degree, config.parallelism.expert_parallel_degree
    layers, context = trunk.get("num_hidden_layers"), trunk.get("max_position_embeddings")
    heads = trunk.get("num_attention_heads")
    experts = expert_count(trunk) if trunk.get("model_type") in FAMILIES else 0
    if context and config.training.seq_len > context:
        yield (f"training.seq_len {config.training.seq_len} exceeds the trunk's max_position_embeddings {context}")
    if layers and config.estimator.layers > layers:
        yield f"estimator.layers {config.estimator.layers} exceeds the trunk's {layers} layers; it must be at most that"
    for name, count in (
        ("num_attention_heads", heads),
        ("num_key_value_heads", trunk.get("num_key_value_heads") or heads),
    ):
        if count and count % tp:
            yield f"parallelism.tensor_parallel_degree {tp} does not divide the trunk's {name} {count}"
    if ep > 1 and config.teacher_cache.top_k:
        yield (
            f"teacher_cache.top_k {config.teacher_cache.top_k}: with expert parallelism all ranks must run the teacher "
            "or none; set it to 0"
        )
    if config.trunk.float8 != "none" and experts:
        yield (
            f"trunk.float8 {config.trunk.float8}: the weights of experts, most of this trunk, cannot be in float8; "
            "set it to none"
        )
    elif config.trunk.float8 == "products":
        yield from _float8_problems(trunk, tp)
    if ep > 1 and not experts:
        yield f"parallelism.expert_parallel_degree {ep}: the trunk has no experts; it must be 1"
    elif ep > 1 and experts % ep:
        yield f"parallelism.expert_parallel_degree {ep} does not divide the trunk's {experts} experts"


def _float8_problems(trunk: dict[str, Any], tp: int) -> Iterator[str]:
    heads, width = trunk.get("num_attention_heads") or 1, trunk.get("hidden_size") or 0
    head_dim = trunk.get("head_dim") or width // heads
    for name, size in (
        ("hidden_size", width),
        ("intermediate_size", (trunk.get("intermediate_size") or 0) // tp),
        ("num_attention_heads * head_dim", heads * head_dim // tp),
        ("num_key_value_heads * head_dim", (trunk.get("num_key_value_heads") or heads) * head_dim // tp),
    ):
        if size % 16:
            part = f" / tensor_parallel_degree {tp}" if tp > 1 and name != "hidden_size" else ""
            yield (
                f"trunk.float8 products: the trunk's {name}{part} is {size}, and float8 products need multiples of 16; "
                "set it to weights or none"
            )


def _multiples(value: int, unit: int) -> str:
    """The multiples of ``unit`` on either side of ``value``."""
    below = value // unit * unit
    return _either([below, below + unit] if below else [unit])


def _either(values: list[int]) -> str:
    """The first few values as "2, 4 or 8"."""
    shown = [str(value) for value in values[:6]]
    return " or ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
