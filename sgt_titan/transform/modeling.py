"""The transform a client runs: token ids or embeddings in, mean and log std or obfuscated embeddings out.

Plain transformers: bodies are its own decoder models, loading and saving its own too, made strict. The names in
the state dict are a contract with the training side, which writes them from its shards:

    embed_tokens.weight (V, D)                 the trunk's table, when shipped
    bodies.{0|1}.layers.{i}.<HF layer names>   Hugging Face layouts
    bodies.{0|1}.norm.weight (D,)
    mean_head.{weight,bias}, log_std_head.{weight,bias}   (D, D) and (D,)
    gate_head.{weight,bias}                     (1, D) and (1,), with a gate
    denoiser.body..., denoiser.mark.weight (D, 1), denoiser.head.{weight,bias}  with denoiser_layers
    prior...                                    with a learned rate_prior (prior.py)

Shapes: B batch, T sequence, D model width, V vocabulary, S past + T.
"""

from __future__ import annotations

import json
import os
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from sgt_titan.errors import UserError
from sgt_titan.objectives.rate import broad_rate
from sgt_titan.transform.configuration import SGTConfig, check_config, decoder_config
from sgt_titan.transform.fingerprint import (
    check_config_fingerprint,
    check_weights_fingerprint,
    fingerprint_tensor,
    fingerprint_weights,
)
from sgt_titan.transform.gaussian import moments, obfuscate, secure_noise
from sgt_titan.transform.prior import Prior

Caches = tuple[DynamicCache, ...]

# Arguments of from_pretrained that would load something other than the files that were checked.
_REFUSED_ARGUMENTS = ("state_dict", "variant", "gguf_file", "key_mapping", "ignore_mismatched_sizes", "adapter_kwargs")


class Release(NamedTuple):
    """z, what is sent (z after the denoiser; z itself without one), and the Gaussian that z was drawn from, (B, T, D).

    z and what is sent are in the dtype of the embeddings; center and log std float32, and of meaning where obfuscated.
    moments: what the center and log std came from, the same for every release of these inputs.
    """

    z_BTD: torch.Tensor
    sent_BTD: torch.Tensor
    center_BTD: torch.Tensor
    log_std_BTD: torch.Tensor
    moments: SGTOutput


@dataclass
class SGTOutput(ModelOutput):
    """Parameters of the Gaussian at every position, float32, in embedding units; caches, one per body."""

    mean_BTD: torch.Tensor | None = None
    log_std_BTD: torch.Tensor | None = None
    past_key_values: Caches | None = None


class ExportedTransform(PreTrainedModel):
    """mu(x) and log sigma(x) of Eq. 1, from short decoders of the trunk's family and two linear heads."""

    config_class = SGTConfig
    config: SGTConfig
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 (transformers' declaration)

    def __init__(self, config: SGTConfig):
        super().__init__(config)
        check_config(config)
        width = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if config.embeddings else None
        self.bodies = nn.ModuleList(decoder(config) for _ in range(1 if config.body == "shared" else 2))
        self.mean_head = nn.Linear(width, width)
        self.log_std_head = nn.Linear(width, width)
        self.gate_head = nn.Linear(width, 1) if config.gate else None
        self.denoiser = Denoiser(config) if config.denoiser_layers else None
        self.prior = Prior(config, decoder) if config.rate_prior != "broad" else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only the heads reach this as Linear: transformers sends what is inside a body to the body's own rule.
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.zeros_(module.weight)
        if isinstance(module, Prior):
            module.reset(init)

    def new_caches(self) -> Caches:
        """Empty caches to stream with: pass them to every call, which extends them in place."""
        bodies = [*self.bodies, *([self.denoiser.body] if self.denoiser is not None else [])]
        return tuple(DynamicCache(config=body.config) for body in bodies)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Caches | None = None,
        use_cache: bool | None = None,
    ) -> SGTOutput:
        """Mean and log std ``(B, T, D)`` in float32 for ids ``(B, T)`` int64 or embeddings ``(B, T, D)``.

        ``attention_mask`` ``(B, S)``: 1 for real tokens, over past and present; padding may be left or right.
        ``past_key_values``: caches of an earlier call or of :meth:`new_caches`, extended in place; causal, so pieces
        give what one pass gives. Without them, ``use_cache=True`` returns new ones; caching is off by default.
        Raises ValueError unless exactly one input is given and the mask covers past and present, UserError for ids when
        no table was shipped.
        """
        embeds_BTD = self._embed(input_ids, inputs_embeds)
        x_BTD = embeds_BTD.to(self.mean_head.weight.dtype)
        if past_key_values is None and use_cache:
            past_key_values = self.new_caches()
        wanted = len(self.bodies) + (self.denoiser is not None)
        if past_key_values is not None and len(past_key_values) != wanted:
            raise ValueError(f"past_key_values has {len(past_key_values)} caches, the transform {wanted}")
        if attention_mask is not None and attention_mask.ndim == 2:
            past = past_key_values[0].get_seq_length() if past_key_values is not None else 0
            expected = (x_BTD.shape[0], past + x_BTD.shape[1])
            if attention_mask.shape != expected:
                raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {expected}")
        hidden = [
            run_body(body, x_BTD, attention_mask, position_ids, past_key_values[index] if past_key_values else None)
            for index, body in enumerate(self.bodies)
        ]
        gate = None if self.gate_head is None else self.gate_head(hidden[-1])
        # Of the embeddings as they were given: a closed gate takes them away, and would leave what a cast rounds off.
        mean_BTD, log_std_BTD = moments(
            embeds_BTD, self.mean_head(hidden[0]), self.log_std_head(hidden[-1]), gate, self.config.bounds
        )
        return SGTOutput(mean_BTD=mean_BTD, log_std_BTD=log_std_BTD, past_key_values=past_key_values)

    def transform(self, inputs: torch.Tensor, mask_BT: torch.Tensor, **options: Any) -> torch.Tensor:
        """What may be sent, ``(B, T, D)``, in the dtype of the embeddings (Eq. 1, then the denoiser if there is one).

        Arguments and errors as :meth:`release`.
        """
        return self.release(inputs, mask_BT, **options).sent_BTD

    @torch.no_grad()
    def release(
        self,
        inputs: torch.Tensor,
        mask_BT: torch.Tensor,
        *,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        noise_BTD: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Caches | None = None,
        moments: SGTOutput | None = None,
    ) -> Release:
        """Obfuscated embeddings and where they came from.

        ``inputs``: token ids ``(B, T)`` (integer) or embeddings ``(B, T, D)`` (float). ``mask_BT`` (bool): true where
        to obfuscate; other positions, and padding, come out exactly as they went in. Noise comes from the operating
        system's generator and is never the same twice; ``noise_BTD`` (standard normal, for a caller that holds its
        noise), ``generator`` or ``seed`` (tests and measurements) replace it. ``past_key_values`` as in
        :meth:`forward`; pieces give what one pass gives. ``moments``: of an earlier release of the same inputs. Raises
        UserError for ids outside the vocabulary, when no table was shipped, or where NaN or infinity would come out;
        ValueError for shapes that do not match.
        """
        x_BTD, mask_BT = self._inputs(inputs, mask_BT, attention_mask)
        out: Any = moments
        if out is None:
            out = self(
                inputs_embeds=x_BTD,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
            )
        eps_BTD = _noise(out.mean_BTD, generator, seed) if noise_BTD is None else noise_BTD.to(out.mean_BTD)
        z_BTD = obfuscate(x_BTD, out.mean_BTD, out.log_std_BTD, eps_BTD, mask_BT)
        sent_BTD = z_BTD
        if self.denoiser is not None:
            sent_BTD = self.denoiser(z_BTD, mask_BT, attention_mask, position_ids, past_key_values)
        if not bool(sent_BTD[mask_BT].isfinite().all()):
            raise UserError(
                "inputs: NaN or infinite values would come out; pass finite embeddings, and load in float32 if a half "
                "precision overflows"
            )
        return Release(z_BTD, sent_BTD, x_BTD.float() + out.mean_BTD, out.log_std_BTD, out)

    @torch.no_grad()
    def rate(
        self,
        tokens_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Nats that one observation of each position can tell at most, ``(B, T)`` float32; 0 where not obfuscated.

        The sum over a prompt is R of objectives/rate.py, under the prior that the export carries. ``tokens_BT``: ids;
        the export must have, or have been given, its embedding table. The context prior looks at one draw of the noise
        (``generator``), the others do not. Errors as :meth:`release`.
        """
        x_BTD, mask_BT = self._inputs(tokens_BT, mask_BT, attention_mask)
        found = self.release(x_BTD, mask_BT, attention_mask=attention_mask, generator=generator)
        tau = self.config.rate_tau * self.config.scale
        rate_BT = broad_rate(found.center_BTD, found.log_std_BTD, tau)
        if self.prior is not None:
            log_p_BT = self.prior.log_probability(found.z_BTD, tokens_BT, attention_mask)
            rate_BT = self.prior.rate(rate_BT, x_BTD.float(), found.center_BTD, found.log_std_BTD, log_p_BT)
        return rate_BT * mask_BT

    def _inputs(
        self, inputs: torch.Tensor, mask_BT: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (B, T, D), and the mask without padding."""
        is_ids = not inputs.is_floating_point()
        if is_ids and inputs.numel() and not 0 <= int(inputs.min()) <= int(inputs.max()) < self.config.vocab_size:
            raise UserError(
                f"input_ids: contains an id outside 0..{self.config.vocab_size - 1}; "
                "use the tokenizer of the trunk this transform was trained for"
            )
        x_BTD = self._embed(inputs, None) if is_ids else inputs
        if mask_BT.shape != x_BTD.shape[:-1]:
            raise ValueError(f"mask_BT has shape {tuple(mask_BT.shape)}, expected {tuple(x_BTD.shape[:-1])}")
        mask_BT = mask_BT.to(x_BTD.device, torch.bool)
        if attention_mask is not None:
            mask_BT = mask_BT & attention_mask[:, -x_BTD.shape[1] :].to(x_BTD.device, torch.bool)
        return x_BTD, mask_BT

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if inputs_embeds is not None:
            return inputs_embeds
        if self.embed_tokens is None:
            raise UserError(
                "input_ids: this export ships no embedding table (embeddings: false in config.json); "
                "pass inputs_embeds from the trunk's own table"
            )
        return self.embed_tokens(input_ids)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As ``PreTrainedModel.save_pretrained``, with the fingerprints of what is written.

        A cast makes other bytes than those exported, and loading them would be refused. Tokenizer files are not
        written.
        """
        if kwargs.get("state_dict") is None:
            digests = {name: fingerprint_tensor(tensor) for name, tensor in self.state_dict().items()}
            known = dict(self.config.fingerprints)
            if self.embed_tokens is not None:
                known["embeddings"] = digests.pop("embed_tokens.weight")
            self.config.fingerprints = {**known, "weights": fingerprint_weights(digests)}
        kwargs.setdefault("save_original_format", False)  # else tensors take names of an older layout
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # transformers' has forty options; those that matter go through
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Self:
        """As ``PreTrainedModel.from_pretrained``, but a file that is not exactly the module is refused.

        Where transformers warns and carries on with random numbers, this raises UserError: missing, unexpected or
        misshapen tensors, NaN or infinite values, an embedding table whose sha256 is not the one in config.json.
        Only safetensors are read, from a local directory or a hub repository.
        """
        for key in _REFUSED_ARGUMENTS:
            if kwargs.pop(key, None):
                raise UserError(f"from_pretrained: {key} is not supported for a Stained Glass Transform; leave it out")
        directory = _local_directory(pretrained_model_name_or_path, kwargs)
        config = kwargs.pop("config", None)
        if not isinstance(config, SGTConfig):
            config = read_config(directory)
        check_checkpoint(directory, config)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["use_safetensors"] = True
        loaded: Any = super().from_pretrained(str(directory), *args, config=config, output_loading_info=True, **kwargs)
        model, info = loaded
        # check_checkpoint has seen all of this; what transformers itself did has the last word.
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            if info.get(problem):
                raise UserError(f"{directory}: transformers reports {problem}: {sorted(map(str, info[problem]))[:3]}")
        return loaded if wants_info else model


class Denoiser(nn.Module):
    """``sent = z + scale g(z, mask)`` where obfuscated: a decoder of the trunk's family and a linear head. Causal."""

    def __init__(self, config: SGTConfig):
        super().__init__()
        self.scale = config.scale
        self.body = decoder(config, config.denoiser_layers)
        self.mark = nn.Linear(1, config.hidden_size, bias=False)
        self.head = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        z_BTD: torch.Tensor,
        mask_BT: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Caches | None = None,
    ) -> torch.Tensor:
        """(B, T, D) in the dtype of z, z itself outside the mask. ``past_key_values``: its own cache is the last."""
        dtype = self.mark.weight.dtype
        marked_BTD = z_BTD.to(dtype) + self.scale * self.mark(mask_BT[..., None].to(dtype))
        cache = past_key_values[-1] if past_key_values else None
        hidden_BTD = run_body(self.body, marked_BTD, attention_mask, position_ids, cache)
        cleaned_BTD = z_BTD.float() + self.scale * self.head(hidden_BTD).float()
        return torch.where(mask_BT[..., None], cleaned_BTD.to(z_BTD.dtype), z_BTD)


def run_body(
    body: nn.Module,
    x_BTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: DynamicCache | None,
) -> torch.Tensor:
    """A body's last hidden state (B, T, D). Positions count real tokens, so that left padding does not shift them."""
    if position_ids is None and attention_mask is not None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x_BTD.shape[1] :]
    return body(
        inputs_embeds=x_BTD,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def decoder(config: SGTConfig, layers: int | None = None) -> PreTrainedModel:
    """A body: the family's decoder without a table of its own, in torch's current default dtype and device."""
    # A one-row vocabulary, because the decoder insists on allocating (and initialising) a table that is dropped below:
    # 4 GB for a 70B trunk.
    small = {"vocab_size": 1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    body_config = decoder_config(config.trunk_config | small, layers)
    body = AutoModel.from_config(
        body_config, dtype=torch.get_default_dtype(), attn_implementation=config._attn_implementation
    )
    body.embed_tokens = None
    return body


def _noise(like: torch.Tensor, generator: torch.Generator | None, seed: int | None) -> torch.Tensor:
    if generator is not None and seed is not None:
        raise ValueError("give a generator or a seed, not both")
    if seed is not None:
        warnings.warn(
            "an explicit seed repeats the noise: whoever learns or guesses it can subtract the noise, and reusing it "
            "across prompts ties them together; leave it out except in tests",
            stacklevel=5,  # whoever called `transform`
        )
        generator = torch.Generator(device=like.device).manual_seed(seed)
    if generator is None:
        return secure_noise(like.shape, device=like.device)
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def expected_shapes(config: SGTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of this configuration; allocates nothing."""
    with torch.device("meta"):
        model = ExportedTransform(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_shapes(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], where: str) -> None:
    """Raise UserError, prefixed by ``where``, unless both have the same names with the same shapes."""
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise UserError(f"{where}: {len(missing)} tensors missing, first {missing[0]}; the checkpoint is incomplete")
    if extra:
        raise UserError(f"{where}: {len(extra)} unexpected tensors, first {extra[0]}; config.json does not describe it")
    for name, shape in expected.items():
        if found[name] != shape:
            raise UserError(f"{where}: {name} has shape {found[name]}, config.json asks for {shape}")


def check_finite(name: str, tensor: torch.Tensor, where: str) -> None:
    """Raise UserError, prefixed by ``where``, if the tensor is not floating point or has NaN or infinite values."""
    if not tensor.is_floating_point():
        raise UserError(f"{where}: {name} is {tensor.dtype}, expected a floating-point type")
    # Chunks of rows: isfinite of a whole embedding table would cost as much memory as the table.
    if not all(bool(torch.isfinite(chunk).all()) for chunk in tensor.reshape(-1).split(1 << 24)):
        raise UserError(
            f"{where}: {name} contains NaN or infinite values; the training run diverged or the file is bad"
        )


def check_checkpoint(directory: Path, config: SGTConfig) -> None:
    """Raise UserError unless the safetensors in ``directory`` are exactly what ``config`` describes.

    Compares names and shapes first, from the headers alone; then reads each tensor once for NaN and infinity, and for
    the fingerprints in config.json, on the stored bytes, so that a later cast to another dtype is allowed.
    """
    check_config(config)
    check_config_fingerprint(config, directory)
    if (directory / "adapter_config.json").exists():
        # Where peft is installed, transformers would change the weights after they were checked.
        raise UserError(f"{directory}: adapter_config.json is no part of an export; copy the export again")
    files = _weight_files(directory)
    try:
        with ExitStack() as stack:
            handles = {file: stack.enter_context(safe_open(file, framework="pt", device="cpu")) for file in files}
            shapes: dict[str, tuple[int, ...]] = {}
            for file, handle in handles.items():
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    if name in shapes:
                        raise UserError(f"{file}: {name} is also in another shard")
                    shapes[name] = tuple(handle.get_slice(name).get_shape())
            check_shapes(shapes, expected_shapes(config), str(directory))
            digests: dict[str, str] = {}
            for file, handle in handles.items():
                for name in handle.keys():  # noqa: SIM118
                    tensor = handle.get_tensor(name)
                    check_finite(name, tensor, str(file))
                    if name == "prior.log_frequency" and abs(float(tensor.double().logsumexp(0))) > 0.05:
                        raise UserError(
                            f"{file}: prior.log_frequency is no distribution over the {config.vocab_size} tokens; the "
                            "prior was fitted on other tokens than this export's, train it again"
                        )
                    if name == "embed_tokens.weight":
                        _check_embeddings(tensor, config, file)
                    elif "weights" in config.fingerprints:
                        digests[name] = fingerprint_tensor(tensor)
            check_weights_fingerprint(digests, config, directory)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{directory}: cannot read the weights: {error}; copy the export again") from error


def _check_embeddings(table_VD: torch.Tensor, config: SGTConfig, file: Path) -> None:
    wanted = config.fingerprints.get("embeddings")
    if wanted is not None and fingerprint_tensor(table_VD) != wanted:
        raise UserError(
            f"{file}: embed_tokens.weight is not the table named in config.json (fingerprints.embeddings); "
            "the transform would meet embeddings it was not trained on"
        )


def _weight_files(directory: Path) -> list[Path]:
    """The files transformers would read, in its order of preference: one file, else the shards of the index."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise UserError(f"{directory}: no model.safetensors and no model.safetensors.index.json; not an export")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: not a safetensors index; copy the export again") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index}: {name!r} is not a safetensors file of this directory")
        if not (directory / name).is_file():
            raise UserError(f"{directory}: shard {name} is missing; copy the export again")
    return [directory / name for name in names]


def read_config(directory: Path) -> SGTConfig:
    """The configuration in ``directory/config.json``. Raises UserError if it is not that of an export."""
    path = directory / "config.json"
    if not path.is_file():
        raise UserError(f"{directory}: no config.json; give the directory of an export")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON; copy the export again") from error
    found = fields.get("model_type") if isinstance(fields, dict) else None
    if found != SGTConfig.model_type:
        raise UserError(f"{path}: model_type is {found!r}, an export has {SGTConfig.model_type!r}")
    return SGTConfig.from_dict(fields)


def _local_directory(name: str | os.PathLike, kwargs: dict[str, Any]) -> Path:
    """The directory itself, or the local copy of a hub repository; takes the arguments that chose it from kwargs."""
    keys = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    hub = {key: value for key in keys if (value := kwargs.pop(key, None)) is not None}
    directory = Path(name)
    if not directory.is_dir():
        if len(directory.parts) > 2 or directory.is_absolute() or str(name).startswith((".", "~")):
            raise UserError(f"{name}: no such directory; give the directory of an export")
        directory = _download(str(name), hub)
    return directory / (kwargs.pop("subfolder", None) or "")


def _download(repo_id: str, hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=["*.json", "*.safetensors", "*.jinja"], **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{repo_id}: no such directory, and not on the hub: {reason}") from error


AutoModel.register(SGTConfig, ExportedTransform, exist_ok=True)
