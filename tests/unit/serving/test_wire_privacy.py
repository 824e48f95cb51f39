"""Every byte the proxy sends upstream, searched for the prompt: as text, as token ids, as clean embeddings.

A TCP relay between proxy and stub keeps the bytes. The searches are themselves tested on what does give a prompt away.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import urllib.parse
import zlib

import httpx
import numpy as np
import openai
import pytest
import torch

from sgt_titan.client import VLLM, Options, Prompt, SGLang, StainedGlassTransform
from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Settings
from tests.stub_servers import running, sglang_app, vllm_app

# No part is digits alone: their hexadecimal form is digits too, which a list of fresh noise may hold by chance.
CANARY, SECOND = "Zorblax Quuxington, IBAN K7741", "hé Wibblefrotz 88"
STOP, TOOL, USER, KEY = "stopat-Xylo", "tool_Grumblekin", "user-Snorkel", "key-Blatherskite-0123"
CHAT = [{"role": "system", "content": SECOND}, {"role": "user", "content": CANARY}]


class Relay:
    """Forwards a port to another and keeps what goes up."""

    def __init__(self, target: str):
        self.target = urllib.parse.urlsplit(target)
        self.sent = bytearray()
        self.loop = asyncio.new_event_loop()
        self.ready = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()
        assert self.ready.wait(10)

    def _run(self):
        asyncio.set_event_loop(self.loop)
        server = self.loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 24))
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self.ready.set()
        self.loop.run_forever()

    async def _serve(self, reader, writer):
        up_reader, up_writer = await asyncio.open_connection(self.target.hostname, self.target.port)

        async def pump(source, sink, keep):
            while chunk := await source.read(1 << 16):
                if keep:
                    self.sent += chunk
                sink.write(chunk)
                await sink.drain()
            sink.close()

        await asyncio.gather(pump(reader, up_writer, True), pump(up_reader, writer, False), return_exceptions=True)


def layers(sent: bytes) -> list[bytes]:
    """What was sent, and what lies under base64, escapes and JSON numbers."""
    found = [bytes(sent)]
    for start in range(len(sent)):
        start = sent.find(b'"prompt_embeds":', start)
        if start < 0:
            break
        value = sent[start + 16 :].lstrip().partition(b'"')[2].partition(b'"')[0]
        found.append(base64.b64decode(value))
        break
    found.append(urllib.parse.unquote_to_bytes(bytes(sent)))
    found.append(bytes(sent).decode("latin-1").encode("latin-1").replace(b"\\u00e9", "é".encode()))
    for data in list(found):
        for offset in range(len(data) - 1):
            if data[offset : offset + 2] in (b"\x78\x9c", b"\x1f\x8b"):  # compressed parts
                try:
                    found.append(zlib.decompressobj(47).decompress(data[offset:]))
                except zlib.error:
                    continue
    return found


def text_found(sent: bytes, words: list[str]) -> set[str]:
    """Words found in any layer, in any case, in UTF-8 or UTF-16, in hex, in base64 at any of its three offsets."""
    haystacks = layers(sent)
    haystacks += [hay.lower() for hay in haystacks]
    found = set()
    for word in words:
        forms = {word.encode(), word.lower().encode(), word.encode("utf-16-le"), word.encode("utf-16-be")}
        forms |= {word.encode().hex().encode(), urllib.parse.quote(word).encode(), json.dumps(word)[1:-1].encode()}
        for shift in range(3):
            coded = base64.b64encode(b"\0" * shift + word.encode())
            forms.add(coded[4 * (shift > 0) : -4])
        if any(form in hay for form in forms if len(form) >= 5 for hay in haystacks):
            found.add(word)
    return found


def ids_found(sent: bytes, ids: list[int], run: int = 6) -> bool:
    """Whether ``run`` token ids in a row were sent, in JSON or as integers of any width."""
    parts = [ids[i : i + run] for i in range(len(ids) - run + 1)]
    forms = [sep.join(map(str, part)).encode() for part in parts for sep in (",", ", ", " ")]
    forms += [np.array(part, kind).tobytes() for part in parts for kind in ("<u2", "<i4", "<i8", ">u2", ">i4", ">i8")]
    haystacks = layers(sent)
    return any(form in hay for form in forms for hay in haystacks)


def clean_found(
    sent: bytes, embeds: list[torch.Tensor], table_VD: torch.Tensor, prompt: Prompt, clear: frozenset[int] = frozenset()
) -> int:
    """Rows of the table at hidden positions: in the bytes of any dtype, or within rounding of the values."""
    count = 0
    for rows_TD in embeds:
        gap = torch.cdist(rows_TD[torch.from_numpy(prompt.mask)].double(), table_VD.double()).amin(1)
        count += int((gap < 1e-2 * table_VD.norm(dim=1).median()).sum())
    # ``clear``: of a byte-level vocabulary, the template's letters are sent in clear and are not what is looked for.
    rows = table_VD[sorted(set(np.array(prompt.ids)[prompt.mask]) - clear)].detach()
    forms = [row.view(torch.uint8).numpy().tobytes() for kind in KINDS for row in rows.to(kind)]
    haystacks = layers(sent)
    return count + sum(form in hay for hay in haystacks for form in forms)


KINDS = (torch.float32, torch.bfloat16, torch.float16)


def words():
    cut = [w for text in (CANARY, SECOND) for w in text.split() if len(w) > 3]
    return [CANARY, SECOND, *cut, STOP, TOOL, USER, KEY, "Wibblefrotz", "be-Fluent"]


@pytest.mark.parametrize("backend, app", [("vllm", vllm_app), ("sglang", sglang_app)])
@pytest.mark.parametrize("stream", [False, True])
def test_nothing_of_a_prompt_is_sent(trunk, sgt, backend, app, stream):
    trunk.received.clear()
    trunk.bodies.clear()
    with running(app(trunk)) as upstream:
        relay = Relay(upstream)
        settings = Settings(relay.url, backend=backend, api_keys=(KEY,))
        with (
            running(create_app(settings, sgt)) as url,
            httpx.Client(
                headers={"authorization": f"Bearer {KEY}", "x-request-id": CANARY, "user-agent": CANARY},
                cookies={"c": "x"},
            ) as client,
        ):
            common = {"model": "trunk", "max_tokens": 3, "stream": stream, "temperature": 0.5, "user": USER}
            common |= {"stop": [STOP], "seed": 1, "metadata": {"note": CANARY}}
            sent = [client.post(f"{url}/v1/chat/completions?q={USER}", json={**common, "messages": CHAT})]
            sent.append(client.post(f"{url}/v1/completions", json={**common, "prompt": CANARY}))
            sent.append(client.post(f"{url}/v1/completions", json={**common, "prompt": sgt.prompt(CANARY).ids}))
            assert [r.status_code for r in sent] == [200, 200, 200], [r.text for r in sent]
        data = bytes(relay.sent)
    assert data.count(b"POST ") == 3 and b"embeds" in data
    assert not text_found(data, words())
    prompts = [sgt.prompt(CHAT), sgt.prompt(CANARY), sgt.prompt(CANARY)]
    clear = frozenset(i for p in prompts for i, m in zip(p.ids, p.mask, strict=True) if not m)
    for prompt, received in zip(prompts, trunk.received, strict=True):
        assert not ids_found(data, prompt.ids)
        assert clean_found(data, [received], sgt.embed_tokens.weight, prompt, clear) == 0
    # Nothing but what the wire format names, and no string but the model's name.
    for body in trunk.bodies:
        strings = {k: v for k, v in body.items() if isinstance(v, str) and k != "prompt_embeds"}
        assert strings == ({"model": "trunk"} if backend == "vllm" else {})
    assert CANARY.encode() not in data.lower() and data.count(b"X-Request-Id: req_") == 3
    heads = [h.partition(b":")[0].lower() for part in data.split(b"POST ")[1:] for h in _head(part)]
    assert set(heads) <= {
        b"x-request-id",  # one of ours
        *(b"host", b"accept", b"accept-encoding", b"connection", b"user-agent", b"content-length", b"content-type"),
    }


def _head(request: bytes) -> list[bytes]:
    return request.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]


def test_a_client_s_retries_are_one_sample(trunk, sgt, chat_export):
    """An OpenAI client repeats what failed, twice by default: of fresh noise the upstream gets three samples."""
    hidden = torch.from_numpy(sgt.prompt(CANARY).mask)
    fresh = StainedGlassTransform.from_pretrained(chat_export, hold_noise=False)
    for transform, samples in ((sgt, 1), (fresh, 3)):
        trunk.received.clear()
        trunk.break_after = 0
        with running(vllm_app(trunk)) as upstream, running(create_app(Settings(upstream), transform)) as url:
            client = openai.OpenAI(base_url=url + "/v1", api_key="unused")
            with client, pytest.raises(openai.InternalServerError):
                client.completions.create(model="trunk", prompt=CANARY, max_tokens=1)
        trunk.break_after = None
        assert len(trunk.received) == 3
        assert len({tuple(z_TD[hidden].flatten().tolist()) for z_TD in trunk.received}) == samples


def test_the_searches_find_what_is_there(sgt, identity_export):
    """A search that finds nothing where everything is in clear would prove nothing."""
    prompt = sgt.prompt(CANARY)
    for form in (
        CANARY.encode(),
        CANARY.upper().encode(),
        CANARY.encode("utf-16-le"),
        base64.b64encode(b"ab" + CANARY.encode() + b"tail"),
        json.dumps({"x": SECOND}).encode(),
        zlib.compress(CANARY.encode()),
        CANARY.encode().hex().encode(),
    ):
        assert text_found(b"POST / " + form, words()), form
    assert ids_found(json.dumps(prompt.ids).encode(), prompt.ids)
    assert ids_found(np.array(prompt.ids, "<i4").tobytes(), prompt.ids)
    assert not ids_found(json.dumps(prompt.ids[::-1]).encode(), prompt.ids)
    clear_TD = sgt.embed_tokens.weight[torch.tensor(prompt.ids)]
    body = json.dumps(VLLM.wire.body(clear_TD, Options(), "trunk")).encode()
    assert clean_found(body, [clear_TD], sgt.embed_tokens.weight, prompt) == prompt.mask.sum() + len(
        set(prompt.ids[1:])
    )
    small = json.dumps(VLLM.wire.body(clear_TD.bfloat16(), Options(), "trunk")).encode()
    assert clean_found(small, [], sgt.embed_tokens.weight, prompt) == len(set(prompt.ids[1:]))
    identity = StainedGlassTransform.from_pretrained(identity_export)
    assert clean_found(b"", [identity.encode(prompt)], sgt.embed_tokens.weight, prompt) == prompt.mask.sum()
    assert "input_embeds" in SGLang.wire.body(clear_TD, Options(), None)


def test_serialised_tensors_hold_one_storage(trunk, sgt):
    trunk.bodies.clear()
    with running(vllm_app(trunk)) as upstream, running(create_app(Settings(upstream), sgt)) as url:
        httpx.post(f"{url}/v1/completions", json={"model": "trunk", "prompt": CANARY, "max_tokens": 1})
    payload = base64.b64decode(trunk.bodies[0]["prompt_embeds"])
    tensor = torch.load(io.BytesIO(payload), weights_only=True)
    assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
