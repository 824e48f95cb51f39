"""The evaluation's heavy parts against the naive way, in one run: ``python benchmarks/evaluation.py``.

    ranking     streamed ranks against the full distance matrix
    map         a cached step per candidate against the SGT over the whole prefix for every candidate
    scan        BeamClean's streamed vocabulary scan against the full matrix

Ratios of medians; peak memory of a process each. Sizes are for two CPU cores and about three minutes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.timing import compare, machine, peak_mib
from sgt_titan.evaluation.attacks.map_search import Causal
from sgt_titan.evaluation.attacks.nearest import top_rows
from sgt_titan.evaluation.world.mechanisms import learned
from sgt_titan.evaluation.world.threat import Table
from sgt_titan.metrics.ranks import token_ranks
from sgt_titan.transform import ExportedTransform, SGTConfig, estimator_config

WIDTH = 128


def full_ranks(x_ND: torch.Tensor, table_VD: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """The whole (N, V) matrix in float64, as one would write it."""
    distance_NV = torch.cdist(x_ND.double(), table_VD.double())
    return 1 + (distance_NV < distance_NV.gather(1, tokens_N[:, None])).sum(-1)


RANKING = """
import torch
torch.set_num_threads({threads})
from benchmarks.evaluation import full_ranks
from sgt_titan.metrics.ranks import token_ranks
table = torch.randn({V}, {D}); tokens = torch.arange({N}) % {V}; x = table[tokens] + torch.randn({N}, {D})
token_ranks(x[:4], table[:4], tokens[:4] % 4); full_ranks(x[:4], table[:4], tokens[:4] % 4); start()
{call}
"""


def ranking() -> None:
    print("\nranking: streamed / full matrix")
    print(f"{'N':>8}{'V':>9}{'streamed s':>12}{'full s':>9}{'time ratio':>12}{'streamed MiB':>14}{'full MiB':>10}")
    for N, V in ((1_000, 8_192), (4_000, 8_192), (1_000, 32_768), (4_000, 32_768)):
        torch.manual_seed(0)
        table, tokens = torch.randn(V, WIDTH), torch.arange(N) % V
        x = table[tokens] + torch.randn(N, WIDTH)
        times = compare(
            {
                "ours": lambda x=x, table=table, tokens=tokens: token_ranks(x, table, tokens),
                "full": lambda x=x, table=table, tokens=tokens: full_ranks(x, table, tokens),
            },
            3,
        )
        calls = {"ours": "token_ranks(x, table, tokens)", "full": "full_ranks(x, table, tokens)"}
        options = {"N": N, "V": V, "D": WIDTH, "threads": torch.get_num_threads()}
        memory = {name: peak_mib(RANKING.format(call=call, **options)) for name, call in calls.items()}
        ours, full = times["ours"].median, times["full"].median
        print(
            f"{N:>8}{V:>9}{ours:>12.2f}{full:>9.2f}{ours / full:>12.2f}{memory['ours']:>14.0f}{memory['full']:>10.0f}"
        )


def make_sgt(vocab: int) -> ExportedTransform:
    config = AutoConfig.for_model(
        "llama", vocab_size=vocab, hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip
    return ExportedTransform(
        SGTConfig(trunk_config=estimator_config(config, 2), vocab_size=vocab, hidden_size=WIDTH, embeddings=False)
    ).eval()


@torch.no_grad()
def beam_step() -> None:
    print("\nmap: one position of one beam; cached step / whole prefix for every candidate")
    print(f"{'T':>6}{'candidates':>12}{'cached ms':>11}{'naive ms':>10}{'naive / cached':>16}")
    for T, C in ((16, 64), (64, 64), (256, 64), (64, 256), (64, 1024)):
        torch.manual_seed(0)
        sgt, table = make_sgt(4096), 0.1 * torch.randn(4096, WIDTH)
        prefix, candidates = torch.randint(0, 4096, (T,)), torch.randint(0, 4096, (1, C))
        emission = Causal(learned(sgt), Table(table), [torch.zeros(T + 1, WIDTH)], None, 0)
        sgt(inputs_embeds=table[prefix][None], past_key_values=emission.caches)

        def naive(table=table, prefix=prefix, candidates=candidates, sgt=sgt):
            rows = torch.cat([prefix.expand(candidates.shape[1], -1), candidates.T], 1)
            for part in rows.split(256):
                sgt(inputs_embeds=table[part])

        times = compare({"cached": lambda e=emission, c=candidates, t=T: e.gaussian(t, c), "naive": naive}, 3)
        cached, slow = times["cached"].median, times["naive"].median
        print(f"{T:>6}{C:>12}{1e3 * cached:>11.1f}{1e3 * slow:>10.0f}{slow / cached:>16.1f}")


SCAN = """
import torch
torch.set_num_threads({threads})
from sgt_titan.evaluation.attacks.nearest import top_rows
x, table = torch.randn({N}, {D}), torch.randn({V}, {D}); top_rows(x[:4], table[:64], 32)
torch.cdist(x[:4].double(), table[:64].double()).topk(32, largest=False); start()
{call}
"""


def scan() -> None:
    print("\nscan: the 32 nearest of V for N tokens; streamed / full matrix")
    print(f"{'N':>8}{'V':>9}{'streamed s':>12}{'full s':>9}{'time ratio':>12}{'streamed MiB':>14}{'full MiB':>10}")
    for N, V in ((1_000, 16_384), (4_000, 16_384), (1_000, 65_536)):
        torch.manual_seed(0)
        x, table = torch.randn(N, WIDTH), torch.randn(V, WIDTH)

        def full(x=x, table=table):
            return torch.cdist(x.double(), table.double()).topk(32, largest=False)

        times = compare({"ours": lambda x=x, t=table: top_rows(x, t, 32), "full": full}, 3)
        calls = {
            "ours": "top_rows(x, table, 32)",
            "full": "torch.cdist(x.double(), table.double()).topk(32, largest=False)",
        }
        options = {"N": N, "V": V, "D": WIDTH, "threads": torch.get_num_threads()}
        memory = {name: peak_mib(SCAN.format(call=call, **options)) for name, call in calls.items()}
        ours, slow = times["ours"].median, times["full"].median
        print(
            f"{N:>8}{V:>9}{ours:>12.2f}{slow:>9.2f}{ours / slow:>12.2f}{memory['ours']:>14.0f}{memory['full']:>10.0f}"
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(machine())
    ranking()
    beam_step()
    scan()
