"""Latent attention and products by head, natively: against torch, itself and what was in memory."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import gguf
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
    Program,
    Tensor,
)

ISAS = _kernels.isas()
FAST = [isa for isa in ISAS if isa != "reference"] or ISAS
SPAN = 512
N = SPAN + 50
BLOCKS = list(np.random.default_rng(3).permutation(64)[: -(-N // 16)])
SIZES = {"blocks": 64, "max_tokens": N, "max_rows": N}
SHAPES = {
    "eight heads at a time": (16, 64, 16, 32),
    "heads in fives": (5, 32, 32, 20),
    "heads one by one": (11, 32, 16, 16),
    "as wide as DeepSeek's": (3, 512, 64, 128),
}
NAN = 7  # the token whose row is not a number, where there is one


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


def with_nan(program: Program) -> Program:
    """The cached row of the token NAN is not a number."""
    weights = list(program.weights)
    for i in (1, 2):
        values = np.array(weights[i].read()).view(np.float32).reshape(-1, weights[i].cols)
        values[NAN] = np.nan
        weights[i] = replace(weights[i], data=values.reshape(-1).view(np.uint8))
    return replace(program, weights=tuple(weights))


def text(program: Program, n: int, seed: int = 2) -> list[int]:
    """Without NAN."""
    tokens = np.random.default_rng(seed).integers(NAN + 1, program.vocab, n)
    return [int(t) for t in tokens]


@pytest.fixture(params=SHAPES, scope="module")
def program(request: pytest.FixtureRequest, small: ModuleType) -> Program:
    return latent_program(small, *SHAPES[request.param])


@pytest.fixture(scope="module")
def whole(small: ModuleType, program: Program) -> Any:
    """Logits of text(program, N), all in one step."""
    ex = small.executor(program, threads=2, **SIZES)
    return ex.logits(small.batch(small.Part(text(program, N), 0, BLOCKS)))


def test_against_torch(small: ModuleType, program: Program, whole: Any) -> None:
    oracle = TorchExecutor(
        program, blocks=64, block_tokens=16, max_tokens=N, kv_dtype=torch.float16, threads=1
    )
    expected = oracle.logits(small.batch(small.Part(text(program, N), 0, BLOCKS)))
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(whole, expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("isa", ISAS)
def test_equal_on_every_isa(small: ModuleType, program: Program, whole: Any, isa: str) -> None:
    n = 130 if isa == "reference" else N
    ex = small.executor(program, isa, **SIZES)
    np.testing.assert_array_equal(small.chunked(ex, text(program, N)[:n], BLOCKS, 37), whole[:n])


@pytest.mark.parametrize("isa", FAST)
def test_bits_do_not_depend_on_chunks_or_neighbours(
    small: ModuleType, program: Program, whole: Any, isa: str
) -> None:
    """Law 1."""
    tokens = text(program, N)
    ex = small.executor(program, isa, threads=2, **SIZES)
    for chunk in (1, 7, 16, 33, 64):
        got = small.chunked(ex, tokens[:100], BLOCKS, chunk)
        np.testing.assert_array_equal(got, whole[:100], err_msg=f"chunks of {chunk}")
    np.testing.assert_array_equal(small.chunked(ex, tokens, BLOCKS, 200), whole)
    # A prefix hit between two neighbours.
    others = [b for b in range(64) if b not in BLOCKS]
    before = small.Part(text(program, 30, 4), 3, others[:3])
    after = small.Part(text(program, 1, 5), 40, others[3:6])
    got = ex.logits(small.batch(before, small.Part(tokens[64:], 64, BLOCKS), after))
    np.testing.assert_array_equal(got[30:-1], whole[64:])


@pytest.mark.parametrize("isa", FAST)
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_do_not_depend_on_who_computes_the_spans(
    small: ModuleType, program: Program, whole: Any, isa: str, threads: int
) -> None:
    """Law 1 over two spans: few rows have each span computed apart, on any thread."""
    ex = small.executor(program, isa, threads, **SIZES)
    tokens = text(program, N)
    ex.logits(small.batch(small.Part(tokens, 0, BLOCKS, rows=[0])))
    for begin, end in ((SPAN - 3, SPAN + 2), (SPAN, SPAN + 20), (N - 1, N)):
        got = ex.logits(small.batch(small.Part(tokens[begin:end], begin, BLOCKS)))
        np.testing.assert_array_equal(got, whole[begin:end])


@pytest.mark.parametrize("isa", ISAS)
def test_stale_nan_is_never_touched(small: ModuleType, program: Program, isa: str) -> None:
    """Neither in blocks that come back, nor in the memory that steps work in: a step of NaN poisons both."""
    ex = small.executor(with_nan(program), isa, threads=2)
    tokens, blocks = text(program, 70), [3, 1, 4, 2, 5]
    clean = ex.logits(small.batch(small.Part(tokens, 0, blocks)))
    assert np.isfinite(clean).all()
    for chunk in (70, 9):
        poison = ex.logits(small.batch(small.Part([NAN] * 80, 0, blocks)))
        assert np.isnan(poison).all()
        np.testing.assert_array_equal(small.chunked(ex, tokens, blocks, chunk), clean)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_harms_only_those_who_see_it(small: ModuleType, program: Program, isa: str) -> None:
    ex = small.executor(with_nan(program), isa)
    tokens, blocks, others = text(program, 100), list(range(7)), list(range(10, 17))
    clean = ex.logits(small.batch(small.Part(tokens, 0, blocks)))
    bad = [*tokens[:50], NAN, *tokens[51:]]
    both = ex.logits(small.batch(small.Part(bad, 0, others), small.Part(tokens, 0, blocks)))
    np.testing.assert_array_equal(both[100:], clean)
    np.testing.assert_array_equal(both[:50], clean[:50])
    assert np.isnan(both[50:100]).all()


def test_copied_blocks_are_the_same_rows(small: ModuleType, program: Program) -> None:
    ex = small.executor(program)
    assert ex.block_bytes == program.cache.head_dim * 16 * 2
    tokens = text(program, 40)
    want = ex.logits(small.batch(small.Part(tokens, 0, [0, 1, 2])))
    held = np.zeros((3, ex.block_bytes), np.uint8)
    for i in range(3):
        ex.read_block(i, held[i])
        ex.write_block(i, np.full(ex.block_bytes, 0xFF, np.uint8))  # not a number, wherever it is read
    for block, rows in zip((9, 15, 4), held, strict=True):
        ex.write_block(block, rows)
    got = ex.logits(small.batch(small.Part(tokens[32:], 32, [9, 15, 4])))
    np.testing.assert_array_equal(got, want[32:])


def test_two_layers_share_a_block(small: ModuleType) -> None:
    """Each layer has rows of its own: what is read of the one is not what the other wrote after it."""
    one = latent_program(small, 5, 32, 32, 20)
    ops = list(one.ops)
    ops[4:5] = [replace(ops[4], layer=1), Embed(len(one.weights), 8, 1.0), replace(ops[4], latent=8, out=9)]
    table = small.tensor(np.random.default_rng(9).standard_normal((one.vocab, 32)))
    two = replace(
        one,
        ops=tuple(ops),
        widths=(*one.widths, 32, one.widths[4]),
        weights=(*one.weights, table),
        cache=replace(one.cache, layers=2),
    )
    tokens = text(one, 60)
    first, both = (small.executor(p) for p in (one, two))
    assert both.block_bytes == 2 * first.block_bytes
    want = small.chunked(first, tokens, BLOCKS, 60)
    np.testing.assert_array_equal(small.chunked(both, tokens, BLOCKS, 13), want)


def head_program(small: ModuleType, kind: gguf.GGMLQuantizationType) -> tuple[Program, Any]:
    """Heads of 96 elements, of which 64 count; and what should come out [tokens, heads * rows] in float64."""
    rng = np.random.default_rng(6)
    heads, rows, cols, apart, vocab = 5, 24, 64, 96, 120
    x = rng.standard_normal((vocab, heads * apart)).astype(np.float32)
    x[:, 3 * apart : 4 * apart] *= 1000  # a head's scale is its own
    values = rng.standard_normal((heads * rows, cols)).astype(np.float32)
    data = gguf.quants.quantize(values, kind)
    weight = Tensor("w", int(kind), heads * rows, cols, data.reshape(-1).view(np.uint8), experts=heads)
    w = gguf.quants.dequantize(data, kind).astype(np.float64).reshape(heads, rows, cols)
    expected = np.einsum("thc,hrc->thr", x.reshape(vocab, heads, apart)[..., :cols].astype(np.float64), w)
    program = Program(
        ops=(Embed(0, 0, 1.0), HeadLinear(0, 1, 1, heads), GatherRows(1, 2), Logits(2, 2, 3, 0.0)),
        widths=(heads * apart, heads * rows, heads * rows, vocab),
        weights=(small.tensor(x, "x"), weight, small.tensor(np.eye(vocab))),
        cache=CacheShape(1, 1, 16),
        vocab=vocab,
    )
    return program, expected


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("kind", "most"), [("F32", 1e-6), ("F16", 1e-6), ("BF16", 4e-3), ("Q8_0", 1e-2), ("Q4_0", 1e-2)]
)
def test_products_by_head(small: ModuleType, kind: str, most: float, isa: str) -> None:
    """`most`: error relative to the largest output of the head; some formats round inputs, too."""
    program, expected = head_program(small, gguf.GGMLQuantizationType[kind])
    ex = small.executor(program, isa, threads=2)
    tokens = text(program, 200)
    got = ex.logits(small.batch(small.Part(tokens, 0, list(range(13)))))
    shape = (200, 5, 24)
    want = expected[tokens]
    off = np.abs(got.reshape(shape) - want).max(axis=(0, 2)) / np.abs(want).max(axis=(0, 2))
    assert (off < most).all(), off
    np.testing.assert_array_equal(small.chunked(ex, tokens[:20], list(range(13)), 3), got[:20])


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
    with pytest.raises(ValueError, match="kv_heads"):
        small.executor(replace(program, cache=CacheShape(1, 2, 80, "latent")))
    shape = small.AttentionShape(heads=2, kv_heads=1, head_dim=32)
    cells = np.zeros((shape.vocab, 64), np.float32)
    plain = small.attention_program(shape, cells, cells[:, :32], cells[:, :32])
    assert any(isinstance(op, Attention) for op in plain.ops)
    with pytest.raises(ValueError, match="latent"):
        small.executor(replace(plain, cache=CacheShape(1, 1, 32, "latent")))


def test_int8_is_refused_by_name(small: ModuleType) -> None:
    with pytest.raises(ValueError, match="kv_format: 'int8' is not supported for latent rows"):
        small.executor(latent_program(small, 16, 64, 16, 32), kv_format="int8")
