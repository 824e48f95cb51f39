"""Small worlds for tests of attacks: a random trunk, rows of tokens, and mechanisms whose success rate is known."""

from __future__ import annotations

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from sgt_titan.evaluation.attacks import ATTACKS
from sgt_titan.evaluation.world.granted import World
from sgt_titan.evaluation.world.mechanisms import Mechanism, Obfuscated
from sgt_titan.evaluation.world.samples import Sample


def tiny_trunk(trunk_dir, name: str = "llama"):
    """A random trunk of conftest's TRUNKS (V = 300, D = 32) as the runner loads it."""
    model = AutoModelForCausalLM.from_pretrained(trunk_dir(name), dtype=torch.float32)
    return model.eval().requires_grad_(False)


def random_rows(count: int, length: int, vocab: int, seed: int, *, clean: int = 1) -> list[Sample]:
    """Rows of uniform tokens; the first ``clean`` of each stay clean, the rest are hidden."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = random.integers(0, vocab, length)
        rows.append(Sample(ids, np.arange(length) >= clean, np.zeros(length, dtype=bool)))
    return rows


def pure_noise() -> Mechanism:
    """Sends noise that has nothing to do with the prompt: no attack may beat the prior."""

    def obfuscate(batch, x_BTD, random):
        noise_BTD = torch.randn(x_BTD.shape, generator=random)
        x_tilde_BTD = torch.where(batch.obfuscate_BT[..., None], noise_BTD, x_BTD)
        return Obfuscated(x_tilde_BTD, torch.zeros_like(x_BTD), torch.zeros_like(x_BTD))

    return Mechanism("pure", "pure noise", obfuscate, std=1.0)


def linear(matrix_DD: torch.Tensor, bias_D: torch.Tensor, std: float) -> Mechanism:
    """x~ = x A + b + std * eps: an SGT whose mean is linear and whose noise is constant."""

    def obfuscate(batch, x_BTD, random):
        center_BTD = x_BTD @ matrix_DD + bias_D
        x_tilde_BTD = center_BTD + std * torch.randn(x_BTD.shape, generator=random)
        x_tilde_BTD = torch.where(batch.obfuscate_BT[..., None], x_tilde_BTD, x_BTD)
        return Obfuscated(x_tilde_BTD, center_BTD, torch.full_like(x_BTD, float(np.log(max(std, 1e-8)))))

    return Mechanism("linear", "linear", obfuscate, std=std)


def world(mechanism: Mechanism, trunk, *, rows: int = 8, length: int = 12, corpus: int = 64, seed: int = 0) -> World:
    vocab = trunk.get_input_embeddings().weight.shape[0]
    return World(
        rows=random_rows(rows, length, vocab, seed + 1),
        corpus=random_rows(corpus, length, vocab, seed + 1000),
        mechanism=mechanism,
        trunk=trunk,
        seed=seed,
    )


def top1(guess, world: World) -> float:
    """Share of hidden tokens that an attack's first guess gets right."""
    return (guess.top_NK[:, 0] == world.truth_N).double().mean().item()


class Counting(torch.nn.Module):
    """A language model that knows one language: each token is followed by the next."""

    def __init__(self, model):
        super().__init__()
        self.inner, self.config = model, model.config
        self.device = model.device

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def forward(self, input_ids, past_key_values, use_cache):
        out = self.inner(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)
        logits = torch.zeros_like(out.logits)
        logits.scatter_(-1, (input_ids[..., None] + 1) % logits.shape[-1], 9.0)
        return type(out)(logits=logits)


# Small enough for a test; the rest of each attack's effort is that of the quick suite.
SEQUENCE = {"first": 5, "most": 10, "layers": 1, "width": 32, "batch_rows": 16}
SMALL = {
    "inverter": {"steps": 40, "layers": 1, "width": 64, "batch_rows": 32},
    **{key: {"beams": 2, "candidates": 32, "rows": 32} for key in ("map_search", "map_search_at_z")},
    "averaging": {"most": 4},
    "averaging_regression": {"most": 4},
    "beamclean_gaussian": {"affine": False, "rounds": 1, "prior_weight": 0.0},
    "beamclean_affine": {"affine": True, "rounds": 1, "prior_weight": 0.0},
    "logit_reading": {"rows": 32},
    **dict.fromkeys(("sequence", "guess", "answer"), SEQUENCE),
    "sequence_at_z": SEQUENCE | {"after": SEQUENCE},
    "sequence_repeats": SEQUENCE | {"times": 2},
    "autoregressive": SEQUENCE | {"beams": 2, "after": SEQUENCE},
}


def run(name: str, here: World, **more):
    """An attack of the table at a small effort."""
    attack = ATTACKS[name]
    return attack.run(
        **here.granted(attack.run),
        **{**(attack.arguments("quick") or attack.arguments("standard")), **SMALL.get(name, {}), **more},
    )
