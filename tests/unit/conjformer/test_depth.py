"""Rounding does not grow into another answer: many layers, 4096 tokens, bfloat16."""

from __future__ import annotations

import json

import pytest
import torch
from rotated_trunks import Rotated, model_of

from sgt_titan.conjformer.command import convert


def converted(folder, layers: int, *, context: int) -> Rotated:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            random = torch.randn(tensor.shape)
            tensor.copy_(1 + 0.3 * random if "norm" in name else random / tensor.shape[-1] ** 0.5)
    model.save_pretrained(folder / "trunk")
    (folder / "trunk" / "tokenizer.json").write_text(json.dumps({}))
    assert convert([str(folder / "trunk"), str(folder / "server"), "--secret", str(folder / "key")]) == 0
    return Rotated(folder / "trunk", folder / "server", folder / "server-client", folder / "key")


@torch.no_grad()
def difference(found: Rotated, tokens: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the plain model in float32, and of the rotated one with its server in ``dtype``."""
    client = found.load_client()
    tokens_1T = torch.randint(0, 200, (1, tokens), generator=torch.Generator().manual_seed(1))
    plain = model_of(found.trunk)(input_ids=tokens_1T).logits
    served = model_of(found.server, dtype)(inputs_embeds=client.encode(tokens_1T).to(dtype)).logits
    return plain, client.decode(served.float())


@pytest.mark.parametrize(("layers", "tokens"), ((32, 256), (2, 4096)), ids=("32 layers", "4096 tokens"))
def test_float32(layers, tokens, tmp_path):
    plain, ours = difference(converted(tmp_path, layers, context=4096), tokens)
    assert plain.std() > 0.5
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)


def test_bfloat16_is_as_far_off_as_the_plain_model_in_bfloat16(tmp_path):
    found = converted(tmp_path, 8, context=512)
    plain, ours = difference(found, 256, torch.bfloat16)
    with torch.no_grad():
        tokens_1T = torch.randint(0, 200, (1, 256), generator=torch.Generator().manual_seed(1))
        half = model_of(found.trunk, torch.bfloat16)(input_ids=tokens_1T).logits.float()
    error, usual = (ours - plain).pow(2).mean().sqrt(), (half - plain).pow(2).mean().sqrt()
    assert error < 1.5 * usual < 0.1 * plain.std()
