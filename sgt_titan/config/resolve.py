"""Defaults that depend on other options, and paths. No torch.

What needs the data (steps from epochs, ``format: auto``), the tokenizer (``template: auto``) or the device
(``dtype: auto``) stays as it is; everything else is explicit after ``resolve``.
"""

from __future__ import annotations

import copy
import os

from sgt_titan.config.degrees import degree_problems, dp_degree
from sgt_titan.config.keys import get
from sgt_titan.config.paths import expand, unset
from sgt_titan.config.schema import PRESETS, TERMS, Config, Term
from sgt_titan.demo import TRUNK

_PATHS = (
    "run.output_dir", "trunk.path", "trunk.architecture", "finetune.teacher", "data.source", "data.cache_dir",
    "teacher_cache.dir",
)  # fmt: skip


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
    for key, table in data.tables():
        if "source" in table:
            table["source"] = expand(table["source"], f"{key}.source")
    for holder, name in ((config.trunk, "path"), (config.finetune, "teacher")):
        if getattr(holder, name) == "demo":
            setattr(holder, name, str(TRUNK))
    if config.trunk.architecture:
        config.trunk.architecture = os.path.abspath(config.trunk.architecture)
    run.output_dir = run.output_dir or os.path.join(home, run.name)
    data.cache_dir = cache_dir(config, home)

    preset = PRESETS.get(config.objective.preset, {})
    for name in TERMS:
        term: Term = getattr(config.objective, name)
        term.weight = preset.get(name, 0.0) if term.weight is None else term.weight
    config.objective.mi_group = config.objective.mi_group or max(2, training.local_batch_size)

    if world_size is not None and not list(degree_problems(config, world_size)):
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
