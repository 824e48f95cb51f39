"""Configuration of an exported transform: what ``config.json`` of an export holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar, Literal

from transformers import AutoConfig, PretrainedConfig

from sgt_titan.errors import UserError
from sgt_titan.objectives.rate import PRIORS
from sgt_titan.transform.chat_template import DATE
from sgt_titan.transform.gaussian import Bounds
from sgt_titan.trunk.families import TRAINED, body_fields

# 2: a denoiser or a learned prior. 3: a gate. An export without them says 1, so that nobody updates without need. A
# client that does not know denoisers refuses 2, since without it the answers are ruined; 3, since nothing would be
# hidden.
FORMAT_VERSION = 3

# Facts about the trunk's checkpoint that the estimator does not share: where it lay, how it was quantised, which
# remote code it wanted, which type it was stored in.
_NOT_INHERITED = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
)


class SGTConfig(PretrainedConfig):
    """Everything needed to rebuild a ``ExportedTransform`` and to feed it as it was trained.

    trunk_config: the body's Hugging Face config as a dict, from :func:`estimator_config`.
    body: "shared" (one body, two heads) or "separate" (body 0 feeds the mean, body 1 the std).
    std_min, std_max, std_init, mean_bound: units of ``scale``; see :class:`sgt_titan.transform.gaussian.Bounds`.
    gate: a gate a token (:func:`sgt_titan.transform.gaussian.gated`), closed at rate_tau.
    denoiser_layers: decoder layers between noise and wire; 0: none.
    rate_prior, rate_tau, context_layers, context_rank: the prior of the rate (``schema.Rate``); broad for a transform
        that was trained without one, whose rate it bounds as well.
    scale, median_norm: per-feature std and median row norm of the trunk's embedding table, embedding units.
    hidden_size, vocab_size: D and V of the trunk's embedding table.
    embeddings: whether the table is shipped in the export.
    obfuscate, obfuscate_template, template: which prompt tokens were obfuscated in training, and in which template.
    template_kwargs, template_date: the chat template's variables and the date that it prints, as in training.
    fingerprints: sha256 of trunk, tokenizer, embeddings, data, as far as known.
    training: summary of the run.
    """

    model_type = "stained_glass_transform"

    trunk_config: dict[str, Any] = field(default_factory=dict)
    body: str = "shared"
    std_min: float = 1e-4
    std_max: float = 10.0
    std_init: float = 0.1
    mean_bound: float = 0.0
    gate: bool = False
    denoiser_layers: int = 0
    rate_prior: str = "broad"
    rate_tau: float = 1.0
    context_layers: int = 0
    context_rank: int = 0
    scale: float = 1.0
    median_norm: float = 1.0
    hidden_size: int = 0
    vocab_size: int = 0
    embeddings: bool = True
    obfuscate: Literal["prompt", "all"] = "prompt"
    obfuscate_template: bool = False
    template: str = "chat"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    template_date: str = DATE
    fingerprints: dict[str, str] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = 1

    before_the_first: ClassVar[Callable[..., Any]] = staticmethod(lambda: None)
    """Makes ``AutoModel`` know whose config this is."""

    def __post_init__(self, **fields: Any) -> None:
        self.before_the_first()
        super().__post_init__(**fields)

    @property
    def bounds(self) -> Bounds:
        """The bounds as the Gaussian functions take them. Raises UserError when they are not a range."""
        closed = self.rate_tau if self.gate else 0.0
        return Bounds(self.std_min, self.std_max, self.std_init, self.mean_bound, self.scale, closed)


def check_config(config: SGTConfig) -> None:
    """Raise UserError unless a model can be built from ``config``: one line, naming the key of config.json."""
    if not isinstance(config.format_version, int) or config.format_version > FORMAT_VERSION:
        raise UserError(
            f"config.json: format_version is {config.format_version}, this sgt_titan reads up to {FORMAT_VERSION}; "
            "update sgt_titan"
        )
    trunk = config.trunk_config
    if not isinstance(trunk, dict) or trunk.get("model_type") not in TRAINED:
        found = trunk.get("model_type") if isinstance(trunk, dict) else type(trunk).__name__
        raise UserError(f"config.json: trunk_config.model_type is {found!r}, must be one of {', '.join(TRAINED)}")
    for key, allowed in (("body", ("shared", "separate")), ("obfuscate", ("prompt", "all"))):
        if getattr(config, key) not in allowed:
            raise UserError(f"config.json: {key} is {getattr(config, key)!r}, must be one of {', '.join(allowed)}")
    if config.rate_prior not in PRIORS:
        raise UserError(f"config.json: rate_prior is {config.rate_prior!r}, must be one of {', '.join(PRIORS)}")
    if not isinstance(config.rate_tau, int | float) or not config.rate_tau > 0:
        raise UserError(f"config.json: rate_tau is {config.rate_tau!r}, must be above 0")
    context = config.rate_prior == "context"
    for key, least in (("denoiser_layers", 0), ("context_layers", int(context)), ("context_rank", int(context))):
        value = getattr(config, key)
        if not isinstance(value, int) or value < least:
            raise UserError(f"config.json: {key} is {value!r}, must be a whole number, at least {least}")
    if config.format_version < needed_version(config):
        raise UserError(
            f"config.json: format_version is {config.format_version}, but a denoiser or a learned prior is from 2 on, "
            "a gate from 3; export again"
        )
    for key in ("hidden_size", "vocab_size"):
        if getattr(config, key) != trunk.get(key):
            raise UserError(f"config.json: {key} is {getattr(config, key)}, but trunk_config.{key} is {trunk.get(key)}")
    _ = config.bounds


def needed_version(config: SGTConfig) -> int:
    """The oldest format version whose readers understand this configuration."""
    if config.gate:
        return 3
    return 2 if config.denoiser_layers or config.rate_prior != "broad" else 1


def estimator_config(trunk_config: PretrainedConfig | dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of a ``layers``-layer decoder of the trunk's family, as a dict for ``SGTConfig.trunk_config``.

    ``trunk_config``: the trunk's Hugging Face config, or the content of its config.json. Rotary settings, norms and
    attention geometry are the trunk's own; MoE families get dense FFNs in every layer, because a short
    body has no use for experts; prediction heads, quantisation and storage type are left out. Raises UserError for a
    family that is not supported or a number of layers that the trunk does not have.
    """
    raw = copy.deepcopy(trunk_config)
    if isinstance(raw, dict):
        family = raw.pop("model_type", None)
    else:
        family = raw.model_type
    if family not in TRAINED:
        raise UserError(f"trunk config.json: model_type {family!r} is not supported; use one of {', '.join(TRAINED)}")
    if isinstance(raw, dict):
        for key in _NOT_INHERITED:
            raw.pop(key, None)
        raw = AutoConfig.for_model(family, **raw)
    if not 1 <= layers <= raw.num_hidden_layers:
        raise UserError(f"estimator.layers: {layers}, must be between 1 and the trunk's {raw.num_hidden_layers} layers")
    config = {key: value for key, value in raw.to_diff_dict().items() if key not in _NOT_INHERITED}
    config |= {"model_type": family, "tie_word_embeddings": False}
    config |= body_fields(config, layers)
    if family == "deepseek_v3":
        config["num_nextn_predict_layers"] = 0
        config.pop("num_mtp_layers", None)
    return config


def decoder_config(trunk_config: dict[str, Any], layers: int | None = None) -> PretrainedConfig:
    """The Hugging Face config object of a body, from the dict made by :func:`estimator_config`.

    layers: of that many layers; None: of as many as the dict says.
    """
    fields = copy.deepcopy(trunk_config)
    if layers is not None:
        fields |= body_fields(fields, layers)
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
