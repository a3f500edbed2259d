"""What /metrics tells, by the names that users of vLLM know, and what sleep adds to them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from lmsleep.serve.engine import Engine
from lmsleep.serve.store import Store

SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counts requests; engine and store are asked when somebody looks.

    Args:
        engine: whose rows are counted.
        store: whose bytes are.
        name: of the model.
    """

    def __init__(self, engine: Engine, store: Store, name: str) -> None:
        self.registry = CollectorRegistry()
        self.engine, self.store = engine, store

        def histogram(metric: str, help: str) -> Histogram:
            made = Histogram(
                f"lmsleep_{metric}", help, ["model_name"], buckets=SECONDS, registry=self.registry
            )
            return made.labels(model_name=name)

        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self.between = histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self.whole = histogram("e2e_request_latency_seconds", "From the request to the end of its answer.")
        self.queued = histogram("request_queue_time_seconds", "From the request to its first step.")
        N, L = str(engine.sleep.passes), str(engine.sleep.window)
        self.sleeping = Histogram(
            "lmsleep_sleep_seconds", "A sleep of one or several sessions together, by N and L.",
            ["model_name", "passes", "window"], buckets=SECONDS, registry=self.registry,
        ).labels(model_name=name, passes=N, window=L)  # fmt: skip
        engine.timed = lambda what, s: (self.queued if what == "queue" else self.sleeping).observe(s)
        self.success = Counter(
            "lmsleep_request_success", "Answers, by why they ended.", ["model_name", "finished_reason"],
            registry=self.registry,
        )  # fmt: skip
        self.prompt = Counter(
            "lmsleep_prompt_tokens", "Tokens of prompts.", ["model_name"], registry=self.registry
        )
        self.known = Counter(
            "lmsleep_prompt_tokens_cached", "Of them known before.", ["model_name"], registry=self.registry
        )
        self.name = name
        self.registry.register(_Asked(self))

    def text(self) -> bytes:
        """Return all metrics in Prometheus' format."""
        return generate_latest(self.registry)


class _Asked:
    """Metrics that are read off engine and store."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def collect(self) -> list[CounterMetricFamily | GaugeMetricFamily]:
        """Return them as they are now."""
        engine, store = self.metrics.engine, self.metrics.store
        counts, states = engine.counts, engine.states
        held = {"live": engine.state_bytes, **store.bytes()}
        N, L = str(engine.sleep.passes), str(engine.sleep.window)
        found: list[CounterMetricFamily | GaugeMetricFamily] = []

        def tell(
            kind: Callable[..., CounterMetricFamily | GaugeMetricFamily],
            name: str,
            help: str,
            values: dict[tuple[str, ...], float],
            labels: tuple[str, ...] = (),
        ) -> None:
            family = kind(f"lmsleep_{name}", help, labels=["model_name", *labels])
            for key, value in values.items():
                family.add_metric([self.metrics.name, *key], value)
            found.append(family)

        tell(GaugeMetricFamily, "num_requests_running", "Requests that read or write.", {(): states["awake"]})
        tell(
            GaugeMetricFamily, "num_requests_waiting", "Requests that are due to sleep.", {(): states["due"]}
        )
        tell(
            GaugeMetricFamily,
            "sessions",
            "Sessions by state: of requests under way, and streams that are kept in memory and on disk.",
            {(state,): n for state, n in {**states, **store.streams()}.items()},
            ("state",),
        )
        tell(CounterMetricFamily, "generation_tokens", "Tokens written.", {(): counts.tokens_written})
        tell(CounterMetricFamily, "tokens_read", "Tokens read.", {(): counts.tokens_read})
        tell(CounterMetricFamily, "sleeps", "Sleeps.", {(N, L): counts.sleeps}, ("passes", "window"))
        tell(CounterMetricFamily, "broken_requests", "Requests that ended in an error.", {(): counts.broken})
        tell(
            GaugeMetricFamily,
            "memory_bytes",
            "Bytes by tier: of requests under way, kept in memory, kept on disk.",
            {(tier,): n for tier, n in held.items()},
            ("tier",),
        )
        evicted = {"memory": store.recent.evicted, "age": 0, "room": 0, **store.room.evicted}
        tell(
            CounterMetricFamily,
            "evicted_sessions",
            "Streams that left memory, and that left the store for their age or for want of room.",
            {(why,): n for why, n in evicted.items()},
            ("reason",),
        )
        return found
