"""vLLM's own code on our bytes, where vLLM is installed; it needs CUDA, so CI has the stub servers instead."""

import pytest
import torch

from sgt_titan.client import Options
from sgt_titan.client.wire import WIRES

embed_utils = pytest.importorskip("vllm.renderers.embed_utils", exc_type=ImportError)
protocol = pytest.importorskip("vllm.entrypoints.openai.completion.protocol", exc_type=ImportError)


class ModelConfig:
    hf_text_config = object()
    enable_prompt_embeds = True
    dtype = torch.bfloat16

    def get_hidden_size(self):
        return 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_request_is_accepted(dtype):
    embeds_TD = torch.randn(5, 8).to(dtype)
    options = Options(max_tokens=3, n=2, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=1, logprobs=2)
    body = WIRES["vllm"].body(embeds_TD, options, "m")
    request = protocol.CompletionRequest.model_validate(body)
    assert request.n == 2 and request.max_tokens == 3 and request.stream_options.continuous_usage_stats
    assert body.keys() <= protocol.CompletionRequest.model_fields.keys()
    loaded = embed_utils.safe_load_prompt_embeds(ModelConfig(), request.prompt_embeds)
    assert torch.equal(loaded, embeds_TD.to(torch.bfloat16))
