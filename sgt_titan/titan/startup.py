"""What a run needs to know before any process group exists: trunk, tokenizer, data, steps.

Everything here is a function of files, so every rank does it alone and finds the same. What is expensive is done by
rank 0 and read by the others.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchtitan
import transformers
from torchtitan.tools.logging import logger
from transformers import AutoConfig, PretrainedConfig

import sgt_titan
from sgt_titan import disk
from sgt_titan.cluster.directory import UNITS
from sgt_titan.config.schema import Config
from sgt_titan.config.trunk import read_trunk
from sgt_titan.data.batch import BatchSource
from sgt_titan.data.cache import wait_or_prepare
from sgt_titan.data.tokenization import check_vocabulary, load_tokenizer
from sgt_titan.errors import UserError
from sgt_titan.objectives.rate import log_frequencies
from sgt_titan.transform.gaussian import TableStatistics, table_statistics
from sgt_titan.transform.tokenizer import fingerprint_ids
from sgt_titan.transform.trunk_files import TrunkFiles

from .flops import hardware_flops_per_token
from .lean import Unfilled
from .load_trunk import check_trunk
from .timeline import Timeline
from .trunks import Family, build, build_body, family_of


@dataclass(kw_only=True)
class Prepared:
    """Everything known before the first collective, whatever is trained."""

    config: Config
    hf: PretrainedConfig
    files: TrunkFiles
    train_source: BatchSource
    probe_source: BatchSource
    fingerprints: dict[str, str]
    timeline: Timeline = field(default_factory=Timeline)

    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of the run beside its config."""
        versions = {module.__name__: module.__version__ for module in (sgt_titan, torch, torchtitan, transformers)}
        found = {"fingerprints": self.fingerprints, "units": UNITS, "versions": versions}
        # Of a mixture: its weights decide no token, so that the cache, which runs of other weights share, cannot say.
        blocks = self.train_source.view.blocks
        mixture = {name: {"samples": samples, "weight": weight} for name, (samples, weight) in blocks.items() if name}
        return {**found, **({"mixture": mixture} if mixture else {}), "hf_config": self.hf.to_dict()}


@dataclass(kw_only=True)
class PreparedSGT(Prepared):
    """log_frequency_V: of the tokens that are obfuscated, for a prior that has them."""

    family: Family
    statistics: TableStatistics
    log_frequency_V: torch.Tensor | None = None

    def hardware_flops(self, model) -> int:
        return hardware_flops_per_token(model, full_recompute=self.config.activation_checkpoint.mode == "full")

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "statistics": asdict(self.statistics)}


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def prepare_sgt(config: Config) -> PreparedSGT:
    """Read, check and tokenize whatever an SGT's run needs.

    Args:
        config: resolved and validated.

    Raises:
        UserError: anything wrong with the trunk, the tokenizer, the data, or the output directory.
    """
    config = copy.deepcopy(config)
    read_trunk(config)
    check_device(config)
    files = TrunkFiles(config.trunk.path)
    hf = load_hf_config(files.path)
    family = family_of(hf)
    check_weights(config, hf, family, files)
    tokenizer = load_tokenizer(config.trunk.path)
    check_vocabulary(tokenizer, hf.vocab_size)

    fingerprint = files.fingerprint()
    train_source, probe_source, data_fingerprint = sources(config, tokenizer)
    statistics = TableStatistics(
        **once(
            Path(config.data.cache_dir) / f"trunk-{fingerprint[:16]}.json",
            lambda: asdict(table_statistics(files.embedding_table())),
        )
    )
    return PreparedSGT(
        config=config,
        hf=hf,
        family=family,
        files=files,
        statistics=statistics,
        train_source=train_source,
        probe_source=probe_source,
        fingerprints={"trunk": fingerprint, "data": data_fingerprint, "ids": fingerprint_ids(tokenizer)},
        log_frequency_V=token_frequencies(config, train_source, data_fingerprint, hf.vocab_size),
    )


def token_frequencies(config: Config, source: BatchSource, fingerprint: str, vocab: int) -> torch.Tensor | None:
    """ln p of the tokens at obfuscated positions, float32 (V,), counted once for the data and kept beside its cache.

    None for a prior that has no tokens.
    """
    if config.objective.rate.prior == "broad":
        return None
    data = config.data
    what = f"{len(source.view)}-{config.training.seq_len}-{data.obfuscate}-{int(data.obfuscate_template)}"
    counted = once(
        Path(data.cache_dir) / f"frequencies-{fingerprint[:16]}-{what}.json",
        lambda: {"counts": source.token_counts(vocab).tolist()},
    )
    return log_frequencies(torch.tensor(counted["counts"]))


def check_device(config: Config) -> None:
    """Raises UserError if this machine's GPU has no float8 products; a CPU computes them, slowly."""
    if config.trunk.float8 != "products" or device_type() == "cpu":
        return
    found = torch.cuda.get_device_capability()
    if found < (8, 9):
        raise UserError(
            f"trunk.float8 products: {torch.cuda.get_device_name()} has compute capability {found[0]}.{found[1]}, and "
            "float8 products need 8.9; set it to weights or none"
        )


def sources(config: Config, tokenizer: Any) -> tuple[BatchSource, BatchSource, str]:
    """Batches to train on, batches to probe with, and the data's fingerprint; fills ``template`` and ``steps``."""
    dataset = wait_or_prepare(config, config.trunk.path, rank())
    config.data.template = dataset.template
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    source = partial(
        BatchSource,
        seq_len=config.training.seq_len,
        seed=config.run.seed,
        packing=config.data.packing,
        obfuscate=config.data.obfuscate,
        obfuscate_template=config.data.obfuscate_template,
        utility_positions=config.objective.utility_positions,
        pad_id=pad,
    )
    train_source = source(dataset.train, global_batch_size=config.training.global_batch_size)
    check_positions(config, train_source)
    held_out = dataset.validation if len(dataset.validation) else dataset.train
    if config.metrics.probe_every and held_out is dataset.train and rank() == 0:
        logger.warning(f"{len(dataset)} samples are too few to hold any out: what the probe calls held-out is not")
    # Whole pair groups: a row without its partners would count as one that tells nothing.
    group = config.objective.mi_group
    probe_source = source(held_out, global_batch_size=-(-config.metrics.probe_samples // group) * group)
    if config.training.steps == 0:
        config.training.steps = train_source.steps(config.training.epochs)
    return train_source, probe_source, dataset.fingerprint


def check_positions(config: Config, source: BatchSource) -> None:
    """Raises UserError if a term of the objective would have no position to be measured at, and so read as perfect."""
    counts, data = source.epoch_counts, config.data
    if not counts.utility_tokens:
        raise UserError(
            f"objective.utility_positions response: no sample of {data.called} has a response within training.seq_len "
            f"{config.training.seq_len}; set it to all, or raise training.seq_len, or set data.prompt_tokens for text"
        )
    if config.run.task == "sgt" and not counts.obfuscated_tokens:
        raise UserError(f"data.source: no sample of {data.called} has a token to obfuscate; prompts are empty")


def check_weights(config: Config, hf: PretrainedConfig, family: Family, files: TrunkFiles) -> None:
    """Every tensor that the trunk, and a body that starts from it, will read is in ``files`` with its shape.

    Raises:
        UserError: naming the first that is not.
    """
    decoders = [build(hf, "sdpa")]
    for part in (config.estimator, config.denoiser):
        if part.layers and part.init_from_trunk:
            decoders.append(build_body(hf, part.layers, "sdpa"))
    for decoder in decoders:
        with torch.device("meta"), Unfilled():
            check_trunk(decoder.build(), family, files)


def load_hf_config(path: Path) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # its checks of values have errors of their own
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{path}/config.json: transformers cannot read it ({said})") from None


def once(file: Path, build: Callable[[], dict[str, Any]], timeout: float = 1800.0) -> dict[str, Any]:
    """The JSON in ``file``, which rank 0 builds if it is not there.

    Raises:
        UserError: rank 0 cannot write it, or has not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not file.is_file():
        if rank() == 0:
            content = json.dumps(build())
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                disk.write(file, content)
            except OSError as error:
                raise UserError(f"data.cache_dir: cannot write {file.parent}: {error.strerror}") from None
        elif time.monotonic() > deadline:
            raise UserError(
                f"{file}: rank 0 did not write it within {timeout:.0f} s; is data.cache_dir shared storage?"
            )
        else:
            time.sleep(0.2)
    return json.loads(file.read_text())
