"""Surrogates through the proxy: nothing of a value or of the field leaves; answers come back with values."""

import asyncio
import json

import httpx
import pytest

from sgt_titan.errors import UserError
from sgt_titan.private import Private
from sgt_titan.serving import main as serve
from sgt_titan.serving.app import create_app
from sgt_titan.serving.private import ask
from sgt_titan.serving.settings import Settings

MAIL, OTHER = "ada@post.org", "bob@mail.net"
PRIVATE = Private.of("patterns", key=b"k" * 32)


def chat(mail=MAIL, **fields):
    return {"model": "trunk", "messages": [{"role": "user", "content": f"mail {mail}"}], "max_tokens": 8, **fields}


class Upstream(httpx.AsyncBaseTransport):
    """A vLLM that keeps what it was sent and answers with ``answer``, a character an event."""

    def __init__(self):
        self.answer, self.bodies = "", []

    async def handle_async_request(self, request):
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "trunk", "max_model_len": 128}]})
        self.bodies.append((await request.aread()).decode())
        events = [{"choices": [{"index": 0, "text": c, "finish_reason": None}]} for c in self.answer]
        events.append({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


@pytest.fixture
def proxy(sgt):
    """post(path, json) -> response, and the upstream."""
    upstream = Upstream()
    app = create_app(Settings("http://upstream", private=PRIVATE, inspect=True), sgt, upstream)

    def post(body, path="/v1/chat/completions"):
        async def go():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.post(path, json=body)

        return asyncio.run(go())

    post.upstream, post.app = upstream, app
    return post


def surrogate(proxy, mail=MAIL):
    return proxy(chat(mail), "/v1/inspect").json()["private"][0]["sent"]


def test_the_same_bytes_whatever_the_value_and_nothing_of_the_field(proxy):
    sent = []
    for mail in (MAIL, OTHER):
        body = chat(mail, private={"conversation": "tea-party", "marks": [{"start": 0, "stop": 4, "kind": "text"}]})
        assert proxy(body).status_code == 200
        sent.append(proxy.upstream.bodies[-1])
    assert sent[0] == sent[1]
    assert not any(word in sent[0] for word in ("tea-party", "marks", "private", "ada", "post.org"))
    proxy(chat(private=False))
    assert proxy.upstream.bodies[-1] != sent[0], "without surrogates something else is sent"


def test_answers_and_streams_come_back_with_the_value(proxy):
    proxy.upstream.answer = f"I wrote to {surrogate(proxy)}."
    found = proxy(chat()).json()["choices"][0]["message"]["content"]
    assert found == f"I wrote to {MAIL}."
    lines = proxy(chat(stream=True)).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert (
        "".join(e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]) == f"I wrote to {MAIL}."
    )
    raw = proxy(chat(private=False)).json()["choices"][0]["message"]["content"]
    assert raw == proxy.upstream.answer, "off is off"


def test_what_came_back_and_what_did_not_is_counted(proxy):
    name = surrogate(proxy).partition("@")[0]
    proxy.upstream.answer = f"{surrogate(proxy)} or {name}ish"
    proxy(chat())
    metrics = asyncio.run(_get(proxy.app, "/metrics"))
    assert 'sgt_private_replaced_total{kind="email"} 1.0' in metrics
    assert 'sgt_private_restored_total{kind="email"} 1.0' in metrics
    assert 'sgt_private_left_total{kind="email"} 1.0' in metrics


async def _get(app, path):
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return (await client.get(path)).text


def test_a_conversation_keeps_its_surrogates_from_turn_to_turn():
    turns = [{"role": "user", "content": f"mail {MAIL}"}, {"role": "assistant", "content": f"sent to {MAIL}"}]
    turns.append({"role": "user", "content": f"also {OTHER}"})
    (first,), (later,) = ask(PRIVATE, None, [turns[:1]]), ask(PRIVATE, None, [turns])
    assert later.what[0] == first.what[0] and later.what[1]["content"].endswith(first.what[0]["content"][5:])
    assert later.what[2]["content"][5:] != first.what[0]["content"][5:]
    (other,) = ask(PRIVATE, {"conversation": "another"}, [turns[:1]])
    assert other.what != first.what


def test_completions_and_stops(proxy):
    sent = ask(PRIVATE, None, [f"mail {MAIL}", f"mail {OTHER}"])
    assert MAIL not in sent[0].what and OTHER not in sent[1].what
    proxy.upstream.answer = f"to {sent[0].hidden[0].replaced[0].surrogate} and more"
    body = {"model": "trunk", "prompt": f"mail {MAIL}", "stop": [MAIL], "max_tokens": 8}
    assert proxy(body, "/v1/completions").json()["choices"][0]["text"] == "to "


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"find": "nonsense"}, "private.find"),
        ({"find": "spacy:/etc"}, "private.find"),
        ({"nonsense": 1}, "private: must be"),
        ({"conversation": ""}, "private.conversation"),
        ({"marks": [{"start": 0, "stop": 99}]}, "outside its text"),
        ({"marks": [{"start": 0, "stop": 4, "kind": "nonsense"}]}, "unknown kind"),
        ({"marks": [{"start": 0, "stop": 4}, {"start": 2, "stop": 6}]}, "overlaps"),
        ({"marks": [{"start": "a", "stop": 4}]}, "whole numbers"),
        ({"marks": [{"message": 9, "start": 0, "stop": 4}]}, "does not exist"),
        ("yes", "private"),
    ],
)
def test_a_bad_field_is_one_line_and_nothing_is_sent(proxy, field, message):
    found = proxy(chat(private=field))
    assert found.status_code == 400 and message in found.json()["error"]["message"]
    assert proxy.upstream.bodies == [] and MAIL not in found.text


def test_log_probabilities_and_token_ids_are_refused(proxy):
    assert "logprobs" in proxy(chat(logprobs=True)).json()["error"]["message"]
    ids = {"model": "trunk", "prompt": [5, 6, 7], "max_tokens": 4}
    assert "token ids" in proxy(ids, "/v1/completions").json()["error"]["message"]
    assert proxy.upstream.bodies == []
    assert proxy({**ids, "private": False}, "/v1/completions").status_code == 200


def test_a_proxy_that_looks_for_nothing_does_what_a_request_asks():
    (asked,) = ask(None, {"find": "patterns"}, [f"mail {MAIL}"])
    assert MAIL not in asked.what
    assert ask(None, None, [f"mail {MAIL}"])[0].conversation is None
    with pytest.raises(UserError, match="looks for nothing"):
        ask(None, True, ["x"])
    tools = [{"function": {"name": "mail", "description": f"mails {MAIL}"}}]
    assert MAIL not in json.dumps(asked.tools(tools)) and MAIL in json.dumps(tools)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--private", "nonsense"], "no finder"),
        (["--private", "patterns", "--private-key-file", "/none"], "cannot be read"),
        (["--private-key-file", "/none"], "without --private"),
        (["--private-own", "/none.yaml"], "cannot be read"),
    ],
)
def test_serve_refuses_before_it_loads_anything(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        serve.main([str(tmp_path / "no-export"), "--upstream", "http://127.0.0.1:1", "--port", "0", *words])
