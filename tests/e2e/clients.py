"""Clients for the tests of the real server: streams that insist on one ending each, and the quiet after."""

import json
import time
from typing import Any

import httpx

PROMPT = "Tell me a long story about a fox, a river and an old mill. "
LONG = {"model": "default", "prompt": PROMPT * 4, "max_tokens": 400, "ignore_eos": True, "stream": True}
SHORT = {"model": "default", "prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "stream": True}


async def stream(
    client: httpx.AsyncClient, url: str, body: dict, read: int | None = None
) -> tuple[list[str], str]:
    """Read a completion's stream (at most `read` events, then hang up): pieces of text, and how it ended."""
    pieces: list[str] = []
    ended: list[str] = []
    async with client.stream("POST", f"{url}/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            await reply.aread()
            return [], f"http {reply.status_code}"
        async for line in reply.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                break
            event = json.loads(line[6:])
            if "error" in event:
                ended.append(event["error"]["code"])
                continue
            pieces.append(event["choices"][0]["text"])
            if event["choices"][0]["finish_reason"]:
                ended.append(event["choices"][0]["finish_reason"])
            if read is not None and len(pieces) >= read:
                return pieces, "hung up"
    assert len(ended) == 1, f"{len(ended)} terminal events: {ended}"
    return pieces, ended[0]


def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=240, limits=httpx.Limits(max_connections=None))


def drained(server, seconds: float = 60) -> dict[str, float]:
    """Metrics once nothing runs or waits any more."""
    deadline = time.monotonic() + seconds
    while True:
        metrics = server.metrics()
        busy = [
            metrics["ktransformers_requests_running"],
            metrics["ktransformers_requests_waiting"],
            metrics["ktransformers_kv_blocks_used"],
        ]
        if not any(busy) or time.monotonic() > deadline:
            return metrics
        time.sleep(0.2)


def ask(server: Any, **body: Any) -> httpx.Response:
    """A short completion, awaited."""
    wanted = {"model": "default", "prompt": "1, 2, 3,", "max_tokens": 4, "temperature": 0} | body
    return httpx.post(f"{server.url}/v1/completions", json=wanted, timeout=60)
