"""What `/metrics` says: vLLM's metric names under the prefix `garage:`, with the labels `model_name` and `engine`.

Gauges and counters are read from the engine when they are scraped; histograms are filled as tokens leave the engine. The registry
belongs to one server, so several can live in one process.
"""

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from garage.engine.engine import Engine
from garage.engine.request import Delta

LABELS = ("model_name", "engine")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
HISTOGRAMS = {
    "time_to_first_token_seconds": "from arrival to the first token",
    "inter_token_latency_seconds": "between two tokens of one request",
    "request_time_per_output_token_seconds": "mean of a request's time per token after the first",
    "e2e_request_latency_seconds": "from arrival to the end",
    "request_queue_time_seconds": "from arrival to the first step",
    "request_prefill_time_seconds": "from the first step to the first token",
    "request_decode_time_seconds": "from the first token to the end",
    "request_inference_time_seconds": "from the first step to the end",
    "request_prompt_tokens": "prompt tokens of a request",
    "request_generation_tokens": "tokens a request was answered with",
    "request_params_n": "n of a request",
    "request_params_max_tokens": "max_tokens of a request",
    "iteration_tokens_total": "tokens of one step",
}


class Metrics:
    """The metrics of one served model."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine, self._names = engine, (model_name, "0")
        self._registry = CollectorRegistry()
        self._registry.register(self)
        labels = (*LABELS, "finished_reason")
        self._success = Counter("garage:request_success", "requests by how they ended", labels, registry=self._registry)
        self._histograms = {name: self._histogram(name) for name in HISTOGRAMS}
        self._last_token: dict[str, float] = {}

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)

    def asked(self, n: int, max_tokens: int) -> None:
        """A request was accepted."""
        self._histograms["request_params_n"].observe(n)
        self._histograms["request_params_max_tokens"].observe(max_tokens)

    def stepped(self, num_tokens: int) -> None:
        """A step was computed."""
        self._histograms["iteration_tokens_total"].observe(num_tokens)

    def heard(self, delta: Delta) -> None:
        """Tokens left the engine."""
        now = time.monotonic()
        last = self._last_token.get(delta.id)
        if last is not None and delta.num_tokens:
            self._histograms["inter_token_latency_seconds"].observe(now - last)
        self._last_token[delta.id] = now
        if delta.completion is not None:
            self._last_token.pop(delta.id)
            self._ended(delta)

    def collect(self) -> Iterator[Metric]:
        """Gauges and counters of this moment (called by the registry)."""
        stats = self._engine.stats()
        usage = stats.num_pages_used / stats.num_pages
        gauges = {"num_requests_running": stats.num_running, "num_requests_waiting": stats.num_waiting, "kv_cache_usage_perc": usage}
        counters = {
            "prompt_tokens": stats.prompt_tokens, "generation_tokens": stats.generation_tokens, "num_preemptions": stats.num_preemptions,
            "prefix_cache_queries": stats.prefix_queries, "prefix_cache_hits": stats.prefix_hits,
        }  # fmt: skip
        for family, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, value in values.items():
                metric = family(f"garage:{name}", name.replace("_", " "), labels=LABELS)
                metric.add_metric(self._names, value)
                yield metric

    def _histogram(self, name: str) -> Histogram:
        buckets = SECONDS if name.endswith("_seconds") else TOKENS
        return Histogram(f"garage:{name}", HISTOGRAMS[name], LABELS, registry=self._registry, buckets=buckets).labels(*self._names)

    def _ended(self, delta: Delta) -> None:
        done, times = delta.completion, delta.times
        assert done is not None and times is not None, delta
        self._success.labels(*self._names, done.finish_reason).inc()
        made = len(done.token_ids)
        seen = {
            "e2e_request_latency_seconds": times.finished - times.arrived,
            "request_queue_time_seconds": times.started - times.arrived,
            "request_inference_time_seconds": times.finished - times.started,
            "request_prompt_tokens": done.prompt_tokens,
            "request_generation_tokens": made,
        }
        if made:
            seen["time_to_first_token_seconds"] = times.first_token - times.arrived
            seen["request_prefill_time_seconds"] = times.first_token - times.started
            seen["request_decode_time_seconds"] = times.finished - times.first_token
        if made > 1:
            seen["request_time_per_output_token_seconds"] = (times.finished - times.first_token) / (made - 1)
        for name, value in seen.items():
            self._histograms[name].observe(value)
