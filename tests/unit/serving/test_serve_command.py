"""``sgt-titan serve`` as a process: what it prints under the loudest logging, how it stops, when it does not start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from sgt_titan import cli
from sgt_titan.serving.main import _listen
from tests.serving_kit import load_trunk
from tests.stub_servers import running, vllm_app

CANARY, STOP, KEY = "Zorblax-7741", "stopat-Xylo", "key-Blatherskite-0123"
# Tokens enough: of an untrained trunk's some are no text.
CHAT = {"model": "trunk", "messages": [{"role": "user", "content": f"who is {CANARY}?"}], "max_tokens": 24}
# Every logger of every library at DEBUG, and warnings and asyncio's own complaints too; and a server that is slow to
# listen after its address has been printed.
LOUD = (
    "import logging, sys, time, uvicorn, warnings;"
    "logging.basicConfig(level=logging.DEBUG); warnings.simplefilter('always'); load = uvicorn.Config.load;"
    "uvicorn.Config.load = lambda self: (time.sleep(0.5), load(self));"
    "from sgt_titan.cli import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture(scope="module")
def trunk(chat_trunk):
    return load_trunk(chat_trunk, delay_s=0.02, endless=True)


def start(export, upstream, *words):
    return subprocess.Popen(
        [sys.executable, "-c", LOUD, "serve", str(export), "--upstream", upstream, "--port", "0", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "SGT_TITAN_API_KEY": KEY, "PYTHONASYNCIODEBUG": "1"},
    )


def test_nothing_private_is_printed_and_it_stops_gracefully(chat_export, trunk, tmp_path):
    key_file = tmp_path / "noise.key"
    with running(vllm_app(trunk)) as upstream:
        process = start(chat_export, upstream, "--noise-key", str(key_file), "--inspect", "--served-name", "trunk")
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True)
        reader.start()
        deadline = time.monotonic() + 90
        while not (found := re.search(r"(http://\S+)/v1 ->", "".join(lines))):
            assert process.poll() is None and time.monotonic() < deadline, "".join(lines)
            time.sleep(0.05)
        url = found[1]
        client = httpx.Client(headers={"authorization": f"Bearer {KEY}"}, timeout=30)
        answers = []
        with client:
            post = lambda path, body: client.post(url + path, json=body)  # noqa: E731
            assert client.get(url + "/healthz").status_code == 200
            found = post("/v1/chat/completions", {**CHAT, "stop": [STOP]}).json()
            answers.append(found["choices"][0]["message"]["content"])
            post("/v1/completions", {"model": "trunk", "prompt": CANARY, "max_tokens": 2})
            post("/v1/inspect", {"prompt": CANARY})
            post("/v1/chat/completions", {**CHAT, "model": CANARY})
            post("/v1/chat/completions", {**CHAT, CANARY: 1})
            post("/v1/chat/completions", {"model": "trunk", "messages": [{"role": CANARY, "content": CANARY}]})
            client.post(url + "/v1/chat/completions", content=f'{{"{CANARY}'.encode() + b"\xff")
            client.get(f"{url}/{CANARY}?{CANARY}", headers={"authorization": f"Bearer {CANARY}"})
            trunk.break_after = 1
            post("/v1/chat/completions", {**CHAT, "stream": True})
            trunk.break_after = None
            # SIGTERM in the middle of an answer: it is finished, then the process ends by itself.
            with client.stream("POST", url + "/v1/chat/completions", json={**CHAT, "stream": True}) as response:
                events = response.iter_lines()
                next(events)
                process.send_signal(signal.SIGTERM)
                rest = list(events)
            assert "data: [DONE]" in rest
        assert process.wait(timeout=30) == 0
        reader.join(timeout=5)
    text = "".join(lines)
    assert "POST /v1/chat/completions 200" in text and "httpcore" in text, "the loud logging was not on"
    assert key_file.stat().st_mode & 0o777 == 0o600
    spellings = [
        CANARY,
        STOP,
        KEY,
        key_file.read_text().strip(),
        CANARY.encode().hex(),
        *CANARY.split("-")[:1],
        "Blatherskite",
        "stopat",
    ]
    embeds = [body["prompt_embeds"][2000:2040] for body in trunk.bodies if len(body["prompt_embeds"]) > 2100]
    assert embeds and len(answers[0]) > 2
    for private in (*spellings, *embeds, answers[0]):
        assert private not in text, f"{private!r} was printed"
        assert private.lower() not in text.lower() or private == answers[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--upstream", "ftp://x"], "--upstream: 'ftp://x' is no URL"),
        (["--upstream", "http://x:70000"], "--upstream: 'http://x:70000' is no URL"),
        (["--upstream", "http://[::1"], "is no URL"),
        (["--upstream", "http://user:pw@x"], "credentials in a URL"),
        (["--upstream", "http://user:pw@x:70000"], "credentials in a URL"),
        (["--total-timeout", "nan"], "--total-timeout"),
        (["--host", "0.0.0.0"], "--api-key-file or SGT_TITAN_API_KEY, or say --no-auth"),
        (["--api-key-file", "missing"], "cannot be read"),
        (["--api-key-file", "{short}"], "at least 16"),
        (["--api-key-file", "{empty}"], "holds no key"),
        (["--upstream-api-key-file", "{two}"], "holds 2 keys, expected one"),
        (["--max-body-mib", "0"], "--max-body-mib"),
        (["--tls-cert", "x"], "give both or neither"),
        (["--tls-cert", "x", "--tls-key", "y"], "x: no such file"),
        (["--tls-cert", "{short}", "--tls-key", "{short}"], "short cannot be used"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout must be at least 0"),
        (["--port", "{taken}"], "cannot listen there"),
        (["--port", "99999"], "--port must be from 0 to 65535"),
        (["--results", "missing.json"], "missing.json: cannot be read"),
        (["--backend", "tgi"], "invalid choice"),
    ],
)
def test_it_does_not_start(chat_export, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.delenv("SGT_TITAN_API_KEY", raising=False)
    monkeypatch.setattr("uvicorn.Server.run", lambda *a, **k: pytest.fail("it served"))
    (tmp_path / "short").write_text("short\n")
    (tmp_path / "empty").write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path / "two").write_text("one\ntwo\n")
        names = {
            "short": tmp_path / "short",
            "two": tmp_path / "two",
            "empty": tmp_path / "empty",
            "taken": taken.getsockname()[1],
        }
        words = [word.format(**names) for word in words]
        assert cli.main(["serve", str(chat_export), "--upstream", "http://127.0.0.1:1", "--port", "0", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "pw" not in err


def test_the_upstream_s_key_may_be_short(chat_export, monkeypatch):
    """Its length is the provider's choice; vLLM's own documentation has one of 12 characters."""
    monkeypatch.setattr("uvicorn.Server.run", lambda *a, **k: None)
    monkeypatch.setattr("signal.signal", lambda *a: None)
    monkeypatch.setenv("SGT_TITAN_UPSTREAM_API_KEY", "token-abc123")
    assert cli.main(["serve", str(chat_export), "--upstream", "http://127.0.0.1:1", "--port", "0"]) == 0


@contextlib.asynccontextmanager
async def connected(patience_s, **options):
    """The client's and the proxy's side of a connection to the proxy's own socket."""
    accepted = asyncio.get_running_loop().create_future()
    listener = _listen("127.0.0.1", 0, patience_s)
    server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener)
    async with server:
        _, ours = await asyncio.open_connection(*listener.getsockname(), **options)
        yield ours, await accepted


def test_small_answers_are_not_held_back_by_the_kernel():
    """Nagle's algorithm would keep the second of two small writes until the first is acknowledged, up to 40 ms."""

    async def accepted():
        async with connected(60) as (ours, theirs):
            nodelay = theirs.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            for writer in (ours, theirs):
                writer.close()
            return nodelay

    assert asyncio.run(accepted())


def test_a_client_that_never_reads_is_given_up():
    """Else its connection, and whatever waits to write into it, stay for ever."""

    async def flooded():
        async with connected(0.3, limit=1) as (ours, theirs):
            with pytest.raises((TimeoutError, ConnectionError)):
                while True:
                    theirs.write(b"x" * (1 << 20))
                    await theirs.drain()
            ours.transport.abort()

    asyncio.run(asyncio.wait_for(flooded(), 20))


def test_no_export(capsys):
    assert cli.main(["serve", "/nowhere", "--upstream", "http://127.0.0.1:1", "--port", "0"]) == 2
    assert "no such directory" in capsys.readouterr().err
