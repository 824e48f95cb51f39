"""Client and proxy against a real vLLM, and the stub against it: the same requests, the same events."""

import asyncio
import base64
import io
import json
import re
import time
from dataclasses import fields

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgt_titan.client import VLLM, Options, StainedGlassTransform, UpstreamError
from sgt_titan.client.wire import REFUSALS, WIRES, check_event, explain
from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Settings
from tests.serving_kit import make_export
from tests.stub_servers import Trunk, running, vllm_app
from tests.vllm.conftest import KEY, TRUNK

pytestmark = pytest.mark.vllm
CHAT = [{"role": "user", "content": "Write to Anna that her parcel has come, and be kind."}]
GREEDY = {"max_tokens": 24, "temperature": 0.0}


@pytest.fixture(scope="module")
def trunk_model():
    return AutoModelForCausalLM.from_pretrained(TRUNK, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    """A transform that changes nothing that matters: answers are those to the clean prompt."""
    return StainedGlassTransform.from_pretrained(make_export(TRUNK, tmp_path_factory.mktemp("identity") / "e", std=0.0))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return StainedGlassTransform.from_pretrained(make_export(TRUNK, tmp_path_factory.mktemp("noisy") / "e", std=0.05))


@pytest.fixture(scope="module")
def proxy(vllm, identity):
    with running(create_app(Settings(vllm, upstream_key=KEY), identity)) as url:
        yield url


@pytest.fixture(scope="module")
def client(proxy):
    with openai.OpenAI(base_url=f"{proxy}/v1", api_key="unused", max_retries=0, timeout=120) as client:
        yield client


def greedy(model, ids, tokens):
    """The ids that transformers answers to the clean prompt."""
    return model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)[0, len(ids) :].tolist()


def bare(model, ids, tokens):
    """Their text."""
    return AutoTokenizer.from_pretrained(TRUNK).decode(greedy(model, ids, tokens), skip_special_tokens=True)


def test_answers_are_those_of_transformers_token_for_token(vllm, identity, trunk_model, client):
    for what in (
        CHAT,
        "Dear Anna,",
        [*CHAT, {"role": "assistant", "content": "Dear"}, {"role": "user", "content": "go on"}],
    ):
        prompt = identity.prompt(what)
        wanted = [identity.tokenizer.decode([i]) for i in greedy(trunk_model, prompt.ids, 24)]
        found = VLLM(vllm, api_key=KEY).generate(identity.encode(prompt), **GREEDY, logprobs=0)
        assert [one.token for one in found.choices[0].logprobs] == wanted and found.completion_tokens == len(wanted)
        assert VLLM(vllm, api_key=KEY).generate(identity.encode(prompt), **GREEDY).text == bare(
            trunk_model, prompt.ids, 24
        )
    assert client.chat.completions.create(model="trunk", messages=CHAT, **GREEDY).choices[0].message.content == bare(
        trunk_model, identity.prompt(CHAT).ids, 24
    )


def test_every_option(client, identity):
    ask = lambda **o: client.chat.completions.create(model="trunk", messages=CHAT, **{**GREEDY, **o})  # noqa: E731
    whole = ask().choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in ask(stream=True)) == whole
    stop = whole[4:7]
    assert ask(stop=[stop]).choices[0].message.content == whole[: whole.index(stop)]
    assert len(ask(n=3, temperature=1.0).choices) == 3
    assert (
        ask(seed=3, temperature=1.0).choices[0].message.content
        == ask(seed=3, temperature=1.0).choices[0].message.content
    )
    logprobs = ask(logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert logprobs and all(e.logprob <= 0 and len(e.top_logprobs) == 2 for e in logprobs)
    for option in ({"top_p": 0.5}, {"presence_penalty": 0.5}, {"frequency_penalty": 0.5}):
        assert ask(**option).choices
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 4, "ignore_eos": True}
    found = ask(extra_body={**extra, "skip_special_tokens": False, "stop_token_ids": [2]}, max_tokens=30)
    assert found.usage.completion_tokens >= 4 and found.usage.prompt_tokens == len(identity.prompt(CHAT))
    held = ask(response_format={"type": "json_object"}, max_tokens=60)
    text = held.choices[0].message.content
    assert text.lstrip().startswith("{") and (held.choices[0].finish_reason == "length" or json.loads(text) is not None)
    many = client.completions.create(model="trunk", prompt=["Dear Anna,", "Dear Bob,"], **GREEDY)
    assert [c.index for c in many.choices] == [0, 1]


# Of the client library; each must be an option that vLLM knows, and do what it says where that can be seen.
ASKED = {
    **{"max_tokens": 3, "n": 2, "temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "presence_penalty": 0.5},
    **{"frequency_penalty": 0.5, "repetition_penalty": 1.1, "seed": 3, "logprobs": 1, "min_tokens": 2},
    **{"ignore_eos": True, "skip_special_tokens": False, "stop_token_ids": (2,), "json_object": True, "stop": ("e",)},
}


def test_every_option_of_the_client(vllm, identity):
    assert ASKED.keys() == {field.name for field in fields(Options)}
    backend, embeds_TD = VLLM(vllm, api_key=KEY), identity.encode("Dear Anna,")
    for name, value in ASKED.items():
        found = backend.generate(embeds_TD, **{"max_tokens": 12, "temperature": 1.0, name: value})
        assert found.choices and all(choice.finish_reason for choice in found.choices), name
        assert len(found.choices) == (2 if name == "n" else 1)
        assert found.completion_tokens <= (3 if name == "max_tokens" else 12 * len(found.choices))
        assert bool(found.choices[0].logprobs) == (name == "logprobs")
        assert name != "stop" or "e" not in found.text
    everything = backend.generate(embeds_TD, **{**ASKED, "json_object": False, "stop": ()})
    assert len(everything.choices) == 2 and 4 <= everything.completion_tokens <= 6


def test_every_refusal_that_is_explained(vllm, identity, trunk_dir):
    embeds_TD = identity.encode("hello")
    cases = [
        (VLLM(vllm, api_key="wrong"), embeds_TD, {}, "upstream_unauthorized"),
        (VLLM(vllm, api_key=KEY, model="other"), embeds_TD, {}, "upstream_not_found"),
        (VLLM(vllm, api_key=KEY), torch.randn(4, 64), {}, "upstream_wrong_model"),
        (VLLM(vllm, api_key=KEY), embeds_TD, {"max_tokens": 5000}, "context_length_exceeded"),
        (VLLM(vllm, api_key=KEY), torch.randn(600, 128), {"max_tokens": 1}, "context_length_exceeded"),
        (VLLM(vllm, api_key=KEY), embeds_TD, {"n": 2, "temperature": 0.0}, "upstream_refused"),
        (VLLM("http://127.0.0.1:9"), embeds_TD, {}, "upstream_down"),
    ]
    for backend, sent, options, code in cases:
        with pytest.raises(UpstreamError) as refused:
            backend.generate(sent, **options)
        assert refused.value.code == code, (str(refused.value), code)


def as_sent(tensor):
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


# What is no request, and what of it is said: every row of the table that explains refusals, caused.
REFUSED = [
    ({"max_tokens": 0}, "max_tokens is too small"),
    ({"min_tokens": 99}, "min_tokens is not between"),
    ({"min_tokens": -1}, "min_tokens is not between"),
    ({"logprobs": 99}, "fewer log probabilities"),
    ({"temperature": -1.0}, "temperature is out"),
    ({"temperature": 9.0}, "temperature is out"),
    ({"top_p": 0.0}, "top_p is out"),
    ({"top_k": -5}, "top_k is out"),
    ({"min_p": 2.0}, "min_p is out"),
    ({"presence_penalty": 9.0}, "a penalty is out"),
    ({"frequency_penalty": 9.0}, "a penalty is out"),
    ({"repetition_penalty": 0.0}, "a penalty is out"),
    ({"n": 2, "temperature": 0.0}, "n is more than 1 at temperature 0"),
    ({"n": 0}, "n is out"),
    ({"stop_token_ids": ["x"]}, "stop_token_ids holds an id that is none"),
    ({"prompt_embeds": base64.b64encode(b"no tensor").decode()}, "cannot read the embeddings"),
    ({"prompt_embeds": as_sent(torch.zeros(8))}, "cannot read the embeddings"),
    ({"prompt_embeds": as_sent(torch.zeros(4, 128, dtype=torch.int8))}, "another --wire-dtype"),
]


def refusal(wire, url, body):
    """How it is explained, and its own words: a status, or, of what the engine refuses, the first event of a stream."""
    status, payload = events_of(url, body)
    if status != 200:
        return explain(wire, status, payload), payload
    try:
        check_event(json.loads(payload[0]), wire)
    except UpstreamError as error:
        return error, payload
    return None, payload


def test_every_refusal_that_is_known_by_its_words(vllm, identity):
    wire = WIRES["vllm"]
    good = wire.body(identity.encode("Dear Anna,"), Options(max_tokens=4, temperature=1.0), "trunk")
    unknown, said = [], set()
    for change, meaning in REFUSED:
        error, words = refusal(wire, vllm, good | change)
        said.add(next((ours for _, ours in REFUSALS if str(error).endswith(ours)), None))
        if error is None or error.code != "upstream_refused" or meaning not in str(error):
            unknown.append((change.keys(), str(error), words))
    assert not unknown, unknown
    assert said == {ours for _, ours in REFUSALS}, "a row that nothing has caused"


def test_embeddings_switched_off_and_a_server_that_goes_in_the_middle(start_vllm, identity):
    with start_vllm(embeds=False) as url, pytest.raises(UpstreamError, match="--enable-prompt-embeds") as refused:
        VLLM(url, api_key=KEY).generate(identity.encode("hello"))
    assert refused.value.code == "upstream_embeds_disabled"
    with pytest.raises(UpstreamError) as gone:
        with start_vllm() as url:
            stream = VLLM(url, api_key=KEY).stream(identity.encode("hello"), Options(max_tokens=400, ignore_eos=True))
            next(stream)
        for _ in stream:
            pass
    assert gone.value.code in ("upstream_cut_off", "upstream_error")


def test_64_clients(proxy, identity, trunk_model):
    contents = [f"Order {i} for customer {i * i}" for i in range(64)]

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{proxy}/v1", api_key="x", max_retries=0, timeout=300) as client:
            asked = [
                client.chat.completions.create(
                    model="trunk", messages=[{"role": "user", "content": c}], max_tokens=8, temperature=0
                )
                for c in contents
            ]
            return [found.choices[0].message.content for found in await asyncio.gather(*asked)]

    found = asyncio.run(everybody())
    for i in (0, 1, 17, 63):  # batches add up in another order: nearly equal logits may swap, so not all are compared
        assert found[i] == bare(trunk_model, identity.prompt([{"role": "user", "content": contents[i]}]).ids, 8)
    assert len(found) == 64


def running_requests(vllm):
    text = httpx.get(vllm + "/metrics").text
    return sum(float(v) for v in re.findall(r"^vllm:num_requests_running\{[^}]*\} ([0-9.e+]+)$", text, re.M))


def test_a_client_that_leaves_stops_the_generation(vllm, proxy):
    body = {"model": "trunk", "messages": CHAT, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", proxy + "/v1/chat/completions", json=body, timeout=60) as response:
        assert response.status_code == 200, response.read()
        pieces = response.iter_bytes()  # kept: its end would be the client's
        next(pieces)
        wait_for(lambda: running_requests(vllm) >= 1, 20)
    wait_for(lambda: running_requests(vllm) == 0, 10)


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def test_held_noise_gives_one_answer_and_fresh_noise_several_samples(vllm, noisy):
    backend = VLLM(vllm, api_key=KEY)
    first, second = noisy.encode(CHAT), noisy.encode(CHAT)
    assert torch.equal(first, second)
    assert backend.generate(first, **GREEDY).text == backend.generate(second, **GREEDY).text
    noisy.held_noise, held = None, noisy.held_noise
    try:
        assert not torch.equal(noisy.encode(CHAT), first) and backend.generate(noisy.encode(CHAT), **GREEDY).text
    finally:
        noisy.held_noise = held


def shape(value):
    """A JSON value without its contents: names and types, which is what a reader of events relies on."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def events_of(url, body):
    with httpx.stream(
        "POST", url + "/v1/completions", json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60
    ) as r:
        if r.status_code != 200:
            return r.status_code, json.loads(r.read())
        lines = [line[6:] for line in r.iter_lines() if line.startswith("data: ")]
    return 200, lines


@pytest.mark.parametrize("options", [{}, {"n": 2, "temperature": 1.0}, {"logprobs": 2}], ids=["plain", "n", "logprobs"])
def test_the_stub_sends_what_vllm_sends(vllm, identity, trunk_model, options):
    stub = Trunk(trunk_model, identity.tokenizer, context=512, key=KEY)
    asked = Options(**{"max_tokens": 6, "temperature": 0.0, **options})
    body = WIRES["vllm"].body(identity.encode("Dear Anna,"), asked, "trunk")
    with running(vllm_app(stub)) as url:
        (_, ours), (_, theirs) = events_of(url, body), events_of(vllm, body)
    assert ours[-1] == theirs[-1] == "[DONE]"
    ours, theirs = ([json.loads(line) for line in lines[:-1]] for lines in (ours, theirs))
    text = lambda events: "".join(c["text"] for e in events for c in e["choices"] if c["index"] == 0)  # noqa: E731
    assert text(ours) == text(theirs) or asked.temperature > 0
    for mine, real in ((ours[0], theirs[0]), (ours[-1], theirs[-1])):
        assert missing(shape(mine), shape(real)) == []


def missing(mine, real, where=""):
    """What the stub says and the real one does not, or says otherwise. The real one may say more."""
    if isinstance(mine, dict) and isinstance(real, dict):
        return [
            m
            for key in mine
            for m in (missing(mine[key], real[key], f"{where}.{key}") if key in real else [f"{where}.{key}"])
        ]
    if isinstance(mine, list) and isinstance(real, list):
        return missing(mine[0], real[0], where + "[]") if mine and real else []
    return [] if mine == real or "NoneType" in (mine, real) else [f"{where}: {mine}, {real}"]


def test_the_stub_refuses_what_vllm_refuses(vllm, identity, trunk_model):
    stub = Trunk(trunk_model, identity.tokenizer, context=512, key=KEY)
    good = WIRES["vllm"].body(identity.encode("Dear Anna,"), Options(max_tokens=4), "trunk")
    wide = WIRES["vllm"].body(torch.randn(4, 64), Options(max_tokens=4), "trunk")
    bad = [
        wide,
        good | {"model": "other"},
        good | {"max_tokens": 5000},
        good | {"prompt_embeds": "no base64!"},
        good | {"echo": True},
        good | {"suffix": "x"},
        good | {"n": 2, "temperature": 0.0},
    ]
    with running(vllm_app(stub)) as url:
        for body in bad:
            (ours, mine), (theirs, real) = events_of(url, body), events_of(vllm, body)
            assert ours == theirs != 200, (mine, real)
            assert explain(WIRES["vllm"], ours, mine).code == explain(WIRES["vllm"], theirs, real).code
