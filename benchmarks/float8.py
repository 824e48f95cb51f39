"""What rounding a trunk's matrices to 8 bits does to its logits:

    python benchmarks/float8.py --trunk DIR --data FILE.jsonl

Weights of all decoder layers go to float8 e4m3 and back, activations stay as they are; with one scale for everything (a
power of two, which no rank has to agree on with others) and with one a row. No speed is measured: CPUs have no float8
products.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import machine

SCALE = 2.0**8  # weights up to 1.75 fit
MAXIMUM = torch.finfo(torch.float8_e4m3fn).max


def one_scale(weight: torch.Tensor) -> torch.Tensor:
    return (weight * SCALE).clamp(-MAXIMUM, MAXIMUM).to(torch.float8_e4m3fn).float() / SCALE


def scale_a_row(weight: torch.Tensor) -> torch.Tensor:
    scale = MAXIMUM / weight.abs().amax(-1, keepdim=True).clamp_min(1e-12)
    return (weight * scale).to(torch.float8_e4m3fn).float() / scale


def bfloat16(weight: torch.Tensor) -> torch.Tensor:
    return weight.bfloat16().float()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", required=True)
    parser.add_argument("--data", required=True, help='JSONL with a "text" column')
    words = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(words.trunk, local_files_only=True)
    lines = Path(words.data).read_text().splitlines()[:32]
    rows = [tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :128] for line in lines]
    print(machine())
    print("\n| weights of the layers | relative error of a weight | KL to the trunk, nats | top-1 agreement |")
    print("|---|---:|---:|---:|")
    model = AutoModelForCausalLM.from_pretrained(words.trunk, dtype=torch.float32, local_files_only=True).eval()
    exact = [model(ids).logits[0].log_softmax(-1) for ids in rows]
    matrices = [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    originals = [module.weight.detach().clone() for module in matrices]
    for name, rounded in (("bfloat16", bfloat16), ("e4m3, one scale", one_scale), ("e4m3, a scale a row", scale_a_row)):
        errors = []
        for module, original in zip(matrices, originals, strict=True):
            module.weight.copy_(rounded(original))
            errors.append((module.weight - original).norm() / original.norm())
        kl, agree = [], []
        for ids, expected in zip(rows, exact, strict=True):
            found = model(ids).logits[0].log_softmax(-1)
            kl.append((expected.exp() * (expected - found)).sum(-1))
            agree.append(found.argmax(-1) == expected.argmax(-1))
        print(
            f"| {name} | {torch.stack(errors).mean():.2%} | {torch.cat(kl).mean():.5f} | "
            f"{torch.cat(agree).float().mean():.2%} |"
        )


if __name__ == "__main__":
    main()
