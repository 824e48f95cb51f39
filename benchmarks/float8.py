"""What ``trunk.float8`` does to a trunk's logits, by the modules that training runs:

    python benchmarks/float8.py --trunk DIR --data FILE.jsonl

Text of the file's "text" column, 32 rows of 128 tokens, against the trunk in float32. No speed is measured here
(``benchmarks/training.py`` has arms for it): a CPU computes float8 products and is slow at it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import add_out, written
from benchmarks.timing import machine
from sgt_titan.titan import cpu_support

cpu_support.install()

from torchtitan.tools.utils import set_default_dtype  # noqa: E402

from sgt_titan.titan.float8 import Float8Linear, to_float8_layers  # noqa: E402
from sgt_titan.titan.load_trunk import load_trunk, named_weights  # noqa: E402
from sgt_titan.titan.trunks import build, family_of  # noqa: E402
from sgt_titan.transform.trunk_files import TrunkFiles  # noqa: E402

WAYS = {  # name -> type of what is not in float8, trunk.float8
    "bfloat16": (torch.bfloat16, "none"),
    "float32, layers in float8": (torch.float32, "weights"),
    "float32, products in float8": (torch.float32, "products"),
    "bfloat16, layers in float8": (torch.bfloat16, "weights"),
    "bfloat16, products in float8": (torch.bfloat16, "products"),
}


def trunk(path: str, dtype: torch.dtype, float8: str):
    hf = AutoConfig.from_pretrained(path, local_files_only=True)
    config = build(hf, "sdpa")
    if float8 != "none":
        config = to_float8_layers(config, float8)
    with set_default_dtype(dtype):
        model = config.build().requires_grad_(False).eval()
    if model.enable_weight_tying:
        model.tok_embeddings.weight = model.lm_head.weight
    load_trunk(model, family_of(hf), TrunkFiles(path))
    return model


@torch.no_grad()
def log_probabilities(model, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    return [model(ids, positions=torch.arange(ids.shape[1])[None])[0].float().log_softmax(-1) for ids in rows]


def weight_error(model, exact: dict[str, torch.Tensor]) -> float:
    """Mean relative error of the layers' matrices."""
    errors = []
    for name, module in model.named_modules():
        if name.startswith("layers.") and isinstance(module, torch.nn.Linear):
            weight = module.weight.float()
            if isinstance(module, Float8Linear):
                weight = weight * module.weight_scale
            expected = exact[f"{name}.weight"]
            errors.append((weight - expected).norm() / expected.norm())
    return float(torch.stack(errors).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trunk", required=True)
    parser.add_argument("--data", required=True, help='JSONL with a "text" column')
    add_out(parser)
    words = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(words.trunk, local_files_only=True)
    lines = Path(words.data).read_text().splitlines()[:32]
    rows = [tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :128] for line in lines]
    columns = {
        "trunk": "",
        "relative error of a weight": ".2%",
        "KL to the trunk in float32, nats": ".5f",
        "top-1 agreement": ".2%",
    }
    reference = trunk(words.trunk, torch.float32, "none")
    exact, weights = log_probabilities(reference, rows), named_weights(reference)
    with written(words.out, machine()) as tables:
        tables.start(f"{sum(ids.shape[1] for ids in rows):,} tokens", columns)
        for name, (dtype, float8) in WAYS.items():
            model = trunk(words.trunk, dtype, float8)
            found = log_probabilities(model, rows)
            kl = torch.cat([(e.exp() * (e - f)).sum(-1) for e, f in zip(exact, found, strict=True)])
            agree = torch.cat([e.argmax(-1) == f.argmax(-1) for e, f in zip(exact, found, strict=True)])
            tables.row(name, weight_error(model, weights), kl.mean().item(), agree.float().mean().item())


if __name__ == "__main__":
    main()
