"""Figures of one gateway, from one source for ``/metrics`` and the page.

Labels are bounded: models come from the catalogue, endpoints from the route table.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from plait.gateway.key_store import Spent

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's buckets, so that boards can be compared.
_FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 240.0)


class Metrics:
    """Counters, gauges and histograms of a gateway, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry, model = self._registry, ["model"]
        self.requests = Counter(
            "plait_gateway_requests",
            "HTTP requests by endpoint and status.",
            ["endpoint", "status"],
            registry=registry,
        )
        self.sessions = Gauge(
            "plait_gateway_sessions_active", "Answers in progress.", registry=registry
        )
        self.waiting = Gauge(
            "plait_gateway_requests_waiting", "Requests that wait for a place.", registry=registry
        )
        self.prompt_tokens = Counter(
            "plait_gateway_prompt_tokens",
            "Prompt tokens of answers, also of those that did not end well.",
            model,
            registry=registry,
        )
        self.completion_tokens = Counter(
            "plait_gateway_completion_tokens", "Tokens delivered.", model, registry=registry
        )
        self.cost = Counter(
            "plait_gateway_cost_microcredits",
            "Microcredits promised for answers, also for those that did not end well.",
            model,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "plait_gateway_time_to_first_token_seconds",
            "From a request's arrival to the first text of an answer.",
            model,
            buckets=_FIRST_TOKEN_S,
            registry=registry,
        )
        self.request_s = Histogram(
            "plait_gateway_request_duration_seconds",
            "From a request's arrival to the end of its answers.",
            model,
            buckets=_REQUEST_S,
            registry=registry,
        )

    def add_spend(self, model: str, spent: Spent) -> None:
        """Count what a request used."""
        self.prompt_tokens.labels(model).inc(spent.prompt_tokens)
        self.completion_tokens.labels(model).inc(spent.completion_tokens)
        self.cost.labels(model).inc(spent.cost)

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def by_model(self) -> dict[str, dict[str, int]]:
        """Tokens and microcredits of each model so far."""
        rows: dict[str, dict[str, int]] = {}
        counters = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cost_microcredits": self.cost,
        }
        for name, counter in counters.items():
            for family in counter.collect():
                for sample in family.samples:
                    if sample.name.endswith("_total"):
                        row = rows.setdefault(sample.labels["model"], dict.fromkeys(counters, 0))
                        row[name] = round(sample.value)
        return rows
