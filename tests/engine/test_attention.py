"""Paged attention on every usable instruction set, over keys and values in bfloat16 and in int8: against
float64, and equal in bits however it is cut."""

from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ktransformers.engine import _kernels

ISAS = _kernels.isas()
SHAPES = {
    "plain": {"heads": 2, "kv_heads": 2, "head_dim": 64},
    "grouped": {"heads": 9, "kv_heads": 3, "head_dim": 64},
    "window": {"heads": 4, "kv_heads": 2, "head_dim": 16, "window": 37},
    "short window": {"heads": 2, "kv_heads": 1, "head_dim": 32, "window": 1},
    "softcap": {"heads": 4, "kv_heads": 1, "head_dim": 80, "softcap": 5.0},
    "both": {"heads": 7, "kv_heads": 1, "head_dim": 96, "window": 64, "softcap": 20.0},
    "wide": {"heads": 2, "kv_heads": 1, "head_dim": 256},
}
LENGTH = 203
SPAN = 512


@pytest.fixture(params=["bf16", "int8"], scope="module")
def small(request: pytest.FixtureRequest, small: ModuleType) -> Any:
    """The module small_programs, whose executors keep KV in one of the formats."""
    executor = partial(small.executor, kv_format=request.param)
    return SimpleNamespace(**vars(small) | {"executor": executor, "kv_format": request.param})


@pytest.fixture(params=SHAPES, scope="module")
def shape(request: pytest.FixtureRequest, small: Any) -> Any:
    return small.AttentionShape(**SHAPES[request.param])


def bf16(x: Any) -> Any:
    return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16).float().numpy()


def exact_queries(shape: Any, q: Any) -> Any:
    """Near q, and bfloat16 once they are scaled: what a kernel does with them first."""
    scale = shape.scale / shape.softcap if shape.softcap else shape.scale * np.log2(np.e)
    return (bf16(q * scale) / scale).astype(np.float32)


def tables(shape: Any, seed: int = 0) -> tuple[Any, Any, Any]:
    """Keys and values that bfloat16 can hold, and int8 with a scale for each head, and queries that it can
    hold: so of all roundings only that of the weights is left."""
    rng = np.random.default_rng(seed)
    q = exact_queries(shape, rng.normal(size=(shape.vocab, shape.heads * shape.head_dim)))
    k, v = (
        np.clip(rng.normal(0, 40, (shape.vocab, shape.kv_heads, shape.head_dim)).round(), -127, 127)
        for _ in range(2)
    )
    for cells in (k, v):
        cells[:, :, 3] = np.where(rng.integers(2, size=cells.shape[:2]), 127, -127)
    k, v = ((cells / 64).reshape(shape.vocab, -1).astype(np.float32) for cells in (k, v))
    return q, k, v


def oracle(shape: Any, q: Any, k: Any, v: Any) -> Any:
    """Attention of a whole sequence [n, ...] in float64."""
    n, group = len(q), shape.heads // shape.kv_heads
    q = q.reshape(n, shape.heads, shape.head_dim).astype(np.float64)
    k, v = (
        np.repeat(a.reshape(n, shape.kv_heads, shape.head_dim).astype(np.float64), group, 1) for a in (k, v)
    )
    scores = np.einsum("ihd,jhd->hij", q, k) * shape.scale
    if shape.softcap:
        scores = shape.softcap * np.tanh(scores / shape.softcap)
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    seen = (j <= i) & ((j > i - shape.window) if shape.window else True)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hij,jhd->ihd", weights, v).reshape(n, -1)


def tokens_of(shape: Any, n: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, shape.vocab - 1, n).tolist()


@pytest.mark.parametrize("isa", ISAS)
def test_against_float64(small: Any, shape: Any, isa: str) -> None:
    tables_ = tables(shape)
    with_isa = small.executor(small.attention_program(shape, *tables_), isa, threads=2)
    tokens = tokens_of(shape, LENGTH, 1)
    got = with_isa.logits(small.batch(small.Part(tokens, 0, list(range(13, 0, -1)))))
    want = oracle(shape, *(t[tokens] for t in tables_))
    # Each weight is rounded to eight bits, and 2^x is good to 1e-4, at most.
    q, k, v = (t[tokens] for t in tables_)
    np.testing.assert_array_less(np.abs(got - want), (2**-8 + 2e-4) * oracle(shape, q, k, np.abs(v)) + 2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_equal_weights_make_the_mean(small: Any, shape: Any, isa: str) -> None:
    """Weights of 1 are exact, so this sees every error of layout, mask, tile and span."""
    q, k, v = tables(shape)
    ex = small.executor(small.attention_program(shape, q, 0 * k, v), isa, 2, max_tokens=600, max_rows=600)
    tokens = tokens_of(shape, SPAN + 77, 9)
    got = ex.logits(small.batch(small.Part(tokens, 0, list(range(37)))))
    want = oracle(shape, *(t[tokens] for t in (q, 0 * k, v)))
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_equal_on_every_isa(small: Any, shape: Any) -> None:
    tokens, blocks = tokens_of(shape, LENGTH, 2), list(range(13))
    program = small.attention_program(shape, *tables(shape))
    results = [
        small.executor(program, isa).logits(small.batch(small.Part(tokens, 0, blocks))) for isa in ISAS
    ]
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


@pytest.mark.parametrize("isa", [i for i in ISAS if i != "reference"] or ISAS)
def test_bits_do_not_depend_on_chunks_or_neighbours(small: Any, shape: Any, isa: str) -> None:
    """Law 1."""
    ex = small.executor(small.attention_program(shape, *tables(shape)), isa, threads=2)
    tokens, blocks = tokens_of(shape, LENGTH, 3), list(range(20, 33))
    whole = ex.logits(small.batch(small.Part(tokens, 0, blocks)))
    for chunk in (1, 7, 16, 33, 64, 100):
        np.testing.assert_array_equal(
            small.chunked(ex, tokens, blocks, chunk), whole, err_msg=f"chunks of {chunk}"
        )
    # A prefix hit of 64 tokens, between two neighbours.
    before = small.Part(tokens_of(shape, 30, 4), 3, [0, 1, 2])
    after = small.Part(tokens_of(shape, 1, 5), 40, [3, 4, 5])
    got = ex.logits(small.batch(before, small.Part(tokens[64:], 64, blocks), after))
    np.testing.assert_array_equal(got[30:-1], whole[64:])


def test_maxima_that_rise(small: Any, shape: Any) -> None:
    """Scores so far apart that what was summed has to be scaled again and again: right, and of equal bits on
    every instruction set and in any chunks."""
    q, k, v = tables(shape)
    tables_ = exact_queries(shape, q * 15), k, v
    program = small.attention_program(shape, *tables_)
    tokens, blocks = tokens_of(shape, LENGTH, 11), list(range(13))
    executors = [small.executor(program, isa, threads=2) for isa in ISAS]
    results = [ex.logits(small.batch(small.Part(tokens, 0, blocks))) for ex in executors]
    q, k, v = (t[tokens] for t in tables_)
    want, most = oracle(shape, q, k, v), oracle(shape, q, k, np.abs(v))
    np.testing.assert_array_less(np.abs(results[0] - want), (2**-8 + 1e-3) * most + 2e-5)
    for ex, got in zip(executors, results, strict=True):
        np.testing.assert_array_equal(got, results[0])
        np.testing.assert_array_equal(small.chunked(ex, tokens, blocks, 23), got)


@pytest.mark.parametrize("isa", [i for i in ISAS if i != "reference"] or ISAS)
def test_bits_do_not_depend_on_who_computes_the_spans(small: Any, shape: Any, isa: str) -> None:
    """Law 1 over three spans: one thread a unit in the large step, spans apart in the small ones."""
    length, sizes = 2 * SPAN + 70, {"blocks": 80, "max_tokens": 2 * SPAN + 80, "max_rows": 2 * SPAN + 80}
    ex = small.executor(small.attention_program(shape, *tables(shape)), isa, 2, **sizes)
    tokens, blocks = tokens_of(shape, length, 10), list(range(3, 72))
    whole = ex.logits(small.batch(small.Part(tokens, 0, blocks)))
    for begin, end in ((SPAN - 3, SPAN + 2), (2 * SPAN - 1, 2 * SPAN + 20), (length - 1, length)):
        got = ex.logits(small.batch(small.Part(tokens[begin:end], begin, blocks)))
        np.testing.assert_array_equal(got, whole[begin:end])


@pytest.mark.parametrize("isa", ISAS)
def test_stale_nan_in_the_cache_is_never_touched(small: Any, shape: Any, isa: str) -> None:
    """Blocks come back from sequences whose numbers had blown up; a mask times NaN is NaN."""
    q, k, v = tables(shape)
    nan = shape.vocab - 1
    k[nan] = v[nan] = np.nan
    ex = small.executor(small.attention_program(shape, q, k, v), isa)
    tokens, blocks = tokens_of(shape, 70, 6), [3, 1, 4, 2, 5]
    clean = ex.logits(small.batch(small.Part(tokens, 0, blocks)))
    poison = ex.logits(small.batch(small.Part([nan] * 80, 0, blocks)))
    assert np.isnan(poison).all()
    np.testing.assert_array_equal(ex.logits(small.batch(small.Part(tokens, 0, blocks))), clean)
    ex.logits(small.batch(small.Part([nan] * 80, 0, blocks)))
    np.testing.assert_array_equal(small.chunked(ex, tokens, blocks, 9), clean)


@pytest.mark.parametrize("isa", ISAS)
def test_nan_harms_only_those_who_see_it(small: Any, shape: Any, isa: str) -> None:
    q, k, v = tables(shape)
    nan = shape.vocab - 1
    k[nan] = v[nan] = np.nan
    ex = small.executor(small.attention_program(shape, q, k, v), isa)
    tokens = tokens_of(shape, 100, 7)
    blocks, others = list(range(7)), list(range(10, 17))
    clean = ex.logits(small.batch(small.Part(tokens, 0, blocks)))
    bad = [*tokens[:50], nan, *tokens[51:]]
    both = ex.logits(small.batch(small.Part(bad, 0, others), small.Part(tokens, 0, blocks)))
    np.testing.assert_array_equal(both[100:], clean)
    np.testing.assert_array_equal(both[:50], clean[:50])
    end = min(50 + shape.window, 100) if shape.window else 100
    assert np.isnan(both[50:end]).all()
    np.testing.assert_array_equal(both[end:100], clean[end:])


def test_extreme_scores(small: Any) -> None:
    """Scores of +-1e5 neither overflow nor lose the winner."""
    shape = small.AttentionShape(heads=2, kv_heads=1, head_dim=16, scale=1.0)
    q, k, v = tables(shape)
    q, k = exact_queries(shape, q * 1e3), k * 128
    ex = small.executor(small.attention_program(shape, q, k, v))
    tokens = tokens_of(shape, 90, 8)
    got = ex.logits(small.batch(small.Part(tokens, 0, list(range(6)))))
    np.testing.assert_allclose(got, oracle(shape, q[tokens], k[tokens], v[tokens]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("isa", ISAS)
def test_what_int8_loses(small: Any, isa: str) -> None:
    """Each token and head has a scale of its own: one that is large makes no other coarse."""
    shape = small.AttentionShape(heads=4, kv_heads=2, head_dim=64, scale=0.125)
    rng = np.random.default_rng(5)
    q, k, v = (
        rng.normal(size=(shape.vocab, n * shape.head_dim)).astype(np.float32) for n in (4, 2, 2)
    )
    k[7] *= 0.01
    v[:, 64:] *= 1000
    tokens = [7, *tokens_of(shape, 150, 1)]
    ex = small.executor(small.attention_program(shape, q, k, v), isa)
    got = ex.logits(small.batch(small.Part(tokens, 0, list(range(10)))))
    want = oracle(shape, *(t[tokens] for t in (q, k, v)))
    error = np.abs(got - want).reshape(-1, 4, 64).max(axis=(0, 2)) / np.array([1, 1, 1000, 1000])
    assert (error < (0.012 if small.kv_format == "bf16" else 0.06)).all(), error
    assert ex.block_bytes == (4 * 64 * 16 * 2 if small.kv_format == "bf16" else (2 * 64 + 8) * 16 * 2)


def test_unknown_format(small: Any) -> None:
    shape = small.AttentionShape(heads=1, kv_heads=1, head_dim=16)
    with pytest.raises(ValueError, match="kv_format: 'int4' is not known"):
        small.executor(small.attention_program(shape, *tables(shape)), kv_format="int4")
