"""Spans of a request: what they say, and that they say nothing else."""

import httpx
import pytest

from sgt_titan.client import StainedGlassTransform
from sgt_titan.serving.app import create_app
from sgt_titan.serving.settings import Settings
from sgt_titan.serving.telemetry import ATTRIBUTES, Span, Telemetry
from tests.serving_kit import load_trunk
from tests.stub_servers import running, vllm_app

CANARY = "Zorblax-7741"


def test_spans_hold_no_content(chat_export, chat_trunk):
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    telemetry = Telemetry(provider.get_tracer("test"))
    sgt, trunk = StainedGlassTransform.from_pretrained(chat_export), load_trunk(chat_trunk)
    with running(vllm_app(trunk)) as upstream:
        app = create_app(Settings(upstream), sgt, telemetry=telemetry)
        with running(app) as url:
            body = {"model": "trunk", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 2}
            found = httpx.post(url + "/v1/chat/completions", json=body, timeout=20)
            httpx.post(url + "/v1/" + CANARY, json=body)
            httpx.post(url + "/v1/chat/completions", json={**body, "model": CANARY}, timeout=20)
    spans = memory.get_finished_spans()
    assert {span.name for span in spans} == {"/v1/chat/completions", "encode", "other"}
    for span in spans:
        assert set(span.attributes) <= ATTRIBUTES and not span.events
        assert CANARY not in span.to_json()
    encode = next(span for span in spans if span.name == "encode")
    route = next(span for span in spans if span.attributes.get("sgt.request_id") == found.headers["x-request-id"])
    assert encode.parent.span_id == route.context.span_id and encode.attributes["sgt.prompt_tokens"] > 10


def test_only_what_is_listed_is_said():
    with pytest.raises(ValueError, match="no attribute"):
        Span().set("prompt", "x")
