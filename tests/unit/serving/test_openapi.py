"""Bodies drawn from the document that the proxy serves: never a 500, OpenAI's form, never a word of the prompt."""

import asyncio
import json

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sgt_titan.client import StainedGlassTransform
from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Settings

CANARY = "Zorblax-7741"
WORDS = st.sampled_from(["", "trunk", CANARY, "user", "tool", "a" * 50, "</s>", "\ud800", "\x00", "\ue0000\ue001"])
NUMBERS = st.sampled_from([0, 1, -1, 2, 10**9, -(10**30), 10**400, 0.5, -0.0, 1e300])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool", CANARY]),
        "content": WORDS | ANYTHING,
    },
    optional={"tool_calls": ANYTHING, "name": ANYTHING, "reasoning_content": ANYTHING, "tool_call_id": ANYTHING},
)


# Of /v1/responses: what a conversation holds there.
PARTS = st.lists(st.fixed_dictionaries({}, optional={"type": WORDS, "text": WORDS | ANYTHING}), max_size=2)
ITEM = st.one_of(
    TURN,
    st.fixed_dictionaries({"type": st.just("function_call"), "name": WORDS | ANYTHING, "arguments": WORDS | ANYTHING}),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "output": WORDS | ANYTHING | PARTS}),
    st.fixed_dictionaries({"type": st.just("reasoning"), "content": ANYTHING | PARTS}),
    st.fixed_dictionaries({"type": st.just("message"), "role": WORDS, "content": ANYTHING | PARTS}),
)


def drawn(schema, schemas):
    """Values of a JSON schema, as far as the document uses them."""
    if "$ref" in schema:
        return drawn(schemas[schema["$ref"].rsplit("/", 1)[1]], schemas)
    if "anyOf" in schema:
        return st.one_of([drawn(part, schemas) for part in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        needed = set(schema.get("required", ()))
        parts = {name: drawn(part, schemas) | ANYTHING for name, part in schema["properties"].items()}
        turns = {"messages": TURN, "input": ITEM}
        parts |= {name: st.lists(one, min_size=1, max_size=3) for name, one in turns.items() if name in parts}
        parts["model"] = st.just("trunk") if "model" in parts else st.nothing()
        parts = {name: part for name, part in parts.items() if name != "model" or "model" in schema["properties"]}
        needed_parts = {name: part for name, part in parts.items() if name in needed}
        return st.fixed_dictionaries(needed_parts, optional={n: p for n, p in parts.items() if n not in needed})
    if kind == "array":
        return st.lists(drawn(schema.get("items", {}), schemas), max_size=3)
    simple = {"string": WORDS, "integer": NUMBERS, "number": NUMBERS, "boolean": st.booleans(), "null": st.none()}
    return simple.get(kind, ANYTHING)


def answer(request):
    """An upstream that has the last word quickly."""
    if request.method == "GET":
        return httpx.Response(200, json={"data": [{"id": "trunk", "max_model_len": 128}]})
    n = json.loads(request.content)["n"]
    events = [{"choices": [{"index": i, "text": "a", "finish_reason": "stop"}]} for i in range(n)]
    return httpx.Response(200, content="".join(f"data: {json.dumps(e)}\n\n" for e in events) + "data: [DONE]\n\n")


@pytest.fixture(scope="module")
def app(chat_export):
    sgt = StainedGlassTransform.from_pretrained(chat_export)
    sent = {"upstream": "http://u", "inspect": True, "openapi": True}
    return create_app(Settings(**sent), sgt, httpx.MockTransport(answer))


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def call(app, loop, method, path, **request):
    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **request)

    return loop.run_until_complete(go())


@pytest.fixture(scope="module")
def document(app, loop):
    return call(app, loop, "GET", "/openapi.json").json()


def test_it_is_behind_a_flag_and_names_every_route(app, document, chat_export, loop):
    from sgt_titan.serving.guard import ROUTES

    sgt = StainedGlassTransform.from_pretrained(chat_export)
    assert call(create_app(Settings("http://u"), sgt), loop, "GET", "/openapi.json").status_code == 404
    assert set(document["paths"]) == set(ROUTES) - {"/openapi.json"}
    assert document["openapi"].startswith("3.1") and set(document["components"]["schemas"]) >= {"Chat", "Completion"}


POSTS = ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/inspect", "/v1/embeddings"]


@pytest.mark.parametrize("path", POSTS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_whatever_is_sent(app, loop, document, path, data):
    assert set(POSTS) == {path for path, kinds in document["paths"].items() if "post" in kinds}
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = data.draw(drawn(schema, document["components"]["schemas"]) | ANYTHING)
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    found = call(app, loop, "POST", path, content=content, headers={"content-type": "application/json"})
    assert found.status_code in (200, 400, 404, 413), (found.status_code, found.text)
    assert found.headers["x-request-id"].startswith("req_")
    if found.status_code == 200:
        assert "server_error" not in found.text and '"error": {' not in found.text, (
            "an error behind a status of success"
        )
    else:
        error = found.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert CANARY not in found.text and len(found.text) < 1000
