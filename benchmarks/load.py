"""What the proxy adds, at some numbers of clients at a time: to text sent straight to the same server, in one run.

    python benchmarks/load.py                # a server that answers at once and reads no prompt: the proxy is the limit
    python benchmarks/load.py --vllm         # the vLLM of .venv-vllm (make test-vllm) over the demo trunk
    python benchmarks/load.py --export EXPORT --upstream http://127.0.0.1:8000 --key KEY --clients 1 16 64 256

The proxy is a process of its own. Straight: `/v1/completions` with the prompt's text. Medians of whole answers. Without
--export it is an untrained transform of the demo trunk, whose times are those of a trained one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.proxy import start_instant, start_proxy
from tests.serving_kit import make_export
from tests.vllm.conftest import KEY as VLLM_KEY
from tests.vllm.conftest import TRUNK
from tests.vllm.conftest import served as served_by_vllm

KEY = "load-key-0123456789"
PROMPT = "Dear Anna, your parcel has come. "


async def ask(
    url: str, key: str, model: str, clients: int, requests: int, tokens: int
) -> tuple[float, float, list[str]]:
    """Median seconds of an answer, requests a second, what was no answer."""
    times: list[float] = []
    failures: list[str] = []
    left = iter(range(requests))
    body = {"model": model, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}

    async def keep(client: httpx.AsyncClient) -> None:
        for number in left:
            # Each begins otherwise: a server finds what it has seen of text, and nothing of embeddings.
            prompt = f"{number}: {PROMPT * 8}"
            started = time.perf_counter()
            found = await client.post("/v1/completions", json={**body, "prompt": prompt})
            times.append(time.perf_counter() - started)
            if found.status_code != 200:
                failures.append(f"{found.status_code} {found.text[:300]}")

    limits = httpx.Limits(max_connections=clients)
    headers = {"authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits) as client:
        started = time.perf_counter()
        await asyncio.gather(*(keep(client) for _ in range(clients)))
        whole = time.perf_counter() - started
    return statistics.median(times), requests / whole, failures


def memory(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export")
    parser.add_argument("--upstream")
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--key", default="unused")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--requests", type=int, default=8, help="of every client, at most 256 in all (default 8)")
    parser.add_argument("--tokens", type=int, default=8)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="load-")))
        upstream, key = arguments.upstream, arguments.key
        if arguments.vllm:
            upstream, key = stack.enter_context(served_by_vllm(folder / "vllm.log")), VLLM_KEY
        elif upstream is None:
            instant, upstream = start_instant()
            stack.callback(instant.terminate)
        export = arguments.export or make_export(TRUNK, folder / "export", std=0.05)
        measure(arguments, str(export), upstream, key, folder / "proxy.log")
    return 0


def measure(arguments: argparse.Namespace, export: str, upstream: str, key: str, log: Path) -> None:
    headers = {"authorization": f"Bearer {key}"}
    served = httpx.get(upstream + "/v1/models", headers=headers).json()["data"][0]["id"]
    options = ["--upstream", upstream, "--active", "256", "--waiting", "1024", "--wait-timeout", "300"]
    environment = {"SGT_TITAN_API_KEY": KEY, "SGT_TITAN_UPSTREAM_API_KEY": key}
    process, url = start_proxy(export, options, environment, log)
    try:
        print("clients   straight ms   req/s   proxy ms   req/s   added ms   failed   proxy MiB")
        for clients in arguments.clients:
            requests = max(clients, min(256, clients * arguments.requests))
            how = (clients, requests, arguments.tokens)
            straight = asyncio.run(ask(upstream, key, served, *how))
            proxied = asyncio.run(ask(url, KEY, "m", *how))
            failed = straight[2] + proxied[2]
            print(
                f"{clients:>7}{1e3 * straight[0]:>14.0f}{straight[1]:>8.1f}{1e3 * proxied[0]:>11.0f}{proxied[1]:>8.1f}"
                f"{1e3 * (proxied[0] - straight[0]):>11.0f}{len(failed):>9}{memory(process.pid):>12.0f}",
                *sorted(set(failed)),
                sep="\n    ",
                flush=True,
            )
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    sys.exit(main())
