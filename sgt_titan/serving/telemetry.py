"""OpenTelemetry spans, without content: routes, statuses, counts and times. Off unless asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sgt_titan.errors import UserError

ATTRIBUTES = {
    "http.response.status_code",
    "sgt.request_id",
    "sgt.prompt_tokens",
    "sgt.completion_tokens",
    "sgt.bytes_sent",
    "sgt.upstream",
    "sgt.attempt",
}


class Span:
    """What may be said of a piece of work: numbers, and names that are ours."""

    def __init__(self, span: Any = None):
        self._span = span

    def set(self, name: str, value: int | float | str) -> None:
        if name not in ATTRIBUTES:
            raise ValueError(f"{name}: no attribute of a span; list it in ATTRIBUTES")
        if self._span is not None:
            self._span.set_attribute(name, value)


class Telemetry:
    """``with telemetry.span(name) as span``. Without a tracer it does nothing."""

    def __init__(self, tracer: Any = None):
        self._tracer = tracer

    @contextmanager
    def span(self, name: str) -> Iterator[Span]:
        if self._tracer is None:
            yield Span()
            return
        # Exceptions are not recorded: their words may be of a prompt.
        with self._tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
            yield Span(span)


def to_collector() -> Telemetry:
    """Spans to where OTEL_EXPORTER_OTLP_ENDPOINT says, as OpenTelemetry's own variables have it.

    Raises UserError if the extra is not installed.
    """
    try:
        import requests
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install 'sgt-titan[telemetry]'") from None
    session = requests.Session()
    session.trust_env = False  # as everything else that leaves: no proxy that the environment names
    provider = TracerProvider(resource=Resource.create({"service.name": "sgt-titan"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(session=session)))
    return Telemetry(provider.get_tracer("sgt_titan.serving"))
