"""The prefix cache at the real server: what one process has computed, the next one finds on disk."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

STORED = 'ktransformers_cache_stores_total{tier="disk"}'


@pytest.fixture(scope="module")
def prompt() -> str:
    rng = random.Random(11)
    return " ".join(rng.choice(("sea", "storm", "lamp", "ship", "night", "gull", "bell")) for _ in range(700))


def ask(server: Any, prompt: str) -> tuple[str, int, int]:
    """The answer, tokens of the prompt, and how many of them were cached."""
    model = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"][0]["id"]
    body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0.7, "seed": 5}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
    usage = answer["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["text"], usage["prompt_tokens"], cached


def stored(server: Any, blocks: int) -> None:
    """Wait until so many blocks are on disk: they are written beside the steps."""
    deadline = time.monotonic() + 120
    while server.metrics().get(STORED, 0) < blocks:
        assert time.monotonic() < deadline, server.log.read_text()[-4000:]
        time.sleep(0.1)


def test_a_known_prompt_after_a_restart(start: Callable[..., Any], prompt: str) -> None:
    """K13: of everything, in order; and nothing of it is computed again but the last piece of a block."""
    first = start()
    text, tokens, cached = ask(first, prompt)
    assert cached == 0
    assert ask(first, prompt)[0] == text
    stored(first, (tokens - 1) // 16)
    assert first.stop() == 0
    assert "prefix cache: device" in first.log.read_text()
    second = type(first)(first.log.parent)
    assert ask(second, prompt) == (text, tokens, (tokens - 1) // 16 * 16)
    assert second.stop() == 0


@pytest.mark.parametrize("role", ["engine", "scheduler"])
def test_a_known_prompt_after_a_death(start: Callable[..., Any], prompt: str, role: str) -> None:
    server = start()
    text, tokens, _ = ask(server, prompt)
    ask(server, prompt)
    stored(server, (tokens - 1) // 16)
    process = server.role(role)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    deadline = time.monotonic() + 60
    while not server.ready():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert ask(server, prompt) == (text, tokens, (tokens - 1) // 16 * 16)


def test_switched_off(start: Callable[..., Any], prompt: str) -> None:
    server = start(disk_bytes=0)
    text, _, _ = ask(server, prompt)
    assert ask(server, prompt)[0] == text
    assert not (server.log.parent / "cache" / "ktransformers" / "kv").exists()


def test_a_broken_folder_costs_no_request(start: Callable[..., Any], tmp_path: Path, prompt: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    server = start(cache_dir=tmp_path / "file")
    text, tokens, _ = ask(server, prompt)
    assert ask(server, prompt) == (text, tokens, (tokens - 1) // 16 * 16)
    assert "the prefix cache has no disk tier" in server.log.read_text()
