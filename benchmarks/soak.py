"""A proxy under clients that vanish, read slowly or send nonsense, before a server that dies and comes back.

    python benchmarks/soak.py --minutes 60 --seed 1

Seeded and bounded. The server is the tests' stub over a small random trunk; it dies in the middle of answers and comes
back on its port. The proxy is a process of its own, all of whose output is kept. Ends with exit code 1 if a request
got neither an answer nor one of the errors that say whose fault it is, if one was generated to its end twice or an
answer not once, if the proxy's memory grew by more than a quarter after the first fifth of the time, or if a word of a
prompt was printed. `python benchmarks/load.py` measures speed.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.proxy import start_proxy
from tests.conftest import write_trunk
from tests.serving_kit import load_trunk, make_export, with_chat_template
from tests.stub_servers import running, vllm_app

CANARY = "Zorblax-7741"
KEY = "soak-key-0123456789"
PATH = "/v1/chat/completions"
PATIENCE = 900.0  # seconds; more than the proxy's own longest limit: what hangs there is an error of its own


class Forgetful(list):
    """For what an hour would fill the memory with."""

    def append(self, item: object) -> None:
        pass


class Upstream(threading.Thread):
    """A stub that stops and comes back on its port, at moments of ``rng``, and sometimes breaks off."""

    def __init__(self, trunk, rng: random.Random, steady: bool):
        super().__init__(daemon=True)
        self.trunk, self.rng, self.steady = trunk, rng, steady
        self.url, self.over, self.up, self.deaths = "", threading.Event(), threading.Event(), 0

    def run(self) -> None:
        port = 0
        while not self.over.is_set():
            with running(vllm_app(self.trunk), port=port, timeout_graceful_shutdown=0) as url:
                self.url, port = url, int(url.rsplit(":", 1)[1])
                self.up.set()
                self.over.wait(1e9 if self.steady else self.rng.uniform(5, 20))
            if not self.over.is_set():
                self.deaths += 1
                self.over.wait(self.rng.uniform(0.2, 2))
                self.trunk.break_after = self.rng.choice([None, None, None, 0, 2])


def hostile(rng: random.Random) -> bytes:
    text = f'{{"model": "m", "messages": [{{"role": "user", "content": "{CANARY}"}}], '
    return rng.choice(
        [
            os.urandom(200),
            b"[" * 20_000,
            (text + f'"max_tokens": {"9" * rng.randint(1, 4000)}}}').encode(),
            (text + f'"{CANARY}": 1}}').encode(),
            json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}] * 40_000}).encode(),
            json.dumps({"model": "m", "messages": [{"role": "tool", "content": [CANARY] * 9}]}).encode(),
            text.encode() + b'"temperature": 1e999}',
        ]
    )


OURS = (408, 413, 429, 502, 503, 504)  # too much, or the server's fault; never 500


class Seen:
    """How requests ended: counts, the ids of those that were answered whole, and a few of those that were lost."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.answered: list[str] = []
        self.lost: list[str] = []
        self.stopped: list[float] = []  # seconds in which nothing ran
        self.canary = 0

    def ended(self, kind: str, how: str, words: str = "") -> None:
        self.counts[f"{kind}: {how}"] += 1
        if how.startswith("LOST"):
            self.lost.append(f"{kind}: {how} {words[:200]!r}")


async def one(client: httpx.AsyncClient, rng: random.Random, seen: Seen) -> None:
    """One request of some kind; how it ended is counted. What ends in no known way is a request lost."""
    kind = rng.choices(["whole", "stream", "vanish", "slow", "hostile"], [4, 3, 2, 1, 2])[0]
    content = f"{CANARY} asks for {rng.random()}"
    body = {"model": "m", "messages": [{"role": "user", "content": content[:60]}], "max_tokens": rng.randint(1, 20)}
    status, text = 0, ""
    try:
        if kind == "hostile":
            found = await client.post(PATH, content=hostile(rng), headers={"content-type": "application/json"})
            status, text = found.status_code, found.text
            how = "refused" if status in (400, 413) else f"error {status}" if status in OURS else f"LOST {status}"
        elif kind == "whole":
            found = await client.post(PATH, json=body)
            status, text = found.status_code, found.text
            if status == 200 and found.json()["choices"][0]["finish_reason"]:
                how = "answered"
                seen.answered.append(found.headers["x-request-id"])
            else:
                how = f"error {status}" if status in OURS and "error" in found.json() else f"LOST {status}"
        else:
            async with client.stream("POST", PATH, json={**body, "stream": True}) as response:
                status = response.status_code
                async for piece in response.aiter_text():
                    text += piece
                    if kind == "vanish":
                        break
                    if kind == "slow":
                        await asyncio.sleep(0.2)
            if kind == "vanish":
                how = "gone" if status == 200 or status in OURS else f"LOST {status}"
            elif status == 200 and "[DONE]" in text:
                how = "answered"
                seen.answered.append(response.headers["x-request-id"])
            elif status == 200 and '"error"' in text:
                how = "error in the middle"
            else:
                how = f"error {status}" if status in OURS and '"error"' in text else f"LOST {status}"
    except httpx.HTTPError as error:
        how = f"LOST {type(error).__name__}"
    seen.canary += CANARY in text
    seen.ended(kind, how, text)


def memory(pid: int) -> float:
    """Resident, MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def soak(url: str, pid: int, seconds: float, clients: int, seed: int) -> tuple[Seen, list[float]]:
    seen = Seen()
    sizes, until, step = [], time.monotonic() + seconds, min(5, seconds / 20)

    async def keep(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        headers = {"authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=PATIENCE) as client:
            while time.monotonic() < until:
                await one(client, rng, seen)

    async def watch() -> None:
        nonlocal until
        while time.monotonic() < until:
            sizes.append(memory(pid))
            slept = time.monotonic()
            await asyncio.sleep(step)
            away = time.monotonic() - slept - step
            if away > 5:  # somebody has stopped all of us (SIGSTOP); that is no time of the soak
                seen.stopped.append(away)
                until += away

    await asyncio.gather(watch(), *(keep(number) for number in range(clients)))
    return seen, sizes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    trunk_dir = with_chat_template(write_trunk(folder / "trunk", "llama"))
    export = make_export(trunk_dir, folder / "export")
    rng = random.Random(arguments.seed)
    trunk = load_trunk(trunk_dir, endless=True, delay_s=0.002)
    trunk.bodies, trunk.received, trunk.headers = Forgetful(), Forgetful(), Forgetful()
    upstream = Upstream(trunk, rng, steady=False)
    upstream.start()
    upstream.up.wait(60)
    log = folder / "proxy.log"
    options = ["--upstream", upstream.url, "--active", "16", "--waiting", "64"]
    options += ["--wait-timeout", "20", "--silence-timeout", "10"]
    process, url = start_proxy(export, options, {"SGT_TITAN_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}, log)
    try:
        seen, sizes = asyncio.run(soak(url, process.pid, 60 * arguments.minutes, arguments.clients, arguments.seed))
    finally:
        process.terminate()
        process.wait(60)
        upstream.over.set()
    for name, count in sorted(seen.counts.items()):
        print(f"{count:>8}  {name}")
    settled = sizes[len(sizes) // 5 :]
    early, late = statistics.median(settled[: len(settled) // 4 + 1]), statistics.median(settled[-len(settled) // 4 :])
    finished = collections.Counter(trunk.finished_ids)
    twice = sum(count > 1 for count in finished.values())
    unfounded = sum(finished[one] != 1 for one in seen.answered)
    repeated = len(seen.answered) - len(set(seen.answered))
    printed = CANARY in log.read_text() or bool(seen.canary)
    print(f"memory: {early:.0f} MiB early, {late:.0f} MiB late; upstream died {upstream.deaths} times")
    print(f"upstream: {trunk.started} begun, {trunk.finished} to the end, {twice} of them twice")
    print(f"answered: {len(seen.answered)}, {unfounded} not generated to the end just once, {repeated} ids repeated")
    if seen.stopped:
        print(f"stopped {len(seen.stopped)} times, {sum(seen.stopped):.0f} s in all, which are not in the minutes")
    print(f"lost: {len(seen.lost)} of {sum(seen.counts.values())}; canary printed: {printed}; ", end="")
    print(f"exit code of the proxy: {process.returncode}")
    for words in seen.lost[:10]:
        print("   ", words)
    print("each line of its log that is no request:")
    for line in sorted({re.sub(r"[0-9a-f]{24}|\d+", "N", line) for line in log.read_text().splitlines()} - {""}):
        if not re.match(r".*(POST|GET) /", line):
            print("   ", line[:160])
    return int(bool(seen.lost) or bool(twice) or bool(unfounded) or printed or late > 1.25 * early)


if __name__ == "__main__":
    sys.exit(main())
