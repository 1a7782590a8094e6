"""What Prometheus reads: events of this process, and the scheduler's last status.

Names are `ktransformers_*`. What routers and the public dashboards read is there under vLLM's names, too,
with the model's name, since their queries filter on it; those hold a colon, which promtool's linter dislikes.
Nothing carries a tenant or a word of a prompt.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from ktransformers.scheduler.protocol import Status

# The same as vLLM's, so that its dashboards and recorded rules stay comparable.
FIRST_TOKEN_BUCKETS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
BETWEEN_TOKENS_BUCKETS = (
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
REQUEST_BUCKETS = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
LENGTH_BUCKETS = tuple(float(1 << power) for power in range(0, 21, 2))
MAX_TENANTS = 50
"""Tenants that have series of their own: the first ones that had a request; all further ones share one."""
OTHER_TENANTS = "other"
TENANT_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)
# Twice the series, which no dashboard reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Field of Status -> (suffix of the native name, of vLLM's, help)
_GAUGES = {
    "running": ("requests_running", "num_requests_running", "Requests that hold KV"),
    "waiting": ("requests_waiting", "num_requests_waiting", "Requests in the queue"),
    "blocks_total": ("kv_blocks", "", "KV blocks there are"),
    "blocks_used": ("kv_blocks_used", "", "KV blocks that sequences hold"),
    "blocks_cached": ("kv_blocks_cached", "", "KV blocks kept for reuse"),
}
_COUNTERS = {
    "preemptions": ("preemptions", "num_preemptions", "Requests put back because blocks ran out"),
    "prefix_hit_tokens": ("prefix_hit_tokens", "prefix_cache_hits", "Prompt tokens found in the cache"),
    "prefix_query_tokens": (
        "prefix_query_tokens",
        "prefix_cache_queries",
        "Prompt tokens looked up in the cache",
    ),
    "computed_tokens": ("computed_tokens", "", "Tokens computed, prompt and output"),
    "recomputed_tokens": ("recomputed_tokens", "", "Tokens computed again after a preemption"),
    "generated_tokens": ("generated_tokens", "", "Tokens drawn"),
    "steps": ("engine_steps", "", "Steps done"),
    "step_seconds": ("engine_step_seconds", "", "Time spent in steps"),
    "engine_restarts": ("engine_restarts", "", "Times the engine was started again"),
    "load_waits": ("cache_load_waits", "", "Requests that waited for their KV to be loaded"),
    "load_timeouts": ("cache_load_timeouts", "", "Requests that waited for it in vain"),
}
# Field of TierStatus -> (suffix of the name, help)
_TIER_GAUGES = {
    "bytes_total": ("cache_size_bytes", "What the tier of the KV cache may hold"),
    "bytes_used": ("cache_bytes", "KV in the tier"),
}
_TIER_COUNTERS = {
    "hit_tokens": ("cache_hit_tokens", "Prompt tokens that were not computed because their KV was here"),
    "evictions": ("cache_evictions", "Blocks given up for others"),
    "loads": ("cache_loads", "Blocks copied from the tier to the device"),
    "load_failures": ("cache_load_failures", "Blocks that could not be"),
    "load_bytes": ("cache_load_bytes", "Bytes copied from the tier to the device"),
    "load_seconds": ("cache_load_seconds", "Time spent copying from the tier to the device"),
    "stores": ("cache_stores", "Blocks copied to the tier"),
    "store_failures": ("cache_store_failures", "Blocks that could not be"),
    "store_bytes": ("cache_store_bytes", "Bytes copied to the tier"),
    "store_seconds": ("cache_store_seconds", "Time spent copying to the tier"),
}


class Metrics:
    """All series of the API process, in a registry of its own."""

    def __init__(self, model: str, status: Callable[[], Status | None]) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.tenants = TenantMetrics(r)
        r.register(_StatusCollector(model, status, self.tenants))

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"ktransformers_{name}", text, registry=r, buckets=buckets)

        self.first_token = histogram(
            "time_to_first_token_seconds", "Submit to first token", FIRST_TOKEN_BUCKETS
        )
        self.between_tokens = TokenHistogram(
            "ktransformers_inter_token_latency_seconds", "Between two tokens", BETWEEN_TOKENS_BUCKETS
        )
        r.register(self.between_tokens)
        self.request = histogram("e2e_request_latency_seconds", "Submit to last token", REQUEST_BUCKETS)
        self.queue = histogram("request_queue_time_seconds", "Submit to first step", REQUEST_BUCKETS)
        self.prompt_length = histogram("request_prompt_tokens", "Tokens of the prompt", LENGTH_BUCKETS)
        self.output_length = histogram("request_generation_tokens", "Tokens of the output", LENGTH_BUCKETS)
        self.prompt_tokens = Counter("ktransformers_prompt_tokens", "Prompt tokens", registry=r)
        self.cached_tokens = Counter(
            "ktransformers_prompt_tokens_cached", "Prompt tokens that were not computed", registry=r
        )
        self.output_tokens = Counter("ktransformers_generation_tokens", "Output tokens", registry=r)
        self._finished = Counter(
            "ktransformers_request_success",
            "Requests by the reason they ended",
            ["finished_reason"],
            registry=r,
        )
        self._failed = Counter(
            "ktransformers_request_failure", "Requests that failed, by error code", ["code"], registry=r
        )
        self._http = Counter(
            "ktransformers_http_requests", "HTTP requests", ["method", "route", "status"], registry=r
        )
        self._http_seconds = Histogram(
            "ktransformers_http_request_duration_seconds",
            "Whole HTTP exchange",
            ["route"],
            registry=r,
            buckets=REQUEST_BUCKETS,
        )

    def finished(self, reason: str) -> None:
        """A request ended with "stop", "length" or "cancelled"."""
        self._finished.labels(reason).inc()

    def failed(self, code: str) -> None:
        """A request was answered by an error."""
        self._failed.labels(code).inc()

    def http_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """An HTTP exchange is over; `route` is the route's template, never the path a client made up."""
        self._http.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._http_seconds.labels(route).observe(seconds)

    def render(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class TokenHistogram:
    """Of what is observed for every token: on one event loop, without the library's locks, at a third of its
    cost."""

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        """`buckets` are upper bounds, which belong to them; one without a bound is added."""
        self._name, self._text = name, text
        self._bounds = (*buckets, math.inf)
        self._counts = [0] * len(self._bounds)
        self._sum = 0.0

    def observe(self, value: float, times: int) -> None:
        """The same value so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        below, buckets = 0, []
        for bound, count in zip(self._bounds, self._counts, strict=True):
            below += count
            buckets.append((floatToGoString(bound), float(below)))  # type: ignore[no-untyped-call]
        yield HistogramMetricFamily(self._name, self._text, buckets, self._sum)


class TenantSeries:
    """The series of one tenant."""

    def __init__(self, metrics: "TenantMetrics", label: str) -> None:
        self.requests = metrics.requests.labels(label)
        self.prompt_tokens = metrics.prompt_tokens.labels(label)
        self.output_tokens = metrics.output_tokens.labels(label)
        self.queue = metrics.queue.labels(label)
        self.first_token = metrics.first_token.labels(label)
        self._rejections, self._label = metrics.rejections, label

    def rejected(self, code: str) -> None:
        """A request was refused before it began."""
        self._rejections.labels(self._label, code).inc()


class TenantMetrics:
    """Series by tenant, of which there are MAX_TENANTS and one for all others."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"ktransformers_tenant_{name}", text, ["tenant", *labels], registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(
                f"ktransformers_tenant_{name}", text, ["tenant"], registry=registry, buckets=TENANT_BUCKETS
            )

        self.requests = counter("requests", "Requests that were not refused")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens")
        self.output_tokens = counter("generation_tokens", "Output tokens")
        self.rejections = counter("rejections", "Requests refused before they began", "reason")
        self.queue = histogram("queue_time_seconds", "Submit to first step")
        self.first_token = histogram("time_to_first_token_seconds", "Submit to first token")
        self._series: dict[str, TenantSeries] = {}
        self._labels: dict[str, str] = {}
        """By the id that the scheduler knows."""

    def label(self, tenant: str) -> str:
        """Of the tenant with this id."""
        return self._labels.get(tenant, OTHER_TENANTS)

    def of(self, name: str, tenant: str) -> TenantSeries:
        """The series that this tenant's requests count in; `tenant` is its id."""
        if name in self._series or len(self._series) < MAX_TENANTS:
            self._labels[tenant] = name
        if name not in self._series:
            if len(self._series) >= MAX_TENANTS:
                name = OTHER_TENANTS
            if name not in self._series:
                self._series[name] = TenantSeries(self, name)
        return self._series[name]


class _StatusCollector:
    """Makes series of the scheduler's status when they are read; without a fresh status only `up` is
    there.
    """

    def __init__(
        self,
        model: str,
        status: Callable[[], Status | None],
        tenants: "TenantMetrics",
    ) -> None:
        self._model, self._status = model, status
        self._tenants = tenants

    def describe(self) -> list[Metric]:
        """Nothing, so that registering does not read the status."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All series of one scrape."""
        status = self._status()
        info = GaugeMetricFamily("ktransformers_model_info", "The served model", labels=["model_name"])
        info.add_metric([self._model], 1.0)
        yield info
        yield GaugeMetricFamily(
            "ktransformers_scheduler_up", "A status younger than 3 s is there", float(status is not None)
        )
        if status is None:
            return
        yield GaugeMetricFamily("ktransformers_engine_ready", "The engine takes steps", float(status.ready))
        for field, (name, vllm, text) in _GAUGES.items():
            value = float(getattr(status, field))
            yield GaugeMetricFamily(f"ktransformers_{name}", text, value)
            yield from self._alias(GaugeMetricFamily, vllm, text, value)
        used = status.blocks_used / status.blocks_total if status.blocks_total else 0.0
        yield GaugeMetricFamily(
            "ktransformers_kv_cache_usage_ratio", "Share of KV blocks that sequences hold", used
        )
        yield from self._alias(
            GaugeMetricFamily, "kv_cache_usage_perc", "Share of KV blocks in use (1 is all)", used
        )
        for field, (name, vllm, text) in _COUNTERS.items():
            value = float(getattr(status, field))
            yield CounterMetricFamily(f"ktransformers_{name}", text, value)
            yield from self._alias(CounterMetricFamily, vllm, text, value)
        yield from self._shares(status)
        yield from self._tiers(status)

    def _shares(self, status: Status) -> Iterator[Metric]:
        """What tenants got while they had a backlog, and what was due to them by weight."""
        fields = {
            "service_units": ("service", "Cost of what was computed (a prompt token is 1)"),
            "backlogged_service_units": ("backlogged_service", "Of that, while something waited"),
            "due_units": ("due", "Share by weight of what was computed for all that had something waiting"),
        }
        for name, (field, text) in fields.items():
            family = CounterMetricFamily(f"ktransformers_tenant_{name}", text, labels=["tenant"])
            sums: dict[str, float] = {}
            for tenant in status.tenants:
                label = self._tenants.label(tenant.id)
                sums[label] = sums.get(label, 0.0) + getattr(tenant, field)
            for label, value in sums.items():
                family.add_metric([label], value)
            yield family

    def _tiers(self, status: Status) -> Iterator[Metric]:
        """By tier of the KV cache, and by tenant and tier."""
        for kind, fields in ((GaugeMetricFamily, _TIER_GAUGES), (CounterMetricFamily, _TIER_COUNTERS)):
            for field, (name, text) in fields.items():
                family = kind(f"ktransformers_{name}", text, labels=["tier"])
                for tier in status.tiers:
                    family.add_metric([tier.name], float(getattr(tier, field)))
                yield family
        held = GaugeMetricFamily("ktransformers_tenant_kv_bytes", "Cached KV", labels=["tenant", "tier"])
        sums: dict[tuple[str, str], int] = {}
        for tenant in status.tenants:
            label = self._tenants.label(tenant.id)
            for tier_name, size in zip(("device", "host", "disk"), tenant.kv_bytes, strict=True):
                sums[label, tier_name] = sums.get((label, tier_name), 0) + size
        for labels, size in sums.items():
            held.add_metric(list(labels), float(size))
        yield held

    def _alias(
        self, kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, text: str, value: float
    ) -> Iterator[Metric]:
        if name:
            family = kind(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([self._model], value)
            yield family
