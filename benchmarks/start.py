"""What a start reads of the trunk, and for how long, with HSDP: each replica its own, and once for all replicas.

    python benchmarks/start.py [--ranks 8] [--replicas 4] [--megabytes 200] [--rates 100 0] [--repeats 3]

The ways are in the same gloo processes and alternate. Storage is a file server that gives ``--rates`` MB/s to all ranks
together, as many nodes share one: a rank that reads waits for its turn at a lock that all have. With 0 files come from
this machine's memory, and what is left is the work on both sides.
"""

from __future__ import annotations

import argparse
import fcntl
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ranks import join
from benchmarks.tables import add_out, written
from benchmarks.timing import machine

WIDTH, LAYERS = 512, 8


def make_trunk(folder: Path, megabytes: int) -> None:
    """A Llama of about that size in bfloat16: random numbers, real names."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = max(64, (megabytes * 10**6 // 2 // LAYERS - 3 * WIDTH**2) // (3 * WIDTH) // 64 * 64)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
        max_position_embeddings=256,
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    save_file(
        {name: (torch.randn(shape) * 0.02).bfloat16() for name, shape in shapes.items()}, folder / "model.safetensors"
    )


def start(rank: int, world: int, port: int, options: argparse.Namespace, folder: str, queue) -> None:
    join(rank, world, port)
    from transformers import AutoConfig

    from sgt_titan.titan.load_trunk import load_trunk
    from sgt_titan.titan.trunks import build, family_of
    from sgt_titan.transform.trunk_files import TrunkFiles

    hf = AutoConfig.from_pretrained(folder)
    decoder = build(hf, "sdpa")
    with torch.device("meta"):
        trunk = decoder.build().to(torch.bfloat16)
    mesh = init_device_mesh("cpu", (options.replicas, world // options.replicas), mesh_dim_names=("replicate", "shard"))
    for layer in trunk.layers.values():
        fully_shard(layer, mesh=mesh)
    fully_shard(trunk, mesh=mesh)
    trunk.to_empty(device="cpu")
    files, server = TrunkFiles(folder), (Path(folder) / "server").open("w")
    read = files.read

    def from_the_server(name, region=None):
        fcntl.flock(server, fcntl.LOCK_EX)
        try:
            before = files.bytes_read
            found = read(name, region)
            if rate:
                time.sleep((files.bytes_read - before) / rate / 1e6)
            return found
        finally:
            fcntl.flock(server, fcntl.LOCK_UN)

    files.read = from_the_server
    ways = {"each": None, "once": mesh.get_group("replicate")}
    seconds: dict[tuple[str, float], list[float]] = {}
    tallies = {}
    for rate in options.rates:
        for _ in range(options.repeats):
            for way, group in ways.items():
                dist.barrier()
                began = time.perf_counter()
                tallies[way] = load_trunk(trunk, family_of(hf), files, group)
                dist.barrier()
                seconds.setdefault((way, rate), []).append(time.perf_counter() - began)
    everyone: list = [None] * world
    dist.all_gather_object(everyone, tallies)
    if rank == 0:
        queue.put((seconds, everyone))
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[100, 0], help="MB/s of storage for all ranks together; 0: no limit"
    )
    parser.add_argument("--repeats", type=int, default=3)
    add_out(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_trunk(Path(folder), options.megabytes)
        size = (Path(folder) / "model.safetensors").stat().st_size
        queue = mp.get_context("spawn").SimpleQueue()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(start, (options.ranks, port, options, folder, queue), nprocs=options.ranks)
        seconds, tallies = queue.get()
    columns = {
        "`trunk.read`": "",
        "read, MB": ",.1f",
        "a rank": ".1f",
        "received, MB": ",.1f",
        **{f"s at {rate:g} MB/s (spread)" if rate else "s from memory (spread)": ".2f" for rate in options.rates},
    }
    layout = f"HSDP {options.replicas} x {options.ranks // options.replicas}"
    with written(options.out, machine()) as tables:
        tables.start(f"trunk of {size / 1e6:.0f} MB, {options.ranks} gloo ranks, {layout}", columns)
        for way in tallies[0]:
            read = [tally[way].read / 1e6 for tally in tallies]
            times = [seconds[way, rate] for rate in options.rates]
            tables.row(
                way,
                sum(read),
                (statistics.median(read), min(read), max(read)),
                sum(tally[way].received for tally in tallies) / 1e6,
                *((statistics.median(s), min(s), max(s)) for s in times),
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
