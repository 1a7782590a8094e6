"""A mixture of experts that speaks says what the dense model of the same function says, on both executors,
and with experts on disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import speaking
from checkpoints import BLOCK, Driver

from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.load import open_model
from ktransformers.engine.program import Program, expert_weights

CAPITAL = [504, 3575, 282, 4649, 314, 7042, 30, 198]
PROMPT = [*CAPITAL * 4, *CAPITAL[:5]]
"""The capital of France is Paris, four times, and once more: what follows is likely enough not to be changed
by noise. (The native executor rounds activations to 8 bits: other ones where sums differ in the last bit.)"""
STEPS = 16


def program_of(path: Path) -> Program:
    return open_model(EngineConfig(model=str(path), executor="torch"))[0]


def greedy(executor: Any) -> list[int]:
    driver = Driver(executor, [np.array(PROMPT, np.int32)], room=STEPS)
    for _ in range(STEPS):
        driver.step({0: len(driver.sequences[0]) - driver.done[0]})
        driver.sequences[0] = np.append(driver.sequences[0], np.int32(driver.logits[0][-1].argmax()))
    executor.close()
    tokens: list[int] = driver.sequences[0][len(PROMPT) :].tolist()
    return tokens


def native(program: Program, expert_bytes: int | None = None) -> NativeExecutor:
    return NativeExecutor(program, threads=2, blocks=8, max_tokens=64, max_rows=64, expert_bytes=expert_bytes)


def a_third(program: Program) -> int:
    """Of the bytes of all experts, about."""
    return sum(program.weights[w].data.nbytes for w in expert_weights(program)) // 3


def oracle(program: Program, said: list[int]) -> list[int]:
    """What the torch executor would say, token by token, after what was said so far."""
    executor = TorchExecutor(program, blocks=8, block_tokens=BLOCK, max_tokens=64, threads=2)
    logits = Driver(executor, [np.array(PROMPT + said, np.int32)]).finish(lambda s: 64)[0]
    tokens: list[int] = logits.argmax(-1)[len(PROMPT) - 1 : -1].tolist()
    return tokens


@pytest.fixture(scope="module")
def dense() -> list[int]:
    """What the default model says."""
    return greedy(native(program_of(speaking.default_model())))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2moe"])
def test_it_says_what_the_default_model_says(kind: str, dense: list[int], tmp_path: Path) -> None:
    program = program_of(speaking.write(tmp_path / "moe.gguf", kind))
    assert dense[:3] == CAPITAL[5:]
    assert greedy(native(program)) == dense
    assert greedy(native(program, a_third(program))) == dense
    if kind == "mixtral":  # a minute for all of them
        assert oracle(program, dense) == dense


def test_qwen3_says_the_same_with_and_without_experts(tmp_path: Path) -> None:
    dense = greedy(native(program_of(speaking.write(tmp_path / "dense.gguf", "qwen3"))))
    program = program_of(speaking.write(tmp_path / "moe.gguf", "qwen3moe"))
    assert greedy(native(program)) == dense
    assert greedy(native(program, a_third(program))) == dense
