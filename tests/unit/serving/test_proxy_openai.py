"""The proxy as OpenAI's own client sees it, over a stub vLLM with a real trunk behind it."""

import asyncio

import httpx
import openai
import pytest
import torch

from sgt_titan.client import StainedGlassTransform
from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Settings
from tests.stub_servers import running, sglang_app, vllm_app

CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "tell me something"}]
GREEDY = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def sgt(identity_export):
    return StainedGlassTransform.from_pretrained(identity_export)


@pytest.fixture(scope="module")
def proxy(trunk, sgt):
    with running(vllm_app(trunk)) as upstream, running(create_app(Settings(upstream, inspect=True), sgt)) as url:
        yield url


@pytest.fixture(scope="module")
def client(proxy):
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key="unused", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def bare(trunk):
    """What the trunk answers to clean text: with an identity transform the proxy must give just that."""

    def answer(ids, tokens=12):
        ids = torch.tensor([ids])
        out = trunk.model.generate(ids, max_new_tokens=tokens, do_sample=False, attention_mask=torch.ones_like(ids))
        return trunk.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


def test_chat(client, sgt, bare):
    found = client.chat.completions.create(model="trunk", messages=CHAT, **GREEDY)
    prompt = sgt.prompt(CHAT)
    assert found.choices[0].message.content == bare(prompt.ids) and found.choices[0].message.role == "assistant"
    assert found.choices[0].finish_reason == "length" and found.model == "trunk"
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (len(prompt), 12, len(prompt) + 12)


def test_chat_stream(client, sgt, bare):
    chunks = list(
        client.chat.completions.create(
            model="trunk", messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *body, last = chunks
    assert body[0].choices[0].delta.role == "assistant" and len({c.id for c in chunks}) == 1
    assert "".join(c.choices[0].delta.content or "" for c in body) == bare(sgt.prompt(CHAT).ids)
    assert [c.choices[0].finish_reason for c in body][-1] == "length" and len(body) > 5
    assert last.choices == [] and last.usage.completion_tokens == 12 and all(c.usage is None for c in body)


def test_n_stop_and_logprobs(client, sgt, bare):
    whole = bare(sgt.prompt(CHAT).ids)
    stop = whole[4:6]
    stopped = client.chat.completions.create(model="trunk", messages=CHAT, stop=[stop, "never"], **GREEDY)
    assert stopped.choices[0].message.content == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    many = client.chat.completions.create(
        model="trunk", messages=CHAT, n=3, max_tokens=4, temperature=1, logprobs=True, top_logprobs=2
    )
    assert [c.index for c in many.choices] == [0, 1, 2]
    for choice in many.choices:
        entries = choice.logprobs.content
        assert 0 < len(entries) <= 4 and all(e.logprob < 0 and 0 < len(e.top_logprobs) <= 2 for e in entries)
    streamed = client.chat.completions.create(
        model="trunk", messages=CHAT, n=2, max_tokens=4, temperature=1, logprobs=True, stream=True
    )
    indices = {c.choices[0].index for c in streamed}
    assert indices == {0, 1}


def test_seed(client):
    ask = lambda seed: client.completions.create(  # noqa: E731
        model="trunk", prompt="a", max_tokens=12, temperature=1, seed=seed
    )
    assert ask(1).choices[0].text == ask(1).choices[0].text != ask(2).choices[0].text


def test_completions(client, sgt, bare):
    prompts = ["once upon", "a time"]
    found = client.completions.create(model="trunk", prompt=prompts, logprobs=1, **GREEDY)
    assert [c.text for c in found.choices] == [bare(sgt.prompt(p).ids) for p in prompts]
    assert [c.index for c in found.choices] == [0, 1]
    assert len(found.choices[0].logprobs.tokens) == 12 and found.choices[0].logprobs.text_offset[0] == 0
    assert found.usage.prompt_tokens == sum(len(sgt.prompt(p)) for p in prompts)
    ids = sgt.prompt("once upon").ids
    assert client.completions.create(model="trunk", prompt=ids, **GREEDY).choices[0].text == found.choices[0].text
    assert client.completions.create(model="trunk", prompt="x", temperature=0).usage.completion_tokens == 16
    chunks = client.completions.create(model="trunk", prompt=prompts, stream=True, n=1, **GREEDY)
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == [c.text for c in found.choices]


def test_defaults_leave_room_for_the_answer(client, sgt, trunk):
    trunk.bodies.clear()
    client.chat.completions.create(model="trunk", messages=CHAT, temperature=0)
    assert trunk.bodies[0]["max_tokens"] == trunk.context - len(sgt.prompt(CHAT))


def test_tools_and_harmless_fields(client, trunk):
    trunk.bodies.clear()
    tool = {"type": "function", "function": {"name": "find"}}
    found = client.chat.completions.create(
        model="trunk",
        messages=[{"role": "user", "content": "hi"}],
        tools=[tool],
        tool_choice="auto",
        user="me",
        metadata={"a": "b"},
        response_format={"type": "text"},
        max_tokens=2,
    )
    assert found.usage.prompt_tokens > 80
    assert trunk.bodies[0].keys() == {"model", "prompt_embeds", "max_tokens", "n", "stream", "stream_options"}


def test_models_health_and_metrics(client, proxy):
    assert [m.id for m in client.models.list()] == ["trunk"] and client.models.retrieve("trunk").id == "trunk"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert httpx.get(f"{proxy}/healthz").status_code == httpx.get(f"{proxy}/readyz").status_code == 200
    text = httpx.get(f"{proxy}/metrics").text
    assert 'sgt_requests_total{route="/v1/chat/completions",status="200"}' in text
    for name in ("sgt_encode_seconds_count", "sgt_first_delta_seconds_bucket", "sgt_upstream_bytes_total"):
        assert name in text


def test_64_clients_at_once(proxy, trunk, sgt, bare):
    started = trunk.started
    contents = [f"client {i} asks for {i * i}" for i in range(64)]

    async def ask(client, i):
        chat = [{"role": "user", "content": contents[i]}]
        if i % 2:
            found = await client.chat.completions.create(model="trunk", messages=chat, max_tokens=4, temperature=0)
            return found.choices[0].message.content
        stream = await client.chat.completions.create(
            model="trunk", messages=chat, max_tokens=4, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them():
        async with openai.AsyncOpenAI(base_url=f"{proxy}/v1", api_key="unused", max_retries=0, timeout=60) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    found = asyncio.run(all_of_them())
    assert trunk.started == started + 64
    wanted = [bare(sgt.prompt([{"role": "user", "content": content}]).ids, 4) for content in contents]
    assert found == wanted, "an answer went to another client"


def test_sglang_behind_the_same_proxy(trunk, sgt, bare):
    with running(sglang_app(trunk)) as upstream:
        app = create_app(Settings(upstream, backend="sglang", served_name="mine", wire_dtype="float32"), sgt)
        with running(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
            found = client.chat.completions.create(model="mine", messages=CHAT, logprobs=True, **GREEDY)
            assert found.choices[0].message.content == bare(sgt.prompt(CHAT).ids)
            assert found.usage.completion_tokens == 12 == len(found.choices[0].logprobs.content)
            assert httpx.get(f"{url}/readyz").status_code == 200


def test_inspect_route(proxy):
    found = httpx.post(f"{proxy}/v1/inspect", json={"messages": CHAT}).json()
    assert found["nearest_neighbour_reads"].count("tell me something") == 1
    assert found["read_right"] == found["obfuscated_tokens"] == len("be brieftell me something")
    assert "weakest observer" in found["warning"] and "not measured" in found["best_attacker"]
    assert httpx.post(f"{proxy}/v1/inspect", json={}).status_code == 400
