"""What the proxy adds, at some numbers of clients at a time: to text sent straight to the same server, in one run.

    python benchmarks/load.py --export EXPORT --upstream http://127.0.0.1:8000 [--key KEY] [--clients 1 16 64 256]

The proxy is a process of its own. Straight: `/v1/completions` with the prompt's text. Medians of whole answers.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.proxy import start_proxy

KEY = "load-key-0123456789"
PROMPT = "Dear Anna, your parcel has come. "


async def ask(url: str, key: str, model: str, clients: int, requests: int, tokens: int) -> tuple[float, float, int]:
    """Median seconds of an answer, requests a second, failures."""
    times, failures, left = [], 0, iter(range(requests))
    body = {"model": model, "prompt": PROMPT * 8, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}

    async def keep(client: httpx.AsyncClient) -> None:
        nonlocal failures
        for _ in left:
            started = time.perf_counter()
            found = await client.post("/v1/completions", json=body)
            times.append(time.perf_counter() - started)
            failures += found.status_code != 200

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
    parser.add_argument("--export", required=True)
    parser.add_argument("--upstream", required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--requests", type=int, default=8, help="of every client, at most 256 in all (default 8)")
    parser.add_argument("--tokens", type=int, default=8)
    arguments = parser.parse_args()
    headers = {"authorization": f"Bearer {arguments.key}"}
    served = httpx.get(arguments.upstream + "/v1/models", headers=headers).json()["data"][0]["id"]
    options = ["--upstream", arguments.upstream, "--active", "256", "--waiting", "1024", "--wait-timeout", "300"]
    environment = {"SGT_TITAN_API_KEY": KEY, "SGT_TITAN_UPSTREAM_API_KEY": arguments.key}
    log = Path(tempfile.mkstemp(prefix="load-", suffix=".log")[1])
    process, url = start_proxy(arguments.export, options, environment, log)
    try:
        print("clients   straight ms   req/s   proxy ms   req/s   added ms   failed   proxy MiB")
        for clients in arguments.clients:
            requests = max(clients, min(256, clients * arguments.requests))
            how = (clients, requests, arguments.tokens)
            straight = asyncio.run(ask(arguments.upstream, arguments.key, served, *how))
            proxied = asyncio.run(ask(url, KEY, "m", *how))
            print(
                f"{clients:>7}{1e3 * straight[0]:>14.0f}{straight[1]:>8.1f}{1e3 * proxied[0]:>11.0f}{proxied[1]:>8.1f}"
                f"{1e3 * (proxied[0] - straight[0]):>11.0f}{straight[2] + proxied[2]:>9}{memory(process.pid):>12.0f}"
            )
    finally:
        process.terminate()
        process.wait(60)
    return 0


if __name__ == "__main__":
    sys.exit(main())
