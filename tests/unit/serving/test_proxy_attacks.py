"""Clients, pages and upstreams that mean harm: one of them must not stop or read what others do."""

import asyncio
import gzip
import json
import socket
import time
from contextlib import contextmanager

import httpx
import pytest

from sgt_titan import outgoing
from sgt_titan.client import VLLM, UpstreamError
from sgt_titan.serving import protocol
from sgt_titan.serving.app import create_app
from sgt_titan.serving.protocol import PatientProtocol
from sgt_titan.serving.settings import Settings
from tests.serving_kit import load_trunk
from tests.stub_servers import running, vllm_app

CANARY = "Zorblax-7741"
CHAT = {"model": "trunk", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 2}


@pytest.fixture(scope="module")
def trunk(chat_trunk):
    return load_trunk(chat_trunk, endless=True)


@pytest.fixture(scope="module")
def url(trunk, sgt):
    with running(vllm_app(trunk)) as upstream:
        settings = Settings(upstream, inspect=True, origins=("https://app.example",))
        with running(create_app(settings, sgt), http=PatientProtocol) as url:
            yield url


def test_a_request_that_cannot_fit_is_refused_before_work(url, sgt, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("it was rendered")

    monkeypatch.setattr("sgt_titan.client.prompt.encode_turns", never)
    turn, tool = {"role": "user", "content": "x"}, {"type": "function", "function": {"name": "f"}}
    wordy = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x" * 500_000: {}}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps({"x": "x" * 1_000_000})}}
    for path, body in (
        ("chat/completions", {"messages": [turn] * 40_000}),
        ("chat/completions", {"messages": [turn | {"content": "x" * 1_000_000}]}),
        ("chat/completions", {"messages": [turn, {"role": "assistant", "content": None, "tool_calls": [call]}]}),
        ("chat/completions", {"messages": [turn], "tools": [tool] * 10_000}),
        ("chat/completions", {"messages": [turn], "tools": [wordy]}),
        ("inspect", {"messages": [turn], "tools": [wordy]}),
        ("completions", {"prompt": "x" * 10**6}),
    ):
        found = httpx.post(f"{url}/v1/{path}", json={"model": "trunk", **body}, timeout=20)
        assert found.status_code == 400 and found.json()["error"]["code"] == "context_length_exceeded", found.text


def test_many_turns_are_linear_work():
    """Counted, not timed: the skeleton is searched once, not once a turn."""
    from sgt_titan.transform import chat_template

    searches = []

    class Text(str):
        def find(self, *args):
            searches.append("find")
            return str.find(self, *args)

        def count(self, *args):
            searches.append("count")
            return str.count(self, *args)

    marks = [f"\ue000{i}\ue001" for i in range(500)]
    pieces = chat_template.split(Text("".join(f"<u>{mark}</u>" for mark in marks)), marks, ["user"] * 500)
    assert len(pieces) == 501 and not searches


def test_a_client_that_left_is_not_encoded_for(url, sgt, monkeypatch):
    """Its prompt is in pieces, and before each it is asked whether anybody still waits."""
    begun, asked = [], []
    original = type(sgt).encode_pieces

    def pieces(self, what, **options):
        begun.append(1)
        for _ in range(200):
            time.sleep(0.01)
            yield from original(self, what, **options)
            asked.append(1)

    monkeypatch.setattr(type(sgt), "encode_pieces", pieces)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=0.5)
    monkeypatch.undo()
    assert httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=10).status_code == 200
    assert begun and len(asked) < 200


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8080"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost:99"}, 200),
        ({"host": "[::1]:8080"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://app.example"}, 200),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "none"}, 200),
    ],
)
def test_pages_of_other_sites_and_rebound_names(url, headers, status):
    for method, path in (("GET", "/metrics"), ("POST", "/v1/inspect"), ("POST", "/v1/chat/completions")):
        body = {"prompt": CANARY} if path == "/v1/inspect" else CHAT
        found = httpx.request(method, url + path, headers=headers, json=body if method == "POST" else None, timeout=20)
        assert found.status_code == status, found.text
        if status == 403:
            assert found.json()["error"]["code"] == "origin_not_allowed" and "evil" not in found.text


def test_a_listed_page_may_read_its_answer(url):
    page = {"origin": "https://app.example", "access-control-request-method": "POST"}
    preflight = httpx.options(url + "/v1/chat/completions", headers=page)
    assert preflight.status_code == 204 and preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert "access-control-allow-origin" not in httpx.get(url + "/v1/models").headers


def raw(url, request: bytes, seconds=5.0) -> bytes:
    with socket.create_connection(url.removeprefix("http://").split(":"), timeout=seconds) as client:
        client.sendall(request)
        received = b""
        while chunk := client.recv(1 << 16):
            received += chunk
            if b"\r\n\r\n" in received:
                break
        return received


def test_two_lengths_are_none(url):
    request = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request += b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n0\r\n\r\n"
    assert raw(url, request).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTT", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he"])
def test_a_request_that_is_never_finished_is_hung_up_on(trunk, sgt, sent, monkeypatch):
    monkeypatch.setattr(PatientProtocol, "head_seconds", 0.2)
    monkeypatch.setattr(PatientProtocol, "keep_alive_seconds", 0.2)
    app = create_app(Settings("http://127.0.0.1:9"), sgt)
    with (
        running(app, http=PatientProtocol) as url,
        socket.create_connection(url.removeprefix("http://").split(":"), timeout=5) as client,
    ):
        client.sendall(sent)
        while client.recv(1 << 16):  # until it hangs up; a timeout is an error
            pass


def test_an_idle_connection_outlives_what_clients_keep(trunk, sgt):
    """Else a request that is sent while it is being closed is lost: httpx reuses one for 5 s."""
    assert 5 * httpx.Limits().keepalive_expiry < protocol.KEEP_ALIVE_SECONDS
    assert outgoing.KEEP_ALIVE_SECONDS < 5, "and ours is given up before vLLM's uvicorn closes it"
    options = {"http": PatientProtocol, "timeout_keep_alive": 0}
    with running(create_app(Settings("http://u"), sgt), **options) as url, httpx.Client(base_url=url) as client:
        ports = set()
        for _ in range(3):
            with client.stream("GET", "/healthz") as found:
                ports.add(found.extensions["network_stream"].get_extra_info("client_addr"))
                found.read()
            time.sleep(0.05)
        assert len(ports) == 1


def test_a_body_that_never_comes(trunk, sgt):
    with running(create_app(Settings("http://127.0.0.1:9", silence_timeout_s=0.2), sgt)) as url:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        assert raw(url, head + b"Content-Length: 9\r\n\r\n{").startswith(b"HTTP/1.1 408")


def test_a_slash_too_many_names_no_other_scheme(url):
    found = httpx.post(url + "/v1/chat/completions/", json=CHAT)
    assert found.status_code == 404 and "location" not in found.headers
    assert found.json()["error"]["type"] == "not_found_error"
    found = httpx.get(url + "/v1/chat/completions")
    assert found.status_code == 405 and found.json()["error"]["type"] == "invalid_request_error"


def test_numbers_of_any_length_are_not_repeated(url):
    long = 10**4000
    for change in ({"max_tokens": long}, {"n": long}, {"seed": -long}, {"top_k": long}, {"min_tokens": long}):
        found = httpx.post(url + "/v1/chat/completions", json={**CHAT, **change}, timeout=20)
        assert found.status_code == 400 and len(found.text) < 400


MODELS = {"data": [{"id": "trunk", "max_model_len": 128}]}


@contextmanager
def behind(sgt, respond, **settings):
    """A proxy before an upstream that answers completions as ``respond`` does."""

    def answer(request):
        return httpx.Response(200, json=MODELS) if request.method == "GET" else respond(request)

    with running(create_app(Settings("http://upstream", **settings), sgt, httpx.MockTransport(answer))) as url:
        yield url


class Body(httpx.AsyncByteStream):
    def __init__(self, make):
        self._make = make

    async def __aiter__(self):
        for chunk in self._make():
            yield chunk


def small_events():
    while True:
        yield b'data: {"choices": []}\n\n' * 1000


def endless_line():
    while True:
        yield b"x"


def test_an_upstream_that_sends_for_ever_is_cut_off_and_others_are_served(sgt):
    """No event of it is a piece of an answer, so nothing outside of the reading loop ever gets to look at the clock."""
    for make in (small_events, endless_line):
        with behind(sgt, lambda request: httpx.Response(200, stream=Body(make)), total_timeout_s=1.0) as url:  # noqa: B023

            async def both():
                async with httpx.AsyncClient(timeout=20) as client:
                    victim = asyncio.create_task(client.post(url + "/v1/chat/completions", json=CHAT))
                    await asyncio.sleep(0.2)
                    alive = await client.get(url + "/healthz")
                    return alive, await victim

            alive, victim = asyncio.run(both())
        assert alive.status_code == 200 and victim.status_code in (502, 504)


def test_a_compressed_answer_is_not_unpacked(sgt):
    bomb = gzip.compress(b'data: {"choices": []}\n\n' * 1_000_000)
    with behind(
        sgt, lambda r: httpx.Response(200, stream=Body(lambda: [bomb]), headers={"content-encoding": "gzip"})
    ) as url:
        found = httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=20)
    assert found.status_code == 502 and found.json()["error"]["code"] == "upstream_malformed"


@pytest.mark.parametrize("tokens", ["9" * 4000, "-1", "true", "1e400", "[]"])
def test_counts_that_are_none(sgt, tokens):
    event = (
        f'data: {{"choices": [{{"index": 0, "text": "a"}}], "usage": {{"completion_tokens": {tokens}}}}}\n\n'.encode()
    )
    with behind(sgt, lambda request: httpx.Response(200, stream=Body(lambda: [event]))) as url:
        found = httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=20)
    assert found.status_code == 502 and found.json()["error"]["code"] == "upstream_malformed"


def test_an_upstream_s_words_do_not_come_through(sgt):
    refusal = {"error": {"message": f"bad request: {CANARY}", "code": 400}}
    with behind(sgt, lambda request: httpx.Response(400, json=refusal)) as url:
        found = httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=20)
    assert found.status_code == 400 and CANARY not in found.text and found.json()["error"]["code"] == "upstream_refused"
    huge = httpx.Client(transport=httpx.MockTransport(lambda r: httpx.Response(500, content=b"x" * (2 << 20))))
    with pytest.raises(UpstreamError, match="longer than any answer"):
        VLLM("http://upstream", client=huge).generate(sgt.encode("x"))


def test_what_an_upstream_said_of_itself_is_asked_again(trunk, sgt, monkeypatch):
    monkeypatch.setattr("sgt_titan.serving.pool.ASK_AGAIN_S", 0.0)
    trunk.context = 4
    try:
        with running(vllm_app(trunk)) as upstream, running(create_app(Settings(upstream), sgt)) as url:
            found = httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=20)
            assert found.json()["error"]["code"] == "context_length_exceeded"
            trunk.context = 128
            assert httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=20).status_code == 200
    finally:
        trunk.context = 128


@pytest.mark.parametrize("length", [0, -5, True, 10**40, "128"])
def test_a_context_that_is_none(sgt, length):
    listed = {"data": [{"id": "trunk", "max_model_len": length}]}
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=json.dumps(listed)))
    with running(create_app(Settings("http://upstream"), sgt, transport)) as url:
        found = httpx.post(url + "/v1/chat/completions", json=CHAT, timeout=20)
    assert found.status_code == 502 and found.json()["error"]["code"] == "upstream_malformed"
