"""The whole loop: a served rotated trunk and its client write what the plain model writes."""

from __future__ import annotations

import http.client
import io
import shutil
import threading

import pytest
import torch
from rotated_trunks import WIDTH, model_of
from safetensors.torch import save

from sgt_titan.conjformer.generate import Local, RotatedRemote, generate, sample
from sgt_titan.conjformer.secret import Secret
from sgt_titan.conjformer.serve import make_server
from sgt_titan.conjformer.talk import generate as generate_command
from sgt_titan.conjformer.talk import serve as serve_command
from sgt_titan.errors import UserError

PROMPT = [0, 17, 33, 120, 250, 4]


def plain_answer(path, count: int) -> list[int]:
    prompt = torch.tensor([PROMPT])
    out = model_of(path).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return out[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def served(rotated):
    found = rotated("llama-tied")
    server = make_server(model_of(found.server))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ("llama-tied", "qwen3", "gpt2"))
def test_greedy_answers_are_the_plain_model_s(rotated, name):
    found = rotated(name)
    answer = list(generate(found.load_client(), Local(model_of(found.server)), PROMPT, max_tokens=24))
    assert answer == plain_answer(found.trunk, 24)


def test_over_http_with_its_traffic(served):
    found, url = served
    server = RotatedRemote(url)
    answer = list(generate(found.load_client(), server, PROMPT, max_tokens=12))
    assert answer == plain_answer(found.trunk, 12)
    traffic = server.traffic
    assert (traffic.tokens, traffic.requests) == (len(PROMPT) + 11, 12)
    assert 4 * WIDTH * traffic.tokens < traffic.up < 4 * WIDTH * traffic.tokens + 100 * traffic.requests
    assert 4 * WIDTH * 12 < traffic.down < (4 * WIDTH + 100) * 12
    half = RotatedRemote(url, wire="bfloat16")
    list(generate(found.load_client(), half, PROMPT, max_tokens=12))
    assert half.traffic.up < 0.7 * traffic.up
    server.close()


def test_sessions_do_not_mix(served):
    found, url = served
    one, other = RotatedRemote(url), RotatedRemote(url)
    first, second = (generate(found.load_client(), s, PROMPT, max_tokens=6) for s in (one, other))
    pairs = list(zip(first, second, strict=True))
    assert [a for a, _ in pairs] == [b for _, b in pairs] == plain_answer(found.trunk, 6)


def test_ends_and_an_empty_prompt(rotated):
    found = rotated("llama-tied")
    answer = plain_answer(found.trunk, 8)
    model = model_of(found.server)
    stop = answer[3]
    assert (
        list(generate(found.load_client(), Local(model), PROMPT, max_tokens=8, ends=(stop,)))
        == answer[: answer.index(stop)]
    )
    with pytest.raises(UserError, match="empty"):
        list(generate(found.load_client(), Local(model), []))


def test_a_session_that_was_forgotten_is_not_begun_anew(served, monkeypatch):
    """Its answers would go on, behind nothing."""
    found, url = served
    monkeypatch.setattr("sgt_titan.conjformer.serve.MAX_SESSIONS", 1)
    client, one, other = found.load_client(), RotatedRemote(url), RotatedRemote(url)
    x_TD = client.encode(torch.tensor([PROMPT]))[0]
    one.step(x_TD)
    with pytest.raises(UserError, match="longer than 128 positions"):
        one.step(x_TD.repeat(30, 1))
    one.step(x_TD)  # a refused request changes nothing
    other.step(x_TD)
    with pytest.raises(UserError, match="has 0 positions of this session, not 12; start again"):
        one.step(x_TD)


def test_a_server_of_another_secret_refuses(served):
    found, url = served
    client = found.load_client()
    mine = RotatedRemote(url, secret=client.about["secret"])
    assert list(generate(client, mine, PROMPT, max_tokens=2)) == plain_answer(found.trunk, 2)
    other = RotatedRemote(url, secret=Secret.fresh().name)
    with pytest.raises(UserError, match=r"another secret.*HTTP 409"):
        list(generate(client, other, PROMPT, max_tokens=2))


def test_sampling_follows_the_distribution():
    logits_V = torch.tensor([2.0, 1.0, 0.0, -9.0])
    random = torch.Generator().manual_seed(0)
    drawn = torch.tensor([sample(logits_V, 1.0, 1.0, random) for _ in range(4000)])
    share = torch.bincount(drawn, minlength=4) / 4000
    assert (share - logits_V.softmax(-1)).abs().max() < 0.03
    # The smallest set with 0.6 of the mass is the first token alone: 0.665.
    assert {sample(logits_V, 1.0, 0.6, random) for _ in range(50)} == {0}
    assert sample(logits_V, 0.0, 1.0, None) == 0


def test_the_server_refuses_what_it_cannot_run(served):
    _, url = served
    host = url.removeprefix("http://")
    session = "0" * 32

    def post(path: str, body: bytes, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(host)
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read()

    assert post("/elsewhere", b"")[0] == 404
    assert post(f"/sessions/{session}", b"nonsense")[0] == 400
    assert post(f"/sessions/{session}", save({"x": torch.ones(2, WIDTH + 1)}))[0] == 400
    assert post(f"/sessions/{session}", save({"x": torch.ones(2, WIDTH, dtype=torch.int64)}))[0] == 400
    assert post(f"/sessions/{session}", save({"x": torch.ones(129, WIDTH)}))[0] == 400  # its trunk has 128 positions
    assert post(f"/sessions/{session}", b"", **{"Content-Length": str(1 << 40)})[0] == 413
    assert post(f"/sessions/{session}", save({"x": torch.ones(3, WIDTH)}))[0] == 200


def test_the_command(served, monkeypatch, capsys):
    found, url = served
    stdin = lambda content: monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))  # noqa: E731
    stdin(b"once upon a time\n")
    words = [str(found.client), "--secret", str(found.secret), "--url", url, "--max-tokens", "5", "--traffic"]
    assert generate_command(words) == 0
    out = capsys.readouterr()
    assert "bytes up" in out.err and "once upon" not in out.err
    nowhere = ["--url", "http://127.0.0.1:9"]
    for content, changes, message in (
        (b"x", nowhere, "is the server up"),
        (b"x", ["--url", "http://127.0.0.1:99999"], "not an address"),
        (b"x", ["--url", "http://[::1"], "not an address"),
        (b"Zorblax \xff", nowhere, "standard input: is not valid UTF-8"),
        (b"x", ["--temperature", "nan"], "--temperature at least 0"),
    ):
        stdin(content)
        with pytest.raises(UserError, match=message) as refused:
            generate_command([*words, *changes])
        assert "Zorblax" not in str(refused.value)


def test_what_is_not_served_or_asked(rotated, tmp_path, monkeypatch):
    found = rotated("llama-tied")
    for words, message in (
        ([str(found.server), "--port", "99999"], "--host 127.0.0.1 --port 99999: cannot listen there"),
        ([str(found.server), "--host", "256.0.0.1"], "--host 256.0.0.1 --port"),
        ([str(found.client)], "no config.json"),
        ([str(found.trunk)], "not a rotated checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            serve_command(words)
    damaged = shutil.copytree(found.server, tmp_path / "server")
    (damaged / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        serve_command([str(damaged)])
    bare = shutil.copytree(found.client, tmp_path / "client", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match="no tokenizer"):
        generate_command([str(bare), "--secret", str(found.secret)])
