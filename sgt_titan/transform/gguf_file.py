"""A GGUF file as safetensors: dequantised by the `gguf` package, a tensor at a time.

config.json and tokenizer must be the original's, beside the file: a GGUF says both in other words (a RoPE scaling as
a tensor of factors, a tokenizer without its rules), and a trunk with another RoPE or other ids is another model. What
the file says of itself must agree with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sgt_titan.errors import UserError
from sgt_titan.transform.shards import Planned
from sgt_titan.trunk.families import shapes

SUFFIX = ".gguf"
SHARD_BYTES = 4 << 30  # and so what is in memory, beside one tensor
# Architectures of GGUF files, and the model types that are written as such.
ARCHITECTURES = {"llama": ("llama", "mistral"), "qwen2": ("qwen2",), "qwen3": ("qwen3",)}
ROPE_FACTORS = "rope_freqs.weight"  # of a scaled RoPE, which config.json says
# Facts of a file, and where config.json has them.
FACTS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


class GGUF:
    """The weights of a file under the names and in the layout of transformers.

    Args:
        config: the original's config.json.

    Raises:
        UserError: the package is missing; a file that is damaged, split, of an architecture that is not read here, or
            not of the model that ``config`` describes.
    """

    def __init__(self, file: Path, config: Mapping[str, Any]):
        try:
            import gguf
        except ImportError:
            raise UserError("GGUF: needs the package gguf; pip install 'sgt-titan[gguf]'") from None
        try:
            self.reader = gguf.GGUFReader(str(file))
        except Exception as error:
            raise UserError(f"{file}: cannot be read as GGUF ({type(error).__name__}); download it again") from None
        self.file, self.config = file, config
        self.architecture = str(self._fact("general.architecture"))
        known = ARCHITECTURES.get(self.architecture)
        if known is None:
            read = ", ".join(ARCHITECTURES)
            raise UserError(f"{file}: GGUF of the architecture {self.architecture!r} is not read here; {read} are")
        if config["model_type"] not in known:
            raise UserError(
                f"{file}: is of the architecture {self.architecture}, and config.json beside it of model_type "
                f"{config['model_type']!r}; put the original's there"
            )
        if int(self._fact("split.count") or 1) > 1:
            raise UserError(
                f"{file}: is one of {self._fact('split.count')} parts; merge them (llama-gguf-split --merge)"
            )
        self._check_facts()
        names = gguf.get_tensor_name_map(
            next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture),
            config["num_hidden_layers"],
        )
        self.names = {}  # of the file -> of transformers
        for name in shapes(dict(config)):
            module, _, suffix = name.rpartition(".")
            self.names[f"{names.get_name(module)}.{suffix}"] = name
        self._check_names()

    def _fact(self, key: str) -> Any:
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def _check_facts(self) -> None:
        scaling = self.config.get("rope_parameters") or {}
        for key, name in FACTS.items():
            found, said = self._fact(f"{self.architecture}.{key}"), self.config.get(name, scaling.get(name))
            if found is None or said is None or isinstance(found, list):
                continue
            if abs(found - said) > 1e-6 * abs(said):
                raise UserError(
                    f"{self.file}: says {key} {found:g}, and config.json beside it {name} {said}; put the original's "
                    "there"
                )

    def _check_names(self) -> None:
        there = {tensor.name for tensor in self.reader.tensors}
        scaled = self.config.get("rope_scaling") or (self.config.get("rope_parameters") or {}).get("rope_type")
        if ROPE_FACTORS in there and scaled in (None, {}, "default"):
            raise UserError(f"{self.file}: has a scaled RoPE, and config.json beside it none; put the original's there")
        if missing := sorted(self.names.keys() - there):
            raise UserError(f"{self.file}: lacks {missing[0]} ({self.names[missing[0]]}; {len(missing)} missing)")
        if more := sorted(there - self.names.keys() - {ROPE_FACTORS}):
            raise UserError(f"{self.file}: holds {more[0]}, which config.json beside it does not describe")

    def planned(self) -> Iterator[Planned]:
        """The tensors in the file's order: float16 and bfloat16 as they are, all else in float32."""
        from gguf import GGMLQuantizationType
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        types = {GGMLQuantizationType.F16: torch.float16, GGMLQuantizationType.BF16: torch.bfloat16}
        # Undoes llama.cpp's order of the rows of queries and keys, which is the interleaved RoPE's.
        heads = {key: self.config[key] for key in ("num_attention_heads", "num_key_value_heads") if key in self.config}
        layout = TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(
            config={"num_key_value_heads": self.config["num_attention_heads"]} | heads
        )
        expected = shapes(dict(self.config))
        for stored in self.reader.tensors:
            if name := self.names.get(stored.name):
                dtype = types.get(stored.tensor_type, torch.float32)
                yield Planned(name, expected[name], dtype, partial(self._make, stored, layout))

    def _make(self, stored: Any, layout: Any) -> torch.Tensor:
        from gguf import dequantize

        try:
            values = dequantize(stored.data, stored.tensor_type)
        except NotImplementedError:
            kind = stored.tensor_type.name
            raise UserError(f"{self.file}: {stored.name} is stored as {kind}, which gguf cannot dequantise") from None
        return torch.from_numpy(layout.process(weights=values, name=stored.name).weights.copy())
