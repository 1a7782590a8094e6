"""Sinks, chunks and scaled positions in the native executor, against torch's and itself."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ktransformers.engine import _kernels
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.program import Attention, PositionScale, Program

N = 700
BLOCKS = list(np.random.default_rng(3).permutation(64)[: -(-N // 16)])
VARIANTS = {
    "sinks": {"sinks": True},
    "chunk": {"chunk": 50},
    "long chunk": {"chunk": 600},
    "sinks and a window": {"sinks": True, "window": 300},
    "position scale": {"span": 100},
}


# Each weight is rounded to eight bits; of scaled positions queries are, too.
ROUNDED = {name: 0.02 if name == "position scale" else 0.008 for name in VARIANTS}


def bf16(x: Any) -> Any:
    return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16).float().numpy()


def variant(small: ModuleType, name: str) -> Program:
    """Attention over random queries, keys and values, with one thing more."""
    rng = np.random.default_rng(1)
    shape = small.AttentionShape(heads=4, kv_heads=2, head_dim=32, window=VARIANTS[name].get("window", 0))
    q, k, v = (rng.standard_normal((shape.vocab, h * 32)) for h in (4, 2, 2))
    # bfloat16 can hold keys and values, and queries once they are scaled.
    to_base_two = shape.scale * np.log2(np.e)
    q, k, v = (bf16(q * to_base_two) / to_base_two).astype(np.float32), bf16(k), bf16(v)
    program: Program = small.attention_program(shape, q, k, v)
    sinks = small.tensor(rng.standard_normal(4) + 3, "sinks")
    ops: list[Any] = list(program.ops)
    at = next(i for i, op in enumerate(ops) if isinstance(op, Attention))
    ops[at] = replace(
        ops[at],
        sinks=len(program.weights) if VARIANTS[name].get("sinks") else None,
        chunk=VARIANTS[name].get("chunk", 0),
    )
    if "span" in VARIANTS[name]:
        ops.insert(at, PositionScale(ops[at].q, VARIANTS[name]["span"], 0.5))
    return replace(program, ops=tuple(ops), weights=(*program.weights, sinks))


@pytest.mark.parametrize("name", list(VARIANTS))
def test_against_torch(small: ModuleType, name: str) -> None:
    program = variant(small, name)
    tokens = np.random.default_rng(2).integers(0, program.vocab, N).tolist()
    sizes = {"blocks": 64, "max_tokens": N, "max_rows": N}
    whole = small.executor(program, threads=2, **sizes).logits(small.batch(small.Part(tokens, 0, BLOCKS)))
    oracle = TorchExecutor(
        program, blocks=64, block_tokens=16, max_tokens=N, threads=1
    )
    expected = oracle.logits(small.batch(small.Part(tokens, 0, BLOCKS)))
    np.testing.assert_allclose(whole, expected, rtol=0, atol=ROUNDED[name])
    plain = replace(program, ops=tuple(
        replace(op, sinks=None, chunk=0) if isinstance(op, Attention) else op
        for op in program.ops if not isinstance(op, PositionScale)
    ))  # fmt: skip
    without = small.executor(plain, **sizes).logits(small.batch(small.Part(tokens, 0, BLOCKS)))
    assert np.abs(without - whole).max() > 0.1, "the variant should matter"
    for isa in _kernels.isas():
        small_steps = small.chunked(small.executor(program, isa, **sizes), tokens, BLOCKS, 37)
        np.testing.assert_array_equal(small_steps, whole)
