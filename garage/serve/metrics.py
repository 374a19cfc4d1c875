"""What `/metrics` says: vLLM's metric names under the prefix `garage:`, with the labels `model_name` and `engine`.

Gauges and counters are read from the engine when they are scraped; histograms are filled as tokens leave the engine, by its one
thread, so that a token costs a bisection and no lock. The registry belongs to one server, so several can live in one process.

Conservation: requests_accepted = requests_finished + requests_aborted + requests_failed + requests_in_flight, at every moment.
"""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from garage.core.types import Request
from garage.engine.engine import Engine
from garage.engine.request import Delta
from garage.specs.serve import EngineSpec

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
ENDS = {"abort": "aborted", "error": "failed"}
"""Counters of how requests ended; all other ends are `finished`."""


class Histogram:
    """Counts of values up to each bound; one thread fills it."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum of all values."""
        names = [*map(str, self._bounds), "+Inf"]
        return list(zip(names, accumulate(map(float, self._counts)), strict=True)), self._sum


class Metrics:
    """The metrics of one served model."""

    def __init__(self, engine: Engine, model_name: str, settings: EngineSpec) -> None:
        self._engine, self._names, self._settings = engine, (model_name, "0"), settings
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._histograms = {name: Histogram(SECONDS if name.endswith("_seconds") else TOKENS) for name in HISTOGRAMS}
        self._reasons: Counter[str] = Counter()
        self._ends: Counter[str] = Counter(accepted=0, finished=0, aborted=0, failed=0)
        self._adapters: dict[str, str] = {}
        self._last_token: dict[str, float] = {}

    @property
    def in_flight(self) -> int:
        """Requests that were accepted and have not ended."""
        return 2 * self._ends["accepted"] - self._ends.total()

    def text(self) -> bytes:
        """The exposition format of Prometheus."""
        return generate_latest(self._registry)

    def asked(self, n: int, max_tokens: int) -> None:
        """A client's request was accepted."""
        self._histograms["request_params_n"].observe(n)
        self._histograms["request_params_max_tokens"].observe(max_tokens)

    def accepted(self, request: Request) -> None:
        """The engine took a request."""
        self._ends["accepted"] += 1
        if request.adapter:
            self._adapters[request.id] = request.adapter

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
            self._ended(delta)

    def collect(self) -> Iterator[Metric]:
        """Everything as of this moment (called by the registry)."""
        stats, settings = self._engine.stats(), self._settings
        yield from (self._metric(CounterMetricFamily, name, value) for name, value in {
            "prompt_tokens": stats.prompt_tokens, "generation_tokens": stats.generation_tokens, "num_preemptions": stats.num_preemptions,
            "prefix_cache_queries": stats.prefix_queries, "prefix_cache_hits": stats.prefix_hits,
            "spec_decode_num_draft_tokens": stats.draft_tokens,
            "spec_decode_num_accepted_tokens": stats.accepted_tokens,
            **{f"requests_{name}": count for name, count in self._ends.items()},
        }.items())  # fmt: skip
        yield from (self._metric(GaugeMetricFamily, name, value) for name, value in {
            "num_requests_running": stats.num_running, "num_requests_waiting": stats.num_waiting,
            "kv_cache_usage_perc": stats.num_pages_used / stats.num_pages, "requests_in_flight": self.in_flight,
        }.items())  # fmt: skip
        adapters = ",".join(sorted(set(self._adapters.copy().values())))
        limit = getattr(settings, "max_loras", 0)
        yield self._metric(GaugeMetricFamily, "lora_requests_info", time.time(), running_lora_adapters=adapters, max_lora=limit)
        yield self._metric(GaugeMetricFamily, "cache_config_info", 1, block_size=settings.page_size, num_gpu_blocks=stats.num_pages,
                           enable_prefix_caching=settings.enable_prefix_caching,
                           cache_dtype=getattr(settings, "kv_cache_dtype", settings.dtype))  # fmt: skip
        success = CounterMetricFamily("garage:request_success", "requests by how they ended", labels=[*LABELS, "finished_reason"])
        for reason, count in self._reasons.copy().items():
            success.add_metric([*self._names, reason], count)
        yield success
        for name, about in HISTOGRAMS.items():
            metric = HistogramMetricFamily(f"garage:{name}", about, labels=LABELS)
            metric.add_metric(self._names, *self._histograms[name].buckets())
            yield metric

    def _metric(self, family: type, name: str, value: float, **facts: object) -> Metric:
        metric: GaugeMetricFamily = family(f"garage:{name}", name.replace("_", " "), labels=[*LABELS, *facts])
        metric.add_metric([*self._names, *map(str, facts.values())], value)
        return metric

    def _ended(self, delta: Delta) -> None:
        done, times = delta.completion, delta.times
        assert done is not None and times is not None, delta
        self._last_token.pop(delta.id)
        self._adapters.pop(delta.id, None)
        self._reasons[done.finish_reason] += 1
        self._ends[ENDS.get(done.finish_reason, "finished")] += 1
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
