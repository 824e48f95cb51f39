"""A real vLLM over the demo trunk, in a process of its own environment (``make test-vllm``)."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]
TRUNK = ROOT / "sgt_titan/demo/trunk"
VLLM = Path(os.environ.get("SGT_TITAN_VLLM", ROOT / ".venv-vllm/bin/vllm"))
KEY = "upstream-key-0123456789"
START_SECONDS = float(os.environ.get("SGT_TITAN_VLLM_START", "900"))


@contextmanager
def served(log: Path, *words: str, embeds: bool = True) -> Iterator[str]:
    """Its URL. The key-value cache is small, and threads are not bound to cores that a container may not have."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(VLLM), "serve", str(TRUNK), "--served-model-name", "trunk", "--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", KEY, "--max-num-seqs", "64", *words]
    command += ["--enable-prompt-embeds"] if embeds else []
    ours = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    ours |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ours
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(url + "/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="session")
def vllm(tmp_path_factory) -> Iterator[str]:
    """URL of a server that takes embeddings; SGT_TITAN_VLLM_URL: of one that runs already, as ``served`` starts it."""
    if "SGT_TITAN_VLLM_URL" in os.environ:
        yield os.environ["SGT_TITAN_VLLM_URL"]
        return
    if not VLLM.is_file():
        pytest.skip(f"no vLLM at {VLLM}; make test-vllm sets it up")
    with served(tmp_path_factory.mktemp("vllm") / "log") as url:
        yield url


@pytest.fixture
def start_vllm(tmp_path) -> Callable[..., object]:
    """``start_vllm(*words, embeds=)``: another one, as a context manager."""
    if not VLLM.is_file():
        pytest.skip(f"no vLLM at {VLLM}; make test-vllm sets it up")
    return lambda *words, **how: served(tmp_path / "log", *words, **how)
