import base64
import io
import math
import zipfile

import pytest
import torch

from sgt_titan.client import Delta, Options, TokenLogprob, UpstreamError
from sgt_titan.client.sse import EventDecoder
from sgt_titan.client.stops import StopScanner
from sgt_titan.client.wire import WIRES, explain, serialise, wire_dtype
from sgt_titan.errors import UserError

VLLM, SGLANG = WIRES["vllm"], WIRES["sglang"]
FULL = Options(max_tokens=7, n=2, temperature=0.5, top_p=0.9, seed=3, logprobs=2, stop=("secret stop",))


@pytest.mark.parametrize("reason", ["abort", "error", "content_filter"])
def test_an_answer_that_was_broken_off_is_no_answer(reason):
    event = {"choices": [{"index": 0, "text": "half", "finish_reason": reason}]}
    with pytest.raises(UpstreamError, match=r"the server (aborted|broke)") as error:
        list(VLLM.reader(Options())(event))
    assert error.value.code == "upstream_aborted"
    for whole in (None, "stop", "length"):
        event["choices"][0]["finish_reason"] = whole
        assert next(VLLM.reader(Options())(event)).finish_reason == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_serialised_embeddings_hold_nothing_else(dtype):
    """torch.save of a view writes the whole storage; other rows may be another prompt's."""
    whole = torch.randn(50, 8).to(dtype)
    view = whole[10:14]
    payload = base64.b64decode(serialise(view), validate=True)
    loaded = torch.load(io.BytesIO(payload), weights_only=True)
    assert torch.equal(loaded, view) and loaded.dtype == dtype and loaded.dim() == 2
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        data = [name for name in archive.namelist() if "/data/" in name]
        assert len(data) == 1 and len(archive.read(data[0])) == view.numel() * dtype.itemsize
    naive = io.BytesIO()
    torch.save(view, naive)
    assert len(naive.getvalue()) > len(payload), "otherwise this test shows nothing"
    for row in (9, 14):
        assert whole[row].view(torch.uint8).numpy().tobytes() not in payload


@pytest.mark.parametrize(
    "bad", [torch.zeros(0, 4), torch.zeros(4), torch.zeros(2, 4).long(), torch.tensor([[float("nan")]])]
)
def test_what_is_no_embedding_is_not_sent(bad):
    for wire in WIRES.values():
        with pytest.raises(UserError, match="embeddings"):
            wire.body(bad, Options(), None)


def test_vllm_request():
    body = VLLM.body(torch.ones(3, 4), FULL, "m")
    assert body.keys() == {
        *("model", "prompt_embeds", "max_tokens", "n", "temperature", "top_p", "seed", "logprobs"),
        *("stream", "stream_options"),
    }
    assert "secret stop" not in str(body)
    assert "model" not in VLLM.body(torch.ones(3, 4), FULL, None)


def test_sglang_request_is_floats():
    """SGLang takes a prompt for a batch of prompts if its first number is an integer."""
    body = SGLANG.body(torch.zeros(3, 4, dtype=torch.bfloat16), FULL, "m")
    assert body["input_embeds"] == [[0.0] * 4] * 3 and isinstance(body["input_embeds"][0][0], float)
    assert body["sampling_params"] == {
        **{"max_new_tokens": 7, "n": 2, "temperature": 0.5, "top_p": 0.9, "sampling_seed": 3}
    }
    assert body["return_logprob"] and body["top_logprobs_num"] == 2 and "secret stop" not in str(body)


def test_sglang_events_are_cumulative():
    read = SGLANG.reader(Options(n=2, logprobs=1))
    event = lambda i, text, rows, reason=None: {  # noqa: E731
        "index": i, "text": text,
        "meta_info": {"completion_tokens": len(rows), "output_token_logprobs": rows, "finish_reason": reason,
                      "output_top_logprobs": [[r] for r in rows]},
    }  # fmt: skip
    a, b, c = [-1.0, 5, "ab"], [-2.0, 6, "c"], [-3.0, 7, "x"]
    assert list(read(event(0, "ab", [a]))) == [Delta(0, "ab", (TokenLogprob("ab", -1.0, (("ab", -1.0),)),), None, 1)]
    assert next(read(event(1, "x", [c]))).text == "x"
    (delta,) = read(event(0, "abc", [a, b], {"type": "stop", "matched": 1}))
    assert (delta.text, delta.finish_reason, delta.tokens) == ("c", "stop", 2)
    assert [t.token for t in delta.logprobs] == ["c"]
    with pytest.raises(UpstreamError, match="aborted"):
        list(read({"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "words"}}}))


def test_a_log_probability_that_is_no_number_is_vllm_s_lowest():
    """JSON says neither infinity nor NaN: servers write null, or what our own answers could not repeat."""
    tops = {"x": None, "y": -math.inf, "z": -1}
    found = {"tokens": ["x", "y"], "token_logprobs": [None, math.nan], "top_logprobs": [tops, None]}
    (delta,) = VLLM.reader(FULL)({"choices": [{"index": 0, "text": "xy", "logprobs": found}]})
    assert [t.logprob for t in delta.logprobs] == [-9999, -9999]
    assert delta.logprobs[0].top == (("z", -1.0), ("x", -9999.0))
    meta = {"output_token_logprobs": [[None, 5, "x"]], "output_top_logprobs": [[[None, 5, "x"]]]}
    (delta,) = SGLANG.reader(FULL)({"text": "x", "meta_info": meta})
    assert delta.logprobs == (TokenLogprob("x", -9999.0, (("x", -9999.0),)),)


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_events_in_any_pieces(size):
    stream = (
        'data: {"a": "x\u2028y"}\r\n\r\n: comment\n\ndata: one\ndata: two\n\nid: 3\ndata:[DONE]\n\ndata: cut'.encode()
    )
    decoder = EventDecoder()
    found = [d for i in range(0, len(stream), size) for d in decoder.feed(stream[i : i + size])]
    assert found == ['{"a": "x\u2028y"}', "one\ntwo", "[DONE]"]


def test_an_endless_event_is_refused(monkeypatch):
    monkeypatch.setattr("sgt_titan.client.sse.MAX_EVENT", 100)
    with pytest.raises(ValueError, match="without an end"):
        list(EventDecoder().feed(b"x" * 101))


def scan(stops, pieces, reason="length"):
    scanner, shown = StopScanner(tuple(stops)), []
    for i, piece in enumerate(pieces):
        delta = scanner.feed(Delta(0, piece, (), reason if i == len(pieces) - 1 else None, i + 1))
        shown += [delta] if delta else []
    return "".join(d.text for d in shown), shown[-1].finish_reason, scanner


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_stops_are_found_across_pieces(size):
    text = "aab<b <en <end> and more"
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found, reason, scanner = scan(["<end>", "never"], pieces)
    assert found == "aab<b <en " and reason == "stop" and scanner.stopped
    assert scan(["<nope>"], pieces)[:2] == (text, "length")
    assert scan([], pieces)[:2] == (text, "length")
    assert scan(["and", "<b"], pieces)[0] == "aab"


def test_what_could_become_a_stop_is_held_back():
    scanner = StopScanner(("abc",))
    assert scanner.feed(Delta(0, "xab")).text == "x"
    assert scanner.feed(Delta(0, "ab")).text == "ab"
    assert scanner.feed(Delta(0, "", (), "length")).text == "ab"
    assert scanner.feed(Delta(0, "late")) is None


def test_log_probabilities_go_with_their_text():
    scanner = StopScanner(("STOP",))
    tokens = [TokenLogprob(t, -1.0) for t in ("he", "llo", "ST", "OP")]
    shown = [scanner.feed(Delta(0, t.token, (t,))) for t in tokens]
    assert [t.token for d in shown if d for t in d.logprobs] == ["he", "llo"]


@pytest.mark.parametrize(
    "status, payload, code, handed_on",
    [
        (400, {"error": {"message": "You must set `--enable-prompt-embeds` to"}}, "upstream_embeds_disabled", 502),
        (400, {"error": {"message": "`prompt_embeds` hidden_size 8 does not"}}, "upstream_wrong_model", 502),
        (
            400,
            {"error": {"message": "must be a 2D tensor of shape (num_tokens, hidden_size)"}},
            "upstream_refused",
            400,
        ),
        (404, {"error": {"message": "The model `x` does not exist."}}, "upstream_not_found", 502),
        (401, {"error": "Unauthorized"}, "upstream_unauthorized", 502),
        (429, None, "upstream_overloaded", 429),
        (503, None, "upstream_overloaded", 503),
        (400, {"error": {"message": "This model's maximum context length is 9"}}, "context_length_exceeded", 400),
        (400, {"detail": "no"}, "upstream_refused", 400),
        (413, None, "upstream_body_too_large", 413),
        (500, {"error": {"message": "x" * 9999}}, "upstream_error", 502),
        (400, {"error": {"message": "line\nbreak " + "x" * 9999}}, "upstream_refused", 400),
    ],
)
def test_refusals_are_explained(status, payload, code, handed_on):
    error = explain(VLLM, status, payload)
    assert (error.code, error.status) == (code, handed_on) and "\n" not in str(error) and len(str(error)) < 400


@pytest.mark.parametrize(
    "bad",
    [
        *({"max_tokens": 0}, {"n": 0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": 1.5}),
        *({"stop": ("",)}, {"stop": "END"}, {"logprobs": 99}, {"seed": 10**400}),
    ],
)
def test_options_out_of_range(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        Options(**bad)


def test_unknown_wire_dtype():
    with pytest.raises(UserError, match="wire dtype"):
        wire_dtype("int8")
