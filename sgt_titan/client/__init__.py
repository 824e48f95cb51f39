"""What an application needs: obfuscate a prompt here, have it answered there.

    from sgt_titan.client import StainedGlassTransform, VLLM
    sgt = StainedGlassTransform.from_pretrained("my-sgt")
    print(VLLM("http://gpu-server:8000").generate(sgt.encode(messages)).text)

Needs torch, transformers, safetensors and httpx; neither torchtitan nor the trunk's weights.
"""

from __future__ import annotations

from sgt_titan.client.answer import Answer, Backend, Choice, Delta, Options, TokenLogprob, UpstreamError
from sgt_titan.client.encoder import StainedGlassTransform
from sgt_titan.client.inspect import Reading, read_nearest
from sgt_titan.client.local import Transformers
from sgt_titan.client.private import PrivateChat
from sgt_titan.client.prompt import Prompt
from sgt_titan.client.remote import VLLM, SGLang
from sgt_titan.client.tool_calls import ToolCall

__all__ = [
    "VLLM",
    "Answer",
    "Backend",
    "Choice",
    "Delta",
    "Options",
    "PrivateChat",
    "Prompt",
    "Reading",
    "SGLang",
    "StainedGlassTransform",
    "TokenLogprob",
    "ToolCall",
    "Transformers",
    "UpstreamError",
    "read_nearest",
]
