"""Prometheus metrics. Labels are routes, statuses and positions in the configuration, never anything a client wrote."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from sgt_titan.client.private import ChoiceRestorer
from sgt_titan.private import Hidden

_SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Of one proxy, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "sgt_requests_total", "Requests by route and status", ("route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "sgt_request_seconds", "From the request's head to the end of its answer", ("route",), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.encode = Histogram(
            "sgt_encode_seconds", "Obfuscate and serialise one prompt", buckets=_SECONDS, registry=registry
        )
        self.first = Histogram(
            "sgt_first_delta_seconds", "From sending a prompt to the first piece of its answer", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.prompt_tokens = Counter("sgt_prompt_tokens_total", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter("sgt_completion_tokens_total", "Tokens of answers", registry=registry)
        self.sent = Counter("sgt_upstream_bytes_total", "Bytes of requests to the upstream", registry=registry)
        self.active = Gauge("sgt_active_requests", "Requests being answered", registry=registry)
        self.waiting = Gauge("sgt_waiting_requests", "Requests waiting for a slot", registry=registry)
        self.upstream_up = Gauge(
            "sgt_upstream_up", "1: asked; 0: it failed lately and rests", ("model", "upstream"), registry=registry
        )
        self.upstream_errors = Counter(
            "sgt_upstream_errors_total", "Upstream failures by code", ("code",), registry=registry
        )
        self.broken = Counter(
            "sgt_answers_given_up_total", "Answers that did not fit what was asked for", registry=registry
        )
        self.private_replaced = Counter(
            "sgt_private_replaced_total", "Private values replaced in prompts, by kind", ("kind",), registry=registry
        )
        self.private_back = Counter(
            "sgt_private_restored_total", "Values put back into answers, by kind", ("kind",), registry=registry
        )
        self.private_left = Counter(
            "sgt_private_left_total", "Traces of surrogates that answers still hold, by kind", ("kind",),
            registry=registry,
        )  # fmt: skip

    def replaced(self, hidden: Iterable[Hidden]) -> None:
        for text in hidden:
            for item in text.replaced:
                self.private_replaced.labels(item.span.kind).inc()

    def put_back(self, choices: Iterable[ChoiceRestorer]) -> None:
        """Of answers that have ended."""
        for choice in choices:
            for counter, counts in ((self.private_back, choice.restored), (self.private_left, choice.left)):
                for kind, count in counts.items():
                    counter.labels(kind).inc(count)
