"""One door to the network: no other part of the package speaks HTTP as a client, and what the door refuses."""

import ast
import gzip
from pathlib import Path

import httpx
import pytest

import sgt_titan
from sgt_titan import outgoing
from sgt_titan.errors import UserError

PACKAGE = Path(sgt_titan.__file__).parent
CLIENTS = {"httpx", "requests", "aiohttp", "urllib3", "urllib.request", "http.client"}
# httpx's types, exceptions and transports for tests; the clients themselves are made in outgoing.py alone. The exporter
# of spans takes a session of requests and no other.
MAY_NAME = {"outgoing.py": CLIENTS, "serving/telemetry.py": {"requests"}}
SERVING = {"serving/app.py", "serving/service.py", "serving/upstream.py"}
TYPES_ONLY = {"client/remote.py", *SERVING, "evaluation/scores/judge.py"}


def test_nobody_else_opens_connections():
    for path in PACKAGE.rglob("*.py"):
        name, text = str(path.relative_to(PACKAGE)), path.read_text()
        found = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names} & CLIENTS
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module} & CLIENTS
        allowed = MAY_NAME.get(name, {"httpx"} if name in TYPES_ONLY else set())
        assert found <= allowed, f"{name} imports {found - allowed}"
        if name != "outgoing.py":
            assert "Client(" not in text.replace("httpx.AsyncClient |", "") or "httpx.Client(" not in text, name
            assert "httpx.AsyncClient(" not in text and "urlopen(" not in text, name


def answer(content=b"x", headers=None, status=200):
    return httpx.MockTransport(lambda request: httpx.Response(status, content=content, headers=headers))


def test_what_leaves_and_what_does_not(monkeypatch):
    seen = []
    for name in ("http_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    transport = httpx.MockTransport(lambda r: seen.append(r) or httpx.Response(302, headers={"location": "http://b/"}))
    with outgoing.client(timeout=1, key="k", transport=transport) as client:
        status, _ = outgoing.exchange(client, "POST", "http://a/", content=b"x", most=9, seconds=1)
    assert status == 302 and len(seen) == 1
    assert seen[0].headers["accept-encoding"] == "identity" and seen[0].headers["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    "transport, error",
    [
        (answer(b"x" * 100), "longer than any answer"),
        (answer(gzip.compress(b"x" * 10_000), {"content-encoding": "gzip"}), "compressed"),
    ],
)
def test_answers_that_are_refused(transport, error):
    with outgoing.client(timeout=1, transport=transport) as client, pytest.raises(httpx.DecodingError, match=error):
        outgoing.exchange(client, "GET", "http://a/", most=50, seconds=9)


def test_an_answer_that_takes_too_long():
    with outgoing.client(timeout=1, transport=answer()) as client, pytest.raises(httpx.ReadTimeout):
        outgoing.exchange(client, "GET", "http://a/", most=50, seconds=-1)


def test_a_proxy_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv(outgoing.PROXY_VARIABLE, "nonsense")
    with pytest.raises(UserError, match="SGT_TITAN_PROXY: is no URL"):
        outgoing.client(timeout=1)
    monkeypatch.setenv(outgoing.PROXY_VARIABLE, "http://127.0.0.1:9")  # nobody there
    with outgoing.client(timeout=1) as client, pytest.raises(httpx.ConnectError):
        outgoing.exchange(client, "GET", "http://127.0.0.1:1/", most=50, seconds=9)
