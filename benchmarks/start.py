"""What a start reads of the trunk, and for how long, with HSDP: each replica its own, and once for all replicas.

    python benchmarks/start.py [--ranks 8] [--replicas 4] [--megabytes 200] [--rate 100] [--repeats 3]

The ways are in the same gloo processes and alternate. Storage is a file server that gives ``--rate`` MB/s to all ranks
together, as many nodes share one: a rank that reads waits for its turn at a lock that all have. With ``--rate 0`` files
come from this machine's memory, and what is left is the work on both sides.
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
            if options.rate:
                time.sleep((files.bytes_read - before) / options.rate / 1e6)
            return found
        finally:
            fcntl.flock(server, fcntl.LOCK_UN)

    files.read = from_the_server
    ways = {"each": None, "once": mesh.get_group("replicate")}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    tallies = {}
    for _ in range(options.repeats):
        for way, group in ways.items():
            dist.barrier()
            began = time.perf_counter()
            tallies[way] = load_trunk(trunk, family_of(hf), files, group)
            dist.barrier()
            seconds[way].append(time.perf_counter() - began)
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
    parser.add_argument("--rate", type=float, default=100.0, help="MB/s of storage for all ranks together; 0: no limit")
    parser.add_argument("--repeats", type=int, default=3)
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
    print(machine())
    storage = f"{options.rate:g} MB/s" if options.rate else "unlimited"
    layout = f"HSDP {options.replicas} x {options.ranks // options.replicas}"
    print(f"trunk {size / 1e6:.0f} MB, {options.ranks} gloo ranks, {layout}, storage {storage}")
    for way, times in seconds.items():
        read = [tally[way].read / 1e6 for tally in tallies]
        received = sum(tally[way].received for tally in tallies) / 1e6
        spread = f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})"
        share = f"{min(read):.1f} to {max(read):.1f} a rank"
        print(f"  {way}: read {sum(read):.1f} MB ({share}), received {received:.1f} MB, {spread}")
    ratio = statistics.median(seconds["each"]) / statistics.median(seconds["once"])
    bytes_ = sum(t["each"].read for t in tallies) / sum(t["once"].read for t in tallies)
    print(f"  once reads {bytes_:.2f} times less, in {ratio:.2f} times less time")
    return 0


if __name__ == "__main__":
    sys.exit(main())
