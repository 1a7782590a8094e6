"""Blocks as bytes: what is read from one block and written to another is the same KV, of whatever shape."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ktransformers.engine.executors.torch import TorchExecutor

LENGTH = 40


def executor(small: ModuleType, kind: str) -> tuple[Any, Any]:
    shape = small.AttentionShape(heads=4, kv_heads=2, head_dim=32)
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(shape.vocab, n * 32)).astype(np.float32) for n in (4, 2, 2))
    program = small.attention_program(shape, q, k, v)
    if kind == "torch":
        return program, TorchExecutor(program, blocks=16, block_tokens=16, max_tokens=64)
    return program, small.executor(program, blocks=16, kv_format=kind)


@pytest.mark.parametrize("kind", ["bf16", "int8", "torch"])
def test_copied_blocks_are_the_same_kv(small: ModuleType, kind: str) -> None:
    program, ex = executor(small, kind)
    tokens = list(np.random.default_rng(2).integers(0, program.vocab, LENGTH))
    want = ex.logits(small.batch(small.Part(tokens, 0, [0, 1, 2])))
    held = np.zeros((3, ex.block_bytes), np.uint8)
    for i in range(3):
        ex.read_block(i, held[i])
        ex.write_block(i, np.full(ex.block_bytes, 0xFF, np.uint8))  # not a number, wherever it is read
    for block, bytes_ in zip((9, 15, 4), held, strict=True):
        ex.write_block(block, bytes_)
        again = np.empty_like(bytes_)
        ex.read_block(block, again)
        assert (again == bytes_).all()
    got = ex.logits(small.batch(small.Part(tokens[32:], 32, [9, 15, 4])))
    np.testing.assert_allclose(got, want[32:], rtol=0, atol=1e-6 if kind == "torch" else 0)


@pytest.mark.parametrize("kind", ["bf16", "torch"])
def test_what_does_not_exist_is_refused(small: ModuleType, kind: str) -> None:
    _, ex = executor(small, kind)
    whole = np.zeros(ex.block_bytes, np.uint8)
    for block in (-1, 16, 1 << 40):
        with pytest.raises(ValueError, match="block"):
            ex.read_block(block, whole)
        with pytest.raises(ValueError, match="block"):
            ex.write_block(block, whole)
    for size in (0, ex.block_bytes - 1, ex.block_bytes + 1):
        with pytest.raises(ValueError, match="into"):
            ex.read_block(0, np.zeros(size, np.uint8))
        with pytest.raises(ValueError, match="data"):
            ex.write_block(0, np.zeros(size, np.uint8))


def test_latent_blocks(small: ModuleType) -> None:
    """MLA's cache has another shape, and goes through the same calls."""
    program, _ = executor(small, "torch")
    latent = type(program.cache)(3, 1, 24, "latent")
    ex = TorchExecutor(
        type(program)(program.ops, program.widths, program.weights, latent, program.vocab),
        blocks=4,
        block_tokens=16,
        max_tokens=64,
    )
    assert ex.block_bytes == 3 * 24 * 16 * 4
    data = np.random.default_rng(3).integers(0, 256, ex.block_bytes).astype(np.uint8)
    ex.write_block(2, data)
    again = np.zeros_like(data)
    ex.read_block(2, again)
    assert (again == data).all()
    for other in (0, 1, 3):
        ex.read_block(other, again)
        assert not again.any()
