"""A checkpoint in a secret basis, tensor by tensor; nothing is read that the tensor at hand does not need.

    norms "fold"   every norm's gain goes into the linears behind it (the last one's to the client's head): exact
    norms "mean"   every norm's gain becomes its mean (ConjFormer, arXiv 2606.16461): to be fine-tuned

A LayerNorm's bias always goes into the linears behind it, and its centring into whatever writes the stream: both are
exact. Without a secret the basis stays the plain one: the scalar-norm model itself, to fine-tune; its last norm keeps
what only a client's head can absorb.

Legend: D width, V vocabulary, h head dimension.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from sgt_titan.conjformer.basis import Basis
from sgt_titan.conjformer.families import Family, Linear, Sizes, chosen_symmetries, family_of, sizes_of
from sgt_titan.conjformer.mark import MARK
from sgt_titan.conjformer.secret import Secret
from sgt_titan.errors import UserError
from sgt_titan.transform.shards import Planned
from sgt_titan.transform.trunk_files import TrunkFiles

Norms = Literal["fold", "mean"]

# safetensors' names of what a checkpoint may hold.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Conversion:
    """One trunk, one variant and, unless ``secret`` is None, one secret.

    Raises:
        UserError: not a checkpoint, a family without a row, a tensor that is missing or that no row explains.
    """

    def __init__(
        self,
        trunk: str | Path,
        secret: Secret | None,
        *,
        norms: Norms = "fold",
        dtype: torch.dtype | None = None,
        compute: torch.dtype = torch.float64,
        device: str = "cpu",
        symmetries: str = "all",
        shake: float = 0.0,
    ):
        self.files = TrunkFiles(trunk)
        self.config: dict[str, Any] = json.loads((self.files.path / "config.json").read_text(encoding="utf-8"))
        self.family: Family = family_of(self.config, self.files.path)
        if not any(name.startswith(self.family.prefix) for name in self.files.entries):
            self.family = replace(self.family, prefix="")  # saved without its head, as the first GPT-2 checkpoints
        self.sizes: Sizes = sizes_of(self.config)
        self.norms, self.dtype, self.compute, self.device = norms, dtype, compute, device
        self.shake, self.noise = shake, Secret.fresh() if shake else None
        self.secret = secret
        self.symmetries = chosen_symmetries(symmetries, self.family, self.config["model_type"])
        self.basis = (
            Basis(secret, self.family, self.sizes, self._free_planes, compute, device, self.symmetries)
            if secret
            else None
        )
        self._check()

    def planned(self) -> Iterator[Planned]:
        """Every tensor of the result, in the order of the source."""
        family, D = self.family, self.sizes.width
        prefix = family.prefix or {"gpt2": "transformer."}.get(self.config["model_type"], "model.")
        for name in sorted(self.files.entries, key=lambda name: _natural(name)):
            layer, local = family.split(name)
            module = local.rpartition(".")[0]
            out = prefix + name.removeprefix(family.prefix) if name != "lm_head.weight" else name
            entry = self.files.entries[name]
            dtype = self.dtype or DTYPES[entry.dtype]
            if local in family.ignored or (self.basis and name in (self._embed, self._positions, "lm_head.weight")):
                continue
            yield Planned(out, entry.shape, dtype, partial(self._shaken, name, layer, local, module))
        stored = self.dtype or DTYPES[self.files.entries[self._embed].dtype]
        if self.basis:
            # The server embeds no token and names none: its "vocabulary" are the D features, its logits the output.
            yield Planned(f"{prefix}{family.embed}.weight", (D, D), stored, lambda: torch.zeros(D, D))
            yield Planned("lm_head.weight", (D, D), stored, lambda: torch.eye(D))
            if family.positions:
                shape = self.files.entries[self._positions].shape
                yield Planned(f"{prefix}{family.positions}.weight", shape, stored, lambda: torch.zeros(shape))

    def server_config(self) -> dict[str, Any]:
        """config.json of the result."""
        config = dict(self.config)
        if self.secret is not None:
            config |= {"vocab_size": self.sizes.width, "tie_word_embeddings": False}
            config |= {key: None for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
            config[MARK] = {"secret": self.secret.name}
        if self.shake:
            config[MARK] = {"drift": self.shake}
        if self.dtype is not None:
            config.pop("torch_dtype", None)
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        if "architectures" not in config or self.family.prefix == "":
            kind = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "gpt2": "GPT2"}[config["model_type"]]
            config["architectures"] = [f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"]
        return config

    def client_tensors(self) -> dict[str, torch.Tensor]:
        """What a client computes with beside the secret, in the plain basis and the stored type.

        embed (V, D), head (V, D) unless tied, gain (D,) and bias (D,) between server and head, positions (T, D).
        """
        found = {"embed": self._centred(self.files.read(self._embed), 1)}
        if self.family.positions:
            found["positions"] = self._centred(self.files.read(self._positions), 1)
        if "lm_head.weight" in self.files and not self.sizes.tied:
            found["head"] = self.files.read("lm_head.weight")
        elif self.family.centred:
            found["head"] = self.files.read(
                self._embed
            )  # centring the head would be exact but not the same in rounding
        final = f"{self.family.prefix}{self.family.final_norm}"
        gain_D = self.files.read(f"{final}.weight").float()
        found["gain"] = gain_D if self.norms == "fold" else torch.ones_like(gain_D)
        if f"{final}.bias" in self.files:
            found["bias"] = self.files.read(f"{final}.bias").float()
        return found

    @property
    def _embed(self) -> str:
        return f"{self.family.prefix}{self.family.embed}.weight"

    @property
    def _positions(self) -> str:
        return f"{self.family.prefix}{self.family.positions}.weight" if self.family.positions else ""

    # -- one tensor ----------------------------------------------------------------------------------------------------

    def _shaken(self, name: str, layer: int | None, local: str, module: str) -> torch.Tensor:
        """A matrix with the share ``shake`` of its variance replaced by noise that nobody can repeat."""
        x = self._make(name, layer, local, module)
        if self.noise is None or x.dim() != 2:
            return x
        x = x.to(self.compute)
        std = x.std()
        return (1 - self.shake) ** 0.5 * x + self.shake**0.5 * std * self.noise.normal(name, *x.shape).to(x)

    def _make(self, name: str, layer: int | None, local: str, module: str) -> torch.Tensor:
        family = self.family
        if name in (self._embed, self._positions, "lm_head.weight"):
            return self.files.read(name)  # of a plain model
        if module in family.linears:
            bias = local.endswith(".bias")
            x = self.linear(layer, module, bias=bias)
            return x.T if family.transposed and not bias else x
        tensor = self.files.read(name)
        if module in family.qk_norm:
            return self._planes(tensor)
        # A plain model keeps what only a client's head could absorb.
        kept = self.basis is None and module == family.final_norm
        if local.endswith(".bias"):
            return tensor if kept else torch.zeros_like(tensor)
        if self.norms == "fold":
            return tensor if kept else torch.ones_like(tensor)
        return torch.full_like(tensor, tensor.double().mean().item())

    def linear(self, layer: int | None, module: str, *, bias: bool = False) -> torch.Tensor:
        """A projection's weight (out, in) or bias (out,) in the new basis, with the gains that are folded into it."""
        rule = self.family.linears[module]
        name = f"{self.family.prefix}{self.family.layer.format(layer)}{module}"
        norm = f"{self.family.prefix}{self.family.layer.format(layer)}{rule.norm}" if rule.norm else ""
        x = None
        if bias:
            x = self._read(f"{name}.bias")
            if norm and f"{norm}.bias" in self.files:
                x = x + self._weight(name) @ self._read(f"{norm}.bias")
        else:
            x = self._weight(name)
            if norm and self.norms == "fold":
                x = x * self._read(f"{norm}.weight")
        if self.basis is not None:
            if rule.out == ("residual",):
                x = self._centred(x, 0)
            parts = x.split(self.widths(rule), 0)
            x = torch.cat(
                [self.basis.change(s, layer, p, dual=s == "key") for s, p in zip(rule.out, parts, strict=True)]
            )
            if not bias:
                x = self.basis.change(rule.reads, layer, x.T, dual=True).T
        return x

    def _weight(self, name: str) -> torch.Tensor:
        """(out, in)."""
        weight = self._read(f"{name}.weight")
        return weight.T if self.family.transposed else weight

    def widths(self, rule: Linear) -> list[int]:
        """Rows of each projection that a tensor holds."""
        s = self.sizes
        width = {"residual": s.width, "query": s.heads * s.head, "key": s.kv_heads * s.head,
                 "value": s.kv_heads * s.head, "unit": s.units, "scaled": s.units}  # fmt: skip
        return [width[space] for space in rule.out]

    def _centred(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """What a LayerNorm would subtract, taken out where it is written."""
        if not self.family.centred:
            return x
        return (x.double() - x.double().mean(dim, keepdim=True)).to(x.dtype)

    def _planes(self, gain_h: torch.Tensor) -> torch.Tensor:
        """Gains of queries or keys. RoPE stands between them, so none can be folded; with ``mean`` the two of a RoPE
        plane are averaged, which lets the plane turn by any angle."""
        if self.norms == "fold":
            return gain_h
        half = gain_h.double().unflatten(0, (2, -1)).mean(0)
        return half.repeat(2).to(gain_h.dtype)

    def _free_planes(self, layer: int) -> torch.Tensor:
        free_P = torch.ones(self.sizes.head // 2, dtype=torch.bool)
        for module in self.family.qk_norm:
            gain_h = self.files.read(f"{self.family.prefix}{self.family.layer.format(layer)}{module}.weight")
            first_P, second_P = self._planes(gain_h).unflatten(0, (2, -1))
            free_P &= first_P == second_P
        return free_P

    def _read(self, name: str) -> torch.Tensor:
        return self.files.read(name).to(self.device, self.compute)

    def _check(self) -> None:
        """Every tensor has a rule and every rule its tensor, before anything is written."""
        family, s = self.family, self.sizes
        expected = {self._embed: (s.vocab, s.width), f"{family.prefix}{family.final_norm}.weight": (s.width,)}
        for index in range(s.layers):
            start = f"{family.prefix}{family.layer.format(index)}"
            for module, rule in family.linears.items():
                width = {"residual": s.width, "heads": s.heads * s.head, "unit": s.units, "scaled": s.units}[rule.reads]
                shape = (sum(self.widths(rule)), width)
                expected[f"{start}{module}.weight"] = shape[::-1] if family.transposed else shape
            expected |= {f"{start}{norm}.weight": (s.width,) for norm in family.norms}
            expected |= {f"{start}{norm}.weight": (s.head,) for norm in family.qk_norm}
        self.files.check(expected)
        modules = {*family.linears, *family.norms, *family.qk_norm}
        outside = {f"{m}.{kind}" for m in (family.embed, family.positions, family.final_norm) for kind in _KINDS}
        for name, entry in self.files.entries.items():
            layer, local = family.split(name)
            known = local in family.ignored or name == "lm_head.weight"
            if layer is None:
                known |= local in outside
            else:
                known |= local.rpartition(".")[0] in modules and local.rpartition(".")[2] in _KINDS
            if not known:
                raise UserError(
                    f"{self.files.path}: tensor {name} has no place in the {self.config['model_type']} family"
                )
            if entry.dtype not in DTYPES and local not in family.ignored:
                raise UserError(f"{self.files.path}: {name} is {entry.dtype}; expected {', '.join(DTYPES)}")


_KINDS = ("weight", "bias")


def _natural(name: str) -> list[Any]:
    """Layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
