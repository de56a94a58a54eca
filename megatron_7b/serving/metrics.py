"""What a server counts, for Prometheus."""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 180.0, 600.0)


class Metrics:
    """Figures of one server.

    Attributes:
        running: Texts that are being written.
        waiting: Texts that wait for a place.
        cache_usage: Share of the key-value cache that running texts may come to need.
        prompt_tokens: Tokens of prompts.
        reused_tokens: Those of them that were kept of an earlier text, and not read again.
        generated_tokens: Tokens that were written.
        dropped: Prompts given up because their client left, or took too long.
        time_to_first_token: From a request to its first token.
        request_seconds: From a request to the end of its reply, by path.
        requests: By path and status.
    """

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time for each figure, which nobody asks for
        self.registry = CollectorRegistry()
        name, registry = "megatron_7b", self.registry
        self.running = Gauge(f"{name}_texts_running", "Texts that are being written", registry=registry)
        self.waiting = Gauge(f"{name}_texts_waiting", "Texts that wait for a place", registry=registry)
        self.cache_usage = Gauge(
            f"{name}_cache_usage_ratio", "Share of the cache that running texts may need", registry=registry
        )
        self.prompt_tokens = Counter(f"{name}_prompt_tokens", "Tokens of prompts", registry=registry)
        self.reused_tokens = Counter(
            f"{name}_prompt_tokens_reused", "Tokens of prompts that were kept of an earlier text", registry=registry
        )
        self.generated_tokens = Counter(f"{name}_generated_tokens", "Tokens that were written", registry=registry)
        self.dropped = Counter(f"{name}_prompts_dropped", "Prompts whose client has left", registry=registry)
        self.time_to_first_token = Histogram(
            f"{name}_time_to_first_token_seconds",
            "From a request to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.request_seconds = Histogram(
            f"{name}_request_seconds", "From a request to the end of its reply", ["path"], buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.requests = Counter(f"{name}_requests", "Requests", ["path", "status"], registry=registry)

    def text(self) -> bytes:
        """Return all figures in Prometheus' text format."""
        return generate_latest(self.registry)
