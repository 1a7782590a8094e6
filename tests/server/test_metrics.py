"""What Prometheus reads."""

import asyncio
import re

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from ktransformers.scheduler.client import RequestFailed
from ktransformers.scheduler.protocol import TokenEvent
from ktransformers.server.accounting import Account, Counted, Usage
from ktransformers.server.api.openai_requests import ChatRequest
from ktransformers.server.auth import LOCAL
from ktransformers.server.metrics import BETWEEN_TOKENS_BUCKETS, Metrics, TokenHistogram
from ktransformers.server.tenants.ledger import Ledger
from ktransformers.server.tenants.limits import Limiter

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi canary"}]}


def series(text: str) -> dict[str, float]:
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            found[name] = float(value)
    return found


@pytest.mark.anyio
async def test_events_are_counted(make, connect, scheduler) -> None:
    scheduler.cached = 4
    async with connect(make()) as client:
        for stream in (False, True):
            assert (
                await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            ).status_code == 200
        await client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2, "n": 2})
        scheduler.failure = RequestFailed("overloaded", "full")
        await client.post("/v1/chat/completions", json=CHAT)
        await client.get("/made/up/path")
        text = (await client.get("/metrics")).text
    found = series(text)
    prefix = "ktransformers_"
    assert found[prefix + "generation_tokens_total"] == 14 * 2 + 4
    assert found[prefix + "prompt_tokens_total"] == 16 * 4
    assert found[prefix + "prompt_tokens_cached_total"] == 16
    assert found[prefix + 'request_success_total{finished_reason="stop"}'] == 2
    assert found[prefix + 'request_success_total{finished_reason="length"}'] == 2
    assert found[prefix + 'request_failure_total{code="overloaded"}'] == 1
    counts = {
        "time_to_first_token_seconds": 4,
        "inter_token_latency_seconds": 28,
        "e2e_request_latency_seconds": 4,
        "request_queue_time_seconds": 4,
    }
    for name, count in counts.items():
        assert found[f"{prefix}{name}_count"] == count
    assert found[prefix + 'http_requests_total{method="GET",route="unmatched",status="404"}'] == 1
    assert found[prefix + 'http_requests_total{method="POST",route="/v1/chat/completions",status="200"}'] == 3
    assert "canary" not in text and "made/up" not in text


@pytest.mark.anyio
async def test_the_status_is_shown(make, connect, scheduler) -> None:
    async with connect(make()) as client:
        found = series((await client.get("/metrics")).text)
        assert found["ktransformers_requests_running"] == 3 and found["ktransformers_requests_waiting"] == 2
        assert found["ktransformers_kv_blocks"] == 100 and found["ktransformers_kv_blocks_used"] == 25
        assert found["ktransformers_kv_cache_usage_ratio"] == 0.25
        assert found["ktransformers_preemptions_total"] == 1
        assert found['ktransformers_model_info{model_name="tiny"}'] == 1
        scheduler.status = None
        found = series((await client.get("/metrics")).text)
        assert found["ktransformers_scheduler_up"] == 0 and "ktransformers_requests_running" not in found


@pytest.mark.anyio
async def test_names(make, connect) -> None:
    """promtool's rules: no colon, base units, counters and only they end in _total."""
    async with connect(make()) as client:
        text = (await client.get("/metrics")).text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
    helps = set(re.findall(r"^# HELP (\S+) \S+", text, re.M))
    assert types.keys() == helps
    for name, kind in types.items():
        assert (name.startswith("ktransformers_") and ":" not in name) or name.startswith("vllm:"), name
        assert name.endswith("_total") == (kind == "counter"), name


@pytest.mark.anyio
async def test_what_routers_read_under_vllms_names(make, connect) -> None:
    async with connect(make()) as client:
        found = series((await client.get("/metrics")).text)
    assert found['vllm:num_requests_running{model_name="tiny"}'] == 3
    assert found['vllm:kv_cache_usage_perc{model_name="tiny"}'] == 0.25
    assert found['vllm:num_preemptions_total{model_name="tiny"}'] == 1


@pytest.mark.anyio
async def test_leaving_is_counted(make, connect, scheduler) -> None:
    scheduler.pause = 30
    app = make()
    service = app.state.service
    task = asyncio.create_task(service.generator.start([[1]], ChatRequest(**CHAT).to_parameters(), LOCAL))
    while not scheduler.submits:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert 'request_success_total{finished_reason="cancelled"} 1.0' in service.metrics.render().decode()


def test_the_histogram_of_tokens_is_the_librarys() -> None:
    """The same text for the same values, at the bounds, beyond them and many at once."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    mine = TokenHistogram("x_seconds", "Text", BETWEEN_TOKENS_BUCKETS)
    ours.register(mine)
    library = Histogram("x_seconds", "Text", registry=theirs, buckets=BETWEEN_TOKENS_BUCKETS)
    assert generate_latest(ours) == generate_latest(theirs)
    for value, times in ((0.0, 1), (0.01, 2), (0.010001, 3), (0.3, 1), (80.0, 4), (1000.0, 2)):
        mine.observe(value, times)
        for _ in range(times):
            library.observe(value)
    found = [
        {(s.name, s.labels.get("le")): s.value for metric in registry.collect() for s in metric.samples}
        for registry in (ours, theirs)
    ]
    assert found[0].keys() == found[1].keys() and found[0] == pytest.approx(found[1])


def counted_choice(metrics: Metrics, ledger: Ledger) -> tuple[Counted, Usage]:
    usage = Usage(prompt_tokens=3)
    reservation = Limiter().reserve((), 3, 10, 1)
    account = Account(usage, ledger, reservation, metrics.tenants.of("t", "t"), ("t", "k", "m"))
    return Counted(metrics, account, 0, 3), usage


def test_what_is_put_out_is_reported_within_a_moment_and_whole_at_the_end() -> None:
    metrics, ledger = Metrics("tiny", lambda: None), Ledger()
    counted, usage = counted_choice(metrics, ledger)
    value = metrics.registry.get_sample_value

    def reported() -> tuple[float | None, ...]:
        return (
            usage.completion_tokens,
            ledger._counts["t", "k", "m"][3],
            value("ktransformers_generation_tokens_total"),
            value("ktransformers_tenant_generation_tokens_total", {"tenant": "t"}),
        )

    counted.event(TokenEvent("a", [5], []))
    assert reported() == (1, 1, 1, 1)
    for _ in range(3):
        counted.event(TokenEvent("a", [5, 6], []))
    counted._report_at = 0.0  # a moment later
    counted.event(TokenEvent("a", [5], []))
    assert reported() == (8, 8, 8, 8)
    counted.event(TokenEvent("a", [5, 5], [], "length"))
    counted.finish("length")
    counted.leave()
    assert reported() == (10, 10, 10, 10)
    assert value("ktransformers_inter_token_latency_seconds_count") == 9


def test_what_a_client_that_leaves_has_had_is_counted() -> None:
    counted, usage = counted_choice(Metrics("tiny", lambda: None), Ledger())
    for _ in range(5):
        counted.event(TokenEvent("a", [5], []))
    counted.leave()
    assert usage.completion_tokens == 5
