"""The native executor on small programs: against numpy, law 1, and everything that it must refuse."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from ktransformers.engine import _kernels
from ktransformers.engine.batch import URGENT_TOKENS, Batch
from ktransformers.engine.executors.native import NativeExecutor
from ktransformers.engine.program import (
    Add,
    Attention,
    CacheShape,
    Embed,
    Gated,
    GatherRows,
    Linear,
    LinearPart,
    Logits,
    Op,
    Program,
    RmsNorm,
    Rope,
    Tensor,
)

ISAS = _kernels.isas()
VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS = 50, 48, 4, 2, 16, 40, 2
EPS = 1e-5
INV_FREQ = (10000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)).astype(np.float32)
X, H, Q, K, V, O, G, U, XR, HR, ATT, L = range(12)  # noqa: E741
WIDTHS = (WIDTH, WIDTH, 64, 32, 32, 64, FFN, FFN, WIDTH, WIDTH, WIDTH, VOCAB)


class Llama:
    """A small random llama whose q has a bias and whose embedding is tied; everything float32."""

    def __init__(self, small: ModuleType) -> None:
        rng = np.random.default_rng(0)
        self.arrays: list[Any] = []

        def weight(*shape: int) -> int:
            self.arrays.append((rng.normal(size=shape) / np.sqrt(shape[-1])).astype(np.float32))
            return len(self.arrays) - 1

        self.embed = weight(VOCAB, WIDTH)
        self.arrays.append(INV_FREQ[None, :])
        self.layers = [
            {
                "norm1": weight(1, WIDTH), "q": weight(64, WIDTH), "q_bias": weight(1, 64),
                "k": weight(32, WIDTH), "v": weight(32, WIDTH),
                "o": weight(WIDTH, 64), "norm2": weight(1, WIDTH),
                "gate": weight(FFN, WIDTH), "up": weight(FFN, WIDTH), "down": weight(WIDTH, FFN),
            }
            for _ in range(LAYERS)
        ]  # fmt: skip
        self.norm = weight(1, WIDTH)
        ops: list[Op] = [Embed(self.embed, X, 2.0)]
        for i, w in enumerate(self.layers):
            ops += [
                RmsNorm(X, w["norm1"], H, WIDTH, EPS),
                Linear(
                    H,
                    (
                        LinearPart(w["q"], w["q_bias"], Q),
                        LinearPart(w["k"], None, K),
                        LinearPart(w["v"], None, V),
                    ),
                ),
                Rope(Q, HEADS, HEAD_DIM, 1, False, 1.0),
                Rope(K, KV_HEADS, HEAD_DIM, 1, False, 1.0),
                Attention(Q, K, V, O, i, HEADS, KV_HEADS, HEAD_DIM, 0.25, 0, 0.0),
                Linear(O, (LinearPart(w["o"], None, H),)),
                Add(X, H, X),
                RmsNorm(X, w["norm2"], H, WIDTH, EPS),
                Linear(H, (LinearPart(w["gate"], None, G), LinearPart(w["up"], None, U))),
                Gated(G, U, G, "silu"),
                Linear(G, (LinearPart(w["down"], None, H),)),
                Add(X, H, X),
            ]
        ops += [GatherRows(X, XR), RmsNorm(XR, self.norm, HR, WIDTH, EPS), Logits(HR, self.embed, L, 3.0)]
        self.program = Program(
            ops=tuple(ops),
            widths=WIDTHS,
            weights=tuple(small.tensor(a, f"w{i}") for i, a in enumerate(self.arrays)),
            cache=CacheShape(LAYERS, KV_HEADS, HEAD_DIM),
            vocab=VOCAB,
        )

    def logits(self, tokens: list[int]) -> Any:
        """Of every position, in float64."""
        a = [x.astype(np.float64) for x in self.arrays]
        n = len(tokens)
        angles = np.arange(n)[:, None, None] * a[1][None]
        cos, sin = np.cos(angles), np.sin(angles)

        def norm(x: Any, w: int) -> Any:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * a[w]

        def rope(x: Any) -> Any:
            first, second = np.split(x, 2, -1)
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

        x = a[self.embed][tokens] * 2.0
        mask = np.triu(np.full((n, n), -np.inf), 1)
        for w in self.layers:
            h = norm(x, w["norm1"])
            q = rope((h @ a[w["q"]].T + a[w["q_bias"]]).reshape(n, HEADS, HEAD_DIM))
            k, v = ((h @ a[w[name]].T).reshape(n, KV_HEADS, HEAD_DIM) for name in "kv")
            k, v = (np.repeat(y, HEADS // KV_HEADS, 1) for y in (rope(k), v))
            scores = np.einsum("ihd,jhd->hij", q, k) * 0.25 + mask
            p = np.exp(scores - scores.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            x = x + np.einsum("hij,jhd->ihd", p, v).reshape(n, -1) @ a[w["o"]].T
            h = norm(x, w["norm2"])
            gate = h @ a[w["gate"]].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ a[w["up"]].T)) @ a[w["down"]].T
        return 3.0 * np.tanh(norm(x, self.norm) @ a[self.embed].T / 3.0)


@pytest.fixture(scope="module")
def llama(small: ModuleType) -> Llama:
    return Llama(small)


@pytest.fixture(scope="module")
def ex(small: ModuleType, llama: Llama) -> NativeExecutor:
    built: NativeExecutor = small.executor(llama.program, threads=2, max_tokens=100, max_rows=80, blocks=40)
    return built


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


@pytest.mark.parametrize("isa", ISAS + _kernels.emulated_isas())
@pytest.mark.parametrize("threads", [1, 3])
def test_llama_against_float64(small: ModuleType, llama: Llama, isa: str, threads: int) -> None:
    got = small.executor(llama.program, isa, threads).logits(
        small.batch(small.Part(text(70), 0, [9, 3, 5, 1, 0]))
    )
    np.testing.assert_allclose(got, llama.logits(text(70)), rtol=3e-3, atol=3e-3)  # attention in bfloat16


def test_bits_do_not_depend_on_chunks_or_neighbours(small: ModuleType, ex: NativeExecutor) -> None:
    """Law 1, with logits and with draws."""
    tokens, blocks = text(70), [9, 3, 5, 1, 0]
    whole = ex.logits(small.batch(small.Part(tokens, 0, blocks)))
    for chunk in (1, 16, 23):
        np.testing.assert_array_equal(small.chunked(ex, tokens, blocks, chunk), whole)
    parts = [
        small.Part(tokens[60:], 60, blocks),
        small.Part(text(40, 1), 0, [20, 21, 22]),
        small.Part([7], 5, [30]),
    ]
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        picked = [parts[i] for i in order]
        at = sum(len(p.tokens) for p in picked[: order.index(0)])
        np.testing.assert_array_equal(ex.logits(small.batch(*picked))[at : at + 10], whole[60:])
    last = small.Part(tokens[69:], 69, blocks)
    alone = ex.step(small.batch(last), small.sampling(1, seed=5, position=70, logprobs=20))
    both = ex.step(small.batch(parts[1], last), small.sampling(41, seed=5, position=70, logprobs=20))
    for name in ("token", "logprob", "top_tokens", "top_logprobs"):
        np.testing.assert_array_equal(getattr(both, name)[-1:], getattr(alone, name))


def test_a_bias_is_the_same_for_many_rows_and_few(small: ModuleType) -> None:
    """Products of many integer rows add it in a pass of its own."""
    rng = np.random.default_rng(3)
    embed = rng.normal(size=(112, 64)).astype(np.float32)
    bias = (100 * rng.normal(size=(1, 112))).astype(np.float32)
    raw = rng.integers(0, 256, (112, 2, 34)).astype(np.uint8)  # Q8_0
    raw[:, :, 1] = 0x2C
    program = Program(
        ops=(Embed(0, 0, 1.0), Linear(0, (LinearPart(1, 2, 1),)), GatherRows(1, 2), Logits(2, 3, 3, 0.0)),
        widths=(64, 112, 112, 112),
        weights=(
            small.tensor(embed), Tensor("w", 8, 112, 64, raw.reshape(-1)), small.tensor(bias),
            small.tensor(np.eye(112)),
        ),
        cache=CacheShape(LAYERS, KV_HEADS, HEAD_DIM),
        vocab=112,
    )  # fmt: skip
    ex, tokens, blocks = small.executor(program), text(130), list(range(9))
    whole = ex.logits(small.batch(small.Part(tokens, 0, blocks)))
    np.testing.assert_array_equal(small.chunked(ex, tokens, blocks, 40), whole)
    scale = raw[:, :, :2].copy().view(np.float16).astype(np.float64)
    w = (scale * raw[:, :, 2:].view(np.int8)).reshape(112, 64)
    np.testing.assert_allclose(whole, embed[tokens] @ w.T + bias, atol=0.02 * np.abs(w).sum(1).max())


def test_only_the_asked_rows_are_drawn(small: ModuleType, ex: NativeExecutor) -> None:
    every = ex.logits(small.batch(small.Part(text(50), 0, [0, 1, 2, 3])))
    some = ex.logits(small.batch(small.Part(text(50), 0, [0, 1, 2, 3], rows=[3, 49])))
    np.testing.assert_array_equal(some, every[[3, 49]])
    drawn = ex.step(
        small.batch(small.Part(text(50), 0, [0, 1, 2, 3], rows=[3, 49])), small.sampling(2, temperature=0.0)
    )
    assert list(drawn.token) == list(every[[3, 49]].argmax(1))
    none = ex.step(small.batch(small.Part(text(50), 0, [0, 1, 2, 3], rows=[])), small.sampling(0))
    assert none.token.shape == (0,)
    assert ex.logits(small.batch()).shape == (0, VOCAB)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_at_far_positions(small: ModuleType, interleaved: bool) -> None:
    """At a million, where a float32 angle is off by 0.06; 8 of 16 elements rotate, and grow twice as long."""
    width, far = 32, 1_000_000
    freq = INV_FREQ[:4]
    program = Program(
        ops=(Embed(0, 0, 1.0), Rope(0, 2, 16, 1, interleaved, 2.0), GatherRows(0, 1), Logits(1, 2, 2, 0.0)),
        widths=(width, width, width),
        weights=(small.tensor(np.eye(width)[::-1]), small.tensor(freq), small.tensor(np.eye(width))),
        cache=CacheShape(1, 1, 16),
        vocab=width,
    )
    table = [0] * (far // 16) + [1, 2]
    got = small.executor(program).logits(small.batch(small.Part(list(range(width)), far, table)))
    x = np.eye(width)[::-1].reshape(width, 2, 16)
    want = x.copy()
    first, second = (slice(0, 8, 2), slice(1, 8, 2)) if interleaved else (slice(0, 4), slice(4, 8))
    angle = (far + np.arange(width))[:, None, None] * freq.astype(np.float64)
    cos, sin = 2 * np.cos(angle), 2 * np.sin(angle)
    want[..., first] = x[..., first] * cos - x[..., second] * sin
    want[..., second] = x[..., second] * cos + x[..., first] * sin
    np.testing.assert_allclose(got, want.reshape(width, width), atol=3e-7)


def change(program: Program, index: int, **fields: Any) -> Program:
    ops = list(program.ops)
    ops[index] = replace(ops[index], **fields)
    return replace(program, ops=tuple(ops))


PART = LinearPart(3, None, Q)
BAD_PROGRAMS: list[tuple[int, dict[str, Any], str]] = [
    (0, {"table": 99}, r"op 0 \(Embed\): table"),
    (0, {"table": -1}, r"op 0 \(Embed\): table"),
    (0, {"out": 12}, r"op 0 \(Embed\): out"),
    (0, {"out": Q}, r"op 0 \(Embed\): out"),
    (0, {"scale": np.inf}, r"op 0 \(Embed\): scale"),
    (0, {"scale": "x"}, r"op 0 \(Embed\): scale: wrong type"),
    (1, {"x": Q}, r"op 1 \(RmsNorm\): x: .* before it is written"),
    (1, {"weight": 0}, r"op 1 \(RmsNorm\): weight"),
    (1, {"group": 0}, r"op 1 \(RmsNorm\): group"),
    (1, {"group": 7}, r"op 1 \(RmsNorm\): group"),
    (1, {"eps": -1.0}, r"op 1 \(RmsNorm\): eps"),
    (1, {"eps": np.nan}, r"op 1 \(RmsNorm\): eps"),
    (2, {"parts": ()}, r"op 2 \(Linear\): parts"),
    (2, {"parts": (replace(PART, weight=99),)}, r"op 2 \(Linear\): parts\[0\]\.weight"),
    (2, {"parts": (replace(PART, weight=7),)}, r"op 2 \(Linear\): parts\[0\]\.weight"),
    (2, {"parts": (replace(PART, bias=5),)}, r"op 2 \(Linear\): parts\[0\]\.bias"),
    (2, {"parts": (replace(PART, out=K),)}, r"op 2 \(Linear\): parts\[0\]\.out"),
    (2, {"parts": (PART, PART)}, r"op 2 \(Linear\): parts\[1\]\.out"),
    (3, {"heads": 3}, r"op 3 \(Rope\): x"),
    (3, {"inv_freq": 2}, r"op 3 \(Rope\): inv_freq"),
    (3, {"heads": 2**62, "head_dim": 16}, r"op 3 \(Rope\): x"),
    (5, {"layer": 2}, r"op 5 \(Attention\): layer"),
    (5, {"layer": -1}, r"op 5 \(Attention\): layer"),
    (5, {"kv_heads": 4}, r"op 5 \(Attention\): kv_heads"),
    (5, {"heads": 3}, r"op 5 \(Attention\): heads"),
    (5, {"head_dim": 32}, r"op 5 \(Attention\): head_dim"),
    (5, {"out": Q}, r"op 5 \(Attention\): out"),
    (5, {"window": -1}, r"op 5 \(Attention\): window"),
    (5, {"softcap": -1.0}, r"op 5 \(Attention\): softcap"),
    (7, {"b": G}, r"op 7 \(Add\): b"),
    (7, {"out": Q}, r"op 7 \(Add\): out"),
    (10, {"up": X}, r"op 10 \(Gated\): gate"),
    (10, {"act": "relu"}, r"op 10 \(Gated\): act"),
    (17, {"layer": 0}, r"op 17 \(Attention\): layer"),
    (25, {"out": X}, r"op 25 \(GatherRows\): out"),
    (27, {"x": X}, r"op 27 \(Logits\): x"),
    (27, {"weight": 3}, r"op 27 \(Logits\): "),
]


@pytest.mark.parametrize(("index", "fields", "message"), BAD_PROGRAMS)
def test_bad_programs_are_refused(
    small: ModuleType, llama: Llama, index: int, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        small.executor(change(llama.program, index, **fields))


def test_other_bad_programs(small: ModuleType, llama: Llama) -> None:
    program = llama.program
    with pytest.raises(ValueError, match="last must be Logits"):
        small.executor(replace(program, ops=program.ops[:-1]))
    with pytest.raises(ValueError, match="op 28: kind"):
        small.executor(replace(program, ops=(*program.ops, program.ops[0])))
    for cache in (CacheShape(0, 2, 16), CacheShape(2, 2, 24), CacheShape(2, 0, 16), CacheShape(2, 2, 1024)):
        with pytest.raises(ValueError, match="cache"):
            small.executor(replace(program, cache=cache))
    for sizes in ({"blocks": 0}, {"max_tokens": 0}, {"max_rows": 0}, {"max_rows": 300}, {"blocks": 2**40}):
        with pytest.raises(ValueError, match=next(iter(sizes))):
            small.executor(program, **sizes)
    with pytest.raises(ValueError, match="isa"):
        small.executor(program, "z80")
    with pytest.raises(ValueError, match="tensor 'w3': data"):
        short = replace(program.weights[3], data=program.weights[3].data[:-1])
        small.executor(replace(program, weights=(*program.weights[:3], short, *program.weights[4:])))
    if len(ISAS) > 1:
        pool = _kernels.ThreadPool(1)
        other = _kernels.pack(pool, ISAS[1], 0, VOCAB, WIDTH, program.weights[0].data)
        last = ("Logits", 1, 0, 2, 0.0, False)
        ops: list[tuple[object, ...]] = [("Embed", 0, 0, 1.0), ("GatherRows", 0, 1), last]
        with pytest.raises(ValueError, match="packed for"):
            _kernels.Program(pool, ISAS[0], ops, [WIDTH, WIDTH, VOCAB], [other], 1, 1, 16, 1, 1, 1)


BAD_BATCHES: list[tuple[str, dict[str, list[int]]]] = [
    ("tokens", {"tokens": [1, 2, VOCAB]}),
    ("tokens", {"tokens": [1, -1, 2]}),
    ("starts", {"starts": [0, 2]}),
    ("starts", {"starts": [1, 3]}),
    ("starts", {"starts": [0, 4]}),
    ("starts", {"starts": [0]}),
    ("starts", {"starts": []}),
    ("starts", {"starts": [0, 4, 3], "context": [0, 0], "block_starts": [0, 1, 2]}),
    ("context", {"context": [-1]}),
    ("context", {"context": [2**31 - 1]}),
    ("blocks", {"context": [2**31 - 2]}),
    ("blocks", {"context": [30]}),
    ("block_starts", {"block_starts": [0, 1]}),
    ("block_starts", {"block_starts": [0]}),
    ("block_starts", {"block_starts": [0, 3]}),
    ("blocks", {"blocks": [0, 40]}),
    ("blocks", {"blocks": [-1, 0]}),
    ("logit_rows", {"logit_rows": [3]}),
    ("logit_rows", {"logit_rows": [-1]}),
    ("logit_rows", {"logit_rows": [1, 1]}),
    ("logit_rows", {"logit_rows": [2, 1]}),
    ("tokens", {"tokens": [0] * 101, "starts": [0, 101]}),
    ("logit_rows", {"tokens": [0] * 90, "starts": [0, 90], "logit_rows": list(range(81))}),
    ("blocks", {"starts": [0, 1, 3], "context": [0, 0], "block_starts": [0, 1, 2], "blocks": [7, 7]}),
]


@pytest.mark.parametrize(("name", "changes"), BAD_BATCHES)
def test_bad_batches_are_refused_and_change_nothing(
    small: ModuleType, ex: NativeExecutor, name: str, changes: dict[str, list[int]]
) -> None:
    blocks = [0, 1]
    good = small.Part([1, 2, 3], 16, blocks)
    ex.logits(small.batch(small.Part(text(16), 0, blocks)))
    before = ex.logits(small.batch(good))
    arrays = {k: np.array(v, np.int32) for k, v in changes.items()}
    bad: Batch = replace(small.batch(good), **arrays)
    with pytest.raises(ValueError, match=f"^{name}"):
        ex.logits(bad)
    with pytest.raises(ValueError, match=f"^{name}"):
        ex.step(bad, small.sampling(len(bad.logit_rows)))
    np.testing.assert_array_equal(ex.logits(small.batch(good)), before)


def test_a_program_within_another(small: ModuleType, llama: Llama) -> None:
    """The same bits over the same KV; what is written by the step around it is refused."""
    ex = small.executor(llama.program, max_tokens=4096, blocks=300)
    tokens, blocks = text(70), [9, 3, 5, 1, 0]
    last = small.batch(small.Part(tokens[60:], 60, blocks, rows=[9]))
    for i in range(0, 60, 20):
        part = small.Part(tokens[i : i + 20], i, blocks[: (i + 35) // 16], rows=[])
        (ex.step if i else ex.urgent_step)(small.batch(part), small.sampling(0))
    want = small.executor(llama.program).logits(small.batch(small.Part(tokens, 0, blocks)))[-1]
    assert ex.urgent_step(last, small.sampling(1, temperature=0.0)).token[0] == want.argmax()
    assert ex.urgent_tokens == URGENT_TOKENS == 256
    with pytest.raises(ValueError, match=r"^tokens"):
        ex.urgent_step(small.batch(small.Part(text(257), 0, list(range(17)), rows=[])), small.sampling(0))

    # Long enough to be interrupted on any machine: some milliseconds.
    refused: list[str] = []

    def between() -> None:
        try:
            ex.urgent_step(last, small.sampling(1))
        except ValueError as error:
            refused.append(str(error))

    rows = [small.Part(text(1000, i), 0, [10 + 63 * i + j for j in range(63)], rows=[]) for i in range(4)]
    around = small.batch(*rows, small.Part(tokens[60:70], 60, blocks))
    for _ in range(20):
        ex.step(around, small.sampling(10), between)
        if refused:
            break
    assert refused and "written twice" in refused[0]

    def fails() -> None:
        raise LookupError("this ends the step")

    with pytest.raises(LookupError):
        for _ in range(20):
            ex.step(around, small.sampling(10), fails)
    assert ex.urgent_step(last, small.sampling(1, temperature=0.0)).token[0] == want.argmax()


def test_arrays_of_another_type_are_not_converted(small: ModuleType, ex: NativeExecutor) -> None:
    good = small.batch(small.Part([1, 2, 3], 0, [0]))
    for bad in (good.tokens.astype(np.int64), good.tokens.astype(np.float32), np.zeros(6, np.int32)[::2]):
        with pytest.raises(TypeError):
            ex.logits(replace(good, tokens=bad))
    with pytest.raises(ValueError, match="temperature"):
        ex.step(good, small.sampling(2))


def test_a_sequence_with_nan_harms_no_other(small: ModuleType, llama: Llama) -> None:
    embed = llama.arrays[llama.embed].copy()
    embed[13] = np.nan
    weights = (small.tensor(embed), *llama.program.weights[1:])
    # The head is another tensor: a NaN in it would be in every row.
    head = len(weights)
    program = replace(change(llama.program, 27, weight=head), weights=(*weights, llama.program.weights[0]))
    ex = small.executor(program)
    tokens = [t for t in text(60) if t != 13]
    n = len(tokens)
    clean = ex.logits(small.batch(small.Part(tokens, 0, [0, 1, 2, 3])))
    both = small.batch(small.Part([1, 13, 2], 0, [8]), small.Part(tokens, 0, [0, 1, 2, 3]))
    got = ex.logits(both)
    np.testing.assert_array_equal(got[3:], clean)
    assert np.isnan(got[1:3]).all()
    drawn = ex.step(both, small.sampling(3 + n, temperature=0.0)).token
    assert (drawn[1:3] == -1).all()
    np.testing.assert_array_equal(drawn[3:], clean.argmax(1))


def test_progress_close_and_sizes(small: ModuleType, llama: Llama) -> None:
    seen: list[tuple[int, int]] = []
    ex = NativeExecutor(llama.program, threads=1, blocks=3, max_tokens=8, max_rows=8,
                        progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    total = sum(w.data.nbytes for w in llama.program.weights)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [d for d, _ in seen] == sorted(d for d, _ in seen)
    assert ex.block_bytes == LAYERS * KV_HEADS * HEAD_DIM * 2 * 16 * 2
    assert ex.isa == ISAS[0]
    assert (ex.blocks, ex.block_tokens) == (3, 16)
    ex.close()
    with pytest.raises(RuntimeError, match="closed"):
        ex.logits(small.batch(small.Part([1], 0, [0])))


def test_profile(small: ModuleType, llama: Llama) -> None:
    executor = small.executor(llama.program)
    batch = small.batch(small.Part([1, 2], 0, [0]))
    expected = executor.logits(batch)
    assert set(executor.profile()) == {(0, 0.0)}
    executor.set_profiling(True)
    np.testing.assert_array_equal(executor.logits(batch), expected)
    calls = executor.profile()
    assert len(calls) == len(llama.program.ops) + 1
    assert all(c > 0 and s > 0 for c, s in calls[:-1])
    executor.set_profiling(False)
    executor.logits(batch)
    assert executor.profile() == calls
    executor.set_profiling(True)
    assert set(executor.profile()) == {(0, 0.0)}
