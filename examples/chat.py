"""python examples/chat.py EXPORT URL: a chat. What you type leaves this machine as obfuscated embeddings only."""

import sys

from sgt_titan.client import VLLM, StainedGlassTransform

# Every turn sends the whole conversation again. Noise is held, so the server gets no second sample of it to average;
# the key is kept (and made, the first time), so a restart is none either.
sgt = StainedGlassTransform.from_pretrained(sys.argv[1], noise_key="noise.key")
server = VLLM(sys.argv[2])
messages = []
for line in filter(str.strip, sys.stdin):
    messages.append({"role": "user", "content": line.strip()})
    answer = server.generate(sgt.encode(messages), max_tokens=200).text
    messages.append({"role": "assistant", "content": answer})
    print(answer, flush=True)
