"""Sinks, chunks, scaled positions and latent rows in the native executor, against torch's and itself."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from ktransformers.engine import _kernels
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.program import (
    Attention,
    CacheShape,
    Embed,
    GatherRows,
    HeadLinear,
    Logits,
    MlaAttention,
    PositionScale,
    Program,
)

N = 700
BLOCKS = list(np.random.default_rng(3).permutation(64)[: -(-N // 16)])
VARIANTS = {
    "sinks": {"sinks": True},
    "chunk": {"chunk": 50},
    "long chunk": {"chunk": 600},
    "sinks and a window": {"sinks": True, "window": 300},
    "position scale": {"span": 100},
}


def variant(small: ModuleType, name: str) -> Program:
    """Attention over random queries, keys and values, with one thing more."""
    rng = np.random.default_rng(1)
    shape = small.AttentionShape(heads=4, kv_heads=2, head_dim=32, window=VARIANTS[name].get("window", 0))
    q, k, v = (rng.standard_normal((shape.vocab, h * 32)).astype(np.float32) for h in (4, 2, 2))
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
        program, blocks=64, block_tokens=16, max_tokens=N, kv_dtype=torch.float16, threads=1
    )
    expected = oracle.logits(small.batch(small.Part(tokens, 0, BLOCKS)))
    np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-5)
    plain = replace(program, ops=tuple(
        replace(op, sinks=None, chunk=0) if isinstance(op, Attention) else op
        for op in program.ops if not isinstance(op, PositionScale)
    ))  # fmt: skip
    without = small.executor(plain, **sizes).logits(small.batch(small.Part(tokens, 0, BLOCKS)))
    assert np.abs(without - whole).max() > 0.01, "the variant should matter"
    for isa in _kernels.isas():
        small_steps = small.chunked(small.executor(program, isa, **sizes), tokens, BLOCKS, 37)
        np.testing.assert_array_equal(small_steps, whole)


def latent_program(small: ModuleType, heads: int, latent: int, rope: int, nope: int) -> Program:
    """Queries are projected by each head, and so is what attention gives: values of 12 elements."""
    rng = np.random.default_rng(5)
    vocab, value = heads * 12, 12

    def table(width: int, name: str) -> Any:
        return small.tensor(rng.standard_normal((vocab, width)), name)

    k_b = small.tensor(rng.standard_normal((heads * latent, nope)) / 4, "k_b")
    v_b = small.tensor(rng.standard_normal((heads * value, latent)) / 4, "v_b")
    q_width = heads * (nope + rope)
    return Program(
        ops=(
            Embed(0, 0, 1.0),
            Embed(1, 1, 1.0),
            Embed(2, 2, 1.0),
            HeadLinear(0, 3, 3, heads),
            MlaAttention(3, 0, 1, 2, 4, 0, heads, 0.1),
            HeadLinear(4, 4, 5, heads),
            GatherRows(5, 6),
            Logits(6, 5, 7, 0.0),
        ),
        widths=(q_width, latent, rope, heads * latent, heads * latent, vocab, vocab, vocab),
        weights=(
            table(q_width, "q"),
            table(latent, "latent"),
            table(rope, "rope"),
            replace(k_b, experts=heads),
            replace(v_b, experts=heads),
            small.tensor(np.eye(vocab)),
        ),
        cache=CacheShape(1, 1, latent + rope, "latent"),
        vocab=vocab,
    )


@pytest.mark.parametrize(
    ("heads", "latent", "rope", "nope"), [(16, 64, 16, 32), (5, 32, 32, 20), (3, 512, 64, 128)]
)
def test_latent_rows_against_torch(small: ModuleType, heads: int, latent: int, rope: int, nope: int) -> None:
    program = latent_program(small, heads, latent, rope, nope)
    tokens = np.random.default_rng(2).integers(0, program.vocab, N).tolist()
    sizes = {"blocks": 64, "max_tokens": N, "max_rows": N}
    whole = small.executor(program, threads=2, **sizes).logits(small.batch(small.Part(tokens, 0, BLOCKS)))
    oracle = TorchExecutor(
        program, blocks=64, block_tokens=16, max_tokens=N, kv_dtype=torch.float16, threads=1
    )
    expected = oracle.logits(small.batch(small.Part(tokens, 0, BLOCKS)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-4)
    for isa in _kernels.isas():
        ex = small.executor(program, isa, **sizes)
        np.testing.assert_array_equal(small.chunked(ex, tokens, BLOCKS, 37), whole)
    others = [b for b in range(64) if b not in BLOCKS]
    parts = [small.Part(tokens[690:], 690, BLOCKS), small.Part(tokens[:20], 0, others[:2])]
    both = ex.logits(small.batch(*parts))
    np.testing.assert_array_equal(both, np.concatenate([whole[690:], whole[:20]]))


@pytest.mark.parametrize(
    ("op", "change", "named"),
    [
        (4, {"layer": 1}, "layer"),
        (4, {"heads": 3}, "q_latent"),
        (4, {"rope": 1}, "latent"),
        (4, {"out": 3}, "out"),
        (3, {"heads": 7}, "heads"),
        (3, {"weight": 0}, "weight"),
        (3, {"out": 0}, "out"),
        (5, {"x": 2}, "heads|weight"),
    ],
)
def test_bad_latent_programs_are_refused(
    small: ModuleType, op: int, change: dict[str, Any], named: str
) -> None:
    program = latent_program(small, 16, 64, 16, 32)
    ops: list[Any] = list(program.ops)
    ops[op] = replace(ops[op], **change)
    with pytest.raises(ValueError, match=named):
        small.executor(replace(program, ops=tuple(ops)))


def test_keys_and_latent_rows_do_not_mix(small: ModuleType) -> None:
    program = latent_program(small, 16, 64, 16, 32)
    with pytest.raises(ValueError, match="latent"):
        small.executor(replace(program, cache=CacheShape(1, 1, 80)))
    plain = variant(small, "sinks")
    with pytest.raises(ValueError, match="latent"):
        small.executor(replace(plain, cache=CacheShape(1, 1, 32, "latent")))
