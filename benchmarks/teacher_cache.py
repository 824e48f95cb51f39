"""What storing k of a teacher's probabilities costs in exactness and on disk, on a real trunk and a trained SGT:

    python benchmarks/teacher_cache.py --trunk DIR --export DIR --data FILE.jsonl

Texts of a JSONL file with a "text" column, 128 tokens of each, the first 48 obfuscated. The error of the gradient is
that of the student's hidden states before lm_head, relative to its norm, and the cosine between the two.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.tables import Tables, add_out, written
from benchmarks.timing import clock, machine
from sgt_titan.objectives.distillation import distil
from sgt_titan.transform import load_export

LENGTH, PROMPT = 128, 48


@torch.no_grad()
def hidden_states(trunk: str, export: str, data: str, rows: int):
    """Hidden states of both streams (N, D) and lm_head's weight."""
    tokenizer = AutoTokenizer.from_pretrained(trunk, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(trunk, dtype=torch.float32, local_files_only=True).eval()
    transform = load_export(export)
    students, teachers = [], []
    for line in Path(data).read_text().splitlines():
        ids = tokenizer(json.loads(line)["text"], return_tensors="pt").input_ids[:, :LENGTH]
        if ids.shape[1] < LENGTH:
            continue
        mask = (torch.arange(LENGTH) > 0) & (torch.arange(LENGTH) < PROMPT)
        embeddings = transform.transform(ids, mask[None])
        teachers.append(model.model(input_ids=ids).last_hidden_state[0, :-1])
        students.append(model.model(inputs_embeds=embeddings).last_hidden_state[0, :-1])
        if len(students) == rows:
            break
    return torch.cat(students), torch.cat(teachers), model.lm_head.weight.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("trunk", "export", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rows", type=int, default=32)
    add_out(parser)
    words = parser.parse_args()
    with written(words.out, machine()) as tables:
        measure(tables, words)


COLUMNS = {
    "k": ",d",
    "bytes a token": ",d",
    "mass in the tail": ".2%",
    "KL, nats": ".4f",
    "of the full KL": ".2%",
    "gradient: relative error": ".2e",
    "cosine": ".6f",
}


def measure(tables: Tables, words: argparse.Namespace) -> None:
    student, teacher, weight = hidden_states(words.trunk, words.export, words.data, words.rows)
    exact = distil(student, teacher, weight)
    full_kl = (exact.cross_entropy_N - exact.teacher_entropy_N).mean().item()
    vocabulary = weight.shape[0]
    tables.start(f"{len(student)} positions, V {vocabulary:,}, KL {full_kl:.4f} nats", COLUMNS)
    for k in (1, 8, 64, 512, vocabulary):
        targets = distil(student, teacher, weight, keep=k).targets
        found = distil(student, None, weight, targets=targets)
        kl = (found.cross_entropy_N - found.teacher_entropy_N).mean().item()
        a, b = found.gradient_ND.flatten().double(), exact.gradient_ND.flatten().double()
        error, cosine = ((a - b).norm() / b.norm()).item(), torch.cosine_similarity(a, b, dim=0).item()
        size = k * (4 + (2 if vocabulary <= 2**16 else 4)) + 4
        tables.row(k, size, targets.tail_N.mean().item(), kl, kl / full_kl, error, cosine)
    started = clock()
    distil(student, teacher, weight)
    asked = clock() - started
    targets = distil(student, teacher, weight, keep=64).targets
    started = clock()
    distil(student, None, weight, targets=targets)
    print(f"\nlm_head and loss: {asked:.2f} s asking, {clock() - started:.2f} s reading k = 64")


if __name__ == "__main__":
    main()
