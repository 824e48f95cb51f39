"""python examples/chat.py EXPORT URL: a chat. What you type leaves this machine as obfuscated embeddings only."""

import sys

from sgt_titan.client import VLLM, StainedGlassTransform

sgt, server = StainedGlassTransform.from_pretrained(sys.argv[1]), VLLM(sys.argv[2])
messages = []
for line in sys.stdin:
    messages.append({"role": "user", "content": line.strip()})
    answer = server.generate(sgt.encode(messages), max_tokens=200).text
    messages.append({"role": "assistant", "content": answer})
    print(answer, flush=True)
