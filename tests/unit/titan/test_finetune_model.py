"""The fine-tuned model's scores in chunks against whole logits, and its drift from the teacher."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from sgt_titan.titan.finetune_model import FinetuneModel

SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": SHAPE | {"num_key_value_heads": 2, "intermediate_size": 24, "tie_word_embeddings": True},
    "qwen3": SHAPE | {"num_key_value_heads": 2, "intermediate_size": 24, "head_dim": 8, "tie_word_embeddings": False},
    "gpt2": {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32},
}
TOKENS_BT = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
CHOSEN_BT = torch.arange(9).expand(2, -1) < torch.tensor([[8], [5]])


def model_of(name: str) -> FinetuneModel:
    torch.manual_seed(0)
    hf = AutoConfig.for_model(name, **CONFIGS[name])
    return FinetuneModel(FinetuneModel.Config(hf=hf, teacher=hf)).train()


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_are_the_whole(name):
    model = model_of(name)
    logits_NV, teacher_NV = (m(input_ids=TOKENS_BT).logits[CHOSEN_BT] for m in (model.lm, model.teacher))
    target_N = TOKENS_BT.roll(-1, 1)[CHOSEN_BT]
    next_token = torch.nn.functional.cross_entropy(logits_NV, target_N, reduction="sum")
    kl = torch.nn.functional.kl_div(
        logits_NV.log_softmax(-1), teacher_NV.log_softmax(-1), log_target=True, reduction="sum"
    )
    weights = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(next_token + 2 * kl, weights)
    found = model(TOKENS_BT, CHOSEN_BT, chunk=3)
    torch.testing.assert_close((found.next, found.kl), (next_token, kl))
    assert found.right == (logits_NV.argmax(-1) == target_N).sum()
    for ours, whole in zip(torch.autograd.grad(found.next + 2 * found.kl, weights), expected, strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-4)


def test_without_a_teacher_there_is_no_kl():
    hf = AutoConfig.for_model("llama", **CONFIGS["llama"])
    found = FinetuneModel(FinetuneModel.Config(hf=hf))(TOKENS_BT, CHOSEN_BT)
    assert found.kl == 0 and found.next > 0


def test_a_rank_without_a_scored_token_still_has_a_gradient():
    found = model_of("llama")(TOKENS_BT, torch.zeros_like(CHOSEN_BT))
    found.next.backward()
    assert found.next == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_drift_is_one_from_itself_and_small_from_a_stranger(name):
    model = model_of(name)
    stranger = model.drift(0)
    model.lm.load_state_dict(model.teacher.state_dict())
    itself = model.drift(0)
    assert stranger < 0.2
    torch.testing.assert_close(itself.item(), 1.0, atol=1e-4, rtol=0)
    model.drift(1).backward()
    assert model.lm.get_input_embeddings().weight.grad is not None
    assert all(p.grad is None for p in model.teacher.parameters())
