"""What the tests of a rotated basis share: a conversion's files, a random GPT-2."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sgt_titan.conjformer.client import Client
from sgt_titan.conjformer.secret import load

WIDTH, VOCAB = 32, 300


class Rotated(NamedTuple):
    trunk: Path
    server: Path
    client: Path
    secret: Path

    def load_client(self, **options) -> Client:
        return Client.load(self.client, load(self.secret), **options)


def model_of(path: Path, dtype=torch.float32):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def write_gpt2(path: Path, *, positions: int = 128, layers: int = 3, tied: bool = True) -> Path:
    """A random GPT-2 none of whose norms and biases is what it is initialised to."""
    from transformers import AutoModelForCausalLM, GPT2Config

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=positions, n_embd=WIDTH, n_layer=layers, n_head=4, n_inner=48,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=tied,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape)
            if ".ln_" in name and name.endswith("weight"):
                tensor.copy_(1 + 0.3 * noise)
            else:
                tensor.copy_(0.3 * noise if tensor.dim() == 1 else noise / WIDTH**0.5)
    model.save_pretrained(path)
    return path
