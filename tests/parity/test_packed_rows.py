"""Samples packed into one row, kept apart by a document mask, get the logits that they get in rows of their own.

Forward only, since FlexAttention has no CPU backward, and not compiled, since compiling it takes a CPU a minute: what
is tested is the mask made from positions, the rotary positions, and what the attention does with both.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoConfig

from sgt_titan.titan.load_trunk import load_trunk
from sgt_titan.titan.trunks import build, family_of
from sgt_titan.transform.trunk_files import TrunkFiles


def load(path, attention):
    hf = AutoConfig.from_pretrained(path)
    trunk = build(hf, attention).build()
    trunk.init_states()
    load_trunk(trunk, family_of(hf), TrunkFiles(path))
    return trunk.eval()


def logits(trunk, tokens_BT, positions_BT, masks):
    h_BTD = trunk.tok_embeddings(tokens_BT)
    for layer in trunk.layers.values():
        h_BTD = layer(h_BTD, masks, positions_BT)
    return trunk.lm_head(trunk.norm(h_BTD))


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch):
    from torchtitan.models.common import attention

    monkeypatch.setattr(attention.FlexAttention, "_compiled_flex_attn", staticmethod(flex_attention))
    monkeypatch.setattr(attention, "_compiled_create_block_mask", create_block_mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3", "deepseek-dense"])
def test_packed_row_equals_rows(name, trunk_dir):
    lengths, seq_len = (40, 7, 61), 128
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(300, (length,), generator=generator) for length in lengths]
    packed, alone = load(trunk_dir(name), "flex"), load(trunk_dir(name), "sdpa")

    padding = seq_len - sum(lengths)
    tokens_BT = torch.cat([*samples, torch.zeros(padding, dtype=torch.int64)])[None]
    positions_BT = torch.cat([torch.arange(n) for n in (*lengths, padding)])[None]
    together = logits(packed, tokens_BT, positions_BT, packed.get_attention_masks(positions_BT))[0]
    start = 0
    for sample in samples:
        own = logits(alone, sample[None], torch.arange(len(sample))[None], None)[0]
        here = together[start : start + len(sample)]
        assert own.std() > 0.5
        difference = (here - own).abs().max().item()
        print(f"{name}: sample of {len(sample)} tokens: max |difference| {difference:.2e}")
        assert difference < 2e-5
        start += len(sample)
