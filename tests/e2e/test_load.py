"""Many clients at once: a pool too small, clients that vanish, processes that die."""

import asyncio
import random
import signal
import time
from pathlib import Path

import httpx
import pytest
from clients import PROMPT, client, drained, stream

from ktransformers.kvcache.config import CacheConfig
from ktransformers.server.bench.processes import usage

BLOCK = CacheConfig().block_tokens
BLOCK_BYTES = 30 * 2 * 3 * 64 * 2 * BLOCK  # layers, keys and values, kv heads, head size, bfloat16


def test_64_streams_in_a_quarter_of_the_room(start) -> None:
    length, prompt = 128, 48
    need = 64 * -(-(length + prompt) // BLOCK)
    server = start(device_bytes=need // 4 * BLOCK_BYTES)

    async def run() -> list[tuple[list[str], str]]:
        async with client() as http:
            return await asyncio.gather(
                *(
                    stream(
                        http,
                        server.url,
                        {
                            "model": "default",
                            "prompt": f"Number {i}. {PROMPT}" * 3,
                            "max_tokens": length,
                            "ignore_eos": True,
                            "stream": True,
                            "seed": i,
                        },
                    )
                    for i in range(64)
                )
            )

    results = asyncio.run(run())
    assert [end for _, end in results] == ["length"] * 64
    metrics = drained(server)
    assert metrics["ktransformers_kv_blocks_used"] == 0
    assert metrics["ktransformers_kv_blocks"] == need // 4
    recomputed, computed = (
        metrics["ktransformers_recomputed_tokens_total"],
        metrics["ktransformers_computed_tokens_total"],
    )
    print(
        f"recomputed {recomputed:.0f} of {computed:.0f} tokens, "
        f"{metrics['ktransformers_preemptions_total']:.0f} preemptions"
    )
    assert recomputed <= 0.05 * computed


def test_a_thousand_clients_vanish(server) -> None:
    rng = random.Random(20261124)

    async def one(http: httpx.AsyncClient, gate: asyncio.Semaphore, i: int) -> None:
        body = {
            "model": "default",
            "prompt": f"{i} {PROMPT * rng.randrange(1, 12)}",
            "max_tokens": 64,
            "ignore_eos": True,
            "stream": rng.random() < 0.7,
        }
        async with gate:
            patience = rng.choice((0.0, 0.002, 0.02, 0.2)) * rng.random()
            try:
                if body["stream"] and rng.random() < 0.5:
                    await stream(http, server.url, body, read=rng.randrange(1, 4))
                else:
                    await asyncio.wait_for(http.post(f"{server.url}/v1/completions", json=body), patience)
            except (TimeoutError, httpx.HTTPError):
                pass

    async def run() -> None:
        gate = asyncio.Semaphore(48)
        async with client() as http:
            await asyncio.gather(*(one(http, gate, i) for i in range(1000)))

    asyncio.run(run())
    metrics = drained(server)
    assert (
        metrics["ktransformers_requests_running"]
        == metrics["ktransformers_requests_waiting"]
        == metrics["ktransformers_kv_blocks_used"]
        == 0
    )
    reply = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "default", "prompt": "1, 2, 3,", "max_tokens": 4},
        timeout=120,
    )
    assert reply.status_code == 200


@pytest.mark.parametrize("victim", ["engine", "scheduler"])
def test_kill_mid_stream(start, victim: str) -> None:
    """Every client gets exactly one terminal event (stream() asserts it); readiness goes and comes back."""
    server = start()

    async def run() -> tuple[list[tuple[list[str], str]], list[int]]:
        async with client() as http:
            tasks = [
                asyncio.create_task(
                    stream(
                        http,
                        server.url,
                        {
                            "model": "default",
                            "prompt": PROMPT * 4,
                            "max_tokens": 400,
                            "ignore_eos": True,
                            "stream": True,
                        },
                    )
                )
                for _ in range(16)
            ]
            queued = [
                asyncio.create_task(
                    stream(
                        http,
                        server.url,
                        {"model": "default", "prompt": PROMPT * 40, "max_tokens": 4, "stream": True},
                    )
                )
                for _ in range(8)
            ]
            await asyncio.sleep(1.0)
            server.role(victim).send_signal(signal.SIGKILL)
            seen: list[int] = []
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                code = (await http.get(f"{server.url}/readyz")).status_code
                if not seen or seen[-1] != code:
                    seen.append(code)
                if 503 in seen and code == 200:
                    break
                await asyncio.sleep(0.02)
            return list(await asyncio.gather(*tasks, *queued)), seen

    results, seen = asyncio.run(run())
    ends = [end for _, end in results]
    assert set(ends) <= {"length", "stop", "engine_restarted", "http 503", "http 500"}, ends
    assert seen[-2:] == [503, 200], seen
    reply = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "default", "prompt": "1, 2, 3,", "max_tokens": 4},
        timeout=120,
    )
    assert reply.status_code == 200
    assert drained(server)["ktransformers_kv_blocks_used"] == 0


def test_memory_is_the_model_the_pool_and_little_else(start, default_model: Path) -> None:
    """The engine's largest resident size, with a pool that prompts have filled twice."""
    pool = 5000 // BLOCK * BLOCK_BYTES
    server = start(device_bytes=pool)
    body = {"model": "default", "prompt": [f"{i} {PROMPT}" * 60 for i in range(16)], "max_tokens": 2}
    reply = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    assert drained(server)["ktransformers_computed_tokens_total"] * BLOCK_BYTES > 2 * pool * BLOCK
    peak = usage(server.process.pid).peak_bytes["engine"]
    print(f"{peak / 1e6:.0f} MB")
    assert pool < peak < 1.3 * default_model.stat().st_size + pool + 200e6


def test_an_idle_server_burns_nothing(server) -> None:
    drained(server)
    time.sleep(2)
    before = {p.pid: sum(p.cpu_times()[:2]) for p in server.processes()}
    time.sleep(15)
    spent = {
        p.name() + str(p.cmdline()[1:3]): sum(p.cpu_times()[:2]) - before.get(p.pid, 0.0)
        for p in server.processes()
    }
    assert sum(spent.values()) < 0.15, f"CPU seconds in 15 s: {spent}"
