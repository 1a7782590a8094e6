"""Short convolutions and the gated delta rule by themselves: against their definitions in float64, equal on
every table bit for bit, whatever the chunk and the batch, and with states kept, copied and poisoned."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from small_programs import executor, tensor

from ktransformers.engine import _kernels
from ktransformers.engine.batch import Batch
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.executors.torch import TorchExecutor
from ktransformers.engine.program import (
    Attention,
    CacheShape,
    DeltaRule,
    Embed,
    GatherRows,
    Logits,
    Program,
    ShortConv,
    StateShape,
)

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
TOKENS = 24
STATES = 6


def i32(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, np.int32)


@dataclass(frozen=True)
class Shape:
    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int = 4

    @property
    def mixed(self) -> int:
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim

    @property
    def out(self) -> int:
        return self.v_heads * self.v_dim


SHAPES = [
    Shape(1, 1, 1, 1),
    Shape(2, 6, 5, 7, taps=2),
    Shape(1, 2, 16, 16, taps=3),
    Shape(2, 2, 24, 33),
    Shape(1, 3, 17, 48, taps=5),
    Shape(2, 4, 128, 128),
]
ids = [f"{s.k_heads}-{s.v_heads}-{s.k_dim}-{s.v_dim}-{s.taps}" for s in SHAPES]


@dataclass(frozen=True)
class Weights:
    """Token t has row t of these as its queries, keys and values, its a and its b."""

    qkv: F32
    a: F32
    b: F32
    conv: F32
    decay: F32
    bias: F32


def weights_of(shape: Shape, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> F32:
        return rng.standard_normal(size).astype(np.float32)

    return Weights(
        normal(TOKENS, shape.mixed),
        normal(TOKENS, shape.v_heads) * 3,
        normal(TOKENS, shape.v_heads) * 3,
        normal(shape.taps, shape.mixed),
        -np.exp(normal(1, shape.v_heads) - 2),
        normal(1, shape.v_heads),
    )


def program_of(shape: Shape, w: Weights) -> Program:
    """The logits are what the rule gives. An attention is there because a cache has a layer at least."""
    s = shape
    vocab = np.zeros((TOKENS, s.out), np.float32)
    n = min(vocab.shape)
    vocab[:n, :n] = np.eye(n)
    ops = (
        Embed(0, 0, 1.0),
        Embed(1, 1, 1.0),
        Embed(2, 2, 1.0),
        Embed(6, 3, 1.0),
        ShortConv(0, 3, 4, 0),
        DeltaRule(4, 1, 2, 4, 5, 5, 0, s.k_heads, s.v_heads, s.k_dim, s.v_dim),
        Attention(3, 3, 3, 6, 0, 1, 1, 16, 1.0, 0, 0.0),
        GatherRows(5, 7),
        Logits(7, 7, 8, 0.0),
    )
    tensors = (w.qkv, w.a, w.b, w.conv, w.decay, w.bias, np.zeros((TOKENS, 16)), vocab)
    return Program(
        ops=ops,
        widths=(s.mixed, s.v_heads, s.v_heads, 16, s.mixed, s.out, 16, s.out, TOKENS),
        weights=tuple(tensor(values) for values in tensors),
        cache=CacheShape(1, 1, 16),
        vocab=TOKENS,
        state=StateShape(1, s.taps - 1, s.mixed, s.v_heads, s.k_dim, s.v_dim),
    )


def native(
    shape: Shape, isa: str | None = None, w: Weights | None = None, threads: int = 2
) -> NativeExecutor:
    return executor(program_of(shape, w or weights_of(shape)), isa, threads, states=STATES)


def oracle(program: Program) -> TorchExecutor:
    return TorchExecutor(program, blocks=64, block_tokens=16, max_tokens=256, states=STATES, threads=1)


def batch(*parts: tuple[list[int], int, int], keep: tuple[int, int] = (-1, 0)) -> Batch:
    """Parts are (tokens, context, slot); `keep` (slot, after so many tokens) is of the first."""
    starts = np.cumsum([0, *(len(tokens) for tokens, _, _ in parts)])
    need = [-(-(context + len(tokens)) // 16) for tokens, context, _ in parts]
    return Batch(
        tokens=i32(*(t for tokens, _, _ in parts for t in tokens)),
        starts=i32(*starts),
        context=i32(*(context for _, context, _ in parts)),
        block_starts=i32(*np.cumsum([0, *need])),
        blocks=i32(*(8 * slot + i for (_, _, slot), n in zip(parts, need, strict=True) for i in range(n))),
        logit_rows=i32(*range(starts[-1])),
        slots=i32(*(slot for _, _, slot in parts)),
        keep_slots=i32(keep[0], *[-1] * (len(parts) - 1)),
        keep_at=i32(keep[1], *[0] * (len(parts) - 1)),
    )


def tokens_of(n: int, seed: int = 1) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, TOKENS, n)]


def chunked(ex: Any, tokens: list[int], chunk: int, slot: int = 0, context: int = 0) -> F32:
    """Logits of tokens after `context` others of the same sequence, `chunk` in a step."""
    steps = [
        ex.logits(batch((tokens[i : i + chunk], context + i, slot))) for i in range(0, len(tokens), chunk)
    ]
    return np.concatenate(steps)


def definition(s: Shape, w: Weights, tokens: list[int]) -> F64:
    """What program.ShortConv and program.DeltaRule say, in float64."""
    x = w.qkv[tokens].astype(np.float64)
    rows = np.concatenate([np.zeros((s.taps - 1, s.mixed)), x])
    sums = sum(w.conv[j].astype(np.float64) * rows[j : j + len(x)] for j in range(s.taps))
    mixed = sums / (1 + np.exp(-np.asarray(sums)))
    out = np.zeros((len(x), s.v_heads, s.v_dim))
    state = np.zeros((s.v_heads, s.k_dim, s.v_dim))
    for t, token in enumerate(tokens):
        q, k = mixed[t, : 2 * s.k_heads * s.k_dim].reshape(2, s.k_heads, s.k_dim)
        v = mixed[t, 2 * s.k_heads * s.k_dim :].reshape(s.v_heads, s.v_dim)
        q = q / np.sqrt((q**2).sum(-1, keepdims=True) + 1e-6) / np.sqrt(s.k_dim)
        k = k / np.sqrt((k**2).sum(-1, keepdims=True) + 1e-6)
        decay = np.exp(w.decay[0] * np.log1p(np.exp(w.a[token].astype(np.float64) + w.bias[0])))
        beta = 1 / (1 + np.exp(-w.b[token].astype(np.float64)))
        for h in range(s.v_heads):
            kh = h // (s.v_heads // s.k_heads)
            state[h] *= decay[h]
            change = beta[h] * (v[h] - state[h].T @ k[kh])
            state[h] += np.outer(k[kh], change)
            out[t, h] = state[h].T @ q[kh]
    return out.reshape(len(x), -1)[:, :TOKENS]


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
def test_definition(shape: Shape) -> None:
    w, tokens = weights_of(shape), tokens_of(60)
    expected = definition(shape, w, tokens)
    torch_executor = oracle(program_of(shape, w))
    for ex in (native(shape), torch_executor):
        for chunk in (60, 7):
            ours = chunked(ex, tokens, chunk)[:, : expected.shape[1]]
            np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * max(np.abs(expected).max(), 1))


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("isa", _kernels.isas())
def test_bits_are_the_references_whatever_the_chunk(isa: str, shape: Shape) -> None:
    tokens = tokens_of(50)
    expected = chunked(native(shape, "reference"), tokens, 50)
    assert np.isfinite(expected).all()
    for chunk in (50, 16, 3, 1):
        np.testing.assert_array_equal(chunked(native(shape, isa), tokens, chunk), expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_neighbours_change_nothing(threads: int) -> None:
    shape = SHAPES[3]
    sequences = [tokens_of(n, seed) for seed, n in enumerate((40, 1, 17, 33))]
    alone = [chunked(native(shape), tokens, 64) for tokens in sequences]
    ex = native(shape, threads=threads)
    done, found = [0] * 4, [[] for _ in sequences]
    sizes = np.random.default_rng(5)
    while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
        pieces = {}
        for s, tokens in enumerate(sequences):
            if done[s] < len(tokens):
                pieces[s] = tokens[done[s] : done[s] + int(sizes.integers(1, 9))]
        out = ex.logits(batch(*((piece, done[s], 5 - s) for s, piece in pieces.items())))
        begin = 0
        for s, piece in pieces.items():
            found[s].append(out[begin : begin + len(piece)])
            begin += len(piece)
            done[s] += len(piece)
    for ours, expected in zip(found, alone, strict=True):
        np.testing.assert_array_equal(np.concatenate(ours), expected)


@pytest.mark.parametrize(
    ("kind", "shape"), [*(("native", s) for s in SHAPES), ("torch", SHAPES[1])], ids=[*ids, "torch"]
)
def test_a_kept_state_is_the_state_after_its_tokens(kind: str, shape: Shape) -> None:
    program = program_of(shape, weights_of(shape))
    ex: Any = native(shape)
    if kind == "torch":
        ex = oracle(program)
    tokens = tokens_of(40)
    whole = chunked(ex, tokens, 40)
    cases = ((0, 40, 16), (0, 16, 16), (0, 3, 1), (15, 40, 16), (20, 40, 32), (31, 32, 32))
    for context, until, kept in cases:
        if context:
            chunked(ex, tokens[:context], 64, slot=1)
        first = ex.logits(batch((tokens[context:until], context, 1), keep=(4, kept)))
        ex.copy_state(4, 2)
        again = chunked(ex, tokens[kept:], 5, slot=2, context=kept)
        if kind == "native":
            np.testing.assert_array_equal(first, whole[context:until])
            np.testing.assert_array_equal(again, whole[kept:])
        np.testing.assert_allclose(first, whole[context:until], rtol=0, atol=1e-5)
        np.testing.assert_allclose(again, whole[kept:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("isa", _kernels.isas())
def test_what_others_left_behind_is_not_read(isa: str) -> None:
    """States and values full of NaN: a new sequence begins with zeros, and writes all that it reads."""
    for shape in SHAPES:
        w = weights_of(shape)
        poisoned = replace(w, qkv=np.where(np.arange(TOKENS)[:, None] == 3, np.nan, w.qkv).astype(np.float32))
        tokens = [t for t in tokens_of(40) if t != 3]
        expected = chunked(native(shape, isa), tokens, 64)
        ex = native(shape, isa, poisoned)
        left = ex.logits(batch(([3] * 60, 0, 0), ([3] * 60, 0, 1)))
        assert np.isnan(left[:, 0]).all()
        np.testing.assert_array_equal(chunked(ex, tokens, 7), expected)
        # Nor is what a slot of another sequence holds: only the poisoned one goes on as it was.
        assert np.isnan(ex.logits(batch((tokens[:1], 60, 1), (tokens[:1], len(tokens), 0)))[0, 0])


def test_a_step_of_no_tokens_of_a_sequence_leaves_its_state() -> None:
    ex = native(SHAPES[1])
    tokens = tokens_of(20)
    whole = chunked(ex, tokens, 64)
    chunked(ex, tokens[:10], 64, slot=1)
    ex.logits(batch(([], 10, 1), ([5], 0, 2)))
    np.testing.assert_array_equal(chunked(ex, tokens[10:], 64, slot=1, context=10), whole[10:])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "none": ({"slots": i32(), "keep_slots": i32(), "keep_at": i32()}, "slots"),
    "too few": ({"slots": i32(0)}, "slots"),
    "no such slot": ({"slots": i32(0, STATES)}, "slots"),
    "negative": ({"slots": i32(-1, 0)}, "slots"),
    "twice": ({"slots": i32(2, 2)}, "written twice"),
    "kept over another": ({"keep_slots": i32(1, -1), "keep_at": i32(3, 0)}, "written twice"),
    "kept twice": ({"keep_slots": i32(4, 4), "keep_at": i32(3, 7)}, "written twice"),
    "kept nowhere": ({"keep_slots": i32(STATES, -1), "keep_at": i32(3, 0)}, "slots"),
    "kept at -2": ({"keep_slots": i32(-2, -1), "keep_at": i32(3, 0)}, "slots"),
    "kept before": ({"keep_slots": i32(-1, 4), "keep_at": i32(0, 5)}, "keep_at"),
    "kept after": ({"keep_slots": i32(-1, 4), "keep_at": i32(0, 10)}, "keep_at"),
    "kept far after": ({"keep_slots": i32(-1, 4), "keep_at": i32(0, 2**31 - 1)}, "keep_at"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_wrong_states_are_refused_before_anything_is_done(what: str) -> None:
    shape = SHAPES[2]
    torch_executor = oracle(program_of(shape, weights_of(shape)))
    good = batch((tokens_of(5), 0, 0), (tokens_of(4), 5, 1))
    changes, named = WRONG[what]
    for ex in (native(shape), torch_executor):
        with pytest.raises(ValueError, match=named):
            ex.logits(replace(good, **changes))
        for source, target in ((-1, 0), (0, STATES)):
            with pytest.raises(ValueError, match="no such slot"):
                ex.copy_state(source, target)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "no state": ({"state": None}, "ShortConv.*layer"),
    "another layer": ({"op": (4, {"layer": 1})}, "ShortConv.*layer"),
    "a layer twice": ({"op": (5, {"layer": -1})}, "DeltaRule.*layer"),
    "in place": ({"op": (4, {"out": 0})}, "ShortConv.*out"),
    "other heads": ({"op": (5, {"v_heads": 1})}, "DeltaRule.*v_heads"),
    "heads that do not divide": ({"op": (5, {"k_heads": 4})}, "DeltaRule.*k_heads"),
    "no heads": ({"op": (5, {"k_heads": 0})}, "DeltaRule.*k_heads"),
    "one gate": ({"op": (5, {"b": 1})}, "DeltaRule.*b"),
    "out over its input": ({"op": (5, {"out": 4})}, "DeltaRule.*out"),
    "biases of another width": ({"op": (5, {"bias": 3})}, "DeltaRule.*bias"),
    "more taps": ({"state": StateShape(1, 4, SHAPES[1].mixed, 6, 5, 7)}, "ShortConv.*weight"),
    "no taps": ({"state": StateShape(1, 0, SHAPES[1].mixed, 6, 5, 7)}, "state"),
    "too many taps": ({"state": StateShape(1, 16, SHAPES[1].mixed, 6, 5, 7)}, "state"),
    "heads too large": ({"state": StateShape(1, 1, SHAPES[1].mixed, 6, 1025, 7)}, "state"),
    "layers beyond memory": ({"state": StateShape(2**40, 1, SHAPES[1].mixed, 6, 5, 7)}, "state"),
}


@pytest.mark.parametrize("what", list(MISFITS))
def test_a_program_that_does_not_fit_together_is_refused(what: str) -> None:
    changes, named = MISFITS[what]
    program = program_of(SHAPES[1], weights_of(SHAPES[1]))
    if "op" in changes:
        at, fields = changes["op"]
        ops = list(program.ops)
        ops[at] = replace(ops[at], **fields)
        program = replace(program, ops=tuple(ops))
    else:
        program = replace(program, **changes)
    with pytest.raises(ValueError, match=named):
        executor(program, states=STATES)


def test_states_need_places() -> None:
    program = program_of(SHAPES[0], weights_of(SHAPES[0]))
    with pytest.raises(ValueError, match="state"):
        executor(program)
    with pytest.raises(ValueError, match="state"):
        TorchExecutor(program, blocks=4, block_tokens=16, max_tokens=16)
    with pytest.raises((ValueError, MemoryError)):
        executor(program, states=2**62)
