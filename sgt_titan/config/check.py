"""What is wrong with a resolved config, across its options and against the trunk. No torch.

What one option must be by itself stands beside it, in ``schema.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sgt_titan.config.degrees import degree_problems, dp_degree, pair_groups_fit, tile
from sgt_titan.config.fields import TURN_FIELDS, USUAL_COLUMNS
from sgt_titan.config.keys import get, keys
from sgt_titan.config.schema import SOURCE_KEYS, Config, Data
from sgt_titan.errors import UserError
from sgt_titan.trunk.families import FAMILIES, expert_count

_DATA_FIELDS = (*USUAL_COLUMNS, *TURN_FIELDS)


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


def _problems(
    config: Config, world_size: int | None, trunk_config: dict[str, Any] | None, device: str | None
) -> Iterator[str]:
    yield from _range_problems(config)
    yield from _task_problems(config)
    yield from _data_problems(config, device)
    if world_size is not None:
        yield from degree_problems(config, world_size)
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
    values = [(key, key, get(config, key)) for key in keys()]
    for where, table in config.data.tables():
        values += [(f"{where}.{name}", f"data.{name}", value) for name, value in table.items() if name != "weight"]
    for said, key, value in values:
        must = keys()[key].must
        if must and value is not None and not must.holds(value):
            yield f"{said} must be {must.words}, got {value}"
    if config.training.steps == 0 and config.training.epochs <= 0:
        yield f"training.epochs must be above 0 when training.steps is 0, got {config.training.epochs}"
    e = config.estimator
    if not 0 < e.std_min < e.std_init < e.std_max:
        yield (
            f"estimator: 0 < std_min < std_init < std_max must hold, got std_min {e.std_min}, std_init {e.std_init}, "
            f"std_max {e.std_max}"
        )


def _task_problems(config: Config) -> Iterator[str]:
    own = config.finetune
    if config.run.task == "sgt":
        for name, value in vars(own).items():
            if value:
                yield f"finetune.{name}: belongs to run.task finetune, this is run.task sgt; leave it out"
        return
    if (own.distil or own.drift) and not own.teacher:
        yield "finetune.teacher is not set: distil and drift need the directory of the original checkpoint"
    if own.teacher and not (own.distil or own.drift):
        yield "finetune.teacher: is not used while distil and drift are 0; set one of them or leave it out"
    if config.teacher_cache.top_k:
        yield "teacher_cache.top_k: run.task finetune stores nothing of its teacher; set it to 0"
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
    for key, table in [("data", vars(data)), *data.tables()]:
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


def _mixture_problems(data: Data) -> Iterator[str]:
    if data.source and data.sources:
        yield f"data.source: {data.source!r}, and data.sources names {', '.join(data.sources)}; give one or the other"
    for key in SOURCE_KEYS[1:]:
        if data.sources and getattr(data, key) != getattr(Data(), key):
            yield f"data.{key}: belongs to one source; set it in data.sources.NAME"
    for key, table in data.tables():
        if not table.get("source"):
            yield f"{key}.source is not set: a preset, a hub dataset name or a local file"
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
        fits = [g for g in range(2, rows + 1) if tile(g, local, dp)]
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
