"""Bodies drawn from the document that the proxy serves: never a 500, OpenAI's form, never a word of the prompt."""

import asyncio
import json
from collections import Counter

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
TEXT = st.sampled_from(["hello", CANARY, "</s>", "a\nb", "\ue0000\ue001"])
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXT}), min_size=1, max_size=2)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXT | PARTS})
WILD_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["developer", "user", "assistant", "tool", CANARY]), "content": WORDS | ANYTHING},
    optional={"tool_calls": ANYTHING, "name": ANYTHING, "reasoning_content": ANYTHING, "tool_call_id": ANYTHING},
)
WILD_PARTS = st.lists(st.fixed_dictionaries({}, optional={"type": WORDS, "text": WORDS | ANYTHING}), max_size=2)
WILD_ITEM = st.one_of(
    st.fixed_dictionaries({"type": st.just("function_call"), "name": WORDS | ANYTHING, "arguments": WORDS | ANYTHING}),
    st.fixed_dictionaries({"type": st.just("function_call_output"), "output": WORDS | ANYTHING | WILD_PARTS}),
    st.fixed_dictionaries({"type": st.just("reasoning"), "content": ANYTHING | WILD_PARTS}),
    st.fixed_dictionaries({"type": st.just("message"), "role": WORDS, "content": ANYTHING | WILD_PARTS}),
)
FUNCTION = st.fixed_dictionaries({"name": TEXT, "parameters": st.just({"type": "object", "properties": {}})})
# What the document calls an object, or a text, and is something more narrow.
NARROW = {
    "model": st.just("trunk"),
    "messages": st.lists(TURN, min_size=1, max_size=3) | st.lists(TURN | WILD_TURN, max_size=3),
    "input": TEXT | st.lists(TURN, min_size=1, max_size=3) | st.lists(TURN | WILD_ITEM, max_size=3),
    "tools": st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}), max_size=2),
    "tool_choice": st.sampled_from(["auto", "none"]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "chat_template_kwargs": st.just({}),
    "text": st.just({"format": {"type": "text"}}),
    "reasoning": st.sampled_from([{}, {"summary": "auto"}]),
    "private": st.sampled_from([False, {"find": "patterns"}]),
    "stop_token_ids": st.just([2]),
}


def drawn(schema, schemas):
    """Values of a JSON schema, as far as the document uses them."""
    if "$ref" in schema:
        return drawn(schemas[schema["$ref"].rsplit("/", 1)[1]], schemas)
    if "anyOf" in schema:
        return st.one_of([drawn(part, schemas) for part in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    if schema.get("type") == "array":
        return st.lists(drawn(schema.get("items", {}), schemas), max_size=3)
    simple = {"string": TEXT, "integer": st.integers(1, 3), "number": st.sampled_from([0, 0.5, 1]), "null": st.none()}
    return {**simple, "boolean": st.booleans(), "object": st.just({})}.get(schema.get("type"), ANYTHING)


@st.composite
def bodies(draw, schema, schemas):
    """A few fields as the document has them; in some one is something else, or has no such name."""
    properties = schema.get("properties", {})
    names = {*schema.get("required", ()), *draw(st.lists(st.sampled_from(sorted(properties) or [""]), max_size=4))}
    body = {n: draw(NARROW[n] if n in NARROW else drawn(properties[n], schemas)) for n in sorted(names & {*properties})}
    for name in draw(st.lists(st.sampled_from([*sorted(properties), CANARY]), max_size=1)):
        body[name] = draw(ANYTHING)
    return body


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
def test_whatever_is_sent(app, loop, document, path):
    assert set(POSTS) == {path for path, kinds in document["paths"].items() if "post" in kinds}
    schemas, statuses = document["components"]["schemas"], Counter()
    schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = schemas[schema["$ref"].rsplit("/", 1)[1]]

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(body=bodies(schema, schemas) | bodies(schema, schemas) | ANYTHING)
    def send(body):
        content = json.dumps(body).encode("utf-8", "surrogatepass")
        found = call(app, loop, "POST", path, content=content, headers={"content-type": "application/json"})
        statuses[found.status_code] += 1
        assert found.status_code in (200, 400, 404, 413), (found.status_code, found.text)
        assert found.headers["x-request-id"].startswith("req_")
        if found.status_code == 200:
            assert '"error": {' not in found.text, "an error behind a status of success"
        else:
            error = found.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert CANARY not in found.text and len(found.text) < 1000

    send()
    assert path == "/v1/embeddings" or statuses[200] >= 2 <= statuses[400], "all ended at the first check, or at none"
