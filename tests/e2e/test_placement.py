"""`ktransformers serve` with experts on two sides, the CPU standing for the device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import speaking

PLACEMENT = """
memory_bytes = 500_000_000
policy = "adaptive"

[[rule]]
match = "blk.[0-9].experts"
device = "device"
experts = [1, 3]
"""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A model with experts, and a placement whose path is relative to where the server starts."""
    model = speaking.write(tmp_path / "moe.gguf", "mixtral")
    (tmp_path / "placement.toml").write_text(PLACEMENT)
    return {"model": model, "executor": "torch", "placement": "../placement.toml", "context": 512}


def test_it_serves(tmp_path: Path, settings: dict[str, Any], start: Callable[..., Any]) -> None:
    server = start(**settings)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "What is the capital of Japan?"}],
        temperature=0,
        max_tokens=16,
    )
    assert "Tokyo" in (reply.choices[0].message.content or "")
    log = server.log.read_text()
    assert "of 120 experts on the device (adaptive)" in log and "torch-cpu+" in log
    server.stop()
    (kept,) = tmp_path.glob("0/cache/ktransformers/kv-experts/*.json")
    counts = json.loads(kept.read_text())["counts"]
    assert len(counts) == 30 and all(sum(counts[f"blk.{n}.experts"]) > 100 for n in range(29))


def test_a_placement_that_does_not_fit_ends_it(
    tmp_path: Path, settings: dict[str, Any], start: Callable[..., Any]
) -> None:
    (tmp_path / "placement.toml").write_text(PLACEMENT.replace("500_000_000", "50_000_000"))
    with pytest.raises(AssertionError, match=r"(?s)exited with 1.*memory_bytes of the placement"):
        start(**settings)
