"""A training checkpoint as something a client can load: config.json, safetensors, tokenizer, card.

Needs the checkpoint and the trunk's directory (for the tokenizer and, if shipped, the embedding table); neither
torchtitan nor a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoConfig

from sgt_titan import checkpoint, disk
from sgt_titan.config.load import load
from sgt_titan.config.schema import TERMS, Config
from sgt_titan.errors import UserError
from sgt_titan.transform.configuration import SGTConfig, estimator_config, needed_version
from sgt_titan.transform.fingerprint import fingerprint_tensor
from sgt_titan.transform.trunk_files import TrunkFiles
from sgt_titan.trunk.tokenizer_files import copy_accompanying, is_accompanying, tokenizer_files

RATES = (("token", "rate"), ("prompt", "rate_prompt"))
SGT, MODEL = "sgt.", "model."  # prefixes of the weights in checkpoints: a transform's, a fine-tuned trunk's


def resolve_checkpoint(path: str | Path) -> Path:
    """A step directory, or the newest committed one of a run's output directory.

    Raises:
        UserError: no committed checkpoint there, or a damaged one.
    """
    path = Path(path)
    found = path if checkpoint.step_of(path) is not None else checkpoint.latest_committed(path)
    if found is None or not checkpoint.is_committed(found):
        raise UserError(f"{path}: no committed checkpoint; give an output directory or one of its checkpoints/step-*")
    if damage := checkpoint.problems(found):
        raise UserError(f"{damage[0]}; export another step of {found.parent}")
    return found


def export_checkpoint(
    path: str | Path, out_dir: str | Path, *, overwrite: bool = False, trunk_path: str | None = None
) -> Path:
    """Write ``out_dir`` from a checkpoint and return it.

    Args:
        path: output directory of a run, or one of its checkpoints.
        out_dir: missing, empty, or with ``overwrite`` an earlier export.
        trunk_path: where the trunk lies now, if not where it was trained.

    Raises:
        UserError: no or a damaged checkpoint, another trunk than the one trained on, ``out_dir`` in use, no room.
    """
    # Here: it brings transformers' models, for which no training need wait before its end.
    from sgt_titan.transform.export import check_target, write_export

    path = resolve_checkpoint(path)
    state, config = checkpoint.read_state(path), load(str(path / checkpoint.CONFIG))
    if config.run.task == "finetune":
        return write_model(path, state, Path(trunk_path or config.trunk.path), Path(out_dir), overwrite=overwrite)
    check_target(Path(out_dir), overwrite=overwrite)
    files = TrunkFiles(trunk_path or config.trunk.path)
    trained_on, found = state["fingerprints"]["trunk"], files.fingerprint()
    if found != trained_on:
        raise UserError(
            f"{files.path}: is not the trunk of {path}: fingerprint {found[:12]}, trained on {trained_on[:12]}"
        )
    tensors, described = checkpoint.read_tensors(path, SGT), sgt_config(config, state)
    table_VD = files.embedding_table()
    if config.export.embeddings:
        tensors["embed_tokens.weight"] = table_VD
    else:
        # The client slices the table from a trunk of its own, and must know it for the right one.
        described.fingerprints = {**described.fingerprints, "embeddings": fingerprint_tensor(table_VD)}
    return write_export(
        out_dir,
        described,
        tensors,
        tokenizer_dir=files.path,
        summary=summary(config, state),
        dtype=config.export.dtype,
        overwrite=overwrite,
    )


def write_model(path: Path, state: dict, trunk: Path, out_dir: Path, *, overwrite: bool) -> Path:
    """The weights of a fine-tuning (``run.task``) as a Hugging Face checkpoint with the trunk's tokenizer."""
    disk.check_target(out_dir, "OUT", overwrite=overwrite, earlier=_is_model, part=_is_of_a_model)
    if not trunk.is_dir() or not tokenizer_files(trunk):
        raise UserError(f"trunk.path: {trunk} has no tokenizer to go with the model; put the trunk back where it was")
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.read_tensors(path, MODEL).items()}
    disk.require_room(out_dir, sum(tensor.nbytes for tensor in tensors.values()))
    with disk.whole(out_dir, overwrite=overwrite) as work:
        save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
        config = {key: value for key, value in state["hf_config"].items() if key != "quantization_config"}
        (work / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
        copy_accompanying(trunk, work)
    return out_dir


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _is_of_a_model(name: str) -> bool:
    return name in ("config.json", "model.safetensors") or is_accompanying(name)


def sgt_config(config: Config, state: dict) -> SGTConfig:
    """Configuration of the exported model."""
    hf = dict(state["hf_config"])
    options, rate = config.estimator, config.objective.rate
    context = rate.prior == "context"
    described = SGTConfig(
        trunk_config=estimator_config(AutoConfig.for_model(hf.pop("model_type"), **hf), options.layers),
        body=options.body,
        std_min=options.std_min,
        std_max=options.std_max,
        std_init=options.std_init,
        mean_bound=options.mean_bound,
        gate=options.gate,
        scale=state["statistics"]["scale"],
        median_norm=state["statistics"]["median_norm"],
        hidden_size=state["hf_config"]["hidden_size"],
        vocab_size=state["hf_config"]["vocab_size"],
        embeddings=config.export.embeddings,
        obfuscate=config.data.obfuscate,
        obfuscate_template=config.data.obfuscate_template,
        template=config.data.template,
        template_kwargs=dict(config.data.template_kwargs),
        template_date=config.data.template_date,
        fingerprints=dict(state["fingerprints"]),
        denoiser_layers=config.denoiser.layers,
        rate_prior=rate.prior,
        rate_tau=rate.tau,
        context_layers=rate.context_layers if context else 0,
        context_rank=rate.context_rank if context else 0,
        training=summary(config, state),
    )
    described.format_version = needed_version(described)
    return described


def summary(config: Config, state: dict) -> dict:
    """What the card says of the training."""
    measured, probe = state.get("metrics", {}), state.get("probe", {})
    return {
        "name": config.run.name,
        "trunk": Path(config.trunk.path).name,
        "steps": state["step"],
        "tokens": state["step"] * config.training.global_batch_size * config.training.seq_len,
        "objective": {name: getattr(config.objective, name).weight for name in TERMS},
        "losses": {name: measured[name] for name in ("utility", *TERMS) if name in measured},
        "rate": {f"nats a {unit}": measured[key] for unit, key in RATES if key in measured},
        "kl": probe.get("held-out kl", measured.get("kl")),
        "agreement": probe.get("held-out agreement", measured.get("agreement")),
        "nn_fr": probe.get("NN-FR"),
    }
