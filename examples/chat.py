"""python examples/chat.py EXPORT URL: a chat. What you type leaves this machine as obfuscated embeddings only."""

import sys

from sgt_titan.client import VLLM, StainedGlassTransform

# hold_noise: every turn sends the whole conversation again; of fresh noise each time the server could take the mean.
sgt, server = StainedGlassTransform.from_pretrained(sys.argv[1], hold_noise=True), VLLM(sys.argv[2])
messages = []
for line in filter(str.strip, sys.stdin):
    messages.append({"role": "user", "content": line.strip()})
    answer = server.generate(sgt.encode(messages), max_tokens=200).text
    messages.append({"role": "assistant", "content": answer})
    print(answer, flush=True)
