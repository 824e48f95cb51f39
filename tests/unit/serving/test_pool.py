"""Several servers: health, fail-over, and that what is sent again are the same embeddings."""

from dataclasses import replace

import httpx
import pytest

from sgt_titan.client import StainedGlassTransform
from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Served, Settings, Target
from tests.serving_kit import load_trunk
from tests.stub_servers import running, vllm_app

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def loaded(chat_trunk):
    return load_trunk(chat_trunk, endless=True)


@pytest.fixture
def trunks(loaded):
    return [replace(loaded, bodies=[], headers=[], received=[]) for _ in range(2)]


@pytest.fixture(scope="module")
def fresh(chat_export):
    """Its noise is new with every call: what is equal was encoded once."""
    return StainedGlassTransform.from_pretrained(chat_export, hold_noise=False)


def serve(fresh, urls, **settings):
    served = Served(fresh, tuple(Target(url) for url in urls), "m")
    return running(create_app(Settings(retry_pause_s=0.01, **settings), [served]))


def ask(url, **change):
    return httpx.post(url + "/v1/chat/completions", json={**CHAT, **change}, timeout=20)


def test_a_server_that_breaks_off_is_followed_by_another(fresh, trunks, monkeypatch):
    monkeypatch.setattr("sgt_titan.serving.pool.FIRST_REST_S", 60.0)
    bad, good = trunks
    bad.break_after = 0
    with running(vllm_app(bad)) as one, running(vllm_app(good)) as two, serve(fresh, [one, two]) as url:
        assert ask(url).status_code == 200
        assert len(bad.received) == len(good.received) == 1
        assert bad.bodies[0]["prompt_embeds"] == good.bodies[0]["prompt_embeds"], "a second sample was sent"
        ids = [trunk.headers[0]["x-request-id"] for trunk in trunks]
        assert ids[0] == ids[1] and ids[0].startswith("req_")
        assert ask(url).status_code == 200 and len(bad.received) == 1, "the one that failed was not left to rest"
        text = httpx.get(url + "/metrics").text
        assert 'sgt_upstream_up{model="0",upstream="0"} 0.0' in text
        assert 'sgt_upstream_up{model="0",upstream="1"} 1.0' in text


def test_a_server_that_is_gone(fresh, trunks):
    with running(vllm_app(trunks[0])) as one, serve(fresh, ["http://127.0.0.1:9", one]) as url:
        assert [ask(url).status_code for _ in range(3)] == [200] * 3
        assert httpx.get(url + "/readyz").status_code == 200


def test_without_retries_all_are_still_asked_what_they_serve(fresh, trunks):
    gone = [f"http://127.0.0.1:{port}" for port in (9, 10, 11)]
    with running(vllm_app(trunks[0])) as one, serve(fresh, [*gone, one], retries=0) as url:
        assert ask(url).status_code == 200 and httpx.get(url + "/readyz").status_code == 200


def test_who_was_asked_is_asked_again_only_for_what_may_pass(fresh):
    """Both refuse our key: each is asked once, whatever --retries says. Both are overloaded: they take turns."""
    calls = []

    def answer(status):
        def respond(request):
            if request.method == "GET":
                return httpx.Response(200, json={"data": [{"id": "t"}]})
            calls.append(request.url.host)
            return httpx.Response(status, json={"error": "no"})

        return httpx.MockTransport(respond)

    served = [Served(fresh, (Target("http://a"), Target("http://b")), "m")]
    for status, hosts in ((401, ["a", "b"]), (503, ["a", "b", "a", "b"])):
        calls.clear()
        with running(create_app(Settings(retry_pause_s=0.01, retries=3), served, answer(status))) as url:
            assert ask(url).status_code in (502, 503)
        assert calls == hosts


def test_an_answer_that_has_begun_is_not_answered_twice(fresh, trunks):
    bad, good = trunks
    bad.break_after = 1
    with running(vllm_app(bad)) as one, running(vllm_app(good)) as two, serve(fresh, [one, two]) as url:
        assert ask(url, max_tokens=9).status_code == 502 and not good.received


def test_what_the_client_did_wrong_is_not_tried_elsewhere(fresh, trunks):
    for trunk in trunks:
        trunk.context = 128
    with running(vllm_app(trunks[0])) as one, running(vllm_app(trunks[1])) as two, serve(fresh, [one, two]) as url:
        assert ask(url, max_tokens=126).status_code == 400
        assert not trunks[0].bodies and not trunks[1].bodies


def test_one_server_is_asked_again_only_for_what_may_pass(fresh, trunks):
    calls = []

    def answer(status):
        def respond(request):
            if request.method == "GET":
                return httpx.Response(200, json={"data": [{"id": "t"}]})
            calls.append(request.content)
            return httpx.Response(status, json={"error": "no"})

        return httpx.MockTransport(respond)

    for status, times in ((503, 3), (500, 1), (401, 1)):
        calls.clear()
        app = create_app(Settings("http://u", served_name="m", retry_pause_s=0.01), fresh, answer(status))
        with running(app) as url:
            assert ask(url).status_code in (502, 503)
        assert len(calls) == times and len(set(calls)) == 1


def test_a_server_that_does_not_answer_at_first_loses_no_request(fresh):
    """Nothing has been sent when it is asked what it serves, so that may be asked again too."""
    calls = []

    def respond(request):
        calls.append(request.method)
        if len(calls) < 3:
            raise httpx.ConnectError("not yet") if len(calls) == 1 else httpx.ConnectTimeout("not yet")
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "t"}]})
        return httpx.Response(200, content=b'data: {"choices":[{"index":0,"text":"a","finish_reason":"stop"}]}\n\n')

    settings = Settings("http://u", served_name="m", retry_pause_s=0.01)
    with running(create_app(settings, fresh, httpx.MockTransport(respond))) as url:
        assert ask(url).status_code == 200 and calls == ["GET"] * 3 + ["POST"]
    calls.clear()
    with running(create_app(replace(settings, retries=1), fresh, httpx.MockTransport(respond))) as url:
        assert ask(url).status_code == 504 and calls == ["GET"] * 2


def test_several_models_and_whose_keys_may_ask_them(fresh, trunks, tmp_path):
    keys = tmp_path / "keys.toml"
    keys.write_text(
        f'[keys.a]\nkey = "{"a" * 16}"\nmodels = ["x"]\nrequests_per_minute = 1\n[keys.b]\nkey = "{"b" * 16}"\n'
    )
    trunks[0].name, trunks[1].name = "one", "two"
    with running(vllm_app(trunks[0])) as one, running(vllm_app(trunks[1])) as two:
        served = [Served(fresh, (Target(one),), "x"), Served(fresh, (Target(two),), "y")]
        with running(create_app(Settings(keys_file=str(keys)), served)) as url:
            get = lambda key: {"authorization": f"Bearer {key * 16}"}  # noqa: E731
            send = lambda key, model: httpx.post(  # noqa: E731
                url + "/v1/chat/completions", json={**CHAT, "model": model}, headers=get(key), timeout=20
            )
            names = [m["id"] for m in httpx.get(url + "/v1/models", headers=get("b")).json()["data"]]
            assert names == ["x", "y"]
            assert [m["id"] for m in httpx.get(url + "/v1/models", headers=get("a")).json()["data"]] == ["x"]
            assert send("a", "y").status_code == 404 and send("b", "y").status_code == 200
            assert trunks[1].bodies[0]["model"] == "two" and not trunks[0].bodies
            assert send("a", "x").status_code == 200
            late = send("a", "x")
            assert late.status_code == 429 and 1 <= int(late.headers["retry-after"]) <= 60
            assert late.json()["error"]["type"] == "rate_limit_error"
