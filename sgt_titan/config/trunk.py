"""The trunk's config.json: that of the checkpoint, or one to build from. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sgt_titan.config.paths import expand
from sgt_titan.config.schema import Config
from sgt_titan.errors import UserError
from sgt_titan.trunk.check import check_checkpoint
from sgt_titan.trunk.families import check_config
from sgt_titan.trunk.files import CONFIG, check_folder, holds_weights, read_json
from sgt_titan.trunk.quantisation import scheme_of
from sgt_titan.trunk.tokenizer_files import check_tokenizer

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
    if own and (own.parent / "tokenizer.json").is_file():
        check_tokenizer(own.parent, found[0])
    return found[0]
