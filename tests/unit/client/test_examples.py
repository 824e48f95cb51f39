import io
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sgt_titan.client import StainedGlassTransform
from tests.serving_kit import load_trunk
from tests.stub_servers import running, vllm_app

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.fixture(scope="module")
def trunk(chat_trunk):
    return load_trunk(chat_trunk, context=2000, endless=True)


def run(monkeypatch, name, *words, stdin=""):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_chat(monkeypatch, capsys, chat_export, trunk, tmp_path):
    monkeypatch.chdir(tmp_path)  # where it keeps its noise key
    monkeypatch.setattr(StainedGlassTransform, "limit", None)  # the small trunk's is less than an answer
    with running(vllm_app(trunk)) as url:
        run(monkeypatch, "chat.py", chat_export, url, stdin="hello\n\nagain\n")
    assert capsys.readouterr().out.strip()
    # A turn that is sent again is the same sample again: of ten the server could average the noise away.
    first_TD, second_TD = trunk.received
    turn = len("<s><user>hello</>") - 2  # <s> is one token, every other character one too
    torch.testing.assert_close(second_TD[:turn], first_TD[:turn], rtol=0, atol=1e-5)


def test_rag(monkeypatch, capsys, chat_export, trunk, tmp_path):
    (tmp_path / "a.txt").write_text("cats purr\n\nthe code is 7\n\ndogs bark")
    rag = runpy.run_path(str(EXAMPLES / "rag.py"))
    paragraphs = ["cats purr", "the code is 7", "the dogs bark"]
    assert rag["best"](paragraphs, "what is the code?", 1) == ["the code is 7"]
    with running(vllm_app(trunk)) as url:
        run(monkeypatch, "rag.py", chat_export, url, tmp_path, "code?")
    assert capsys.readouterr().out.strip() and trunk.bodies[-1]["temperature"] == 0


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl here")
def test_proxy(chat_export, chat_trunk):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "PORT": str(port), "SGT_TITAN_API_KEY": "key-0123456789abcdef"}
    command = ["bash", str(EXAMPLES / "proxy.sh"), str(chat_export)]
    with running(vllm_app(load_trunk(chat_trunk, endless=True))) as url:
        done = subprocess.run([*command, url], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "data: [DONE]" in done.stdout, done.stdout + done.stderr
