"""What Prometheus reads."""

import asyncio
import re

import pytest

from ktransformers.scheduler.client import RequestFailed
from ktransformers.server.api.openai_requests import ChatRequest
from ktransformers.server.auth import LOCAL

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
