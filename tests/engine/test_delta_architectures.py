"""Qwen3-Next against `transformers`: states beside KV, kept, copied, chunked and batched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CHUNKS, LENGTHS, VOCAB, Case, Driver, build, load, torch_executor
from converters import convert

from ktransformers.engine import _kernels
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.models.decoder import compile_program
from ktransformers.engine.models.folder import open_folder
from ktransformers.engine.program import Program, StateShape

F32 = np.ndarray[Any, np.dtype[np.float32]]
I32 = np.ndarray[Any, np.dtype[np.int32]]

CASE = Case(
    "qwen3next",
    "Qwen3Next",
    {
        "num_hidden_layers": 5,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 24,
        "linear_value_head_dim": 20,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
    {
        "expert_count": 8,
        "expert_used_count": 3,
        "expert_feed_forward_length": 32,
        "expert_shared_feed_forward_length": 48,
        "rope.dimension_count": 8,
        "rope.freq_base": 1e6,
        "ssm.conv_kernel": 4,
        "ssm.state_size": 24,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 6,
        "ssm.inner_size": 120,
        "full_attention_interval": 4,
    },
)

TOLERANCE = 2e-4
"""theirs works in pieces of 64 tokens, and the norm of a result near zero makes roundings larger."""


@pytest.fixture(scope="module")
def model() -> Any:
    return build(CASE)


@pytest.fixture(scope="module")
def gguf_path(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(CASE, model, tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture(scope="module")
def program(gguf_path: Path) -> Program:
    return load(gguf_path)[1]


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder")
    model.save_pretrained(path, max_shard_size="200KB")
    return path


@pytest.fixture(scope="module")
def sequences() -> list[I32]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, VOCAB, n).astype(np.int32) for n in LENGTHS]


def theirs(model: Any, tokens: I32) -> F32:
    with torch.no_grad():
        out: F32 = model(torch.from_numpy(tokens)[None].long(), use_cache=False).logits[0].numpy()
    return out


@pytest.fixture(scope="module")
def expected(model: Any, sequences: list[I32]) -> list[F32]:
    return [theirs(model, s) for s in sequences]


def program_of(path: Path) -> Program:
    opened = open_folder(path)
    return compile_program(opened.spec, opened)


def native(program: Program, isa: str | None = None, threads: int = 2) -> NativeExecutor:
    return NativeExecutor(
        program, isa=isa, threads=threads, blocks=64, max_tokens=256, max_rows=256, states=12
    )


@pytest.mark.parametrize("chunk", list(CHUNKS))
@pytest.mark.parametrize("container", ["gguf", "folder"])
def test_torch(
    container: str, program: Program, folder: Path, sequences: list[I32], expected: list[F32], chunk: str
) -> None:
    if container == "folder":
        program = program_of(folder)
    driver = Driver(torch_executor(program), sequences)
    for ours, reference in zip(driver.finish(CHUNKS[chunk]), expected, strict=True):
        assert np.abs(reference).max() > 1, "the logits of a test model should be worth comparing"
        np.testing.assert_allclose(ours, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("isa", _kernels.isas())
def test_native(program: Program, sequences: list[I32], expected: list[F32], isa: str) -> None:
    """With keys and values in float16 a few rows choose another expert: all the others are close."""
    ours = Driver(native(program, isa), sequences).finish(CHUNKS["chunks"])
    off = np.concatenate([np.abs(a - b).max(axis=-1) for a, b in zip(ours, expected, strict=True)])
    assert np.quantile(off, 0.75) < 6e-3
    assert np.mean(np.concatenate(ours).argmax(-1) == np.concatenate(expected).argmax(-1)) > 0.95


def test_folder_and_gguf_are_the_same_model(folder: Path, program: Program) -> None:
    ours = program_of(folder)
    assert [type(op) for op in ours.ops] == [type(op) for op in program.ops]
    assert ours.widths == program.widths
    assert (ours.cache, ours.state) == (program.cache, program.state)
    assert program.cache.layers == 1 and program.state == StateShape(4, 3, 216, 6, 24, 20)
    for a, b in zip(ours.weights, program.weights, strict=True):
        np.testing.assert_allclose(a.read().view(np.float32), b.read().view(np.float32), rtol=1e-6)
