"""Every backend over the same real trunk: the same embeddings must get the same answer."""

import asyncio
import base64
import io
import json
import shutil
import subprocess
import time

import httpx
import pytest
import torch
from tokenizers import Tokenizer, decoders
from transformers import AutoTokenizer

from sgt_titan.client import VLLM, Options, SGLang, StainedGlassTransform, Transformers, UpstreamError
from sgt_titan.errors import UserError
from sgt_titan.serving.settings import Settings, Target
from sgt_titan.serving.upstream import Upstream
from tests.serving_kit import load_trunk
from tests.stub_servers import running, sglang_app, vllm_app


def encoded(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


GREEDY = {"max_tokens": 12, "temperature": 0.0}


@pytest.fixture(scope="module")
def servers(trunk):
    with running(vllm_app(trunk)) as vllm, running(sglang_app(trunk)) as sglang:
        yield {"vllm": VLLM(vllm, model="trunk"), "sglang": SGLang(sglang)}


@pytest.fixture(scope="module")
def local(trunk):
    return Transformers(trunk.model, trunk.tokenizer)


@pytest.fixture(scope="module")
def backends(servers, local):
    return {**servers, "transformers": local}


@pytest.fixture(scope="module")
def embeds_TD(chat_export, local):
    """A prompt whose greedy answer is long enough to look at: an untrained trunk may end at once, or write nothing."""
    sgt = StainedGlassTransform.from_pretrained(chat_export)
    for seed in range(50):
        with pytest.warns(UserWarning, match="seed"):
            embeds_TD = sgt.encode("where is Zorblax?", seed=seed)
        answer = local.generate(embeds_TD, **GREEDY)
        if answer.choices[0].finish_reason == "length" and len(answer.text) > 6:
            return embeds_TD
    raise AssertionError("no prompt gets a whole answer")


def test_all_answer_alike_and_see_the_same(backends, embeds_TD, trunk):
    trunk.received.clear()
    answers = {name: backend.generate(embeds_TD, **GREEDY) for name, backend in backends.items()}
    assert len({answer.text for answer in answers.values()}) == 1 and answers["vllm"].text
    for answer in answers.values():
        assert (answer.prompt_tokens, answer.completion_tokens) == (len(embeds_TD), 12)
        assert answer.choices[0].finish_reason == "length"
    for received in trunk.received:
        assert torch.equal(received, embeds_TD)  # the wire changes nothing


def test_the_identity_is_the_bare_trunk(identity_export, trunk, backends):
    """What is answered to the client is what the trunk answers to the text."""
    sgt = StainedGlassTransform.from_pretrained(identity_export)
    chat = [{"role": "user", "content": "tell me something"}]
    ids = torch.tensor([trunk.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)])
    assert sgt.prompt(chat).ids == ids[0].tolist()
    bare = trunk.model.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    wanted = trunk.tokenizer.decode(bare[0, ids.shape[1] :], skip_special_tokens=True)
    for name, backend in backends.items():
        assert backend.generate(sgt.encode(chat), **GREEDY).text == wanted, name


@pytest.mark.parametrize("name", ["vllm", "sglang", "transformers"])
def test_streams_choices_and_stops(backends, embeds_TD, name):
    backend = backends[name]
    whole = backend.generate(embeds_TD, **GREEDY).text
    deltas = list(backend.stream(embeds_TD, **GREEDY))
    assert "".join(d.text for d in deltas) == whole and len(deltas) > 3
    many = backend.generate(embeds_TD, max_tokens=5, n=3, temperature=1.0)
    assert len(many.choices) == 3 and all(0 < c.tokens <= 5 for c in many.choices)
    stop = whole[4:6]
    stopped = backend.generate(embeds_TD, stop=(stop,), **GREEDY)
    assert stopped.text == whole[: whole.index(stop)] and stopped.choices[0].finish_reason == "stop"


def test_log_probabilities_agree(servers, embeds_TD):
    vllm, sglang = (s.generate(embeds_TD, logprobs=2, **GREEDY).choices[0].logprobs for s in servers.values())
    assert len(vllm) == 12 and [t.token for t in vllm] == [t.token for t in sglang]
    for a, b in zip(vllm, sglang, strict=True):
        assert a.logprob == pytest.approx(b.logprob) and a.logprob < 0
        assert len(b.top) == 2 and b.logprob == pytest.approx(b.top[0][1])  # greedy
        # vLLM's format maps a text to its log-probability: of two tokens of one text (halves of a character,
        # special tokens, whose text is empty) only the later is left
        assert dict(a.top) == pytest.approx(dict(b.top))


def test_leaving_the_loop_stops_generation(chat_trunk, embeds_TD):
    trunk = load_trunk(chat_trunk, delay_s=0.02, endless=True)
    with running(vllm_app(trunk)) as url:
        for _ in VLLM(url).stream(embeds_TD, max_tokens=100, temperature=1.0):
            break
        deadline = time.monotonic() + 5
        while not trunk.cancelled and time.monotonic() < deadline:
            time.sleep(0.01)
        assert trunk.cancelled == 1 and trunk.steps < 50


def test_leaving_the_loop_stops_a_local_model(local, embeds_TD):
    stream = local.stream(embeds_TD, max_tokens=100)
    next(stream)
    started = time.monotonic()
    stream.close()  # waits for the thread
    assert time.monotonic() - started < 5


def test_half_the_bytes_in_bfloat16(servers, embeds_TD, trunk):
    trunk.bodies.clear()
    small = VLLM(servers["vllm"]._url.removesuffix("/v1/completions"), dtype="bfloat16")
    small.generate(embeds_TD, max_tokens=1)
    servers["vllm"].generate(embeds_TD, max_tokens=1)
    sizes = [len(body["prompt_embeds"]) for body in trunk.bodies]
    assert sizes[1] - sizes[0] == pytest.approx(embeds_TD.numel() * 2 * 4 / 3, rel=0.05)
    assert torch.equal(trunk.received[-2], embeds_TD.bfloat16().float())


def refusal(url, embeds_TD, kind=VLLM, timeout=20, logprobs=None, **options):
    with pytest.raises(UpstreamError) as refused:
        kind(url, timeout=timeout, **options).generate(embeds_TD, max_tokens=4, logprobs=logprobs)
    assert "\n" not in str(refused.value)
    return refused.value


def test_what_a_server_refuses_is_explained(chat_trunk, embeds_TD):
    trunk = load_trunk(chat_trunk, embeds=False, endless=True)
    with running(vllm_app(trunk)) as vllm, running(sglang_app(trunk)) as sglang:
        assert "--enable-prompt-embeds" in str(refusal(vllm, embeds_TD))
        assert "--disable-radix-cache" in str(refusal(sglang, embeds_TD, SGLang))
        trunk.embeds = True
        assert refusal(vllm, embeds_TD, model="another").code == "upstream_not_found"
        assert refusal(vllm, embeds_TD[:, :8]).code == "upstream_wrong_model"
        assert refusal(sglang, embeds_TD[:, :8], SGLang).code == "upstream_wrong_model"
        assert refusal(vllm, embeds_TD.repeat(20, 1)).code == "context_length_exceeded"
        trunk.key = "k"
        assert refusal(vllm, embeds_TD, api_key="wrong").code == "upstream_unauthorized"
        assert VLLM(vllm, api_key="k").generate(embeds_TD, max_tokens=1).text is not None
        trunk.key, trunk.break_after = None, 2
        assert refusal(vllm, embeds_TD).code == "upstream_error"
        trunk.break_after, trunk.delay_s = None, 1.0
        slow = refusal(vllm, embeds_TD, timeout=0.3)
        assert (slow.code, slow.status) == ("upstream_timeout", 504)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompt_embeds": "!"}, ""),
        ({"prompt_embeds": base64.b64encode(b"no tensor").decode()}, "could not be deserialized"),
        ({"prompt_embeds": encoded(subprocess.Popen)}, "could not be deserialized"),
        ({"prompt_embeds": encoded(torch.zeros(3))}, "must be a 2D tensor"),
        ({"prompt_embeds": encoded(torch.zeros(3, 32, dtype=torch.int64))}, "not a floating-point type"),
        ({"prompt_embeds": encoded(torch.zeros(3, 31))}, "hidden_size 31 does not match"),
        ({"prompt_embeds": None}, "Either prompt or prompt_embeds"),
        ({"echo": True}, "Echo is unsupported"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"prompt_logprobs": 1}, "not compatible"),
        ({"stream": False}, "Stream options"),
        ({"model": "x"}, "does not exist"),
    ],
)
def test_the_stub_is_as_strict_as_vllm(servers, embeds_TD, change, message):
    body = {**servers["vllm"].wire.body(embeds_TD, Options(), "trunk"), **change}
    response = httpx.post(servers["vllm"]._url, json=body)
    assert response.status_code in (400, 404) and message in response.json()["error"]["message"]


def test_a_proxy_of_the_environment_sees_nothing(monkeypatch, trunk, embeds_TD):
    """It would see the embeddings and, in clear text, the answers."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with running(vllm_app(trunk)) as url:
        assert VLLM(url).generate(embeds_TD, **GREEDY).text
        upstream = Upstream(Target(url), Settings())
        assert asyncio.run(upstream.describe()).model == "trunk"


def test_a_certificate_that_is_not_accepted_is_told_apart(embeds_TD):
    def refuse(request):
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")

    with pytest.raises(UpstreamError, match="certificate is not accepted; SSL_CERT_FILE"):
        VLLM("https://x", client=httpx.Client(transport=httpx.MockTransport(refuse))).generate(embeds_TD)


def test_no_server(embeds_TD):
    assert refusal("http://127.0.0.1:9", embeds_TD).code == "upstream_down"
    assert refusal("no url", embeds_TD).code == "upstream_cut_off"


def test_an_answer_cut_off_is_no_answer(embeds_TD):
    from fastapi import FastAPI
    from starlette.responses import Response

    app = FastAPI()
    whole = 'data: {"choices": [{"index": 0, "text": "x", "finish_reason": "stop", %s}], "usage": %s}\n\n'
    cut_off = [
        'data: {"choices": [{"index": 0, "text": "half"}]}\n\n',
        'data: {"choices": [{"index": 0, "text": "half"}]}\n\ndata: [DONE]\n\n',
    ]
    malformed = [
        "data: not json\n\n",
        "data: " + "[" * 100_000 + "\n\n",
        'data: {"choices": [{"index": 5, "text": "x"}]}\n\n',
        'data: {"choices": [{"index": 1e999, "text": "x"}]}\n\n',
        "data: [1]\n\n",
        whole % ('"text": 5', "null"),
        whole % ('"text": "\\ud800"', "null"),
        whole % ('"finish_reason": 5', "null"),
        whole % ('"logprobs": {"tokens": [5], "token_logprobs": [-1]}', "null"),
        whole % ('"logprobs": {"tokens": ["x"], "token_logprobs": ["x"]}', "null"),
        whole % ('"a": 0', '{"completion_tokens": "x"}'),
    ]
    bodies = iter([*cut_off, *malformed])

    @app.post("/v1/completions")
    async def cut():
        return Response(next(bodies), media_type="text/event-stream")

    with running(app) as url:
        codes = [refusal(url, embeds_TD, logprobs=0).code for _ in cut_off + malformed]
    assert codes == ["upstream_cut_off"] * len(cut_off) + ["upstream_malformed"] * len(malformed)


def test_what_transformers_cannot_do(local, embeds_TD):
    with pytest.raises(UserError, match="logprobs"):
        local.generate(embeds_TD, logprobs=1)
    with pytest.raises(UserError, match="another trunk"):
        local.generate(embeds_TD[:, :8])
    with pytest.raises(UserError, match="same answer"):
        local.generate(embeds_TD, n=2, temperature=0)
    with pytest.raises(UserError, match="cannot be loaded"):
        Transformers.from_pretrained("/nowhere")
    assert "logprobs" in Options.__doc__


def test_a_local_model_s_text_is_that_of_tokenizer_json(trunk_dir, tmp_path):
    """Whatever class transformers takes for its model_type: here one that brings a decoder of its own."""
    folder = shutil.copytree(trunk_dir("qwen2"), tmp_path / "trunk")
    core = Tokenizer.from_file(str(folder / "tokenizer.json"))
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")])
    core.save(str(folder / "tokenizer.json"))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"tokenizer_class": "Qwen2Tokenizer"}))
    ids = core.encode("a cat", add_special_tokens=False).ids
    assert core.decode(ids) == "b cbt" != AutoTokenizer.from_pretrained(folder).decode(ids)
    assert Transformers.from_pretrained(str(folder))._tokenizer.decode(ids) == "b cbt"
