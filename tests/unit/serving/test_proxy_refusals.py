"""What the proxy refuses, and what it does when the upstream or the client misbehaves."""

import asyncio
import json
import socket
import time
from contextlib import contextmanager

import httpx
import openai
import pytest

from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Settings
from tests import stub_servers
from tests.serving_kit import load_trunk
from tests.stub_servers import running, sglang_app, vllm_app

CANARY = "Zorblax-7741"
USER = {"role": "user", "content": CANARY}
CHAT = {"model": "trunk", "messages": [USER]}


@pytest.fixture
def trunk(chat_trunk, _loaded):
    """A fresh record over the one loaded model."""
    from dataclasses import replace

    return replace(_loaded, bodies=[], headers=[], received=[])


@pytest.fixture(scope="module")
def _loaded(chat_trunk):
    return load_trunk(chat_trunk, endless=True)


@contextmanager
def proxy(trunk, sgt, app=vllm_app, **settings):
    with running(app(trunk)) as upstream, running(create_app(Settings(upstream, **settings), sgt)) as url:
        yield url


def post(url, body, path="/v1/chat/completions", **options):
    options.setdefault("timeout", 20)
    return httpx.post(url + path, json=body, **options)


def error(response, status):
    """The error of a response in OpenAI's form, without a word of the prompt."""
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"} and CANARY not in response.text
    assert "\n" not in found["message"]
    return found


@pytest.fixture(scope="module")
def shared(_loaded, sgt):
    with proxy(_loaded, sgt, max_body=20_000, max_prompt_tokens=100, max_tokens=50) as url:
        yield url


@pytest.mark.parametrize(
    "change, message",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "  "}]}, "every content is empty"),
        ({"messages": [{"role": "wizard", "content": CANARY}]}, "role: must be one of"),
        ({"messages": CANARY}, "messages: Input should be a valid list"),
        ({"messages": [CANARY]}, "messages"),
        ({"messages": [{"role": "user", "content": CANARY * 9}]}, "at most"),
        ({"messages": [{"role": "user", "content": CANARY + "\ud800"}]}, "not valid Unicode"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": CANARY}]}]}, "only text parts"),
        ({"model": None}, "model: Field required"),
        ({"model": 3}, "model"),
        ({"temperature": CANARY}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 51}, "at most 50"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0, "max_tokens": 5}, "max_tokens"),
        ({"n": 1000}, "n: 1000"),
        ({"n": 0}, "n: 0"),
        ({"seed": 10**400}, "seed: an integer of more than 18 digits"),
        ({"stop": [CANARY] * 17}, "at most 16"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"logit_bias": {"17": 3}}, "logit_bias: unsupported; token ids would leave"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": CANARY}}}, "with a schema"),
        ({"echo": True}, "echo: unsupported"),
        ({CANARY: 1}, "unknown field"),
        ({"tools": [{"type": "function", "function": {"name": CANARY * 20}}]}, "tokens, at most"),
    ],
)
def test_bad_chats(shared, change, message):
    import re

    body = {key: value for key, value in {**CHAT, **change}.items() if value is not None}
    # As json.dumps writes it, lone surrogates and all.
    response = httpx.post(
        shared + "/v1/chat/completions",
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    assert re.search(message, error(response, 400)["message"])


@pytest.mark.parametrize(
    "change",
    [
        *({"prompt": bad} for bad in ("", [], ["a", ""], [0, 999], 3, ["a"] * 65, {"a": CANARY})),
        {"prompt": "a", "suffix": CANARY},
        {"prompt": "a", "best_of": 3},
    ],
)
def test_bad_completions(shared, change):
    error(post(shared, {"model": "trunk", **change}, "/v1/completions"), 400)


def test_bad_bodies(shared):
    url, json_type = shared + "/v1/chat/completions", {"content-type": "application/json"}
    send = lambda content, headers=json_type: httpx.post(url, content=content, headers=headers)  # noqa: E731
    assert "UTF-8" in error(send(b'{"model": "' + CANARY.encode() + b'\xff"}'), 400)["message"]
    assert "JSON" in error(send(CANARY.encode()), 400)["message"]
    assert "JSON object" in error(send(b"[1]"), 400)["message"]
    error(send(b"[" * 15_000), 400)
    error(send(b'{"model": "m"}', {"content-type": "text/plain"}), 415)
    error(send(json.dumps({**CHAT, "x": "y" * 20_000}).encode()), 413)

    def unannounced():
        for _ in range(100):
            yield b" " * 1000

    error(send(unannounced()), 413)
    error(httpx.post(shared + "/v1/" + CANARY), 404)
    error(httpx.get(url), 405)
    assert "model_not_found" in error(post(shared, {**CHAT, "model": "gpt-4o"}), 404)["code"]


def test_authentication(trunk, sgt):
    key = "k" * 32
    with proxy(trunk, sgt, api_keys=(key, "another" * 4), upstream_key="up" * 10) as url:
        trunk.key = "up" * 10
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": key},
            {"authorization": f"Basic {key}"},
        ):
            for path in ("/v1/models", "/metrics", "/v1/chat/completions"):
                assert httpx.get(url + path, headers=headers).status_code == 401
            assert error(post(url, CHAT, headers=headers), 401)["code"] == "invalid_api_key"
        assert not trunk.bodies
        assert httpx.get(url + "/healthz").status_code == 200
        client = openai.OpenAI(base_url=url + "/v1", api_key=key, max_retries=0)
        assert client.chat.completions.create(**CHAT, max_tokens=2).choices
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="no").models.list()
        # The client's key stays here, ours goes there.
        assert trunk.headers[0]["authorization"] == f"Bearer {trunk.key}" and key not in str(trunk.headers)


def test_what_is_printed_by_mistake_holds_no_secret(sgt):
    key, other = "key-Blatherskite-0123", "up-Blatherskite-0123"
    assert "Blatherskite" not in repr(Settings("http://x", api_keys=(key,), upstream_key=other))
    prompt = sgt.prompt(CANARY)
    assert repr(prompt) == f"Prompt({len(prompt)} tokens)"


def test_upstream_errors_are_openai_errors(trunk, sgt):
    with proxy(trunk, sgt) as url:
        trunk.embeds = False
        assert "--enable-prompt-embeds" in error(post(url, CHAT), 502)["message"]
        ready = httpx.get(url + "/readyz")
        assert ready.status_code == 503 and ready.json()["error"]["code"] == "upstream_embeds_disabled"
        trunk.embeds, trunk.break_after = True, 0
        assert error(post(url, CHAT), 502)["code"] == "upstream_error"
        trunk.break_after = 3
        client = openai.OpenAI(base_url=url + "/v1", api_key="x", max_retries=0)
        with client, pytest.raises(openai.APIError, match="upstream failed"):
            list(client.chat.completions.create(**CHAT, stream=True, max_tokens=9, temperature=1))
        trunk.break_after = None
        assert httpx.get(url + "/readyz").status_code == 200
    with proxy(trunk, sgt, app=sglang_app, backend="sglang") as url:
        trunk.embeds = False
        assert "--disable-radix-cache" in error(post(url, CHAT), 502)["message"]
    trunk.embeds = True
    with proxy(trunk, sgt, upstream_key="wrong") as url:
        trunk.key = "right"
        assert error(post(url, CHAT), 502)["code"] == "upstream_unauthorized"
    trunk.key = None


def test_another_model_upstream(trunk, sgt, trunk_dir):
    with proxy(trunk, sgt, model="missing") as url:
        assert error(post(url, {**CHAT, "model": "missing"}), 502)["code"] == "upstream_wrong_model"
    import torch

    trunk.model = torch.nn.Module()
    trunk.model.config, trunk.model.dtype = type("C", (), {"hidden_size": 48}), torch.float32
    with proxy(trunk, sgt) as url:
        assert error(post(url, CHAT), 502)["code"] == "upstream_wrong_model"
        assert httpx.get(url + "/readyz").json()["error"]["code"] == "upstream_wrong_model"


def test_an_upstream_that_comes_back_as_another(trunk, sgt):
    """Its name and context are asked once, and again when it refuses."""
    trunk.name = "before"
    with proxy(trunk, sgt, served_name="trunk") as url:
        assert post(url, {**CHAT, "max_tokens": 1}).status_code == 200
        trunk.name = "after"
        assert error(post(url, CHAT), 502)["code"] == "upstream_not_found"
        assert post(url, {**CHAT, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("listed", [None, [], {"data": [3]}, {"data": [{"id": "trunk", "max_model_len": "many"}]}])
def test_an_upstream_that_lists_no_models(sgt, listed):
    def answer(request):
        return httpx.Response(200, json=listed)

    with running(create_app(Settings("http://upstream"), sgt, httpx.MockTransport(answer))) as url:
        assert error(post(url, CHAT), 502)["code"] == "upstream_malformed"


def test_no_upstream(sgt):
    with running(create_app(Settings("http://127.0.0.1:9"), sgt)) as url:
        assert error(post(url, CHAT), 502)["code"] == "upstream_down"
        assert httpx.get(url + "/readyz").status_code == 503 and httpx.get(url + "/healthz").status_code == 200


def test_slow_upstream(trunk, sgt):
    trunk.delay_s = 1.0
    with proxy(trunk, sgt, silence_timeout_s=0.5) as url:
        assert error(post(url, CHAT), 504)["code"] == "upstream_timeout"
    with proxy(trunk, sgt, total_timeout_s=1.5) as url:
        assert error(post(url, CHAT), 504)["code"] == "timeout"
    wait_for(lambda: trunk.cancelled == 2)


def wait_for(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_the_upstream(trunk, sgt, stream):
    trunk.delay_s = 0.03
    with proxy(trunk, sgt, active=1) as url:
        body = {**CHAT, "stream": stream, "max_tokens": 80, "temperature": 1}
        if stream:
            with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=10) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                post(url, body, timeout=1.0)
        wait_for(lambda: trunk.cancelled == 1)
        assert trunk.steps < 60
        assert post(url, {**CHAT, "max_tokens": 1}).status_code == 200, "the slot was not given back"
        if not stream:
            assert 'status="499"' in httpx.get(url + "/metrics").text


def test_a_client_that_reads_nothing_gives_its_slot_back(sgt):
    """Neither timeout of the upstream would end it: the upstream has answered."""
    endless = 'data: {"choices": [{"index": 0, "text": "' + "x" * 100_000 + '"}]}\n\n'

    class Answer(httpx.AsyncByteStream):
        closed = False

        async def __aiter__(self):
            while True:
                yield endless.encode()

        async def aclose(self):
            self.closed = True

    answer = Answer()

    def respond(request):
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "trunk"}]})
        return httpx.Response(200, stream=answer)

    app = create_app(Settings("http://upstream", silence_timeout_s=0.5), sgt, httpx.MockTransport(respond))
    with running(app) as url, socket.create_connection(url.removeprefix("http://").split(":")) as client:
        body = json.dumps({**CHAT, "stream": True}).encode()
        head = f"Host: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + body)
        wait_for(lambda: app.state.service.admission.active == 1)
        wait_for(lambda: app.state.service.admission.active == 0, 20)
        assert answer.closed


def test_back_pressure(trunk, sgt):
    trunk.delay_s = 0.15  # an answer takes longer than six requests take to arrive on a busy machine
    with proxy(trunk, sgt, active=1, waiting=1, wait_s=15) as url:

        async def flood():
            async with httpx.AsyncClient(timeout=20) as client:
                send = lambda: client.post(url + "/v1/chat/completions", json={**CHAT, "max_tokens": 8})  # noqa: E731
                return await asyncio.gather(*(send() for _ in range(6)))

        statuses = sorted(r.status_code for r in asyncio.run(flood()))
        assert statuses == [200, 200, 503, 503, 503, 503]
        assert trunk.started == 2
    with proxy(trunk, sgt, active=1, waiting=9, wait_s=0.1) as url:
        found = asyncio.run(_two(url))
        late = next(r for r in found if r.status_code == 503)
        assert error(late, 503)["code"] == "overloaded" and late.headers["retry-after"] == "1"


async def _two(url):
    async with httpx.AsyncClient(timeout=20) as client:
        send = lambda: client.post(url + "/v1/chat/completions", json={**CHAT, "max_tokens": 8})  # noqa: E731
        return await asyncio.gather(send(), send())


def test_the_embeddings_of_many_prompts_are_made_one_at_a_time(trunk, sgt, monkeypatch):
    """They are thousands of times as large as the text; what is wrong with any prompt is found before the first."""
    events = []
    encode, load = type(sgt).encode, stub_servers.load_embeds
    monkeypatch.setattr(type(sgt), "encode", lambda self, prompt, **_: events.append("encode") or encode(self, prompt))
    monkeypatch.setattr(stub_servers, "load_embeds", lambda *args: events.append("send") or load(*args))
    with proxy(trunk, sgt) as url:
        body = {"model": "trunk", "max_tokens": 1}
        assert post(url, {**body, "prompt": ["a", "b", "c"]}, "/v1/completions").status_code == 200
        assert events == ["encode", "send"] * 3
        events.clear()
        error(post(url, {**body, "prompt": ["a", "b", "c" * 500]}, "/v1/completions"), 400)
        assert not events


def test_a_defect_of_ours_says_nothing(trunk, sgt, monkeypatch, caplog):
    with proxy(trunk, sgt) as url:
        monkeypatch.setattr(type(sgt), "encode", lambda self, prompt, **_: (_ for _ in ()).throw(ValueError(CANARY)))
        caplog.set_level("DEBUG")
        found = error(post(url, CHAT), 500)
        assert found["message"] == "internal error of the proxy"
    assert "ValueError at" in caplog.text and CANARY not in caplog.text
